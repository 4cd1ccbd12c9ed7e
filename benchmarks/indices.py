"""Chips per second and core for a shard's indices: objects in, arrays of a shard out.

One synthetic shard of 256 chips (224 px of 1 m, patches of 16): blocks that share edges,
buildings, wandering lines, points; 25, 100 and 400 objects a chip. Stages are timed one by one in
seconds of CPU time, one thread, best of several runs. The baseline does the same with a loop over
chips of plain shapely, rasterio and numpy calls, on a sample of chips of the same shard; its
labels, statistics and number of relations must be ours.

    python benchmarks/indices.py [--repeat 3] [--sample 4]

Prints JSON.
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import shapely
from _common import best_of, growth, peak_mb, report
from numpy.typing import NDArray
from rasterio.features import rasterize
from rasterio.transform import from_bounds
from shapely.prepared import prep

from pipelines.anchors import build_anchors
from pipelines.correspondence import build_correspondence
from pipelines.features import Features
from pipelines.labels import cut_labels, densities, rasterise
from pipelines.objects import Objects, clip
from pipelines.relations import build_relations
from pipelines.statistics import patch_brightness, statistics
from schemas.config import ObjectOptions
from schemas.layout import Kind

SIDE, SIZE, PATCH, CLASSES = 16, 224, 16, 20
PATCHES = SIZE // PATCH
ORIGIN = (501_760.0, 5_017_600.0)
GOAL = 100.0
OBJECTS = (25, 100, 400)


def make_features(per_chip: int, seed: int = 0) -> Features:
    """About so many objects a chip, after clipping: 30 % points, the rest in three equal parts."""
    rng = np.random.default_rng(seed)
    side_m = float(SIDE * SIZE)
    # Areas and lines that cross a chip's border become two objects.
    total = int(SIDE * SIDE * per_chip * 0.78)
    cells = round((total * 0.2) ** 0.5)
    line_count = building_count = int(total * 0.25)
    blocks = shapely.polygons(_mesh(cells, side_m, rng))
    buildings = shapely.polygons(_buildings(building_count, side_m, rng))
    turn = np.cumsum(rng.normal(0, 0.4, (line_count, 12)), axis=1)
    turn += rng.uniform(0, 2 * np.pi, (line_count, 1))
    step = rng.uniform(5, 12, (line_count, 12, 1))
    path = np.cumsum(step * np.stack([np.cos(turn), np.sin(turn)], axis=-1), axis=1)
    lines = shapely.linestrings(rng.uniform(0, side_m, (line_count, 1, 2)) + path)
    points = shapely.points(rng.uniform(0, side_m, (int(total * 0.3), 2)))
    geometry = np.concatenate([points, lines, blocks, buildings])
    geometry = shapely.transform(geometry, lambda xy: xy + ORIGIN)
    groups = [len(points), len(lines), len(blocks), len(buildings)]
    kind = np.repeat([Kind.POINT, Kind.LINE, Kind.POLYGON, Kind.POLYGON], groups).astype(np.uint8)
    osm_class = np.repeat([0, 16, 1, CLASSES], groups)
    osm_class = osm_class + rng.integers(0, np.repeat([5, 4, 9, 1], groups))
    count = len(geometry)
    width = np.where(kind == Kind.LINE, rng.choice([2, 4, 6, 12], count), 0)
    return Features(
        geometry=geometry,
        osm=np.arange(count) << 2 | 2,
        part=np.zeros(count, np.int32),
        kind=kind,
        osm_class=osm_class.astype(np.uint8),
        width_m=width.astype(np.float32),
        tag_offset=np.zeros(count + 1, np.int64),
        tag=np.empty(0, np.int32),
        tags=[],
        counts={},
    )


def _mesh(cells: int, side_m: float, rng: np.random.Generator) -> NDArray[np.float64]:
    corner = np.stack(np.meshgrid(*[np.linspace(0, side_m, cells + 1)] * 2), axis=-1)
    corner[1:-1, 1:-1] += rng.uniform(-0.3, 0.3, (cells - 1, cells - 1, 2)) * side_m / cells
    around = [corner[:-1, :-1], corner[:-1, 1:], corner[1:, 1:], corner[1:, :-1]]
    return np.stack(around, axis=2).reshape(-1, 4, 2)


def _buildings(count: int, side_m: float, rng: np.random.Generator) -> NDArray[np.float64]:
    outline = np.array([[-1, -1], [1, -1], [1, 0], [0, 0], [0, 1], [-1, 1]])
    angle = rng.uniform(0, np.pi, count)
    axes = np.stack([np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle)], axis=-1)
    shape = (outline * rng.uniform(4, 12, (count, 1, 2))) @ axes.reshape(-1, 2, 2)
    outlines: NDArray[np.float64] = rng.uniform(0, side_m, (count, 1, 2)) + shape
    return outlines


def chip_bounds() -> NDArray[np.float64]:
    """Bounds of the chips of the shard in raster order, [N, 4] metres."""
    y, x = np.divmod(np.arange(SIDE * SIDE), SIDE)
    west, south = ORIGIN[0] + x * SIZE, ORIGIN[1] + (SIDE - 1 - y) * SIZE
    return np.stack([west, south, west + SIZE, south + SIZE], axis=1).astype(float)


def run_stages(
    features: Features, image: NDArray[np.uint8], repeat: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Seconds of each stage, and what they made."""
    seconds: dict[str, float] = {}
    made: dict[str, Any] = {}

    def stage(name: str, work: Callable[[], Any]) -> Any:
        seconds[name], made[name] = best_of(repeat, work, clock=time.process_time)
        return made[name]

    bounds = chip_bounds()
    block = (*ORIGIN, ORIGIN[0] + SIDE * SIZE, ORIGIN[1] + SIDE * SIZE)
    o: Objects = stage("clip", lambda: clip(features, bounds, ObjectOptions()))
    stage("relations", lambda: build_relations(o.geometry, o.chip, o.kind, o.chips))
    stage("anchors", lambda: build_anchors(o.geometry, o.kind, o.chip, bounds))
    stage(
        "correspondence",
        lambda: build_correspondence(o.geometry, o.kind, o.chip, bounds, PATCHES),
    )
    raster = stage(
        "rasterise",
        lambda: rasterise(
            features.geometry, features.osm_class, features.width_m, block, 2 * SIDE * SIZE
        ),
    )
    labels = stage("labels", lambda: cut_labels(raster, SIDE, SIDE, SIZE, PATCH, CLASSES))
    stage("densities", lambda: densities(o.kind, o.osm_class, o.size, o.chip, bounds, CLASSES))
    bright = stage("brightness", lambda: patch_brightness(image, PATCH))
    stage("statistics", lambda: statistics(labels["patch_fraction"], bright))
    return seconds, made


def measure(per_chip: int, repeat: int) -> tuple[dict[str, Any], Features, dict[str, Any]]:
    """Figures of our stages at one density."""
    features = make_features(per_chip)
    image = np.random.default_rng(1).integers(1, 256, (SIDE**2, 3, SIZE, SIZE)).astype(np.uint8)
    seconds, made = run_stages(features, image, repeat)
    indices = sum(seconds.values()) - seconds["clip"]
    figures = {
        "objects_per_chip": len(made["clip"].chip) / SIDE**2,
        "edges": len(made["relations"]["relation"]),
        "seconds": {name: round(s, 4) for name, s in seconds.items()},
        "shard_seconds": round(indices, 3),
        "chips_per_second": round(SIDE**2 / indices, 1),
        "chips_per_second_with_clip": round(SIDE**2 / (indices + seconds["clip"]), 1),
        "peak_mb": peak_mb(),
    }
    return figures, features, made


def baseline(features: Features, made: dict[str, Any], chips: list[int]) -> dict[str, Any]:
    """Figures of the plain loop on some chips; raises if its results are not ours."""
    seconds = dict.fromkeys(["relations", "anchors", "correspondence", "labels", "statistics"], 0.0)
    objects: Objects = made["clip"]
    bounds = chip_bounds()
    for n in chips:
        mine = np.flatnonzero(objects.chip == n)
        shapes, box = list(objects.geometry[mine]), tuple(bounds[n])
        mark = time.process_time()

        def lap(name: str) -> None:
            nonlocal mark
            now = time.process_time()
            seconds[name] += now - mark
            mark = now

        edges = _plain_relations(shapes, objects.kind[mine])
        lap("relations")
        for shape in shapes:
            _ = (shape.centroid, shape.representative_point())
        lap("anchors")
        _plain_correspondence(shapes, box)
        lap("correspondence")
        pixel, fraction = _plain_labels(features, box)
        lap("labels")
        moran = _plain_moran(fraction)
        lap("statistics")
        offset = made["relations"]["edge_offset"]
        if edges != offset[n + 1] - offset[n]:
            raise SystemExit(f"chip {n}: {edges} relations, ours {offset[n + 1] - offset[n]}")
        np.testing.assert_allclose(fraction, made["labels"]["patch_fraction"][n], atol=0.02)
        same = (pixel == made["labels"]["label_pixel"][n]).mean()
        if same < 0.99:
            raise SystemExit(f"chip {n}: only {same:.3f} of the pixels are ours")
        np.testing.assert_allclose(moran, made["statistics"][0][n], atol=0.02)
    total = sum(seconds.values()) / len(chips)
    return {
        "chips": len(chips),
        "seconds_per_chip": {name: round(s / len(chips), 4) for name, s in seconds.items()},
        "chips_per_second": round(1 / total, 3),
    }


def _plain_relations(shapes: list[Any], kind: NDArray[np.uint8]) -> int:
    """Directed relations among the objects of a chip: pairs that meet, self, Delaunay."""
    meeting = 0
    for i, first in enumerate(shapes):
        ready = prep(first)
        for second in shapes[i + 1 :]:
            if ready.intersects(second):
                first.relate(second)
                meeting += 1
    points = [s for s, k in zip(shapes, kind, strict=True) if k == Kind.POINT]
    cloud = shapely.MultiPoint(points if len(points) > 3 else [])
    near = shapely.delaunay_triangles(cloud, only_edges=True)
    return len(shapes) + 2 * (meeting + len(near.geoms))


def _plain_correspondence(
    shapes: list[Any], box: tuple[float, ...]
) -> list[tuple[int, int, float]]:
    """Object, patch and share, for every object and patch that meet."""
    shares = []
    for i, shape in enumerate(shapes):
        x0, y0, x1, y1 = shape.bounds
        for row in range(int((box[3] - y1) // PATCH), int((box[3] - y0) // PATCH) + 1):
            for column in range(int((x0 - box[0]) // PATCH), int((x1 - box[0]) // PATCH) + 1):
                west, north = box[0] + column * PATCH, box[3] - row * PATCH
                part = shape.intersection(shapely.box(west, north - PATCH, west + PATCH, north))
                if not part.is_empty:
                    size = part.area / PATCH**2 if part.area else part.length
                    shares.append((i, row * PATCHES + column, size))
    return shares


def _plain_labels(
    features: Features, box: tuple[float, ...]
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Pixels and patch fractions of a chip, from rasterio at twice the resolution."""
    shapes = []
    near = np.flatnonzero(shapely.intersects(features.geometry, shapely.box(*box).buffer(20)))
    for i in near[np.argsort(features.osm_class[near], kind="stable")]:
        shape, value = features.geometry[i], int(features.osm_class[i])
        if features.kind[i] == Kind.LINE:
            shape = shape.buffer(float(features.width_m[i]) / 2, cap_style="flat")
        if value and features.kind[i] != Kind.POINT:
            shapes.append((shape, value))
    cells = 2 * SIZE
    raster = rasterize(
        shapes, (cells, cells), transform=from_bounds(*box, cells, cells), dtype="uint8"
    )
    quarters = raster.reshape(SIZE, 2, SIZE, 2).swapaxes(1, 2).reshape(SIZE, SIZE, 4)
    votes = np.stack([(quarters == c).sum(axis=-1) for c in range(CLASSES + 1)])
    y, x = np.ogrid[:SIZE, :SIZE]
    latest = CLASSES - votes[::-1].argmax(axis=0)
    pixel = np.where((y + 2 * x) % 4 < 2, latest, votes.argmax(axis=0)).astype(np.uint8)
    fraction = np.empty((PATCHES, PATCHES, CLASSES))
    for i in range(PATCHES):
        for j in range(PATCHES):
            square = raster[32 * i : 32 * (i + 1), 32 * j : 32 * (j + 1)]
            fraction[i, j] = [(square == c + 1).mean() for c in range(CLASSES)]
    return pixel, fraction


def _plain_moran(fraction: NDArray[np.float64]) -> NDArray[np.float64]:
    """Moran's I of each class by the full weight matrix."""
    y, x = np.divmod(np.arange(PATCHES**2), PATCHES)
    apart = np.maximum(abs(y[:, None] - y), abs(x[:, None] - x))
    weights = (apart == 1) / (apart == 1).sum(axis=1, keepdims=True)
    result = np.zeros(CLASSES)
    for c in range(CLASSES):
        field = fraction[..., c].ravel()
        z = field - field.mean()
        if np.ptp(field):
            result[c] = z @ weights @ z / (z @ z)
    return result


def main() -> None:
    """Run every density and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3, help="runs; the best of each stage counts")
    parser.add_argument("--sample", type=int, default=4, help="chips of the baseline")
    arguments = parser.parse_args()
    chips = np.linspace(0, SIDE**2 - 1, arguments.sample).astype(int).tolist()
    ours, plain = {}, {}
    for per_chip in OBJECTS:
        figures, features, made = measure(per_chip, arguments.repeat)
        ours[per_chip] = figures
        plain[per_chip] = baseline(features, made, chips)
    report(
        {
            "benchmark": "indices",
            "chips": SIDE**2, "size_px": SIZE, "patch_px": PATCH, "classes": CLASSES,
            "goal_chips_per_second_at_100_objects": GOAL,
            "ours": ours,
            "baseline": plain,
            "ratio": {
                n: round(ours[n]["chips_per_second"] / plain[n]["chips_per_second"], 1)
                for n in OBJECTS
            },
            "growth_exponent": growth(
                [ours[n]["objects_per_chip"] for n in OBJECTS],
                [ours[n]["shard_seconds"] for n in OBJECTS],
            ),
        }
    )  # fmt: skip


if __name__ == "__main__":
    main()

"""A golden checksum of every stage: its output changes only together with its version.

The checksums of the stages scenes, labels and statistics stand in their own test files. Inputs are
made by hand, so that a stage's checksum does not change with another stage's output. Change a
golden only together with the version of its stage in pipelines/plan.py.
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
import xxhash
from numpy.typing import NDArray

from pipelines.anchors import build_anchors
from pipelines.correspondence import build_correspondence, patch_shares
from pipelines.features import Features, load_features
from pipelines.objects import Objects, clip
from pipelines.plan import STAGES
from pipelines.relations import build_relations
from pipelines.store import write_shard
from pipelines.tags import merge_vocabularies, shard_vocabulary, tag_arrays
from schemas.config import ObjectOptions
from schemas.layout import LAYOUT, Relation
from schemas.sensor import sensor
from schemas.taxonomy import Taxonomy, default_taxonomy
from tests.shards import make_info

CHIP_M = 1000.0
BOUNDS = np.array([[0, 0, CHIP_M, CHIP_M], [CHIP_M, 0, 2 * CHIP_M, CHIP_M]])
"""Two chips side by side, metres."""

# Every relation but `self` and `near` on whole metres, where predicates have no rounding to do;
# then four points that are neighbours, in the second chip.
SHAPES = """
POLYGON ((20 20, 420 20, 420 420, 20 420, 20 20), (120 120, 120 220, 220 220, 220 120, 120 120))
POLYGON ((240 240, 320 240, 320 300, 240 300, 240 240))
POLYGON ((240 240, 240 300, 320 300, 320 240, 240 240))
POLYGON ((420 20, 700 20, 700 130, 420 130, 420 20))
POLYGON ((350 350, 610 370, 530 690, 350 350))
LINESTRING (10 550, 330 470, 610 370, 930 790)
LINESTRING (100 20, 100 900)
LINESTRING (330 470, 610 370)
LINESTRING (120 120, 220 120, 220 220, 310 410)
POINT (50 60)
POINT (270 270)
POINT (100 640)
POINT (420 20)
POINT (1110 130)
POINT (1510 290)
POINT (1270 770)
POINT (1330 310)
""".strip().splitlines()

# Degrees: a wood of two parts of which one has a clearing, a bow tie, a road and a shore across
# several chips, a house too small to keep, a tree.
MAP = {
    (17 << 2 | 3): (
        "MULTIPOLYGON (((9.0012 48.0013, 9.0139 48.0021, 9.0118 48.0092, 9.0012 48.0013), "
        "(9.0071 48.0031, 9.0083 48.0052, 9.0097 48.0043, 9.0071 48.0031)), "
        "((9.0171 48.0017, 9.0193 48.0019, 9.0181 48.0043, 9.0171 48.0017)))",
        ["landuse=forest", "leaf_type=mixed"],
    ),
    (23 << 2 | 2): (
        "POLYGON ((9.0031 48.0111, 9.0071 48.0147, 9.0073 48.0109, 9.0033 48.0151, "
        "9.0031 48.0111))",
        ["natural=scrub"],
    ),
    (29 << 2 | 2): (
        "LINESTRING (8.9973 48.0037, 9.0061 48.0081, 9.0163 48.0079, 9.0291 48.0139)",
        ["highway=residential", "surface=asphalt"],
    ),
    (31 << 2 | 2): (
        "LINESTRING (9.0177 48.0171, 9.0131 48.0013, 9.0117 48.0173)",
        ["natural=coastline"],
    ),
    (37 << 2 | 2): (
        "POLYGON ((9.0053 48.0059, 9.0054 48.0059, 9.0054 48.006, 9.0053 48.0059))",
        ["building=yes"],
    ),
    (41 << 2 | 1): ("POINT (9.0023 48.0097)", ["natural=tree"]),
}


def _digest(*arrays: NDArray[np.generic]) -> str:
    """Hash of types, shapes and bytes."""
    digest = xxhash.xxh3_64()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _rounded(values: NDArray[np.floating], step: float) -> NDArray[np.int64]:
    """Values in whole steps: the last digits differ between processors and library versions."""
    return np.rint(values.astype(np.float64) / step).astype(np.int64)


def _shapes() -> tuple[NDArray[np.object_], NDArray[np.int64], NDArray[np.uint8]]:
    geometry = shapely.from_wkt(SHAPES)
    chip = (shapely.bounds(geometry)[:, 0] >= CHIP_M).astype(np.int64)
    kind = shapely.get_dimensions(geometry).astype(np.uint8)
    order = np.lexsort((kind, chip))
    return geometry[order], chip[order], kind[order]


def _write_map(path: Path) -> None:
    """A converted extract."""
    geometry = shapely.from_wkt([wkt for wkt, _ in MAP.values()])
    box = shapely.bounds(geometry).T
    columns = {
        "osm": pa.array(list(MAP), pa.int64()),
        "geometry": shapely.to_wkb(geometry).tolist(),
        "tags": [tags for _, tags in MAP.values()],
        **dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)),
    }
    pq.write_table(pa.table(columns), path)


def _comparable(objects: Objects, origin: tuple[float, float]) -> tuple[NDArray[np.generic], ...]:
    """Arrays and geometry, coordinates in millimetres and sizes in whole metres."""
    arrays = objects.arrays()
    geometry = objects.geometry.copy()
    # Where a ring starts is GEOS's affair; which way a line runs is ours.
    area = objects.kind == 2
    geometry[area] = shapely.normalize(geometry[area])
    return (
        *(arrays[name] for name in sorted(arrays) if name != "object_size"),
        _rounded(arrays["object_size"], 1.0),
        _rounded(shapely.get_coordinates(geometry) - origin, 1e-3),
        shapely.get_num_coordinates(geometry),
        np.array(sorted(objects.counts.items())),
    )


def test_the_bytes_of_objects_change_only_with_the_version_of_their_stage(tmp_path: Path) -> None:
    _write_map(tmp_path / "map.parquet")
    west, south = 500_000.0, 5_316_300.0
    y, x = np.divmod(np.arange(4), 2)
    bounds = np.stack([west + 640 * x, south + 640 * (1 - y)], axis=1)
    bounds = np.concatenate([bounds, bounds + 640], axis=1)
    square = (west, south, west + 1280, south + 1280)
    features = load_features(tmp_path / "map.parquet", 32632, square, default_taxonomy())
    every = clip(features, bounds, ObjectOptions())
    some = clip(features, bounds, ObjectOptions(min_polygon_fraction=0.001, max_per_chip=2))
    assert set(every.kind) == {0, 1, 2}
    assert features.counts == {"invalid_repaired": 1}
    assert some.counts.keys() == {"object_below_minimum", "object_over_cap"}
    digest = _digest(
        features.osm_class, features.part, _rounded(features.width_m, 1e-3),
        *_comparable(every, (west, south)), *_comparable(some, (west, south)),
    )  # fmt: skip
    assert (STAGES["objects"], digest) == (2, "9b74da8d641ddb2e")


def test_the_bytes_of_tags_change_only_with_the_version_of_their_stage() -> None:
    texts = ["building=yes", "café=oui", "highway=path", "a=b=c", "never=1"]
    offset = np.array([0, 2, 3, 5, 6])
    features = Features(
        geometry=shapely.points(np.zeros((4, 2))), osm=np.arange(4), part=np.zeros(4, np.int32),
        kind=np.zeros(4, np.uint8), osm_class=np.zeros(4, np.uint8),
        width_m=np.zeros(4, np.float32), tag_offset=offset,
        tag=np.array([0, 3, 1, 0, 2, 4], np.int32), tags=texts, counts={},
    )  # fmt: skip
    source = np.array([2, 0, 0, 1])
    objects = Objects(
        geometry=features.geometry[source], chip=np.zeros(4, np.int64), source=source,
        kind=features.kind[source], osm_class=features.osm_class[source],
        osm=features.osm[source], size=np.zeros(4, np.float32), chips=1, counts={},
    )  # fmt: skip
    arrays = tag_arrays(features, objects)
    vocabulary = merge_vocabularies([shard_vocabulary(arrays)] * 2)
    digest = _digest(
        *(arrays[name] for name in sorted(arrays)), vocabulary.ids, vocabulary.objects,
        np.array(vocabulary.texts),
    )  # fmt: skip
    assert (STAGES["tags"], digest) == (1, "5a39b40e014c635b")


def test_the_bytes_of_relations_change_only_with_the_version_of_their_stage() -> None:
    geometry, chip, kind = _shapes()
    arrays = build_relations(geometry, chip, kind, len(BOUNDS))
    assert set(arrays["relation"]) == set(Relation)
    digest = _digest(*(arrays[name] for name in sorted(arrays)))
    assert (STAGES["relations"], digest) == (1, "dabe3282dac50d9a")


def test_the_bytes_of_anchors_change_only_with_the_version_of_their_stage() -> None:
    geometry, chip, kind = _shapes()
    anchor = build_anchors(geometry, kind, chip, BOUNDS)
    assert anchor.dtype == np.float32
    # A hundred-thousandth of a chip: 100 times as coarse as float32 in [0, 1].
    assert (STAGES["anchors"], _digest(_rounded(anchor, 1e-5))) == (1, "107454cfb2254fd1")


def test_the_bytes_of_correspondence_change_only_with_the_version_of_their_stage() -> None:
    geometry, chip, kind = _shapes()
    _, _, share = patch_shares(geometry, kind, chip, BOUNDS, 7)
    # Weights are whole numbers already; none of these is so near a half that it could go both ways.
    assert (abs(share * 255 % 1 - 0.5) > 1e-6).all()
    arrays = build_correspondence(geometry, kind, chip, BOUNDS, 7)
    digest = _digest(*(arrays[name] for name in sorted(arrays)))
    assert (STAGES["correspondence"], digest) == (1, "b3d929b54f71e4f7")


def _shard(image: str) -> dict[str, NDArray[np.generic]]:
    """Arrays that count up, of 17 chips, so that the pixels are two chunks."""
    sizes = {
        "chip": 17, "band": 2, "y": 8, "x": 8, "patch_y": 2, "patch_x": 2, "class": 3, "word": 2,
        "bound": 4, "lonlat": 2, "object": 34, "anchor": 4, "xy": 2, "object_tag": 34, "tag": 5,
        "byte": 35, "edge": 51, "ends": 2, "offset": 3, "correspondence": 68, "chip_edge": 18,
        "object_edge": 35, "tag_edge": 6,
    }  # fmt: skip
    last = {"object_offset": 34, "edge_offset": 51, "object_tag_offset": 34, "tag_text_offset": 35,
            "patch_offset": 68}  # fmt: skip
    largest = {"object_kind": 3, "object_class": 4, "label_pixel": 4, "relation": 10, "edge": 2,
               "object_tag": 5, "patch": 4, "object_anchor": 2}  # fmt: skip
    arrays = {}
    for spec in LAYOUT:
        shape = tuple(sizes[dim] for dim in spec.dims)
        count = np.arange(np.prod(shape)).reshape(shape)
        if spec.name in last:
            count = count * last[spec.name] // (shape[0] - 1)
        dtype = image if spec.dtype == "image" else spec.dtype
        arrays[spec.name] = (count % largest.get(spec.name, 251)).astype(dtype)
    return arrays


def test_the_bytes_of_store_change_only_with_the_version_of_their_stage(tmp_path: Path) -> None:
    # Here the bytes are those of files, so a new version of Zarr or Blosc may change them too: the
    # same content key would then stand for other bytes, and the version must go up as well.
    names = {
        "sensor": sensor("aerial-rgb", ("red", "green")),
        "taxonomy": Taxonomy(classes=default_taxonomy().classes[:3]),
    }
    about, info = {"scenes": ["é"], "n": 1.5}, make_info(**names)
    checksums = [
        write_shard(tmp_path, image, "key", _shard(image), about, info).checksum
        for image in ("uint8", "uint16")
    ]
    digest = xxhash.xxh3_64_hexdigest("".join(checksums).encode())
    assert (STAGES["store"], digest) == (4, "ef74fb7c8785ed02")


def test_every_stage_has_exactly_one_golden_checksum() -> None:
    found: Counter[str] = Counter()
    for path in Path(__file__).parent.glob("test_*.py"):
        golden = r'assert \(STAGES\["(\w+)"\], .+\) == (?:GOLDEN|\(\d+, "[0-9a-f]{16}"\))\n'
        found.update(re.findall(golden, path.read_text(encoding="utf-8")))
    assert found == dict.fromkeys(STAGES, 1)

"""Pictures of a dataset: a contact sheet of chips with their OSM, and a map of its shards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray

from geolink.reader import Dataset, read_shard
from schemas.dataset import DatasetInfo
from schemas.errors import GeoLinkError
from schemas.findings import SURE
from schemas.grid import chip_name, unpack_chip
from schemas.layout import Kind, Relation

Arrays = dict[str, NDArray[Any]]

RELATION_COLORS = {
    Relation.TOUCHES: "#ffd54f", Relation.OVERLAPS: "#ff8a65", Relation.COVERS: "#4dd0e1",
    Relation.COVERED_BY: "#4dd0e1", Relation.EQUALS: "#f06292", Relation.CROSSES: "#e53935",
    Relation.CONTAINS_POINT: "#aed581", Relation.WITHIN: "#aed581", Relation.NEAR: "#b39ddb",
}  # fmt: skip
SPLIT_COLORS = {"train": "#4a90d9", "val": "#f2a33c", "test": "#c2557a"}
_COLUMNS = ("image", "objects by class", "relations", "label_pixel", "correspondence")


def rgb(
    image: NDArray[Any], info: DatasetInfo, stretched_as: NDArray[Any] | None = None
) -> NDArray[np.float32]:
    """A chip [band, y, x] as a picture [y, x, 3] in [0, 1], stretched between percentiles, its own
    or another chip's."""
    names = [b.name for b in info.sensor.bands]
    shown = info.sensor.rgb or ((names * 3)[:3] if len(names) < 3 else names[:3])
    bands = [names.index(b) for b in shown]
    picture = np.stack([image[b] for b in bands], axis=-1).astype(np.float32)
    other = image if stretched_as is None else stretched_as
    values = np.stack([other[b] for b in bands], axis=-1).astype(np.float32)
    valid = values[(values != info.sensor.nodata).all(axis=-1)]
    if len(valid) == 0:
        return np.zeros_like(picture)
    low, high = np.percentile(valid, (1, 99))
    stretched: NDArray[np.float32] = np.clip((picture - low) / max(high - low, 1e-6), 0, 1)
    return stretched


def class_colors(info: DatasetInfo) -> NDArray[np.float32]:
    """[classes + 1, 3] colours in [0, 1]; row 0 (no OSM statement) is white."""
    colors = [to_rgb(c.color) for c in info.taxonomy.classes]
    return np.array([(1.0, 1.0, 1.0), *colors], np.float32)


def chip_parts(shard: Arrays, n: int) -> Arrays:
    """The arrays of one chip of a shard: its rows, objects, edges and correspondences."""
    first, last = shard["object_offset"][n : n + 2]
    e0, e1 = shard["edge_offset"][n : n + 2]
    p0, p1 = shard["patch_offset"][first], shard["patch_offset"][last]
    objects = {k: v[first:last] for k, v in shard.items() if k.startswith("object_")
               and k not in ("object_offset", "object_tag", "object_tag_offset")}  # fmt: skip
    return {
        **{k: shard[k][n] for k in ("image", "label_pixel", "chip_id", "center_lonlat", "valid")},
        **objects,
        "edge": shard["edge"][e0:e1], "relation": shard["relation"][e0:e1],
        "patch_offset": shard["patch_offset"][first : last + 1] - p0,
        "patch": shard["patch"][p0:p1], "patch_weight": shard["patch_weight"][p0:p1],
    }  # fmt: skip


def pick_chips(
    dataset: Dataset, count: int, split: str | None = None, seed: int = 0
) -> list[Arrays]:
    """Chips to look at: drawn with a seed, from many shards, those with more objects first.

    Raises GeoLinkError if the split is empty.
    """
    rows = [r for r in dataset.rows if r.chips and split in (None, r.split)]
    if not rows:
        raise GeoLinkError(f"{dataset.path} has no chip in split {split!r}")
    rng = np.random.default_rng(seed)
    chosen = [rows[i] for i in rng.permutation(len(rows))[:count]]
    each = -(-count // len(chosen))
    picked: list[Arrays] = []
    for row in chosen:
        shard = read_shard(dataset, row)
        objects = np.diff(shard["object_offset"])
        candidates = rng.permutation(len(objects))[: 8 * each]
        best = candidates[np.argsort(-objects[candidates], kind="stable")][:each]
        picked += [chip_parts(shard, int(n)) for n in best]
    return picked[:count]


def contact_sheet(
    dataset: Dataset, picture: Path, *, count: int = 6, split: str | None = None, seed: int = 0
) -> None:
    """Write a sheet of chips: image, objects, relations, labels, correspondence.

    Raises GeoLinkError if the split is empty or the file cannot be written.
    """
    chips = pick_chips(dataset, count, split, seed)
    figure = draw_chips(chips, dataset.info)
    save(figure, picture)


def draw_chips(chips: Sequence[Arrays], info: DatasetInfo) -> Figure:
    """One row a chip, five views each, with legends."""
    rows = len(chips)
    legend = 1.05
    figure = Figure(figsize=(12.5, 2.62 * rows + legend), facecolor="white", layout=None)
    axes = figure.subplots(rows, 5, squeeze=False)
    height = 2.62 * rows + legend
    figure.subplots_adjust(
        left=0.01,
        right=0.99,
        top=1 - 0.3 / height,
        bottom=legend / height,
        wspace=0.03,
        hspace=0.13,
    )
    for n, chip in enumerate(chips):
        _draw_chip(axes[n], chip, info)
        if n == 0:
            for axis, name in zip(axes[n], _COLUMNS, strict=True):
                axis.set_title(name, fontsize=10, pad=5)
    present = np.unique(np.concatenate([np.unique(c["label_pixel"]) for c in chips]))
    colors = class_colors(info)
    handles: list[Any] = [
        Patch(color=colors[i], label=info.taxonomy.names[i - 1]) for i in present if i > 0
    ]
    kinds = np.unique(np.concatenate([c["relation"] for c in chips]))
    edges = [
        Line2D([], [], color=color, lw=2, label=relation.name.lower())
        for relation, color in RELATION_COLORS.items()
        if relation in kinds
    ]
    for items, y in ((handles, 0.86), (edges, 0.36)):
        figure.legend(
            handles=items, loc="upper center", bbox_to_anchor=(0.5, y * legend / height),
            borderaxespad=0,
            ncols=10, fontsize=8, frameon=False, handlelength=1.2, columnspacing=1.1,
        )  # fmt: skip
    return figure


def _draw_chip(axes: NDArray[Any], chip: Arrays, info: DatasetInfo) -> None:
    picture = rgb(chip["image"], info)
    side = picture.shape[0]
    labels = class_colors(info)[chip["label_pixel"]]
    known = (chip["label_pixel"] > 0)[..., None]
    where = "{:.4f}, {:.4f}".format(*chip["center_lonlat"])
    name = chip_name(unpack_chip(chip["chip_id"])) if chip["chip_id"][0] else "imported pair"
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_xlim(0, side)
        axis.set_ylim(side, 0)
    extent = (0, side, side, 0)
    axes[0].imshow(picture, extent=extent)
    axes[0].set_xlabel(f"{name}   {where}", fontsize=6, loc="left", labelpad=2)
    axes[1].imshow(np.where(known, 0.45 * picture + 0.55 * labels, picture), extent=extent)
    _draw_objects(axes[1], chip, info, side)
    axes[1].set_xlabel(f"{len(chip['object_kind'])} objects", fontsize=6, loc="left", labelpad=2)
    gray = picture.mean(axis=-1) * 0.6
    axes[2].imshow(gray, cmap="gray", vmin=0, vmax=1, extent=extent)
    _draw_relations(axes[2], chip, side)
    axes[3].imshow(labels, extent=extent)
    axes[4].imshow(picture, extent=extent)
    _draw_correspondence(axes[4], chip, info, side)


def _centres(chip: Arrays) -> NDArray[np.float32]:
    """Where an object is drawn: the centroid of polygons and lines, the point itself."""
    anchor = chip["object_anchor"]
    polygon = (chip["object_kind"] == Kind.POLYGON)[:, None]
    centre: NDArray[np.float32] = np.where(polygon, anchor[:, 3], anchor[:, 0])
    return centre


def _draw_objects(axis: Axes, chip: Arrays, info: DatasetInfo, side: int) -> None:
    colors = class_colors(info)[chip["object_class"]]
    centre = _centres(chip) * side
    for kind, marker, size in ((Kind.POLYGON, "s", 7), (Kind.LINE, "D", 5), (Kind.POINT, "o", 7)):
        rows = chip["object_kind"] == kind
        x, y = centre[rows].T
        axis.scatter(
            x,
            y,
            s=size,
            c=colors[rows],
            marker=marker,
            edgecolors="black",
            linewidths=0.4,
        )


def _draw_relations(axis: Axes, chip: Arrays, side: int) -> None:
    centre = _centres(chip) * side
    drawn = chip["relation"] != Relation.SELF
    edge, relation = chip["edge"][drawn], chip["relation"][drawn]
    colors = np.array([RELATION_COLORS[r] for r in RELATION_COLORS])
    position = np.zeros(len(Relation), int)
    position[list(RELATION_COLORS)] = np.arange(len(RELATION_COLORS))
    axis.add_collection(
        LineCollection(centre[edge], colors=colors[position[relation]], linewidths=0.6, alpha=0.8)
    )
    x, y = centre.T
    axis.scatter(x, y, s=2, c="white")
    axis.set_xlabel(f"{len(edge) // 2} related pairs", fontsize=6, loc="left", labelpad=2)


def _draw_correspondence(axis: Axes, chip: Arrays, info: DatasetInfo, side: int) -> None:
    """Patches of one object: the largest that does not fill the chip."""
    patches = info.grid.patches
    count = np.diff(chip["patch_offset"])
    partly = np.flatnonzero((count > 1) & (count < 0.7 * patches * patches))
    if len(partly) == 0:
        return
    n = partly[np.argmax(count[partly])]
    rows = slice(*chip["patch_offset"][n : n + 2])
    weight = np.zeros(patches * patches, np.float32)
    weight[chip["patch"][rows]] = chip["patch_weight"][rows] / 255.0
    line = chip["object_kind"][n] == Kind.LINE
    shown = weight.reshape(patches, patches) / (weight.max() if line else 1.0)
    overlay = np.zeros((patches, patches, 4), np.float32)
    overlay[..., :3] = to_rgb("#ff2d95")
    overlay[..., 3] = 0.75 * shown
    axis.imshow(overlay, extent=(0, side, side, 0), interpolation="nearest")
    name = ("", *info.taxonomy.names)[chip["object_class"][n]] or "no class"
    axis.set_xlabel(
        f"{Kind(int(chip['object_kind'][n])).name.lower()} ({name}): {count[n]} patches",
        fontsize=6, loc="left", labelpad=2,
    )  # fmt: skip


def shard_map(dataset: Dataset, picture: Path) -> None:
    """Write a map of the shards by split, with their numbers of chips.

    Raises GeoLinkError if the file cannot be written.
    """
    save(draw_map(dataset), picture)


def draw_map(dataset: Dataset) -> Figure:
    """Shards by split in degrees; the darker, the more objects per chip."""
    figure = Figure(figsize=(7, 6.4), facecolor="white", layout="constrained")
    axis = figure.subplots()
    rows = [r for r in dataset.rows if r.chips]
    density = np.array([r.objects / r.chips for r in rows])
    strength = 0.25 + 0.65 * density / max(density.max(initial=0.0), 1e-9)
    for row, alpha in zip(rows, strength, strict=True):
        west, south, east, north = row.bounds_lonlat
        box = (west, south), east - west, north - south
        axis.add_patch(Rectangle(*box, facecolor=SPLIT_COLORS[row.split], alpha=float(alpha)))
        axis.add_patch(Rectangle(*box, fill=False, edgecolor="white", lw=1))
        if len(rows) <= 150:
            middle = ((west + east) / 2, (south + north) / 2)
            axis.annotate(f"{row.chips}", middle, ha="center", va="center", fontsize=7)
    axis.autoscale_view()
    bounds = np.array([r.bounds_lonlat for r in rows])
    axis.set_aspect(1 / np.cos(np.radians(bounds[:, [1, 3]].mean())))
    axis.set_xlabel("longitude")
    axis.set_ylabel("latitude")
    chips = {s: sum(r.chips for r in rows if r.split == s) for s in SPLIT_COLORS}
    axis.legend(
        handles=[Patch(color=c, label=f"{s}: {chips[s]:,} chips") for s, c in SPLIT_COLORS.items()],
        loc="upper center", bbox_to_anchor=(0.5, 1.09), ncols=3, frameon=False,
    )  # fmt: skip
    return figure


def shift_map(dataset: Dataset, picture: Path) -> None:
    """Write a map of how far images lie off the map, one arrow a chip that is sure of it.

    Raises GeoLinkError if the file cannot be written, or a shard cannot be read.
    """
    save(draw_shifts(dataset), picture)


def draw_shifts(dataset: Dataset) -> Figure:
    """Arrows at the chips' centres in degrees, in pixels; dots where there is nothing to go by."""
    names = ("center_lonlat", "bounds", "shift")
    shards = [read_shard(dataset, row, names) for row in dataset.rows if row.chips]
    place, bounds, shift = (np.concatenate([s[n] for s in shards]) for n in names)
    pixels = shift[:, :2] / ((bounds[:, 2:] - bounds[:, :2]) / dataset.info.grid.size)
    sure = shift[:, 2] >= SURE
    lon, lat = place.T
    figure = Figure(figsize=(8.2, 6.4), facecolor="white", layout="constrained")
    axis = figure.subplots()
    axis.scatter(lon[~sure], lat[~sure], s=3, c="#bbbbbb")
    title = f"{sure.sum():,} of {len(sure):,} chips are sure"
    if sure.any():
        length, (x, y) = np.hypot(*pixels[sure].T), np.median(pixels[sure], axis=0)
        title += f"; median {x:+.2f} px east, {y:+.2f} px north"
        arrows = axis.quiver(
            lon[sure], lat[sure], *pixels[sure].T, length, cmap="viridis", width=0.003
        )
        arrows.set_clim(0, max(2.0, float(np.percentile(length, 98))))
        axis.quiverkey(arrows, 0.9, 1.03, 1, "1 px", labelpos="E")
        figure.colorbar(arrows, ax=axis, shrink=0.8, label="pixels between map and image")
    axis.set_title(title, fontsize=9, loc="left")
    axis.set_aspect(1 / np.cos(np.radians(lat.mean())))
    axis.set_xlabel("longitude")
    axis.set_ylabel("latitude")
    axis.ticklabel_format(useOffset=False)
    return figure


def save(figure: Figure, picture: Path, dpi: int = 130) -> None:
    """Write a figure. Raises GeoLinkError if it cannot be written or its type is unknown."""
    mpl.rcParams["svg.hashsalt"] = "geolink"
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture, dpi=dpi)
    except (OSError, ValueError) as error:
        raise GeoLinkError(f"cannot write picture {picture}: {error}") from error

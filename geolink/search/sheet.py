"""Places that were found: as GeoJSON, and pictures of them on a sheet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from geolink.search.index import Index
from geolink.search.rank import Ranking
from geolink.show import rgb
from schemas.dataset import read_arrays
from schemas.errors import GeoLinkError
from schemas.grid import printed_chip, to_lonlat

_COLUMNS = 6
_RIGHT, _WRONG, _PLAIN = "#2e7d32", "#b71c1c", "#444444"


def places(index: Index, ranking: Ranking, has: NDArray[np.bool_] | None) -> dict[str, Any]:
    """GeoJSON (RFC 7946) of the outlines of ranked chips, best first.

    has: [N], whether a chip has the tags; none: not known.
    """
    features = []
    for rank, (chip, score) in enumerate(zip(ranking.chips.tolist(), ranking.score), start=1):
        about = _read(index, chip, ("chip_id", "bounds", "epsg"))
        x0, y0, x1, y1 = about["bounds"]
        ring = to_lonlat(int(about["epsg"])).transform([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0])
        lon, lat = index.lonlat[chip].tolist()
        properties = {
            "rank": rank, "score": round(float(score), 6), "chip": printed_chip(about["chip_id"]),
            "split": str(index.split[chip]), "lon": round(lon, 7), "lat": round(lat, 7),
        }  # fmt: skip
        if has is not None:
            properties["in_osm"] = bool(has[chip])
        outline = [[round(x, 7), round(y, 7)] for x, y in zip(*ring)]
        features.append({
            "type": "Feature", "properties": properties,
            "geometry": {"type": "Polygon", "coordinates": [outline]},
        })  # fmt: skip
    return {"type": "FeatureCollection", "features": features}


def draw_sheet(
    index: Index, ranking: Ranking, title: str, path: Path, *, has: NDArray[np.bool_] | None,
    like: int | None = None,
) -> None:  # fmt: skip
    """Pictures of ranked chips to a PNG; a green frame: OSM has the tags there, red: it has not.

    like: the chip that others are to be like, drawn first. Raises GeoLinkError if it cannot be
    written.
    """
    shown = ([] if like is None else [like]) + ranking.chips.tolist()
    columns = min(_COLUMNS, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(1.9 * columns, 2.25 * lines + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for n, (axes, chip) in enumerate(zip(grid, shown)):
        axes.set_axis_on()
        axes.set_xticks([])
        axes.set_yticks([])
        axes.imshow(rgb(_read(index, chip, ("image",))["image"], index.dataset.info))
        lon, lat = index.lonlat[chip].tolist()
        rank = n + (like is None)
        score = "" if chip == like else f"{rank}   {ranking.score[rank - 1]:.2f}\n"
        axes.set_title(f"{score or 'like this'}\n{lat:.4f}, {lon:.4f}".replace("\n\n", "\n"),
                       fontsize=7)  # fmt: skip
        colour = _PLAIN if has is None or chip == like else _RIGHT if has[chip] else _WRONG
        for side in axes.spines.values():
            side.set(color=colour, linewidth=2.5)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise GeoLinkError(f"cannot write {path}: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write a value, whole or not at all. Raises GeoLinkError if it cannot be written."""
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise GeoLinkError(f"cannot write {path}: {error}") from error


def _read(index: Index, chip: int, names: tuple[str, ...]) -> dict[str, Any]:
    """Arrays of one chip."""
    shard, place = index.place(chip)
    row = index.dataset.split_rows(None)[shard]
    arrays, _ = read_arrays(index.dataset.path, row.path, names, (place, place + 1))
    return {n: a[0] if n == "image" else a[place] for n, a in arrays.items()}

"""A search from query to files."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from geolink.models.base import PretrainModel
from geolink.reader import open_dataset
from geolink.search.index import Progress, make_index, open_aligned
from geolink.search.query import chip_at, find_tags
from geolink.search.rank import search_like, search_tags
from geolink.search.sheet import draw_sheet, places, write_json
from schemas.errors import GeoLinkError
from schemas.storage import Location


def search(
    source: Location,
    checkpoint: Path | str,
    output: Path,
    *,
    tags: Sequence[str] = (),
    like: tuple[float, float] | None = None,
    count: int = 24,
    split: str | None = None,
    snapshot: int | None = None,
    normalise: str = "checkpoint",
    cache: Path | None = None,
    accelerator: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Find places by tags or by example; `places.geojson`, `sheet.png`, `search.json` in `output`.

    Args:
        source: a dataset.
        checkpoint: one that has learnt to align images with OSM.
        output: folder of the results.
        tags: `key=value`, all of which a place is to have.
        like: longitude and latitude of a place that others are to be like, instead of tags.
        count: places that are ranked; recall is measured among as many.
        split: only chips of this one are ranked; none: all.
        snapshot: of the dataset; none: the latest.
        normalise: as `open_encoder` takes.
        cache: folder where projections of all chips are kept for the next search; none: not kept.
        accelerator: where the encoder runs.
        progress: is told of chips.

    Returns what `search.json` holds. Raises GeoLinkError: nothing to look for, no such tag or
    place, as `open_aligned` and `make_index`.
    """
    if bool(tags) == (like is not None):
        raise GeoLinkError("give either tags (key=value) or --like LON LAT")
    if count < 1:
        raise GeoLinkError(f"{count} places cannot be ranked: ask for at least one")
    dataset = open_dataset(source, snapshot)
    encoder = open_aligned(dataset, checkpoint, accelerator, normalise)
    model = encoder.module
    assert isinstance(model, PretrainModel)
    with ExitStack() as stack:
        kept = cache or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="geolink-")))
        index = make_index(dataset, encoder, kept, progress=progress)
        has, chip = None, None
        if like is not None:
            chip = chip_at(index, *like)
            ranking = search_like(index, chip, count=count, split=split)
            title = f"like {like[1]:.5f}, {like[0]:.5f}"
        else:
            found = find_tags(index, tuple(tags))
            has = found.has
            ranking = search_tags(index, model, found, count=count, split=split)
            title = " and ".join(tags)
        about = {
            "query": title, "dataset": dataset.info.name, "snapshot": dataset.snapshot,
            "checkpoint": str(checkpoint), "chips": len(index), "method": ranking.method,
            "count": count, "held_out": ranking.held_out, "relevant": ranking.relevant,
            "found": ranking.found,
        }  # fmt: skip
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "places.geojson", places(index, ranking, has))
        draw_sheet(index, ranking, title, output / "sheet.png", has=has, like=chip)
        write_json(output / "search.json", about)
    return about

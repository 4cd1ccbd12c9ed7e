"""Embedding an area: every block once, marked when it is written, so that a run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zarr

from geolink.embed.area import Area, Block
from geolink.embed.models import Embedder, embed_chips
from geolink.embed.store import Errors, Kept, create, state_errors, write_block
from geolink.embed.windows import Lattice, Pixels, embed_block, read_block
from geolink.reader import Dataset
from schemas.errors import GeoLinkError
from schemas.storage import writing
from schemas.storage_local import LocalStorage

Progress = Callable[[int, int], None]
"""Called with blocks done and blocks in all."""

ZARR, CLAIM, DONE = "embeddings.zarr", "embed.json", ".done"


@dataclass(frozen=True, eq=False)
class Embedded:
    """What a run did."""

    folder: Path
    blocks: int
    written: int
    """Blocks that were computed now; the others were there."""
    kinds: dict[str, int]
    """Width by kind."""
    lost: dict[str, dict[str, dict[str, float]]]
    """By area and kind, what is lost by how values are kept (`store.state_errors`)."""


def embed_areas(
    embedder: Embedder,
    areas: list[Area],
    dataset: Dataset | None,
    folder: Path,
    made_from: dict[str, Any],
    *,
    lattice: Lattice,
    kept: Kept,
    progress: Progress | None = None,
) -> Embedded:
    """Embed areas into `<folder>/embeddings.zarr`, a block at a time.

    Memory holds the pixels and tokens of one block and the pixels of the next. A block that is
    written whole is marked; a run that was stopped does the others, and ends with the same bytes.

    Args:
        embedder, areas, dataset: as `open_embedder` gives and takes.
        folder: new, or one that holds the same embeddings, finished or not.
        made_from: what the embeddings are of, beside the encoder; a folder of others is refused.
        lattice: windows over each area.
        kept: how values are kept.
        progress: is told of blocks.

    Raises GeoLinkError: the folder holds something else or cannot be written; pixels cannot be
    read.
    """
    encoder = embedder.encoder
    about = {
        **made_from, "encoder": encoder.name, "encoder_key": encoder.key, "kept_as": kept,
        "grid": lattice.grid, "overlap": lattice.overlap, "patch_px": embedder.patch,
    }  # fmt: skip
    claim(folder, CLAIM, about, "embeddings")
    create(folder / ZARR, areas, list(embedder.kinds), kept, about)
    root = zarr.open_group(str(folder / ZARR), mode="r+")
    marks = LocalStorage(folder / DONE)
    todo = [(a, b) for a in areas for b in a.blocks if not marks.exists(_mark(a, b))]
    total = sum(len(area.blocks) for area in areas)
    for n, (area, block, pixels) in enumerate(read_ahead(todo, lattice), start=1):
        group = root[area.name]
        assert isinstance(group, zarr.Group)
        errors = _embed(embedder, area, block, pixels, dataset, lattice, group)
        marks.write(_mark(area, block), json.dumps(errors).encode())
        if progress:
            progress(total - len(todo) + n, total)
    lost = {area.name: _finish(root, area, embedder, marks) for area in areas}
    if not marks.exists("finished"):
        zarr.consolidate_metadata(str(folder / ZARR))
        marks.write("finished", b"")
    widths = {kind.name: kind.width for kind in embedder.kinds}
    return Embedded(folder, total, len(todo), widths, lost)


def _embed(
    embedder: Embedder, area: Area, block: Block, pixels: Pixels, dataset: Dataset | None,
    lattice: Lattice, group: zarr.Group,
) -> dict[str, Errors]:  # fmt: skip
    """Compute and write one block."""
    tokens, there = embed_block(pixels, area, block, lattice, embedder.tokens, embedder.device)
    if not tokens.shape[-1]:
        return {}
    found = {"patch": (tokens, there)}
    if dataset is not None:
        found |= embed_chips(embedder, dataset, area, block, tokens, lattice.batch_size)
    each = area.chip // area.patch
    errors = {}
    for kind in embedder.kinds:
        side = each if kind.of_chips else 1
        at = (block.row // side, block.column // side)
        errors[kind.name] = write_block(group, kind, at, *found[kind.name])
    return errors


def read_ahead(
    todo: list[tuple[Area, Block]], lattice: Lattice
) -> Iterator[tuple[Area, Block, Pixels]]:
    """Blocks with their pixels, which are read while the one before is at work."""
    with ThreadPoolExecutor(1) as pool:
        coming = [pool.submit(read_block, *todo[0], lattice)] if todo else []
        for n, (area, block) in enumerate(todo):
            pixels = coming.pop().result()
            if n + 1 < len(todo):
                coming.append(pool.submit(read_block, *todo[n + 1], lattice))
            yield area, block, pixels


def _finish(
    root: zarr.Group, area: Area, embedder: Embedder, marks: LocalStorage
) -> dict[str, dict[str, float]]:
    """State what was lost in each array of an area."""
    blocks = [json.loads(marks.read(_mark(area, block))) for block in area.blocks]
    group = root[area.name]
    assert isinstance(group, zarr.Group)
    return {
        kind.name: state_errors(group, kind, own)
        for kind in embedder.kinds
        if (own := [errors[kind.name] for errors in blocks if kind.name in errors])
    }


def _mark(area: Area, block: Block) -> str:
    return f"{area.name}/{block.name}.json"


def claim(folder: Path, name: str, about: dict[str, Any], what: str) -> None:
    """Say in the file `name` of a folder what it holds.

    what: that, as a word. Raises GeoLinkError if it holds something else.
    """
    files = LocalStorage(folder)
    plain = json.loads(json.dumps(about))
    with writing(folder):
        if files.exists(name):
            there = json.loads(files.read(name))
            other = [k for k in plain if there.get(k) != plain[k]]
            if other:
                raise GeoLinkError(
                    f"{folder} holds other {what} ({other[0]} is {there.get(other[0])!r} "
                    f"there, and {plain[other[0]]!r} now): choose a new folder"
                )
            return
        if folder.is_dir() and any(folder.iterdir()):
            raise GeoLinkError(f"{folder} is not empty and holds no {what}: choose a new one")
        files.write(name, (json.dumps(plain, indent=2) + "\n").encode())

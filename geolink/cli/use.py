"""Commands that use a checkpoint on places, and make data for it: embed, search, predict, pair."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from geolink.cli.location import LOCATION

if TYPE_CHECKING:
    from geolink.embed.store import Kept
    from schemas.evaluation import Inputs

_FILE = click.Path(path_type=Path)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
_ACCELERATOR = click.option(
    "--accelerator", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto",
    show_default=True, help="Where the encoder runs.",
)  # fmt: skip
_CHECKPOINT = click.option(
    "--checkpoint", required=True, help="Run or checkpoint folder, published file, timm:NAME."
)


@click.command(short_help="Embed a dataset or a big image: Zarr and maps.")
@click.argument("source", type=LOCATION)
@click.argument("folder", type=_FILE)
@_CHECKPOINT
@click.option(
    "--inputs", type=click.Choice(["image", "image+osm"]),
    help="Default: image+osm for a dataset, image for a file.",
)  # fmt: skip
@click.option("--snapshot", type=int, help="Of a dataset; default: the latest.")
@click.option("--bands", help="Names of a file's bands, with commas, where it does not say.")
@click.option(
    "--normalise", type=click.Choice(["checkpoint", "data"]), default="checkpoint",
    show_default=True, help="Whose mean and deviation scale the pixels.",
)  # fmt: skip
@click.option("--overlap", type=int, help="Patches that windows share; default: a quarter.")
@click.option(
    "--keep", "kept", type=click.Choice(["float16", "int8"]), default="float16", show_default=True,
    help="How values are kept; what is lost is stated.",
)  # fmt: skip
@click.option("--clusters", default=8, show_default=True, help="Of the k-means map, 2 to 16.")
@click.option("--seed", default=0, show_default=True, help="Of the sample maps are fitted on.")
@click.option("--batch-size", default=64, show_default=True, help="Windows encoded at once.")
@_ACCELERATOR
@_JSON
def embed(
    source: Path | str, folder: Path, checkpoint: str, inputs: str | None, snapshot: int | None,
    bands: str | None, normalise: str, overlap: int | None, kept: str, clusters: int, seed: int,
    batch_size: int, accelerator: str, as_json: bool,
) -> None:  # fmt: skip
    """Embed SOURCE, a dataset or a georeferenced image of any size, into FOLDER.

    `embeddings.zarr` holds an embedding of every patch, and of every chip of a dataset also image,
    OSM objects (region) and both fused; xarray opens it. `pca-*.tif` shows three principal
    components as colours, `kmeans-*.tif` clusters; a PNG lies beside each. Windows reach across
    chips and fade into each other, so that no seam shows. Safe to interrupt and to run again.
    """
    from flows.embed import embed as run
    from geolink.cli import output

    with _progress("embedding", "block", quiet=as_json) as progress:
        done = run(
            source, checkpoint, folder, inputs=cast("Inputs | None", inputs), snapshot=snapshot,
            bands=tuple(bands.split(",")) if bands else (), normalise=normalise, overlap=overlap,
            kept=cast("Kept", kept), clusters=clusters, seed=seed, batch_size=batch_size,
            accelerator=accelerator, progress=progress,
        )  # fmt: skip
    if as_json:
        output.print_json(dataclasses.asdict(done))
        return
    output.table(
        {
            "zarr": done.embedded.folder / "embeddings.zarr",
            "blocks": {"in all": done.embedded.blocks, "computed now": done.embedded.written},
            "widths": done.embedded.kinds,
            **{
                f"lost of {kind} ({area})": {
                    "relative": f"{lost['relative_error']:.2%}",
                    "least cosine": f"{lost['least_cosine']:.5f}",
                }
                for area, kinds in done.embedded.lost.items()
                for kind, lost in kinds.items()
            },
            "maps": ", ".join(str(path) for path in done.maps),
            "variance in the colours": ", ".join(f"{share:.0%}" for share in done.explained),
        },
        as_json=False,
    )


@click.command(short_help="Find places by tag, or places like another.")
@click.argument("dataset", type=LOCATION)
@click.argument("output", type=_FILE)
@click.argument("tags", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--like", type=float, nargs=2, metavar="LON LAT", help="Instead of tags; degrees.")
@_CHECKPOINT
@click.option("--count", default=24, show_default=True, help="Places; recall is among as many.")
@click.option("--split", type=click.Choice(["train", "val", "test"]), help="Only chips of it.")
@click.option("--snapshot", type=int, help="Snapshot; default: the latest.")
@click.option(
    "--normalise", type=click.Choice(["checkpoint", "data"]), default="checkpoint",
    show_default=True, help="Whose mean and deviation scale the pixels.",
)  # fmt: skip
@click.option("--cache", type=_FILE, help="Keep the projections of all chips for the next search.")
@_ACCELERATOR
@_JSON
def search(
    dataset: Path | str, output: Path, tags: tuple[str, ...], like: tuple[float, float] | None,
    checkpoint: str, count: int, split: str | None, snapshot: int | None, normalise: str,
    cache: Path | None, accelerator: str, as_json: bool,
) -> None:  # fmt: skip
    """Find places of DATASET whose images look as if they had the tags, or look like another.

    Writes `places.geojson`, `sheet.png` and `search.json` into OUTPUT. A tag is compared with
    images in the space where the checkpoint has learnt to align them with OSM. How many of the
    chips with the tags come first is measured on the splits other than train, whose objects the
    search does not use, beside band statistics and chance.
    """
    from geolink.cli import output as show
    from geolink.search.run import search as run

    with _progress("reading", "chip", quiet=as_json) as progress:
        found = run(
            dataset, checkpoint, output, tags=tags, like=like, count=count, split=split,
            snapshot=snapshot, normalise=normalise, cache=cache, accelerator=accelerator,
            progress=progress,
        )  # fmt: skip
    if as_json:
        show.print_json(found)
        return
    show.table(
        {
            "query": found["query"],
            "ranked": f"{min(count, found['chips']):,} of {found['chips']:,} chips, by "
            f"{found['method']}",
            "held out": f"{found['held_out']:,} chips, {found['relevant']:,} with the tags",
            **{
                name: {key.replace("_", " "): round(value, 3) for key, value in figures.items()}
                for name, figures in found["found"].items()
            },
            "places": output / "places.geojson",
            "pictures": output / "sheet.png",
        },
        as_json=False,
    )


@click.command(short_help="Give a folder of images their OSM objects.")
@click.argument("images", type=_FILE)
@click.argument("folder", type=_FILE)
@click.option("--osm", required=True, help="PBF file or address; auto: finds and downloads one.")
@click.option("--size", type=int, help="Side of chips in pixels; default: of most images.")
@click.option("--patch", default=16, show_default=True, help="Side of patches in pixels.")
@click.option(
    "--block-km", default=20.0, show_default=True,
    help="Where no folders say which image is of which split: blocks of this side share one.",
)  # fmt: skip
@click.option("--cache", type=_FILE, help="Folder of converted extracts; default: the user's.")
@click.option("--workers", default=1, show_default=True, help="Processes that build shards.")
@_JSON
def pair(
    images: Path, folder: Path, osm: str, size: int | None, patch: int, block_km: float,
    cache: Path | None, workers: int, as_json: bool,
) -> None:  # fmt: skip
    """Give IMAGES their OSM objects, so that image+OSM can be tried on any benchmark with places.

    IMAGES holds GeoTIFFs, or images with `bounds.csv` (file, west, south, east, north in degrees),
    in folders of classes and splits or none. FOLDER gets the pairs, a dataset of them, and
    `labels.csv`, for `geolink evaluate TASK --data FOLDER/dataset --labels FOLDER/labels.csv`.
    Safe to interrupt and to run again.
    """
    from geolink.cli import output
    from pipelines.pairing import pair_images

    with _progress("pairing", "image", quiet=as_json) as progress:
        done = pair_images(
            images, folder, osm, cache=cache, size=size, patch=patch,
            block_km=block_km, workers=workers, progress=progress,
        )  # fmt: skip
    summary = {
        "images": done.images, "pairs_made_now": done.written, "objects": done.objects,
        "images_without_objects": done.without_objects, "images_left_out": len(done.skipped),
        "osm": done.extract, "dataset": str(folder / "dataset"), "labels": str(done.labels),
        "snapshot": done.build.snapshot,
    }  # fmt: skip
    if as_json:
        output.print_json({**summary, "left_out": done.skipped})
        return
    output.table(summary, as_json=False)
    for name, why in list(done.skipped.items())[:10]:
        click.secho(f"left out {name}: {why}", fg="yellow", err=True)


@click.command(short_help="Map a region by a model that evaluate trained.")
@click.argument("model", type=_FILE)
@click.argument("source", type=LOCATION)
@click.option("--out", type=_FILE, help="Folder of the maps; default: predict-NAME in MODEL.")
@click.option("--snapshot", type=int, help="Of a dataset; default: the latest.")
@click.option("--bands", help="Names of a file's bands, with commas, where it does not say.")
@click.option("--checkpoint", help="Where the model's checkpoint lies, if it was moved.")
@click.option("--batch-size", default=32, show_default=True, help="Windows seen at once.")
@_ACCELERATOR
@_JSON
def predict(
    model: Path, source: Path | str, out: Path | None, snapshot: int | None, bands: str | None,
    checkpoint: str | None, batch_size: int, accelerator: str, as_json: bool,
) -> None:  # fmt: skip
    """Map SOURCE, a georeferenced image of any size or a dataset, by the model in MODEL.

    MODEL is the folder of `geolink evaluate segmentation --output MODEL`, or of finetune, zones,
    villages. Writes `classes.tif`, `probability.tif`, `polygons.parquet`, `map.png` and
    `predict.json`. A model of image+osm takes a dataset, whose chips have objects. Safe to
    interrupt and to run again.
    """
    from flows.predict import predict as run
    from geolink.cli import output

    folder = out or model / f"predict-{Path(str(source)).stem}"
    with _progress("predicting", "block", quiet=as_json) as progress:
        done = run(
            model, source, folder, snapshot=snapshot,
            bands=tuple(bands.split(",")) if bands else (), checkpoint=checkpoint,
            batch_size=batch_size, accelerator=accelerator, progress=progress,
        )  # fmt: skip
    if as_json:
        output.print_json(done)
        return
    for name, area in done["areas"].items():
        cells = sum(area["cells"].values())
        output.table(
            {
                "area": name,
                **{
                    of: f"{area['area_m2'][of] / 1e4:,.2f} ha, {area['cells'][of] / cells:.1%}"
                    for of in done["classes"]
                },
                "no data": f"{area['cells']['no data'] / cells:.1%}",
                "polygons": area["polygons"],
                "files": ", ".join(str(folder / file) for file in area["files"]),
            },
            as_json=False,
        )


COMMANDS = (embed, search, predict, pair)


@contextmanager
def _progress(what: str, unit: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar with rate and time left."""
    if quiet:
        yield None
        return
    from tqdm import tqdm

    with tqdm(unit=unit, desc=what, file=sys.stderr, disable=None) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update

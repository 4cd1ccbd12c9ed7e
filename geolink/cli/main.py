"""Commands of `geolink`. A user's mistake is one sentence and exit status 2, never a traceback.

Exit status: 0 done, 1 partly done (some shards failed; published only if asked), 2 a mistake or bad
input, 130 interrupted, 75 a run that SIGTERM stopped and that goes on when run again.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from geolink.cli.dataset import COMMANDS
from geolink.cli.doctor import COMMANDS as DOCTOR_COMMANDS
from geolink.cli.evaluate import evaluate
from geolink.cli.location import LOCATION
from geolink.cli.model import COMMANDS as MODEL_COMMANDS
from geolink.cli.model import TARGETS, export_checkpoint
from geolink.cli.train import COMMANDS as TRAIN_COMMANDS
from geolink.cli.use import COMMANDS as USE_COMMANDS
from schemas.errors import GeoLinkError

PARTIAL, MISTAKE, INTERRUPTED = 1, 2, 130

_FILE = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="geolink-osm", prog_name="geolink")
def cli() -> None:
    """Turn any place on Earth into an aligned image-OpenStreetMap dataset, and train on it."""


@cli.command(short_help="Build a dataset, or bring it up to date.")
@click.argument("config", type=_FILE)
@click.option("--workers", default=1, show_default=True, help="Processes that build shards.")
@click.option("--scheduler", help="Address of a running Dask scheduler, instead of --workers.")
@click.option("--publish-partial", is_flag=True, help="Publish also if some shards failed.")
@click.option("--dry-run", is_flag=True, help="Only say what would be built, why, and its cost.")
@click.option("--price-gb-month", default=0.0, help="Price of keeping 1e9 bytes (for --dry-run).")
@click.option("--price-1000-requests", default=0.0, help="Price of a thousand requests.")
@click.option("--price-worker-hour", default=0.0, help="Price of an hour of a worker.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def build(
    config: Path, workers: int, scheduler: str | None, publish_partial: bool, dry_run: bool,
    price_gb_month: float, price_1000_requests: float, price_worker_hour: float, as_json: bool,
) -> None:  # fmt: skip
    """Build a dataset from CONFIG (YAML), or bring it up to date.

    Shards whose inputs have not changed are left alone, so it is safe to run again, to interrupt
    and to run from cron.
    """
    if not dry_run:
        _build(config, as_json, workers=workers, scheduler=scheduler, partial=publish_partial)
        return
    from geolink.cli import output
    from pipelines.estimate import Prices, estimate_build
    from schemas.config import DatasetConfig
    from schemas.load import load_config

    prices = Prices(price_gb_month, price_1000_requests, price_worker_hour)
    loaded = load_config(config, DatasetConfig)
    output.estimate(estimate_build(loaded, workers=workers, prices=prices), as_json=as_json)


@cli.command(short_help="Bring a dataset up to newer scenes, OSM, config or code.")
@click.argument("config", type=_FILE)
@click.option("--workers", default=1, show_default=True, help="Processes that build shards.")
@click.option("--scheduler", help="Address of a running Dask scheduler, instead of --workers.")
@click.option("--area", type=_FILE, help="GeoJSON polygons: refresh only shards that meet them.")
@click.option("--publish-partial", is_flag=True, help="Publish also if some shards failed.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def refresh(
    config: Path, workers: int, scheduler: str | None, area: Path | None, publish_partial: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Rebuild what newer scenes, a newer extract, another CONFIG or newer code change.

    Unlike `build`, it also takes a config whose sensor, taxonomy or options differ from the
    dataset's. Readers of earlier snapshots notice nothing.
    """
    from pipelines.places import region_geometry
    from schemas.sources import Region

    within = region_geometry(Region(file=area)) if area else None
    _build(
        config, as_json, workers=workers, scheduler=scheduler, within=within, change=True,
        partial=publish_partial,
    )  # fmt: skip


def _build(config: Path, as_json: bool, **options: Any) -> None:
    from geolink.cli import output
    from pipelines.build import build_dataset
    from schemas.config import DatasetConfig
    from schemas.load import load_config

    dataset = load_config(config, DatasetConfig)
    with output.shard_progress(quiet=as_json) as progress:
        result = build_dataset(dataset, progress=progress, **options)
    output.build_summary(result, as_json=as_json)
    if result.failed:
        sys.exit(PARTIAL)


@cli.command(short_help="Say why a shard or chip is as it is.")
@click.argument("dataset", type=LOCATION)
@click.argument("name")
@click.option("--snapshot", type=int, help="Snapshot; default: the latest.")
@click.option("--config", type=_FILE, help="Say also what a rebuild from this config would change.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def explain(
    dataset: Path | str, name: str, snapshot: int | None, config: Path | None, as_json: bool
) -> None:
    """Explain NAME, a shard or chip of DATASET: its inputs, scenes considered, and its past."""
    from geolink.cli import output
    from pipelines.explain import explain as run
    from schemas.config import DatasetConfig
    from schemas.load import load_config

    loaded = load_config(config, DatasetConfig) if config else None
    found = run(dataset, name, snapshot=snapshot, config=loaded)
    output.explanation(found, as_json=as_json)


@cli.command(short_help="Say what a dataset, shard, run or checkpoint is.")
@click.argument("path", type=LOCATION)
@click.option("--snapshot", type=int, help="Snapshot of a dataset; default: the latest.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def info(path: Path | str, snapshot: int | None, as_json: bool) -> None:
    """Say what PATH is: a dataset, a shard, a checkpoint or a run; counts, sizes, licence."""
    from geolink.cli import output
    from geolink.info import describe

    output.table(describe(path, snapshot), as_json=as_json)


@cli.command(short_help="Draw chips of a dataset, or its shard map.")
@click.argument("dataset", type=LOCATION)
@click.argument("picture", type=_FILE)
@click.option(
    "--what", type=click.Choice(["chips", "map", "shifts"]), default="chips", show_default=True
)
@click.option("--snapshot", type=int, help="Snapshot; default: the latest.")
@click.option("--split", type=click.Choice(["train", "val", "test"]), help="Only this split.")
@click.option("--count", default=6, show_default=True, help="Chips on the sheet.")
@click.option("--seed", default=0, show_default=True, help="Which chips are drawn.")
def show(
    dataset: Path | str, picture: Path, what: str, snapshot: int | None, split: str | None,
    count: int, seed: int,
) -> None:  # fmt: skip
    """Draw chips of DATASET, its shard map, or a map of shifts, to PICTURE (PNG)."""
    from geolink.reader import open_dataset
    from geolink.show import contact_sheet, shard_map, shift_map

    opened = open_dataset(dataset, snapshot)
    if what == "map":
        shard_map(opened, picture)
    elif what == "shifts":
        shift_map(opened, picture)
    else:
        contact_sheet(opened, picture, count=count, split=split, seed=seed)
    click.echo(f"wrote {picture}")


@cli.command(short_help="Write chips as GeoTIFF, PNG or STAC, or an encoder.")
@click.argument("source", type=LOCATION)
@click.argument("folder", type=_FILE)
@click.option(
    "--format",
    "formats",
    multiple=True,
    help="One or more of geotiff, png, geoparquet, webdataset, pyg, stac.",
)
@click.option("--to", type=click.Choice(TARGETS), help="Library of the image encoder.")
@click.option("--snapshot", type=int, help="Snapshot; default: the latest.")
@click.option("--split", help="Only this split: train, val or test.")
@click.option(
    "--bbox", type=float, nargs=4, metavar="W S E N", help="Only chips centred in it; degrees."
)
@click.option("--limit", type=int, help="Only the first so many chips.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def export(
    source: Path | str, folder: Path, formats: tuple[str, ...], to: str | None,
    snapshot: int | None, split: str | None, bbox: tuple[float, float, float, float] | None,
    limit: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Write chips of a dataset SOURCE to FOLDER in other formats, or a checkpoint's image encoder.

    With --to, SOURCE is a checkpoint or run folder: its image encoder for timm, the Hugging Face
    hub (hf), TorchGeo or ONNX, with a model card. With --format, SOURCE is a dataset:
    geotiff: pixels; png: label masks; geoparquet: chips, objects (as points) and relations;
    webdataset, pyg: training samples; stac: a catalog of the dataset and of what was exported.
    Safe to interrupt and to run again.
    """
    if (to is None) == (not formats):
        raise GeoLinkError("give either --format (of a dataset) or --to (of a checkpoint)")
    if to is not None:
        if snapshot is not None or split or bbox or limit is not None:
            raise GeoLinkError("--snapshot, --split, --bbox and --limit are for --format")
        export_checkpoint(source, folder, to, as_json=as_json)
        return
    from flows.export import export as run
    from geolink.cli import output

    with output.export_progress(quiet=as_json) as progress:
        result = run(
            source, folder, formats, snapshot=snapshot, split=split, bbox=bbox, limit=limit,
            progress=progress,
        )  # fmt: skip
    output.table(dataclasses.asdict(result), as_json=as_json)


@cli.command(short_help="Run the whole system offline, to a page.")
@click.argument("folder", type=_FILE)
@click.option("--osm", type=_FILE, help="Render scenes over this PBF, instead of the made-up town.")
@click.option("--seed", default=0, show_default=True, help="Seed of the world and the training.")
@click.option("--size-km", default=20.0, show_default=True, help="Side of the made-up region.")
@click.option("--seeds", default=3, show_default=True, help="Encoders trained and evaluated.")
@click.option("--epochs", type=int, help="Passes over the chips; default: what fits minutes.")
@click.option("--workers", default=2, show_default=True, help="Processes that build shards.")
def demo(
    folder: Path, osm: Path | None, seed: int, size_km: float, seeds: int, epochs: int | None,
    workers: int,
) -> None:  # fmt: skip
    """Run the whole system offline in FOLDER: world, build, pretrain, evaluate, report page."""
    from flows.demo import run_demo

    page = run_demo(
        folder, osm_pbf=osm, seed=seed, size_km=size_km, seeds=seeds, epochs=epochs,
        workers=workers, say=click.echo,
    )  # fmt: skip
    click.echo(f"\nThe report page: {page}")


@cli.command(short_help="Print a config schema or the shard layout.")
@click.argument("what", type=click.Choice(["dataset", "train", "evaluate", "shard"]))
@click.option("--json", "as_json", is_flag=True, help="The shard layout as JSON, not Markdown.")
def schema(what: str, as_json: bool) -> None:
    """Print the JSON Schema of a config, or the table of a shard's arrays."""
    from schemas.config import DatasetConfig
    from schemas.evaluation import TaskConfig
    from schemas.layout import LAYOUT, layout_table
    from schemas.training import TrainConfig

    if what == "shard":
        rows = [spec._asdict() for spec in LAYOUT]
        click.echo(json.dumps(rows, indent=2) if as_json else layout_table())
        return
    models: dict[str, Any] = {
        "dataset": DatasetConfig, "train": TrainConfig, "evaluate": TaskConfig,
    }  # fmt: skip
    click.echo(json.dumps(models[what].model_json_schema(), indent=2))


for command in (
    evaluate, *COMMANDS, *MODEL_COMMANDS, *TRAIN_COMMANDS, *USE_COMMANDS, *DOCTOR_COMMANDS,
):  # fmt: skip
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the console script `geolink`."""
    try:
        status = cli.main(args=arguments, standalone_mode=False)
    except GeoLinkError as error:
        click.secho(f"geolink: {error}", fg="red", err=True)
        sys.exit(MISTAKE)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        click.secho(f"geolink: {error.strerror or error}{where}", fg="red", err=True)
        sys.exit(MISTAKE)
    except click.ClickException as error:
        error.show()
        sys.exit(MISTAKE)
    except (KeyboardInterrupt, click.Abort):
        click.secho("geolink: interrupted; run the same command again to continue", err=True)
        sys.exit(INTERRUPTED)
    except ModuleNotFoundError as error:
        root = (error.name or "").partition(".")[0]
        if root in {"schemas", "pipelines", "geolink", "flows"}:
            raise
        train = {"torch", "torch_geometric", "timm", "lightning", "tensorboard"}
        extra = "train" if root in train else "build"
        click.secho(
            f"geolink: this command needs {root!r}; install geolink-osm[{extra}] (or [all])",
            fg="red", err=True,
        )  # fmt: skip
        sys.exit(MISTAKE)
    sys.exit(status if isinstance(status, int) else 0)

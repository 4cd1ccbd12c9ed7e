"""The command `evaluate`: a task by name and options, or a config file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from schemas.errors import GeoLinkError

if TYPE_CHECKING:
    from geolink.tasks.contracts import ReadPixels
    from schemas.evaluation import TaskConfig

# As in schemas.evaluation, whose import would take longer than to say what options there are.
INPUTS = ("image", "osm", "image+osm")
BASELINES = (
    "random", "imagenet", "pixels", "bands", "osm", "image-only", "osm-only", "difference",
    "majority",
)  # fmt: skip

_FILE = click.Path(path_type=Path)


@click.command(short_help="Evaluate a checkpoint by a task.")
@click.argument("task")
@click.option("--checkpoint", help="Run or checkpoint folder, published file, timm:NAME, random:.")
@click.option("--data", help="Dataset, folder of labelled images, or .npz file.")
@click.option("--inputs", type=click.Choice(INPUTS), help="What the encoder is given.")
@click.option("--labels", help="Of a dataset: region, regions, object, patch, pixel, a CSV file.")
@click.option(
    "--share", "shares", type=float, multiple=True, help="Of the labels; may be repeated."
)
@click.option("--seeds", type=int, help="How often, each with other labels.")
@click.option(
    "--baseline", "baselines", type=click.Choice(BASELINES), multiple=True,
    help="Instead of those that suit the task.",
)  # fmt: skip
@click.option("--cache", type=_FILE, help="Folder of features that are kept.")
@click.option("--output", type=_FILE, help="Folder of the results.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE",
    help="Any other field of the config, such as knn.k=10 (`geolink schema evaluate`).",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def evaluate(task: str, settings: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Evaluate a checkpoint by TASK: knn, linear, finetune, segmentation, change, zones,
    villages.

    TASK may also be a config file (YAML), of which the options change fields. Scores come with
    intervals over test images and with baselines that are treated alike; hyper-parameters are
    chosen on validation alone. With --output: JSON, Markdown, a figure and a page.
    """
    from geolink.cli import output
    from geolink.tasks.evaluate import evaluate as run

    config = make_config(task, {k: v for k, v in options.items() if v not in (None, ())}, settings)
    say = (lambda _: None) if as_json else (lambda line: click.echo(line, err=True))
    output.evaluation_summary(run(config, pixel_reader(), say), as_json=as_json)


def make_config(task: str, options: dict[str, Any], settings: tuple[str, ...]) -> TaskConfig:
    """The config of a command line. Raises GeoLinkError naming what is wrong."""
    import yaml

    from schemas.evaluation import TaskConfig, TaskName
    from schemas.load import load_config, validate_config

    values: dict[str, Any] = {}
    if Path(task).suffix in (".yaml", ".yml", ".json"):
        values = load_config(Path(task), TaskConfig).model_dump(exclude_unset=True)
    elif task in get_args(TaskName):
        values["task"] = task
    else:
        raise GeoLinkError(
            f"there is no task {task!r}: it is one of {', '.join(get_args(TaskName))}, or a config "
            "file (.yaml)"
        )
    values |= options
    if values.get("labels") and Path(str(values["labels"])).suffix == ".csv":
        values["labels"] = Path(str(values["labels"]))
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise GeoLinkError(f"--set {setting}: write KEY=VALUE, such as knn.k=10")
        *groups, name = key.split(".")
        place = values
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                raise GeoLinkError(f"--set {setting}: {group} has no fields")
        place[name] = yaml.safe_load(value)
    return validate_config(values, TaskConfig, "the command line")


def pixel_reader() -> ReadPixels:
    """Reads image files: GeoTIFF and others by GDAL where rasterio is installed."""
    from geolink.tasks.sources.files import read_pixels as plain

    try:
        from pipelines.pixels import read_pixels as raster
    except ModuleNotFoundError:
        return plain
    return lambda path: raster(path) if path.suffix.lower() in (".tif", ".tiff") else plain(path)

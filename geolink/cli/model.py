"""Commands about weights: convert; and `export` of a checkpoint's encoder."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from schemas.errors import GeoLinkError

if TYPE_CHECKING:
    from geolink.export.encoder import Target
    from geolink.models.published import Layout

_FILE = click.Path(path_type=Path)

TARGETS = ("timm", "hf", "torchgeo", "onnx")
LAYOUTS = ("pyg240", "pyg281", "unimodal")


@click.command(short_help="Turn published weights into a checkpoint, or back.")
@click.argument("source", type=_FILE)
@click.argument("target", type=_FILE)
@click.option(
    "--layout", type=click.Choice(LAYOUTS), help="Of the file that is written; default: as it was."
)
@click.option("--config", type=_FILE, help="The model (YAML), where shapes do not tell all of it.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def convert(
    source: Path, target: Path, layout: str | None, config: Path | None, as_json: bool
) -> None:
    """Turn a published file SOURCE into a checkpoint folder TARGET, or a checkpoint into a file.

    A folder as SOURCE (a checkpoint, or a run: its last one) is written as a .pth or .safetensors
    file. Nothing is lost either way.
    """
    from geolink.checkpoint import describe_checkpoint
    from geolink.cli import output
    from geolink.convert import to_checkpoint, to_published
    from schemas.load import load_config
    from schemas.training import ModelConfig

    if source.is_dir():
        if config is not None:
            raise GeoLinkError("--config is for a file as SOURCE: a checkpoint has its own")
        written = to_published(source, target, cast("Layout | None", layout))
        megabytes = target.stat().st_size / 1e6
        output.table(
            {"file": str(target), "layout": written, "megabytes": megabytes}, as_json=as_json
        )
        return
    if layout is not None:
        raise GeoLinkError("--layout is for a checkpoint folder as SOURCE: a file has its own")
    meta = to_checkpoint(source, target, load_config(config, ModelConfig) if config else None)
    about = describe_checkpoint(target)
    if config is None:
        model = meta.config.model
        names = ("num_heads", "fusion_heads", "decoder_heads", "temperature")
        about["not_in_the_file"] = {name: getattr(model, name) for name in names}
    output.table(about, as_json=as_json)
    if config is None and not as_json:
        click.echo("Not in the file: taken as in the published model; --config says otherwise.")


def export_checkpoint(checkpoint: Path | str, folder: Path, to: str, *, as_json: bool) -> None:
    """`geolink export CHECKPOINT FOLDER --to …`."""
    from geolink.cli import output
    from geolink.export.encoder import export_encoder

    done = export_encoder(Path(checkpoint), folder, cast("Target", to))
    figures = dataclasses.asdict(done)
    load = figures.pop("load").replace("FOLDER", str(folder))
    if as_json:
        output.print_json(figures | {"folder": str(folder), "load": load})
        return
    output.table(figures | {"folder": str(folder)}, as_json=False)
    click.echo(f"\n{load}")


COMMANDS = (convert,)

"""The command `doctor`: what is installed and around it, and what to do where it falls short."""

import sys
from pathlib import Path

import click

from geolink.cli.checks import examine
from geolink.cli.surroundings import Finding, State

FAULT = 1
_COLOURS: dict[State, str | None] = {
    "ok": "green",
    "note": None,
    "warning": "yellow",
    "fault": "red",
}


@click.command(short_help="Check the installation and say what to do.")
@click.argument("folder", type=click.Path(path_type=Path), default=Path("."))
@click.option(
    "--clock-url", default="https://pypi.org", show_default=True, metavar="URL",
    help="Server whose clock this machine's is compared with; empty: none.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def doctor(folder: Path, clock_url: str, as_json: bool) -> None:
    """Check the installation, and that datasets and runs can be kept in FOLDER (default: here).

    What is checked follows from the extras that are installed: a machine that only trains needs no
    GDAL. Exit status 1: something that is needed is missing or broken.

    \b
    Examples:
      geolink doctor
      geolink doctor /data/geolink --json
    """
    from geolink.cli import output

    found = examine(folder, clock_url)
    faults = sum(one.state == "fault" for one in found)
    if as_json:
        output.print_json({"usable": not faults, "checks": [one._asdict() for one in found]})
    else:
        _show(found)
    if faults:
        sys.exit(FAULT)


def _show(found: list[Finding]) -> None:
    width = max(len(one.check) for one in found)
    for one in found:
        mark = click.style(f"{one.state:<8}", fg=_COLOURS[one.state])
        click.echo(f"{mark} {one.check:<{width}}  {one.found}")
        if one.remedy:
            click.echo(f"{'':<{width + 11}}-> {one.remedy}")
    faults = sum(one.state == "fault" for one in found)
    warnings = sum(one.state == "warning" for one in found)
    click.echo(
        f"{'not usable yet' if faults else 'usable'}: {faults} "
        f"{'fault' if faults == 1 else 'faults'}, {warnings} "
        f"{'warning' if warnings == 1 else 'warnings'}"
    )


COMMANDS = (doctor,)

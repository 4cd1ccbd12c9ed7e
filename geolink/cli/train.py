"""Commands about pretraining runs: `pretrain`, `compare`."""

import dataclasses
import sys
from pathlib import Path

import click

from schemas.errors import GeoLinkError

_FILE = click.Path(path_type=Path)

MISTAKE = 2
EXIT = {"SIGINT": 130, "SIGTERM": 75}
"""Exit status of a run that a signal stopped, its checkpoint written. 130: what shells expect of
Ctrl-C. 75: EX_TEMPFAIL of sysexits.h, "try again later", which schedulers can tell from a failure
and from a process that SIGTERM killed without a checkpoint (143)."""


@click.command(short_help="Pretrain an encoder, or resume a run.")
@click.argument("config", type=_FILE, required=False)
@click.option("--replay", type=_FILE, help="Run a step again that was not finite, and say why.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def pretrain(config: Path | None, replay: Path | None, as_json: bool) -> None:
    """Pretrain an encoder from CONFIG (YAML); run again to resume an interrupted run.

    On several devices of this machine by `devices` in CONFIG; on several machines, or with another
    launcher, by `torchrun -m geolink.cli pretrain CONFIG` or srun.

    Ctrl-C and SIGTERM stop it after the step at work, with a checkpoint; exit status 130 and 75.

    With --replay instead of CONFIG: a step whose loss was not finite is run again from the file
    that the run named, in memory; it says which terms, parameters and chips make it so.
    """
    if (config is None) == (replay is None):
        raise GeoLinkError("give either CONFIG or --replay FILE")
    if replay is not None:
        _replay(replay, as_json)
        return
    from geolink.cli import output
    from geolink.training.distributed import OtherRankFailed, launched_rank
    from geolink.training.loop import pretrain as run
    from schemas.load import load_config
    from schemas.training import TrainConfig

    assert config is not None
    training = load_config(config, TrainConfig)
    first = launched_rank() == 0
    try:
        with output.step_progress(quiet=as_json or not first) as progress:
            result = run(training, progress=progress)
    except OtherRankFailed:
        sys.exit(MISTAKE)
    if first:
        output.run_summary(result, as_json=as_json)
    if result.stopped_by is not None:
        sys.exit(EXIT[result.stopped_by])


def _replay(path: Path, as_json: bool) -> None:
    from geolink.cli import output
    from geolink.training.replay import replay

    found = dataclasses.asdict(replay(path))
    if not as_json:
        for name in ("parameters", "chips"):
            found[name] = output.some(found[name])
    output.table(found, as_json=as_json)


@click.command(short_help="Compare runs, or evaluations.")
@click.argument("runs", type=_FILE, nargs=-1, required=True)
@click.option("--plot", type=_FILE, help="Draw their curves to this file (PNG, SVG or PDF).")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def compare(runs: tuple[Path, ...], plot: Path | None, as_json: bool) -> None:
    """Compare the folders RUNS: where their configs differ, and what came of it.

    Folders that `geolink evaluate --output` wrote are compared by their predictions: scores, and
    the lead of each over the first, paired by test image.
    """
    from geolink.cli import output

    if all((run / "result.json").is_file() for run in runs):
        from geolink.tasks.compare import compare_results

        if plot is not None:
            raise GeoLinkError("--plot draws curves of pretraining runs, not of evaluations")
        output.columns(compare_results(runs), as_json=as_json)
        return
    from geolink.compare import compare_runs, draw_comparison

    table = compare_runs(runs)
    if plot is not None:
        draw_comparison(runs, table["run"], plot)
    output.columns(table, as_json=as_json)
    if plot is not None and not as_json:
        click.echo(f"wrote {plot}")


COMMANDS = (pretrain, compare)

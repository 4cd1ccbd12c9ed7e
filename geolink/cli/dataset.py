"""Commands that look after a dataset: diff, history, verify, gc, pin, splits check.

Exit status 1: something is damaged, or splits share something; what it is stands on stdout.
"""

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from geolink.cli.location import LOCATION
from schemas.errors import GeoLinkError

if TYPE_CHECKING:
    from pipelines.diff import Difference
    from pipelines.leaks import SplitCheck
    from pipelines.verify import Verification

FOUND = 1
_SHOWN = 20

_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.command(short_help="Say what differs between snapshots or datasets.")
@click.argument("a", type=LOCATION)
@click.argument("b", type=LOCATION)
@click.argument("c", type=int, required=False)
@_JSON
def diff(a: Path | str, b: Path | str, c: int | None, as_json: bool) -> None:
    """Say what differs: `diff DATASET 3 5` between snapshots, `diff A B` between datasets.

    Shards and why they were rebuilt; chips; objects by class; scenes; the dataset's contract.
    `diff DATASET 3` compares snapshot 3 with the latest one.
    """
    from geolink.cli import output
    from pipelines.diff import diff as compare

    number = int(str(b)) if str(b).isdigit() else None
    if c is not None and number is None:
        raise GeoLinkError("give a dataset and two snapshots, or two datasets")
    before, after = ((a, number), (a, c)) if number is not None else ((a, None), (b, None))
    with _progress("comparing", quiet=as_json) as progress:
        result = compare(before, after, progress=progress)
    if as_json:
        output.print_json(_plain(result))
    else:
        _show_diff(result)


@click.command(short_help="List a dataset's snapshots and what each changed.")
@click.argument("dataset", type=LOCATION)
@_JSON
def history(dataset: Path | str, as_json: bool) -> None:
    """List the snapshots of DATASET: when, what they changed, who pins them."""
    from geolink.cli import output
    from pipelines.history import history as steps

    found = steps(dataset)
    if as_json:
        output.print_json(_plain(found))
        return
    for step in found:
        changed = f"{step.built:,} built, {step.rebuilt:,} rebuilt, {step.removed:,} removed"
        click.echo(
            f"{step.snapshot:>8}  {step.published:%Y-%m-%d %H:%M}Z  {step.shards:,} shards "
            f"({changed}), {step.chips:,} chips, {step.objects:,} objects, "
            f"{output.size(step.bytes)}"
        )
        notes = [f"changed: {', '.join(step.contract)}"] if step.contract else []
        notes += [f"pinned by {', '.join(step.pinned)}"] if step.pinned else []
        notes += ["splits certified"] if step.certified else []
        for note in notes:
            click.echo(f"{'':>8}  {note}")


@click.command(short_help="Test every byte and invariant of a dataset.")
@click.argument("dataset", type=LOCATION)
@click.option("--snapshot", type=int, help="Snapshot; default: the latest.")
@click.option(
    "--deep",
    is_flag=False,
    flag_value=3,
    default=0,
    type=click.IntRange(min=0),
    metavar="[N]",
    help="Also build N shards (default 3) anew from the sources of --config, and compare.",
)
@click.option(
    "--config", type=click.Path(path_type=Path), help="Config of the dataset, for --deep."
)
@click.option("--seed", default=0, show_default=True, help="Which shards --deep draws.")
@_JSON
def verify(
    dataset: Path | str, snapshot: int | None, deep: int, config: Path | None, seed: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Test DATASET: checksums, layout, invariants, vocabulary, missing and unknown files."""
    from geolink.cli import output
    from pipelines.verify import verify_dataset
    from schemas.config import DatasetConfig
    from schemas.load import load_config

    if deep and config is None:
        raise GeoLinkError("--deep builds shards anew: give the dataset's config as --config")
    loaded = load_config(config, DatasetConfig) if config else None
    with _progress("verifying", quiet=as_json) as progress:
        result = verify_dataset(
            dataset, snapshot, config=loaded, deep=deep, seed=seed, progress=progress
        )
    if as_json:
        output.print_json(_plain(result))
    else:
        _show_verification(result)
    if result.damages:
        sys.exit(FOUND)


@click.command(short_help="Remove what no kept snapshot needs.")
@click.argument("dataset", type=LOCATION)
@click.option("--keep", default=10, show_default=True, help="Latest snapshots that are kept.")
@click.option(
    "--grace-hours",
    default=24.0,
    show_default=True,
    help="Nothing younger is removed: longer than any build, or reader that pins nothing, runs.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@_JSON
def gc(dataset: Path | str, keep: int, grace_hours: float, dry_run: bool, as_json: bool) -> None:
    """Remove old snapshots of DATASET, and shards and vocabularies that none left needs.

    Pinned snapshots stay. Safe beside builds, readers and another gc.
    """
    from geolink.cli import output
    from pipelines.gc import collect_garbage

    result = collect_garbage(
        dataset, keep=keep, grace=timedelta(hours=grace_hours), dry_run=dry_run
    )
    if as_json:
        output.print_json(_plain(result))
        return
    for name in [*result.shards, *result.files]:
        click.echo(f"{'would remove' if dry_run else 'removed'} {name}")
    output.table(
        {
            "snapshots_removed": result.removed_snapshots,
            "snapshots_kept": result.kept_snapshots,
            "shards_removed": len(result.shards),
            "other_files_removed": len(result.files),
            "freed": output.size(result.bytes),
            "too_young": result.young,
            "spared": len(result.spared),
        },
        as_json=False,
    )


@click.command(short_help="Keep a snapshot from being removed by gc.")
@click.argument("dataset", type=LOCATION)
@click.argument("name")
@click.option("--snapshot", type=int, help="Snapshot; default: the latest.")
@click.option("--remove", is_flag=True, help="Remove the pin of that name.")
@_JSON
def pin(dataset: Path | str, name: str, snapshot: int | None, remove: bool, as_json: bool) -> None:
    """Pin a snapshot of DATASET under NAME: `geolink gc` keeps it until the pin is removed."""
    from geolink.cli import output
    from schemas.dataset import read_info, snapshot_numbers
    from schemas.pins import remove_pin, write_pin

    read_info(dataset)
    if remove:
        if not remove_pin(dataset, name):
            raise GeoLinkError(f"{dataset} has no pin {name!r}; `geolink history` lists them")
        output.table({"removed": name}, as_json=as_json)
        return
    number = snapshot if snapshot is not None else max(snapshot_numbers(dataset), default=0)
    written = write_pin(dataset, name, number)
    output.table({"pin": name, "snapshot": number, "by": written.by}, as_json=as_json)


@click.group(short_help="Check that splits share nothing.")
def splits() -> None:
    """Train, validation and test."""


@splits.command(short_help="Prove that splits, or two datasets, share nothing.")
@click.argument("dataset", type=LOCATION)
@click.option("--snapshot", type=int, help="Snapshot; default: the latest.")
@click.option("--against", type=LOCATION, help="Another dataset, instead of DATASET's own splits.")
@click.option("--against-snapshot", type=int, help="Its snapshot; default: the latest.")
@click.option(
    "--buffer",
    "buffer_m",
    type=click.FloatRange(min=0),
    metavar="METRES",
    help="Least distance between chips; default: the dataset's splits.buffer_m.",
)
@click.option(
    "--allow-crossing",
    is_flag=True,
    help="Only count OSM objects whose parts on either side are farther apart than the buffer.",
)
@_JSON
def check(
    dataset: Path | str, snapshot: int | None, against: Path | str | None,
    against_snapshot: int | None, buffer_m: float | None, allow_crossing: bool, as_json: bool,
) -> None:  # fmt: skip
    """Prove that the splits of DATASET share no pixel, OSM object or place within the buffer.

    What passes gets a certificate beside the snapshot; what leaks is named, and exits with 1.
    """
    from geolink.cli import output
    from pipelines.certificates import certify
    from pipelines.leaks import check_splits

    with _progress("reading", quiet=as_json) as progress:
        result = check_splits(
            dataset, snapshot, against=(against, against_snapshot) if against else None,
            buffer_m=buffer_m, crossing="count" if allow_crossing else "leak", progress=progress,
        )  # fmt: skip
    certificate = certify(result) if result.passed else None
    if as_json:
        found = {"passed": result.passed, "certificate": certificate}
        output.print_json({**_plain(result), **found})
    else:
        _show_check(result, certificate)
    if not result.passed:
        sys.exit(FOUND)


@click.command(short_help="Write a page about a dataset: map, findings, chips.")
@click.argument("dataset", type=LOCATION)
@click.argument("page", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--snapshot", type=int, help="Snapshot; default: the latest.")
def report(dataset: Path | str, page: Path, snapshot: int | None) -> None:
    """Write the report of DATASET to PAGE: one HTML file that needs nothing else.

    A map of the shards by split, state, age and finding; every finding and what to do; the chips
    to look at first; distributions; scenes, OpenStreetMap, lineage and licence.
    """
    from flows.report import write_report

    click.echo(f"wrote {write_report(dataset, page, snapshot=snapshot)}")


COMMANDS = (diff, history, verify, gc, pin, splits, report)


def _plain(value: Any) -> Any:
    """A result as JSON can hold it. (`dataclasses.asdict` cannot copy counters.)"""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@contextmanager
def _progress(what: str, *, quiet: bool) -> Iterator[Any]:
    """A bar of shards; called with shards done and in all."""
    if quiet:
        yield None
        return
    from tqdm import tqdm

    with tqdm(unit="shard", desc=what, file=sys.stderr, disable=None) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


def _show_diff(result: "Difference") -> None:
    from geolink.cli import output

    click.echo(f"{result.before[0]} {result.before[1]} -> {result.after[0]} {result.after[1]}")
    for name, (old, new) in result.contract.items():
        click.echo(f"contract: {name} was {_short(old)}, is {_short(new)}")
    for sign, shards in (("+", result.shards_added), ("-", result.shards_removed)):
        for shard in shards[:_SHOWN]:
            click.echo(f"{sign} shard {shard}")
    for shard, reasons in list(result.shards_rebuilt.items())[:_SHOWN]:
        click.echo(f"~ shard {shard}: {'; '.join(reasons)}")
    tally = result.objects
    output.table(
        {
            "shards": {
                "added": len(result.shards_added), "removed": len(result.shards_removed),
                "rebuilt": len(result.shards_rebuilt), "unchanged": result.shards_unchanged,
                "in another split": len(result.shards_moved),
            },
            "chips": {
                "added": result.chips_added, "removed": result.chips_removed,
                **{f"with another {name}": n for name, n in result.chips_changed.items()},
            },
            "scenes_added": result.scenes_added, "scenes_removed": result.scenes_removed,
        },
        as_json=False,
    )  # fmt: skip
    click.echo(f"{'objects':<24}{'added':>9}{'removed':>9}{'changed':>9}")
    sides = (tally.added, tally.removed, tally.changed)
    for name in sorted({*tally.added, *tally.removed, *tally.changed}):
        click.echo(f"  {name:<22}" + "".join(f"{side[name]:>9,}" for side in sides))
    click.echo(f"  {'all':<22}" + "".join(f"{side.total():>9,}" for side in sides))
    if tally.changed.total():
        shown = ", ".join(f"{name} {n:,}" for name, n in tally.changed_in.items() if n)
        click.echo(f"  changed in: {shown}")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _show_verification(result: "Verification") -> None:
    from geolink.cli import output

    for damage in result.damages:
        click.secho(f"{damage.where}: {damage.what}", fg="red")
    for shard, reasons in result.changed.items():
        click.echo(f"shard {shard} cannot be compared with its sources: {'; '.join(reasons)}")
    for name in result.unknown[:_SHOWN]:
        click.echo(f"unknown file {name}")
    summary: dict[str, Any] = {
        "dataset": str(result.dataset), "snapshot": result.snapshot, "shards": result.shards,
        "chips": result.chips, "objects": result.objects, "bytes": output.size(result.bytes),
        "recomputed": len(result.recomputed), "shards_that_no_snapshot_needs": result.unreferenced,
        "unknown_files": len(result.unknown), "damages": len(result.damages),
    }  # fmt: skip
    output.table(summary, as_json=False)


def _show_check(result: "SplitCheck", certificate: str | None) -> None:
    from geolink.cli import output

    for leak in result.leaks:
        click.secho(f"{leak.kind}: {leak.what}", fg="red")
    output.table(
        {
            "snapshot": result.snapshot, "chips": result.chips, "objects": result.objects,
            "buffer_m": result.buffer_m, "pairs_measured": result.pairs,
            "found": dict(sorted(result.found.items())),
            "certificate": certificate or "none: the splits share something",
        },
        as_json=False,
    )  # fmt: skip

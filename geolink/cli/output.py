"""What commands print: progress on stderr, results on stdout, JSON where a program reads."""

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from schemas.findings import FINDINGS

if TYPE_CHECKING:
    from geolink.training.loop import RunResult
    from pipelines.build import BuildResult
    from pipelines.estimate import Estimate
    from pipelines.explain import Explanation
    from schemas.dataset import SnapshotRow

_NAMED = 10


def print_json(data: object) -> None:
    """Print as indented JSON."""
    click.echo(json.dumps(data, indent=2, default=str))


def table(rows: Mapping[str, Any], *, as_json: bool) -> None:
    """Print names and values in two columns."""
    if as_json:
        print_json(rows)
        return
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        shown = [f"{k} {human(v)}" for k, v in value.items()] if isinstance(value, dict) else None
        text = ", ".join(shown) if shown is not None else human(value)
        click.echo(f"{name.replace('_', ' '):<{width}}  {text or 'none'}")


def columns(table: Mapping[str, Sequence[Any]], *, as_json: bool) -> None:
    """Print names and several values each, one column a thing."""
    if as_json:
        print_json(table)
        return
    rows = [[name.replace("_", " "), *(human(v) for v in values)] for name, values in table.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())


def human(value: object) -> str:
    """A value as people read it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(human(v) for v in value)
    return str(value)


def some(names: Sequence[str], most: int = 5) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def size(n: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def duration(hours: float) -> str:
    """Hours as people read them."""
    if hours < 1 / 60:
        return f"{hours * 3600:,.0f} s"
    return f"{hours * 60:,.0f} min" if hours < 2 else f"{hours:,.0f} h"


@contextmanager
def shard_progress(
    *, quiet: bool
) -> Iterator[Callable[[int, int, "SnapshotRow | None"], None] | None]:
    """A bar of shards with rate and time left; chips and objects so far."""
    if quiet:
        yield None
        return
    with tqdm(unit="shard", desc="building", file=sys.stderr, disable=None) as bar:
        chips = objects = 0

        def update(done: int, total: int, row: "SnapshotRow | None") -> None:
            nonlocal chips, objects
            if row is not None:
                chips, objects = chips + row.chips, objects + row.objects
            bar.total = total
            bar.set_postfix_str(f"{chips:,} chips, {objects:,} objects", refresh=False)
            bar.update(done - bar.n)

        yield update


@contextmanager
def export_progress(*, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar of shards with rate and time left."""
    if quiet:
        yield None
        return
    with tqdm(unit="shard", desc="exporting", file=sys.stderr, disable=None) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


@contextmanager
def step_progress(
    *, quiet: bool
) -> Iterator[Callable[[int, int, Mapping[str, float]], None] | None]:
    """A bar of training steps with rate and time left; the loss and chips per second."""
    if quiet:
        yield None
        return
    with tqdm(unit="step", desc="pretraining", file=sys.stderr, disable=None) as bar:

        def update(step: int, total: int, log: Mapping[str, float]) -> None:
            bar.total = total
            bar.set_postfix_str(
                f"loss {log['loss']:.4f}, {log['samples_per_s']:,.0f} chips/s", refresh=False
            )
            bar.update(step - bar.n)

        yield update


def build_summary(result: "BuildResult", *, as_json: bool) -> None:
    """Counts of a build, its findings, and what failed."""
    rows = result.rows
    split = {s: sum(r.chips for r in rows if r.split == s) for s in ("train", "val", "test")}
    summary = {
        "dataset": str(result.dataset),
        "snapshot": result.snapshot,
        "published": result.published,
        "shards": {
            "built": result.built, "unchanged": result.unchanged, "removed": result.removed,
            "failed": len(result.failed),
        },
        "chips": sum(r.chips for r in rows),
        "chips_by_split": split,
        "objects": sum(r.objects for r in rows),
        "edges": sum(r.edges for r in rows),
        "bytes": sum(r.bytes for r in rows),
        "seconds": round(result.seconds, 1),
        "findings": result.qc,
    }  # fmt: skip
    if as_json:
        print_json({**summary, "named": result.named, "failed": result.failed})
        return
    if result.snapshot is None:
        summary["snapshot"] = "none published: some shards failed"
    summary["bytes"] = size(sum(r.bytes for r in rows))
    del summary["findings"]
    table(summary, as_json=False)
    findings(result.qc, result.named)
    for shard, message in list(result.failed.items())[:10]:
        click.secho(f"shard {shard} failed: {message}", fg="red", err=True)
    if result.failed:
        click.secho(
            f"{len(result.failed)} of {len(result.failed) + len(rows)} shards failed; run again "
            "to build only those",
            fg="red", err=True,
        )  # fmt: skip


def estimate(found: "Estimate", *, as_json: bool) -> None:
    """What a build would do, shards grouped by why."""
    if as_json:
        print_json(found.record())
        return
    table(
        {
            "dataset": str(found.dataset),
            "shards": {
                "to build": len(found.shards), "unchanged": found.unchanged,
                "removed": found.removed,
            },
            "chips": found.chips,
            "scenes": found.scenes,
            "to read": f"{size(found.read_bytes)}, {found.read_requests:,} requests",
            "to write": f"{size(found.write_bytes)}, {found.write_requests:,} requests",
            "time": f"{duration(found.hours)} ({duration(found.worker_hours)} of one worker)",
            "cost": f"{found.cost_once:,.2f} once, {found.cost_month:,.2f} a month",
            "rates": found.rates,
        },
        as_json=False,
    )  # fmt: skip
    for why, shards in Counter(found.shards.values()).most_common(20):
        click.echo(f"  {shards:,} {'shard' if shards == 1 else 'shards'}: {why}")
    findings(found.skipped, found.named)


def explanation(found: "Explanation", *, as_json: bool) -> None:
    """A shard's inputs, scenes and past, and what a rebuild would change."""
    if as_json:
        print_json(dataclasses.asdict(found) | {"row": found.row._asdict()})
        return
    row, inputs = found.row, found.made_from["inputs"]
    if found.chip is not None:
        click.secho(f"chip {found.chip['chip']}", bold=True)
        table({k: v for k, v in found.chip.items() if k != "chip"}, as_json=False)
        click.echo()
    click.secho(f"shard {row.shard}", bold=True)
    about = {
        "split": row.split, "chips": row.chips, "objects": row.objects, "path": row.path,
        "made_from": f"{len(inputs.get('scenes', []))} candidate scenes, "
        f"OSM of {row.osm_timestamp or 'unknown time'}",
        "stages": found.made_from["stages"], "findings": row.qc,
    }  # fmt: skip
    table(about, as_json=False)
    if found.considered:
        click.secho("\nscenes considered, best first", bold=True)
    for scene in found.considered:
        mark = "+" if scene.get("chosen") else "-"
        click.echo(f"  {mark} {scene['scene']}: {scene.get('reason', '')}")
        if scene["scene"] in found.radiometry:
            click.echo(f"      offset {found.radiometry[scene['scene']]}")
    click.secho("\npast", bold=True)
    for number, reason in found.past:
        click.echo(f"  snapshot {number}: {reason}")
    if found.rebuild is not None:
        click.secho("\na rebuild would change", bold=True)
        for reason in found.rebuild or ["nothing"]:
            click.echo(f"  {reason}")


def findings(counts: Mapping[str, int], named: Mapping[str, Sequence[str]]) -> None:
    """What was found, gravest first: how often, what it means, and what it is about."""
    order = ("error", "warning", "note")
    found = sorted((order.index(FINDINGS[code].severity), code) for code in counts)
    width = max((len(code) for code in counts), default=0)
    colour = {"error": "red", "warning": "yellow", "note": None}
    for grade, code in found:
        about = FINDINGS[code]
        mark = click.style(f"{order[grade]:<8}", fg=colour[about.severity])
        click.echo(f"{mark} {counts[code]:>7,}  {code:<{width}}  {about.meaning}")
        which = named.get(code, ())
        if which:
            click.echo(f"{'':<18}{some(which, _NAMED)}")
    if found:
        click.echo("What to do about each is in docs/findings.md.")


def run_summary(result: "RunResult", *, as_json: bool) -> None:
    """Where a run's checkpoint and page are, its last loss, and what happened on the way."""
    if as_json:
        print_json(dataclasses.asdict(result))
        return
    summary = {
        "run": shortest(result.run),
        "checkpoint": shortest(result.checkpoint),
        "page": shortest(result.run / "index.html"),
        "steps": f"{result.step:,} of {result.steps:,}",
        "loss": result.loss,
    }
    if result.samples_per_s:
        summary["chips_a_second"] = round(result.samples_per_s, 1)
    table(summary, as_json=False)
    for note in result.notes:
        click.echo(note)
    if not (result.finished and result.samples_per_s):
        click.secho(result.message, fg=None if result.finished else "yellow")


def shortest(path: Path) -> str:
    """A path from here, if it is below."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def evaluation_summary(result: Mapping[str, Any], *, as_json: bool) -> None:
    """Scores with their intervals, ours first."""
    if as_json:
        print_json(result)
        return
    name = result["measures"][0]
    click.echo(
        f"{result['task']} on {result['held_out']:,} test images of {result['dataset']}, "
        f"{result['classes']} classes: {name.replace('_', ' ')}"
    )
    for method, points in result["curve"].items():
        for point in points:
            low, high = point["interval"][name]
            labels = f"{point['labels']:>7,} labels  " if len(points) > 1 else ""
            lead = ""
            if "difference" in point:
                value, a, b = (100 * v for v in point["difference"][name])
                lead = f"   ours {value:+.1f} ({a:+.1f} to {b:+.1f}), p {point['p'][name]:.3f}"
            click.echo(
                f"  {method:<12} {labels}{point['score'][name]:6.1%}   95 % interval {low:.1%} to "
                f"{high:.1%}{lead}"
            )
    for note in result["notes"]:
        click.echo(f"  note: {note}")

"""Histograms as inline SVG, in the page's colours."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike

from flows.report.survey import OBJECT_EDGES, SHARE_BINS, SHIFT_BINS, SHIFT_STEP_PX, Survey
from schemas.dataset import DatasetInfo

_WIDTH, _HEIGHT = 360.0, 190.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 8.0, 8.0, 22.0, 24.0


@dataclass(frozen=True)
class Chart:
    """A figure of the page."""

    title: str
    svg: Markup
    caption: str


def charts(found: Survey, info: DatasetInfo) -> list[Chart]:
    """Every distribution of which there is anything to show."""
    shares = [f"{100 * n // SHARE_BINS}–{100 * (n + 1) // SHARE_BINS} %" for n in range(SHARE_BINS)]
    percent = [(0.0, "0 %"), (SHARE_BINS / 2, "50 %"), (float(SHARE_BINS), "100 %")]
    made = [
        Chart(
            "Valid pixels", _bars([found.valid], shares, percent, "chips"),
            "Chips by the share of their pixels that hold an image: neither masked as cloud, "
            "shadow or defect, nor without data.",
        ),
        Chart(
            "Objects in a chip", _bars([found.objects], *_object_axis(), "chips"),
            "Chips by the number of OpenStreetMap objects in them.",
        ),
    ]  # fmt: skip
    if found.months.keys() - {""}:
        months, counts = _months(found)
        ticks = [(0.5, months[0]), (len(months) - 0.5, months[-1])][: len(months)]
        made.append(
            Chart(
                "When the images were taken", _bars([counts], months, ticks, "chips"),
                "Chips by the month of the scene that most of their pixels come from."
                + (f" Of {found.months['']:,} chips the time is not known."
                   if found.months[""] else ""),
            )
        )  # fmt: skip
    if found.cloud_used.any() or found.cloud_unused.any():
        made.append(
            Chart(
                "Cloud over the shard",
                _bars([found.cloud_used, found.cloud_unused], shares, percent, "scenes"),
                "Scenes considered for a shard, by the share of their pixels there that is masked. "
                f"Filled: used ({int(found.cloud_used.sum()):,}). "
                f"Pale: not used ({int(found.cloud_unused.sum()):,}).",
            )
        )  # fmt: skip
    if found.shift.any():
        made.append(_shift(found, info.grid.gsd_m))
    return made


def _shift(found: Survey, gsd_m: float) -> Chart:
    names = [f"{n * SHIFT_STEP_PX:g}–{(n + 1) * SHIFT_STEP_PX:g} px" for n in range(SHIFT_BINS)] + [
        f"over {SHIFT_BINS * SHIFT_STEP_PX:g} px"
    ]
    per = 1 / SHIFT_STEP_PX
    ticks = [(0.0, "0"), (2 * per, "2 px"), (4 * per, "4 px"), (SHIFT_BINS + 0.5, "more")]
    sure = int(found.shift.sum())
    east, north = found.shift_sum_m / sure
    where = (
        f"{abs(east):.1f} m {'east' if east > 0 else 'west'} and "
        f"{abs(north):.1f} m {'north' if north > 0 else 'south'}"
    )
    return Chart(
        "Image against map", _bars([found.shift], names, ticks, "chips"),
        f"How far a chip's image lies off its map, for the {sure:,} of {found.chips:,} chips where "
        f"that can be told with certainty; a pixel is {gsd_m:g} m. On average the image lies "
        f"{where} of the map.",
    )  # fmt: skip


def _object_axis() -> tuple[list[str], list[tuple[float, str]]]:
    upper = [f"–{b - 1:,}" if b - a > 1 else "" for a, b in pairwise(OBJECT_EDGES)]
    names = [f"{a:,}{u} objects" for a, u in zip(OBJECT_EDGES, [*upper, " or more"], strict=True)]
    ticks = [(n + 0.5, f"{OBJECT_EDGES[n]:,}") for n in (0, 4, 7, 10, 13)]
    return names, ticks


def _months(found: Survey) -> tuple[list[str], list[int]]:
    """Whole years by month from the first to the last, and their chips; by year where many."""
    known = sorted(found.months.keys() - {""})
    first, last = np.datetime64(f"{known[0][:4]}-01"), np.datetime64(f"{known[-1][:4]}-12")
    months = np.arange(first, last + 1).astype(str).tolist()
    if len(months) <= 72:
        return months, [found.months[m] for m in months]
    years = sorted({m[:4] for m in months})
    return years, [sum(c for m, c in found.months.items() if m[:4] == y) for y in years]


def _bars(
    series: Sequence[ArrayLike], names: Sequence[str], ticks: Sequence[tuple[float, str]], what: str
) -> Markup:
    """Bars of counts, further series stacked in paler tone; ticks: (position in bars, text)."""
    counts = np.array(series, np.int64)
    most, bars = max(int(counts.sum(axis=0).max()), 1), counts.shape[1]
    step = (_WIDTH - _LEFT - _RIGHT) / bars
    tall = _HEIGHT - _TOP - _BOTTOM
    floor = _HEIGHT - _BOTTOM
    parts = []
    for n in range(bars):
        base = floor
        for k, count in enumerate(counts[:, n].tolist()):
            if not count:
                continue
            # A bar that is there is seen.
            height = max(tall * count / most, 1.0)
            base -= height
            text = f"{names[n]}: {count:,} {what}" + (
                ("", " not used")[k] if len(counts) > 1 else ""
            )
            parts.append(
                Markup(
                    '<rect class="bar{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">'
                    "<title>{}</title></rect>"
                ).format(k, _LEFT + n * step + 0.5, base, max(step - 1, 1), height, text)
            )
    parts.append(
        Markup('<line class="axis" x1="{0:g}" x2="{1:g}" y1="{2:g}" y2="{2:g}"/>').format(
            _LEFT, _WIDTH - _RIGHT, floor
        )
    )
    parts.append(
        Markup('<line class="top" x1="{0:g}" x2="{1:g}" y1="{2:g}" y2="{2:g}"/>').format(
            _LEFT, _WIDTH - _RIGHT, _TOP
        )
    )
    parts.append(
        Markup('<text x="{:g}" y="{:g}">{}</text>').format(_LEFT, _TOP - 6, f"{most:,} {what}")
    )
    for at, text in ticks:
        x = _LEFT + at * step
        side = "start" if x < 30 else "end" if x > _WIDTH - 40 else "middle"
        x = _LEFT if side == "start" else _WIDTH - _RIGHT if side == "end" else x
        parts.append(
            Markup('<text x="{:.1f}" y="{:g}" text-anchor="{}">{}</text>').format(
                x, _HEIGHT - 7, side, text
            )
        )
    return Markup('<svg class="chart" viewBox="0 0 {:g} {:g}" role="img">{}</svg>').format(
        _WIDTH, _HEIGHT, Markup("").join(parts)
    )

"""The report page: what it says, what it escapes, where it draws, and how a browser shows it."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from pyproj import Geod

from flows.report import write_report
from flows.report.layers import Layer
from flows.report.map import CELLS, draw_map
from flows.report.pictures import typical_chips, worst_chips
from flows.report.projection import corners, project_for, to_plane
from geolink.cli.main import cli
from geolink.page.base import foreign
from pipelines.catalog import open_catalog
from pipelines.snapshot import publish
from pipelines.store import prepare_dataset
from schemas import storage_objects
from schemas.dataset import SnapshotRow, read_snapshot, vocabulary_name
from schemas.findings import CHIP_FLAGS, FINDINGS
from schemas.grid import Block, Grid, chip_name, unpack_chip
from schemas.licences import Licence
from schemas.storage import storage
from tests.servers.s3 import environment, s3
from tests.shards import make_grid, make_info, random_arrays, store_row, write_vocabulary

HOSTILE = "<script>document.title='taken'</script>"
STREET = "شارع\u202eالملك\x07"
ERROR = f"{HOSTILE} & no pixels"


def _dataset(folder: Path, rows: int = 6) -> Path:
    """A dataset with every finding there is, and hostile texts wherever others write."""
    info = make_info(
        name=f"{HOSTILE} {STREET}",
        licences=(Licence(source="s<2>", licence="CC-BY-4.0", attribution=f"© {HOSTILE}"),),
    )
    prepare_dataset(folder, info)
    kept = []
    for n in range(rows):
        block = Block(32632, 10 + n % 3, 100 + n // 3)
        arrays = random_arrays(n, block=block)
        arrays["finding"] &= np.uint32(0 if n == rows - 1 else 0b111)
        row = store_row(folder, block, arrays, ("train", "val", "test")[n % 3])
        flags = {
            code: sum(bits >> i & 1 for bits in row.chip_findings)
            for i, code in enumerate(CHIP_FLAGS)
        }
        others = {c: 1000 + 7 * i + n for i, c in enumerate(FINDINGS) if c not in CHIP_FLAGS}
        qc = {**flags, **others} if n < rows - 1 else {}
        kept.append(row._replace(qc={code: count for code, count in qc.items() if count}))
    key = write_vocabulary(folder, 4)
    path = folder / vocabulary_name(key)
    table = pq.read_table(path)
    values = [
        HOSTILE if i == 0 else STREET if i == 1 else str(v) for i, v in enumerate(table["value"])
    ]
    objects = [10_000 - i for i in range(len(values))]
    table = table.set_column(2, "value", [values]).set_column(3, "objects", [objects])
    pq.write_table(table, path)
    publish(folder, kept, key, info)
    return folder


def _catalog(dataset: Path) -> None:
    """A catalog with two builds: one that published, and one in which a shard failed."""
    shards = [row.shard for row in read_snapshot(dataset).rows]
    at = datetime(2026, 1, 2, 3, 4)
    with open_catalog(dataset / "catalog.duckdb") as con:
        config = json.dumps({"scenes": {"stac": "https://example.org/api?token=secret"}})
        con.execute(
            "INSERT INTO builds VALUES (1, ?, ?, ?, '9.8.7', 1, 'published'), "
            "(2, ?, ?, '{}', '9.8.8', NULL, 'partial')", [at, at, config, at, at],
        )  # fmt: skip
        con.executemany(
            "INSERT INTO shards (build, shard, content_key, state) VALUES (1, ?, 'k', 'built')",
            [[shard] for shard in shards],
        )
        con.execute(
            "INSERT INTO shards (build, shard, content_key, state, message) "
            "VALUES (2, '32632-00014-00101', 'k', 'failed', ?)", [ERROR],
        )  # fmt: skip
        con.execute(
            "INSERT INTO findings (build, code, severity, count) "
            "VALUES (1, 'osm_filtered', 'note', 123456)"
        )
        for scene, chosen, reason in (("a", True, "gave pixels"), ("seen<", False, "cloudy & low")):
            con.executemany(
                "INSERT INTO scenes VALUES (1, ?, ?, ?, 12.5, true, 0.25, 1.0, ?, 0, ?)",
                [[shard, scene, at, chosen, reason] for shard in shards],
            )
        con.execute(
            "INSERT INTO extracts VALUES ('e', 'town.pbf', 'abc123', 5000000, ?, 4321, 'x')",
            ["2026-01-01T00:00:00Z"],
        )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _dataset(tmp_path_factory.mktemp("report") / "data")


@pytest.fixture(scope="module")
def page(dataset: Path) -> str:
    out = dataset.parent / "report.html"
    return write_report(dataset, out).read_text(encoding="utf-8")


def _text(page: str) -> str:
    """What a page says: no tags, entities resolved, white space as one blank."""
    body = re.sub(r"<[^>]*>", " ", page.partition("<body>")[2])
    return " ".join(html.unescape(body).split())


def test_every_finding_is_told_with_its_count_its_meaning_and_what_to_do(
    dataset: Path, page: str
) -> None:
    total: dict[str, int] = {}
    for row in read_snapshot(dataset).rows:
        for code, n in row.qc.items():
            total[code] = total.get(code, 0) + n
    assert set(FINDINGS) - set(CHIP_FLAGS) < set(total)
    found = page[page.index('id="findings"') : page.index("Chips to look at")]
    rows = {
        m: _text("<body>" + r) for r in found.split("<tr>") for m in re.findall(r"<code>(\w+)", r)
    }
    assert rows.keys() == total.keys()
    for code, n in total.items():
        assert f" {n:,} " in rows[code], code
        assert FINDINGS[code].severity in rows[code]
        for text in (FINDINGS[code].meaning, FINDINGS[code].remedy):
            assert " ".join(text.split()) in rows[code]


def test_the_page_states_the_numbers_of_its_snapshot(dataset: Path, page: str) -> None:
    rows, text = read_snapshot(dataset).rows, _text(page)
    assert f"{sum(r.chips for r in rows)} chips" in text
    assert f"{sum(r.objects for r in rows):,} OSM objects" in text
    assert f"{sum(r.edges for r in rows):,} spatial relations" in text
    flagged = sum(bits != 0 for r in rows for bits in r.chip_findings)
    assert f"{flagged} of {sum(r.chips for r in rows)} chips carry a finding" in text
    for split, name in (("train", "training"), ("val", "validation"), ("test", "test")):
        of = [r for r in rows if r.split == split]
        chips = sum(r.chips for r in of)
        assert re.search(rf"\b{name} {len(of)} {chips} {100 * chips / 36:.1f} %", text)
    assert "Snapshot 1," in text
    assert "has no catalog.duckdb beside it" in text


def test_text_of_others_is_escaped_and_keeps_its_direction_to_itself(page: str) -> None:
    assert "<script" not in page
    assert html.escape(HOSTILE).replace("&#x27;", "&#39;") in page
    assert "\u202e" not in page
    assert "\x07" not in page
    assert page.count(f"={html.escape(HOSTILE).replace('&#x27;', '&#39;')}</bdi>") == 1
    assert str(foreign("شارع")) == "<bdi>شارع</bdi>"
    assert str(foreign("a\x00b\u202e")) == "<bdi>a⌈0000⌉b⌈202E⌉</bdi>"


def test_a_page_asks_nothing_of_the_network(page: str) -> None:
    addresses = re.findall(r"""(?:src|href|action|data)\s*=\s*["']([^"']*)""", page)
    assert addresses
    assert all(a.startswith(("data:image/", "#")) for a in addresses)
    assert "@import" not in page
    assert "url(" not in page
    assert "default-src 'none'" in page


def test_the_same_dataset_gives_the_same_page(dataset: Path, page: str, tmp_path: Path) -> None:
    assert write_report(dataset, tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_a_catalog_adds_failed_shards_scenes_ruled_out_and_inputs_left_out(
    dataset: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(dataset, copy)
    _catalog(copy)
    page = write_report(copy, tmp_path / "page.html").read_text(encoding="utf-8")
    text = _text(page)
    assert "could not make 1 shard." in text
    assert f"32632-00014-00101 {ERROR}" in text
    in_shards = sum(row.qc.get("osm_filtered", 0) for row in read_snapshot(copy).rows)
    assert f" {in_shards + 123_456:,} cases" in text
    assert "seen< 2026-01-02 0 shards 6 shards 12 % 25 % cloudy & low" in text
    assert "cloudy & low" in text
    assert "9.8.7" in text
    assert "town.pbf" in text
    assert "4,321" in text
    assert "secret" not in page


def test_what_cannot_be_read_or_written_is_one_sentence(dataset: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke(cli, ["report", str(dataset), str(tmp_path / "no" / "page.html")])
    assert "cannot write" in str(run.exception)
    run = CliRunner().invoke(cli, ["report", str(tmp_path), str(tmp_path / "page.html")])
    assert "no GeoLink dataset" in str(run.exception)
    done = CliRunner().invoke(cli, ["report", str(dataset), str(tmp_path / "page.html")])
    assert done.exit_code == 0
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_a_large_dataset_gives_a_small_page_that_says_what_it_left_out(
    dataset: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(dataset, copy)
    found = read_snapshot(copy)
    # Ten thousand rows over the six shards that are there.
    rows = [
        found.rows[n % 5]._replace(
            shard=f"32632-{300 + n % 100:05d}-{300 + n // 100:05d}", scenes=[f"scene-{n:06d}"]
        )
        for n in range(10_000)
    ]
    publish(copy, rows, found.vocabulary, found.info)
    page = write_report(copy, tmp_path / "page.html")
    assert page.stat().st_size < 3_000_000
    text = _text(page.read_text(encoding="utf-8"))
    assert "Measured on 1,000 of 10,000 shards" in text
    assert "10,000 shards" in text
    assert "here are the 40 that were used most" in text
    assert f"{sum(r.objects for r in rows):,} OSM objects" in text


def test_a_dataset_in_an_object_store_has_the_same_report(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, there = tmp_path / "data", "s3://data/town"
    shutil.copytree(dataset, copy)
    _catalog(copy)
    with s3() as address:
        for name, value in environment(address).items():
            monkeypatch.setenv(name, value)
        storage_objects._bucket.cache_clear()
        for path in sorted(p for p in copy.rglob("*") if p.is_file()):
            storage(there).write(path.relative_to(copy).as_posix(), path.read_bytes())
        pages = [
            write_report(place, tmp_path / f"{n}.html").read_text(encoding="utf-8")
            for n, place in enumerate((copy, there))
        ]
    times = re.compile(r"2\d{3}-\d\d-\d\d \d\d:\d\d")
    assert times.sub("", pages[0]) == times.sub("", pages[1])


# Chips


def _row(shard: str, bits: list[int]) -> SnapshotRow:
    return SnapshotRow(
        shard, "", "", "", "train", len(bits), 10, 0, 0, 32632, [0, 0, 1, 1], [], "", [], [], [],
        {}, bits,
    )  # fmt: skip


def test_the_worst_chips_show_every_finding_gravest_first_whatever_the_order_of_rows() -> None:
    bit = {code: 1 << n for n, code in enumerate(CHIP_FLAGS)}
    rows = [_row(f"s{n:03d}", [bit["chip_cloudy"], 0]) for n in range(200)]
    rows[150] = _row("s150", [0, bit["chip_osm_sparse"]])
    rows[120] = _row("s120", [bit["chip_shifted"], bit["chip_shifted"] | bit["chip_constant"]])
    picked = worst_chips(rows)
    assert (picked[0][0].shard, picked[0][1]) == ("s120", 1)
    assert len(picked) == len({(row.shard, n) for row, n in picked}) == 12
    seen = [row.chip_findings[n] for row, n in picked]
    for code in ("chip_cloudy", "chip_shifted", "chip_constant", "chip_osm_sparse"):
        assert any(bits & bit[code] for bits in seen)
    again = worst_chips(rows[::-1])
    assert [(r.shard, n) for r, n in again] == [(r.shard, n) for r, n in picked]
    assert [n for _, n in typical_chips(rows[:1])] == [1]
    assert worst_chips([_row("s", [0, 0])]) == []


def test_a_chip_is_pictured_with_its_name_and_findings(dataset: Path, page: str) -> None:
    row = read_snapshot(dataset).rows[0]
    picture = page[page.index('<figure class="chip">') :]
    ids = re.findall(r'<span class="id">([\d-]+)</span></figcaption>', picture)
    names = {
        chip_name(unpack_chip(packed))
        for n in range(6)
        for packed in random_arrays(n, block=Block(32632, 10 + n % 3, 100 + n // 3))["chip_id"]
    }
    assert row.chips == 6
    assert len(ids) >= 12
    assert set(ids) <= names
    assert picture.count("data:image/png;base64,") == 2 * len(ids)


# The map


def _layer(n: int) -> Layer:
    """A view that gives every shard a class of its own."""
    return Layer("v", "", [("train", "")] * n, np.arange(n))


def _shapes(svg: str) -> list[np.ndarray]:
    """Corners of each path of a map, by class."""
    found = []
    paths = re.findall(r'<path class="a(\d+)" d="M([^"]*)z"', svg)
    for _, path in sorted(paths, key=lambda p: int(p[0])):
        x, y, *steps = (
            float(v) for v in re.findall(r"-?[\d.]+(?:e-?\d+)?", path.replace("l", " "))
        )
        found.append(np.array([x, y]) + np.cumsum([[0, 0], *np.reshape(steps, (-1, 2))], axis=0))
    return found


def _area(shape: np.ndarray) -> float:
    x, y = shape.T
    return abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 2


@pytest.mark.parametrize(
    "names",
    [
        ["32631-00139-02200", "32632-00058-02200", "32631-00100-02800"],
        ["32660-00148-00100", "32601-00050-00100"],
        ["32760-00148-01900", "32701-00050-01900"],
    ],
)
def test_areas_on_the_map_are_true_over_zones_and_the_antimeridian(names: list[str]) -> None:
    grid = Grid(gsd_m=10, size=32, patch=8, shard_side=16)
    lonlat = corners(grid, names, {})
    drawn = draw_map(lonlat, [_layer(len(names))], names)
    # Near to each other in truth is near to each other on the map, on either side of 180 degrees.
    plane = to_plane(project_for(lonlat.reshape(-1, 2)), lonlat).mean(axis=1)
    middle = lonlat.mean(axis=1)
    metres = Geod(ellps="WGS84").inv(*middle[0], *middle[1])[2]
    assert np.hypot(*(plane[0] - plane[1])) == pytest.approx(metres, rel=0.01)
    shapes = _shapes(str(drawn.svg))
    assert len(shapes) == len(names)
    if not drawn.marks:
        areas = np.array([_area(s) for s in shapes])
        assert np.allclose(areas, areas.mean(), rtol=0.05)
    assert drawn.scale is not None
    assert all(0 <= label.at <= 100 for label in drawn.meridians + drawn.parallels)


def test_neighbouring_shards_meet_on_the_map() -> None:
    grid = make_grid()
    names = ["32632-00010-00100", "32632-00011-00100", "32632-00010-00101"]
    a, b, c = _shapes(str(draw_map(corners(grid, names, {}), [_layer(3)], names).svg))
    assert b[:, 0].min() == pytest.approx(a[:, 0].max(), abs=3)
    assert c[:, 1].max() == pytest.approx(a[:, 1].min(), abs=3)
    assert _area(a) == pytest.approx(np.ptp(a[:, 0]) * np.ptp(a[:, 1]), rel=0.05)


def test_dates_of_a_place_are_one_shape_and_very_many_shards_are_drawn_together() -> None:
    grid = make_grid()
    dates = ["32632-00010-00100", "32632-00010-00100-d1", "32632-00011-00100"]
    drawn = draw_map(corners(grid, dates, {}), [_layer(3)], dates)
    assert (drawn.shapes, drawn.shards) == (2, 2)
    side = 110
    names = [f"32632-{c:05d}-{r:05d}" for c in range(300, 300 + side) for r in range(side)]
    value = np.zeros(len(names), np.int64)
    value[5000] = 1
    layer = Layer("v", "", [("fine", ""), ("error", "")], 1 - value, first_wins=True)
    drawn = draw_map(corners(grid, names, {}), [layer], names)
    assert CELLS / 4 < drawn.shapes <= CELLS
    assert drawn.shards > 1
    assert len(re.findall(r'class="a0"', str(drawn.svg))) == 1


def test_places_all_over_the_world_are_on_one_map() -> None:
    names = ["32632-00010-00100", "32701-00030-00800", "32760-00050-00400", "32618-00030-00300"]
    grid = Grid(gsd_m=10, size=256, patch=8, shard_side=4)
    drawn = draw_map(corners(grid, names, {}), [_layer(4)], names)
    assert len(_shapes(str(drawn.svg))) == 4
    assert drawn.scale is None
    assert drawn.marks == 4
    for shape in _shapes(str(drawn.svg)):
        assert ((shape > -5) & (shape < 1005)).all()


# A browser

_MEASURE = """<script>
addEventListener('load', () => {
  const wide = document.documentElement, views = [];
  const style = e => getComputedStyle(e);
  for (const radio of document.querySelectorAll('input[name=view]')) {
    radio.checked = true;
    const fills = [...document.querySelectorAll('.frame path')].map(p => style(p).fill);
    const legends = [...document.querySelectorAll('.legend')];
    const shown = legends.filter(l => style(l).display != 'none').length;
    views.push({fills: [...new Set(fills)], legends: shown});
  }
  const pictures = [...document.images].map(i => i.complete && i.naturalWidth > 0);
  parent.document.body.dataset.measured = JSON.stringify({
    scroll: wide.scrollWidth, client: wide.clientWidth, views, pictures,
    paper: style(document.body).backgroundColor, title: document.title,
    fetched: performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')),
  });
});
</script></body>"""


@dataclass(frozen=True)
class Browser:
    """A headless browser."""

    program: str
    profile: Path

    def run(self, *flags: str) -> subprocess.CompletedProcess[str]:
        """Run it once."""
        return subprocess.run(
            [
                self.program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
                "--no-first-run", "--disable-background-networking", "--disable-component-update",
                "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr",
                f"--user-data-dir={self.profile}", *flags,
            ],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    found = [shutil.which(n) for n in ("chromium", "google-chrome", "chromium-browser")]
    program = next((path for path in found if path), None)
    if program is None:
        pytest.skip("no headless browser: neither chromium nor google-chrome is installed")
    return Browser(program, tmp_path_factory.mktemp("profile"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_shows_the_page_without_overflow_errors_or_requests(
    browser: Browser, page: str, tmp_path: Path, width: int, scheme: str
) -> None:
    # The page's policy forbids scripts, so the measuring copy goes without it.
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    assert policy.search(page)
    copy, picture = tmp_path / "page.html", tmp_path / "page.png"
    measuring = html.escape(policy.sub("", page).replace("</body>", _MEASURE))
    # In a frame of that width, for the window of a headless browser has a least one.
    copy.write_text(
        '<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{measuring}"></iframe>',
        encoding="utf-8",
    )
    flags = (
        f"--window-size={width},900",
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
    )
    done = browser.run(*flags, "--dump-dom", copy.as_uri())
    assert "CONSOLE" not in done.stderr, done.stderr
    match = re.search(r'data-measured="([^"]*)"', done.stdout)
    assert match, done.stderr[-2000:]
    measured = json.loads(html.unescape(match[1]))
    assert measured["client"] == width
    assert measured["scroll"] <= width
    assert measured["fetched"] == []
    assert all(measured["pictures"])
    assert measured["title"].endswith("dataset report")
    # A view that is chosen paints the shards and shows its own legend.
    assert len(measured["views"]) >= 10
    assert all(view["legends"] == 1 for view in measured["views"])
    assert len(measured["views"][0]["fills"]) == 3
    light = sum(int(v) for v in re.findall(r"\d+", measured["paper"])[:3])
    assert (light > 600) == (scheme == "light")
    # The page as it is, with its policy, is drawn.
    whole = tmp_path / "whole.html"
    whole.write_text(page, encoding="utf-8")
    done = browser.run(*flags, f"--screenshot={picture}", whole.as_uri())
    assert "CONSOLE" not in done.stderr, done.stderr
    assert picture.stat().st_size > 10_000

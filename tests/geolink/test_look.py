"""A run that is looked at is the same run; what is told of it is true."""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from geolink.checkpoint import checkpoints, load_model, read_meta
from geolink.graph import GraphBatch
from geolink.models.fusion import Attention
from geolink.models.guided import CrossAttention
from geolink.models.ops import patchify
from geolink.page.charts import Curve, draw_curves, nice_ticks
from geolink.page.run import write_run_page
from geolink.reader import open_dataset, tag_table
from geolink.stream import read_chips
from geolink.tasks.evaluate import evaluate
from geolink.training.log import read_log
from geolink.training.loop import pretrain
from geolink.training.parts import take
from geolink.training.pictures import (
    Shown,
    _unpatchify,
    attention_to_objects,
    pick_objects,
    principal_colors,
)
from schemas.errors import GeoLinkError
from schemas.evaluation import TaskConfig
from schemas.training import TrainConfig
from tests.flows.test_report import Browser, browser
from tests.geolink.test_training import assert_same_run, config
from tests.shards import make_dataset

__all__ = ["browser"]

SPLITS = ("train", "train", "train", "val")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("dataset"), shards=4, chips=7, splits=SPLITS)


def looked_config(dataset: Path, run: Path, **changes: Any) -> TrainConfig:
    return config(dataset, run, **{"evaluate_every": 5, "keep": {"last": 1, "best": 1}, **changes})


@pytest.fixture(scope="module")
def looked(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("looked") / "run"
    assert pretrain(looked_config(dataset, run)).finished
    return run


def test_looking_at_a_run_changes_nothing_of_it(
    looked: Path, dataset: Path, tmp_path: Path
) -> None:
    pretrain(config(dataset, tmp_path / "run"))
    assert_same_run(looked, tmp_path / "run")


def test_a_run_is_looked_at_at_intervals_and_at_its_end(looked: Path) -> None:
    lines = [line for line in read_log(looked) if "validation" in line]
    assert [line["step"] for line in lines] == [5, 10, 12]
    for kind in ("reconstruction", "attention", "map"):
        files = sorted((looked / "pictures").glob(f"{kind}-*.png"))
        assert [f.stem for f in files] == [f"{kind}-{n:06d}" for n in (5, 10, 12)]
        with Image.open(files[-1]) as picture:
            assert np.asarray(picture.convert("RGB")).std() > 5


def test_the_figure_is_that_of_the_evaluation_task(looked: Path, dataset: Path) -> None:
    line = [line for line in read_log(looked) if "validation" in line][-1]
    result = evaluate(
        TaskConfig(
            checkpoint=checkpoints(looked)[-1],
            data=dataset,
            held_out=("val",),
            baselines=(),
            bootstrap=10,
        )
    )
    for name in ("accuracy", "balanced_accuracy", "macro_f1"):
        expected = result["scores"]["encoder"]["score"][name]
        assert line["validation"][name] == pytest.approx(expected, abs=1e-6)
    assert line["validation"]["chips"] == result["held_out"]
    assert line["validation"]["fit"] == result["images"]["train"]


def test_the_best_checkpoint_is_kept_beside_the_last(looked: Path) -> None:
    by_step = {
        line["step"]: line["validation"]["balanced_accuracy"]
        for line in read_log(looked) if "validation" in line
    }  # fmt: skip
    best = max(by_step, key=lambda step: (by_step[step], -step))
    assert {int(p.name[5:]) for p in checkpoints(looked)} == {best, 12}
    for folder in checkpoints(looked):
        step = int(folder.name[5:])
        assert read_meta(folder).validation == pytest.approx(by_step[step], abs=1e-6)


def test_averaged_weights_are_looked_at_where_a_run_averages_them(
    dataset: Path, tmp_path: Path
) -> None:
    plain, averaged = tmp_path / "plain", tmp_path / "averaged"
    pretrain(looked_config(dataset, plain, epochs=1, lr=0.05))
    pretrain(looked_config(dataset, averaged, epochs=1, lr=0.05, ema=0.999))
    maps = [(run / "pictures" / "map-000004.png").read_bytes() for run in (plain, averaged)]
    assert maps[0] != maps[1]


def test_a_run_without_a_validation_split_cannot_be_looked_at(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "d", shards=2, chips=7)
    with pytest.raises(GeoLinkError, match=r"evaluate_every needs a validation split: .*split val"):
        pretrain(looked_config(folder, tmp_path / "run"))
    assert not (tmp_path / "run" / "run.json").exists()


class Sources(HTMLParser):
    """Everything that a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.found += [v or "" for name, v in attrs if name in ("src", "href", "srcset", "data")]


def test_the_page_of_a_run_shows_it_and_fetches_nothing(looked: Path) -> None:
    page = (looked / "index.html").read_text(encoding="utf-8")
    parser = Sources()
    parser.feed(page)
    assert parser.found
    assert all(source.startswith("data:image/png") for source in parser.found)
    assert not parser.tags & {"script", "link", "iframe", "object"}
    assert "@import" not in page
    assert not re.search(r"url\(", page)
    assert "Finished: 12 of 12 steps are done." in page
    for title in ("Loss", "Contrast", "Gradient norm", "kNN on the validation split", "Memory"):
        assert f"<h3>{title}</h3>" in page
    assert page.count("<img") == 3
    assert "the peak of this device is not known" in page


def test_a_page_says_why_there_is_no_evaluation(looked: Path, tmp_path: Path) -> None:
    meta = read_meta(checkpoints(looked)[-1])
    line = {"step": 5, "message": "not evaluated: no chip is of a class"}
    never = meta.config.model_copy(update={"evaluate_every": None})
    for log, config_, text in (
        ([line], meta.config, "Not evaluated: no chip is of a class."),
        ([], meta.config, "Not evaluated yet."),
        ([], never, "Not evaluated on the way: set"),
    ):
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        page = write_run_page(tmp_path, meta.model_copy(update={"config": config_}))
        assert text in page.read_text(encoding="utf-8")


_MEASURE = """<script>addEventListener('load', () => {
  const wide = document.documentElement;
  parent.document.body.dataset.measured = JSON.stringify([
    wide.scrollWidth, wide.clientWidth, [...document.images].every(i => i.naturalWidth > 0),
    performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).length,
  ]);
});</script></body>"""


@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
def test_a_phone_shows_the_page_without_overflow_or_requests(
    looked: Path, browser: Browser, tmp_path: Path, scheme: int
) -> None:
    page = (looked / "index.html").read_text(encoding="utf-8")
    # Its policy forbids scripts, so the measuring copy goes without it.
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    assert policy.search(page)
    measuring = html.escape(policy.sub("", page).replace("</body>", _MEASURE))
    copy = tmp_path / "page.html"
    copy.write_text(
        '<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f'<iframe style="border:0;width:390px;height:900px" srcdoc="{measuring}"></iframe>',
        encoding="utf-8",
    )
    flags = (f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom", copy.as_uri())
    done = browser.run(*flags)
    assert "CONSOLE" not in done.stderr
    found = re.search(r'data-measured="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    assert json.loads(html.unescape(found[1])) == [390, 390, True, 0]


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
@settings(max_examples=50, deadline=None)
def test_ticks_are_few_and_span_the_values(low: float, span: float) -> None:
    ticks = nice_ticks(low, low + span)
    assert 2 <= len(ticks) <= 7
    tiny = 1e-9 * max(abs(low), span, 1)
    assert ticks[0] <= low + tiny
    assert ticks[-1] >= low + span - tiny


def test_curves_leave_out_what_is_not_finite_and_keep_peaks() -> None:
    values = np.ones(5000)
    values[[7, 1234]] = 50, np.nan
    svg = str(draw_curves([Curve("loss", np.arange(5000), values)]))
    assert "nan" not in svg
    line = re.search(r'points="([^"]*)"', svg)
    assert line
    points = np.array([p.split(",") for p in line[1].split()], float)
    assert len(points) <= 600
    assert points[:, 1].min() < points[:, 1].max() - 100
    assert draw_curves([Curve("mfu", [1, 2], [np.nan, np.nan])]) == ""


def shown(run: Path, dataset: Path) -> Shown:
    model, meta = load_model(run)
    opened = open_dataset(dataset)
    model.set_tag_table(torch.from_numpy(tag_table(opened).astype(np.float32)))
    batch = next(read_chips(opened, "val", batch_size=7))
    chips = [take(batch, n, n + 1) for n in range(3)]
    return Shown(chips, model, meta, opened.info, torch.device("cpu"), {})


def test_attention_to_objects_is_that_of_the_fusion(
    looked: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's own multi-head attention, with the same weights, as the oracle."""
    s = shown(looked, dataset)
    chip = s.chips[0]
    seen: list[torch.Tensor] = []
    forward = Attention.forward

    def also(self: Attention, q: Any, k: Any, v: Any, valid: Any, *rest: Any) -> Any:
        if self is s.model.osm_cross_modal_encoder[-1].cross_attn_token_to_image:
            oracle = nn.MultiheadAttention(q.shape[-1], self.heads, batch_first=True)
            oracle.load_state_dict(self.state_dict())
            seen.append(oracle(q, k, v, key_padding_mask=~valid)[1][0].detach())
        return forward(self, q, k, v, valid, *rest)

    monkeypatch.setattr(Attention, "forward", also)
    looked_at = attention_to_objects(s, chip)
    assert looked_at.shape == (16, chip.graph.nodes)
    np.testing.assert_allclose(looked_at.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.sort(looked_at), np.sort(seen[0].numpy()), atol=1e-6)
    # Which column is whose: what only one object is told of moves its column.
    graph = chip.graph
    values = {f: getattr(graph, f) for f in graph.__dataclass_fields__}
    anchor = graph.anchor.clone()
    anchor[3] = 1 - anchor[3]
    moved = GraphBatch(**{**values, "anchor": anchor})
    again = attention_to_objects(s, type(chip)(**{**vars(chip), "graph": moved}))
    ratio = np.log(again / looked_at)
    others = np.delete(np.arange(graph.nodes), 3)
    # A softmax: all other columns of a patch change by the same factor.
    assert np.ptp(ratio[:, others], axis=1).max() < np.abs(ratio[:, 3] - ratio[:, 0]).max()


def test_the_other_variant_is_looked_at_too(dataset: Path, tmp_path: Path) -> None:
    """What patches take from objects, put together from the attention that is drawn."""
    changed = config(dataset, tmp_path / "run").model.model_copy(update={"variant": "geolink2"})
    pretrain(looked_config(dataset, tmp_path / "run", epochs=1, model=changed))
    assert (tmp_path / "run" / "pictures" / "attention-000004.png").exists()
    s = shown(tmp_path / "run", dataset)
    layer = CrossAttention(8, 1)
    query, key = torch.randn(1, 5, 8), torch.randn(1, 6, 8)
    bias = torch.randn(1, 1, 5, 6).masked_fill(torch.rand(1, 1, 5, 6) < 0.3, -torch.inf)
    bias[0, 0, 2] = -torch.inf
    value = layer.out(layer.attention_map(query, key, bias) @ layer.value(key))
    torch.testing.assert_close(layer(query, key, key, bias), value)
    looked_at = attention_to_objects(s, s.chips[0])
    np.testing.assert_allclose(looked_at.sum(1), 1, rtol=1e-5)
    # Told of the correspondence, patches look at what they meet from the start.
    graph = s.chips[0].graph
    met = np.zeros_like(looked_at, dtype=bool)
    met[graph.patch, np.repeat(np.arange(graph.nodes), graph.patch_offset.diff())] = True
    assert looked_at[met].mean() > 1.5 * looked_at[~met].mean()


def test_objects_that_are_drawn_meet_patches_and_are_distinct(looked: Path, dataset: Path) -> None:
    for chip in shown(looked, dataset).chips:
        chosen = pick_objects(chip)
        assert len(set(chosen)) == len(chosen) <= 3
        met = chip.graph.patch_offset.diff()
        assert all(0 < met[node] <= 8 for node in chosen)


def test_patches_become_the_image_again() -> None:
    image = torch.rand(1, 3, 32, 32)
    np.testing.assert_array_equal(_unpatchify(patchify(image, 8), 8, 3), image[0].numpy())


def test_colours_of_embeddings_are_ranks_along_their_principal_axes() -> None:
    along = torch.linspace(-1, 1, 30)
    features = along[:, None] * torch.tensor([[3.0, 0.0, 0.0, 0.0]])
    features[:, 1] += 0.1 * torch.cos(torch.arange(30.0))
    color = principal_colors(features)
    assert color.shape == (30, 3)
    np.testing.assert_allclose(color[:, 0], np.arange(30) / 29, atol=1e-6)
    assert principal_colors(torch.ones(1, 4)).shape == (1, 3)
    assert np.isfinite(principal_colors(torch.ones(5, 2))).all()

"""The demo, small: from nothing to a page."""

import json
from pathlib import Path

import pytest

from flows.demo import run_demo
from geolink.reader import open_dataset


@pytest.mark.slow
def test_the_demo_goes_from_a_seed_to_a_page(tmp_path: Path) -> None:
    said: list[str] = []
    page = run_demo(tmp_path, size_km=2.0, seeds=1, epochs=1, workers=1, say=said.append)
    html = page.read_text(encoding="utf-8")
    assert html.count("data:image/png;base64,") == 6
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert 'src="data:' in html
    for name in ("satellite", "aerial"):
        assert sum(r.chips for r in open_dataset(tmp_path / name).rows) > 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert f"{scores[0]['scores']['encoder']['score']['accuracy']:.1%}" in html
    assert any(line.startswith("==> pretrain") for line in said)

from pathlib import Path

import pytest

from schemas.docs import PAGES


@pytest.mark.parametrize("name", PAGES)
def test_a_page_made_from_the_contract_is_the_contract(name: str) -> None:
    path = Path(__file__).resolve().parents[2] / "docs" / name
    assert path.read_text(encoding="utf-8") == PAGES[name](), "run python -m schemas.docs docs"

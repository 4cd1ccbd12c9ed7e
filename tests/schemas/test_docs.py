from pathlib import Path

from schemas.docs import page


def test_the_data_contract_page_is_the_contract() -> None:
    path = Path(__file__).resolve().parents[2] / "docs" / "data-contract.md"
    assert path.read_text(encoding="utf-8") == page(), (
        "run python -m schemas.docs > docs/data-contract.md"
    )

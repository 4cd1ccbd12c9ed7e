"""The configs that users copy are valid."""

from pathlib import Path

import pytest

from schemas.config import Config, DatasetConfig
from schemas.evaluation import TaskConfig
from schemas.load import load_config
from schemas.training import TrainConfig

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODELS: dict[str, type[Config]] = {
    "town": DatasetConfig,
    "pairs": DatasetConfig,
    "train": TrainConfig,
    "evaluate": TaskConfig,
}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda p: p.stem)
def test_an_example_config_is_valid(path: Path) -> None:
    load_config(path, MODELS[path.stem])

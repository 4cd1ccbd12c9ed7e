"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real OSM extracts, image-OSM pairs and golden files; skips where it is absent.

    Looked for in ``$GEOLINK_SHARED``, then beside the checkout.
    """
    folder = Path(os.environ.get("GEOLINK_SHARED", _ROOT.parent / "shared"))
    if not (folder / "data" / "README.md").exists():
        pytest.skip(f"real data and golden files are not there: {folder} (set GEOLINK_SHARED)")
    return folder

"""TorchGeo in a folder of its own, beside the locked packages."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from platformdirs import user_cache_path

HERE = Path(__file__).parent


def torchgeo_folder() -> Path:
    """Folder with TorchGeo, made once a user; skips where it cannot be made."""
    pins = (HERE / "torchgeo.txt").read_bytes()
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    name = f"torchgeo-{version}-{hashlib.sha256(pins).hexdigest()[:12]}"
    home = Path(os.environ.get("GEOLINK_TEST_CACHE", user_cache_path("geolink-tests"))) / name
    if home.is_dir():
        return home
    home.parent.mkdir(parents=True, exist_ok=True)
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    tool = [uv, "pip"] if uv else [sys.executable, "-m", "pip"]
    with tempfile.TemporaryDirectory(dir=home.parent) as folder:
        wanted = ["--no-deps", "--target", f"{folder}/made", "-r", str(HERE / "torchgeo.txt")]
        python = ["--python", sys.executable] if uv else []
        done = subprocess.run(
            [*tool, "install", "-q", *python, *wanted], capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            pytest.skip(f"TorchGeo cannot be installed: {last}")
        try:
            (Path(folder) / "made").rename(home)
        except OSError:
            # Another test process was first.
            assert home.is_dir()
    return home

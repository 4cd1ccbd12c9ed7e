"""A real STAC API (stac-fastapi) as a process of its own, in an environment of its own."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import requests
from platformdirs import user_cache_path

_HERE = Path(__file__).parent


def environment() -> Path:
    """Python of the server's environment, made once a user; skips where it cannot be made."""
    pins = (_HERE / "requirements.txt").read_bytes()
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    name = f"stac-api-{version}-{hashlib.sha256(pins).hexdigest()[:12]}"
    home = Path(os.environ.get("GEOLINK_TEST_CACHE", user_cache_path("geolink-tests"))) / name
    python = home / "bin" / "python"
    if python.exists():
        return python
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent) as folder:
        made = Path(folder) / "env"
        wanted = str(_HERE / "requirements.txt")
        uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
        into = str(made / "bin" / "python")
        if uv:
            steps = [
                [uv, "venv", "-q", "--python", sys.executable, str(made)],
                [uv, "pip", "install", "-q", "--python", into, "-r", wanted],
            ]
        else:
            steps = [
                [sys.executable, "-m", "venv", str(made)],
                [into, "-m", "pip", "install", "-q", "-r", wanted],
            ]
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True, timeout=300)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                pytest.skip(f"the STAC API server cannot be installed: {last}")
        try:
            made.rename(home)
        except OSError:
            # Another test process was first.
            assert python.exists()
    return python


@contextmanager
def serve_api(
    folder: Path,
    collections: list[dict[str, Any]],
    items: dict[str, list[dict[str, Any]]],
    language: Literal["filter", "query"] = "filter",
) -> Iterator[str]:
    """Serve collections and their items; yields the address of the landing page.

    language: the extension of STAC search that takes conditions.
    """
    (folder / "items").mkdir(parents=True)
    (folder / "collections.json").write_text(json.dumps(collections))
    for name, some in items.items():
        (folder / "items" / f"{name}.json").write_text(json.dumps(some))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [environment(), _HERE / "run_api.py", folder, language],
            stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
        try:
            assert process.stdout
            port = process.stdout.readline().strip()
            assert port, (folder / "log").read_text()
            address = f"http://127.0.0.1:{port}"
            _wait_for(address)
            yield address
        finally:
            process.kill()
            process.wait()


def _wait_for(address: str) -> None:
    for _ in range(200):
        try:
            requests.get(address, timeout=5).raise_for_status()
        except requests.RequestException:
            time.sleep(0.1)
        else:
            return
    raise AssertionError(f"no answer from {address}")

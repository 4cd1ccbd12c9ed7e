"""The layers: what may import what, read from the source; and that the CLI starts light.

schemas <- geolink, pipelines (siblings) <- flows <- geolink.cli
"""

import ast
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("schemas", "pipelines", "geolink", "flows")

# For each layer: what of the house it may import, and what of others it may not.
LAYERS: dict[str, tuple[set[str], set[str]]] = {
    "schemas": ({"schemas"}, {"torch", "dask", "duckdb", "rasterio", "prefect", "geopandas"}),
    "pipelines": ({"schemas", "pipelines"}, {"torch", "torchvision", "timm", "prefect"}),
    "geolink": (
        {"schemas", "geolink"},
        {"dask", "distributed", "dask_geopandas", "duckdb", "rasterio", "prefect", "geopandas"},
    ),
    "flows": ({"schemas", "pipelines", "geolink", "flows"}, set()),
    "geolink.cli": ({*PACKAGES, "geolink.cli"}, set()),
}
HEAVY = (
    "torch", "dask", "distributed", "duckdb", "rasterio", "prefect", "geopandas", "matplotlib",
    "xarray", "pandas", "timm", "stackstac", "quackosm", "scipy",
)  # fmt: skip


def _layer(module: str) -> str:
    """The layer of a module of the house, or an empty name."""
    if module == "geolink.cli" or module.startswith("geolink.cli."):
        return "geolink.cli"
    root = module.partition(".")[0]
    return root if root in PACKAGES else ""


def _imports(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a module imports, anywhere in it."""
    here = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = here[: len(here) - node.level + 1] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            first = node.args[0]
            text = first.value if isinstance(first, ast.Constant) else None
            if name in ("import_module", "__import__") and isinstance(text, str):
                yield node.lineno, text


def _violations(source: str, module: str, is_package: bool = False) -> list[str]:
    own, foreign = LAYERS[_layer(module)]
    found = []
    for line, name in _imports(source, module, is_package):
        layer = _layer(name)
        if (layer and layer not in own) or name.partition(".")[0] in foreign:
            found.append(f"{module}:{line} imports {name}")
    return found


def _modules() -> list[tuple[str, Path]]:
    return [
        (".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path)
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    ]


def test_no_module_imports_from_a_layer_above_or_beside_it() -> None:
    modules = _modules()
    assert {_layer(module) for module, _ in modules} == set(LAYERS)
    found = [
        violation
        for module, path in modules
        for violation in _violations(
            path.read_text(encoding="utf-8"), module, path.name == "__init__.py"
        )
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("schemas.grid", "import pipelines"),
        ("schemas.grid", "def f():\n    from geolink.reader import open_dataset"),
        ("pipelines.build", "import torch.nn as nn"),
        ("pipelines.build", "from geolink import reader"),
        ("pipelines.build", "if True:\n    import flows.demo"),
        ("geolink.reader", "from pipelines.store import verify"),
        ("geolink.reader", "import rasterio.features"),
        ("geolink.reader", "import importlib\nimportlib.import_module('duckdb')"),
        ("geolink.reader", "from geolink import cli"),
        ("geolink.reader", "from . import cli"),
        ("geolink.models.paper", "from ..cli import main"),
        ("geolink.reader", "from dask.distributed import Client"),
        ("flows.demo", "from geolink.cli.main import main"),
    ],
)
def test_an_import_against_the_layers_is_found(module: str, source: str) -> None:
    assert len(_violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pipelines.build", "import duckdb\nfrom schemas.grid import Grid\nfrom . import store"),
        ("geolink.reader", "import torch\nfrom schemas.layout import LAYOUT\nimport numpy"),
        ("flows.demo", "from geolink.reader import open_dataset\nimport pipelines.build"),
        ("geolink.cli.main", "import flows.demo, pipelines.build\nfrom geolink.cli import output"),
    ],
)
def test_imports_along_the_layers_are_fine(module: str, source: str) -> None:
    assert _violations(source, module) == []


def test_the_cli_starts_without_heavy_packages() -> None:
    code = (
        "import sys\n"
        "from geolink.cli.main import cli, main\n"
        "for words in (['--version'], ['--help'], *([name, '--help'] for name in cli.commands)):\n"
        "    try:\n"
        "        main(words)\n"
        "    except SystemExit as end:\n"
        "        assert not end.code, words\n"
        f"print('loaded:', *sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout
    assert done.stdout.splitlines()[-1].strip() == "loaded:"


def test_help_takes_less_than_three_tenths_of_a_second() -> None:
    def seconds() -> float:
        """The lesser of wall and processor time, so that a busy machine does not count."""
        before, start = os.times(), time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "geolink.cli", "--help"], cwd=ROOT, capture_output=True,
            check=True,
        )  # fmt: skip
        wall, after = time.perf_counter() - start, os.times()
        used = after.children_user - before.children_user
        return min(wall, used + after.children_system - before.children_system)

    assert min(seconds() for _ in range(5)) < 0.3

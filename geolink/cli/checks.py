"""What `geolink doctor` checks: each check is a function that finds something and says a remedy."""

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from geolink.cli import surroundings as around
from geolink.cli.surroundings import Finding
from schemas.errors import GeoLinkError

PACKAGE = "geolink-osm"

MARKERS = {
    "build": ("duckdb", "rasterio", "dask"),
    "train": ("torch",),
    "flows": ("prefect",),
    "remote": ("obstore",),
    "onnx": ("onnxruntime",),
}
"""Extras, and the packages one of which says that somebody meant to install it."""
PURPOSES = {
    "build": "building datasets",
    "train": "training and embedding",
    "flows": "Prefect flows",
    "remote": "datasets in object stores",
    "onnx": "exporting to ONNX",
}


Check = Callable[[], Iterator[Finding]]


def examine(folder: Path, clock_url: str = "") -> list[Finding]:
    """Run all checks that the installed extras call for.

    folder: where datasets or runs are to be kept. clock_url: see `clock`; empty: left out.
    """
    there = installed_extras()
    checks: dict[str, Check] = {
        "python": python,
        "packages": lambda: packages(there),
        "PROJ": proj,
        "shard codecs": codecs,
    }
    if "build" in there:
        checks |= {"GDAL": gdal, "DuckDB": duckdb_spatial}
    if "train" in there:
        checks |= {"torch": torch_devices, "/dev/shm": around.shared_memory}
    if "flows" in there:
        checks["Prefect"] = around.prefect
    checks |= {
        "folder": lambda: around.place(folder),
        "open files": around.open_files,
        "proxy": around.proxy,
    }
    if clock_url:
        checks["clock"] = lambda: around.clock(clock_url)
    return [finding for name, check in checks.items() for finding in _tried(name, check)]


def _tried(name: str, check: Check) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:  # noqa: BLE001 - a library that breaks is what is looked for
        yield Finding(
            name,
            "fault",
            f"{type(error).__name__}: {error}",
            "a library it loads may be missing or damaged: install the package anew",
        )


def installed_extras() -> set[str]:
    """Extras that somebody meant to install, whole or not."""
    return {extra for extra, markers in MARKERS.items() if any(_version(m) for m in markers)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def python() -> Iterator[Finding]:
    """Interpreter and version of GeoLink."""
    shown = f"{sys.version.split()[0]} in {sys.prefix}; GeoLink {_version(PACKAGE) or 'unknown'}"
    yield Finding("python", "ok", shown)


def packages(there: set[str]) -> Iterator[Finding]:
    """Whether all packages of the base and of the extras that are there can be used together."""
    wanted = _requirements()
    for extra in ("", *MARKERS):
        name = f"extra {extra}" if extra else "packages"
        if extra and extra not in there:
            remedy = f'for {PURPOSES[extra]}: pip install "{PACKAGE}[{extra}]"'
            yield Finding(name, "note", "not installed", remedy)
            continue
        if extra not in wanted:
            yield Finding(name, "note", "not known to this installation", "install GeoLink anew")
            continue
        wrong = [text for text in map(_wrong, wanted[extra]) if text]
        if wrong:
            remedy = f'pip install "{PACKAGE}[{extra}]"' if extra else f"pip install {PACKAGE}"
            yield Finding(name, "fault", "; ".join(wrong), remedy)
        else:
            yield Finding(name, "ok", f"all {len(wanted[extra])} packages are there")


def _requirements() -> dict[str, list[tuple[str, str]]]:
    """By extra ("" is the base): packages with the versions that will do, from the metadata."""
    from packaging.requirements import Requirement

    found: dict[str, list[tuple[str, str]]] = {}
    for text in requires(PACKAGE) or []:
        one = Requirement(text)
        if one.name == PACKAGE:
            continue
        for extra in ("", *MARKERS):
            applies = one.marker is None or one.marker.evaluate({"extra": extra})
            if applies and (one.marker is not None) == bool(extra):
                found.setdefault(extra, []).append((one.name, str(one.specifier)))
    return found


def _wrong(requirement: tuple[str, str]) -> str:
    """What is wrong with a package; empty: nothing."""
    from packaging.specifiers import SpecifierSet

    name, versions = requirement
    there = _version(name)
    if there is None:
        return f"{name} is missing"
    if not SpecifierSet(versions).contains(there, prereleases=True):
        return f"{name} is {there}, needed is {versions}"
    return ""


def proj() -> Iterator[Finding]:
    """PROJ and its data: 9°E on the equator is the middle of UTM zone 32."""
    import pyproj

    to_utm = pyproj.Transformer.from_crs(4326, 32632, always_xy=True)
    x, y = to_utm.transform(9.0, 0.0)
    if abs(x - 500_000) > 1e-3 or abs(y) > 1e-3:
        yield Finding("PROJ", "fault", f"9°E 0°N is at {x:.3f}, {y:.3f}", _unset("PROJ_DATA"))
    else:
        folder = pyproj.datadir.get_data_dir()
        yield Finding("PROJ", "ok", f"{pyproj.proj_version_str}, data in {folder}")


def _unset(variable: str) -> str:
    return f"if {variable} or PROJ_LIB is set, unset it: each package brings its own data"


def codecs() -> Iterator[Finding]:
    """Blosc and CRC-32C, which shards are written with, by way of zarr-python."""
    import numpy as np
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec

    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    for shuffle in ("shuffle", "bitshuffle"):
        array = zarr.create_array(
            zarr.storage.MemoryStore(),
            shape=values.shape,
            chunks=(16, 64),
            dtype=values.dtype,
            compressors=[
                BloscCodec(typesize=2, cname="zstd", clevel=5, shuffle=shuffle),
                Crc32cCodec(),
            ],
        )
        array[:] = values
        if not np.array_equal(np.asarray(array[:]), values):
            yield Finding(
                "shard codecs",
                "fault",
                f"Blosc ({shuffle}) does not give back what it was given",
                "pip install --force-reinstall numcodecs zarr",
            )
            return
    yield Finding("shard codecs", "ok", f"zarr {zarr.__version__}: Blosc and CRC-32C give back")


def gdal() -> Iterator[Finding]:
    """GDAL writes and reads a GeoTIFF in memory, and finds its own PROJ data."""
    import numpy as np
    import rasterio
    from rasterio.io import MemoryFile
    from rasterio.warp import transform

    values = np.arange(256, dtype=np.uint16).reshape(1, 16, 16)
    with MemoryFile() as memory:
        with memory.open(
            driver="GTiff",
            width=16,
            height=16,
            count=1,
            dtype="uint16",
            crs="EPSG:32632",
            transform=rasterio.transform.from_origin(500_000, 160, 10, 10),
            compress="deflate",
        ) as file:
            file.write(values)
        with memory.open() as file:
            same = np.array_equal(file.read(), values)
    (x,), (y,) = transform("EPSG:4326", "EPSG:32632", [9.0], [0.0])
    if not same or abs(x - 500_000) > 1e-3 or abs(y) > 1e-3:
        wrong = f"9°E 0°N is at {x:.3f}, {y:.3f}" if same else "a GeoTIFF comes back changed"
        yield Finding("GDAL", "fault", wrong, _unset("PROJ_DATA"))
        return
    shown = f"{rasterio.__gdal_version__}, rasterio {rasterio.__version__}"
    yield Finding("GDAL", "ok", f"{shown}: writes, reads and transforms")


def duckdb_spatial() -> Iterator[Finding]:
    """DuckDB and its spatial extension, from its wheel or from where it was downloaded before."""
    import importlib.util

    import duckdb

    from pipelines.osm_convert import install_spatial

    offline = importlib.util.find_spec("duckdb_extension_spatial") is not None
    name, shown = "DuckDB", f"{duckdb.__version__} with its spatial extension"
    if offline:
        try:
            install_spatial()
        except GeoLinkError as error:
            yield Finding(name, "fault", str(error), "set HOME to a folder that can be written")
            return
    try:
        with duckdb.connect() as con:
            con.load_extension("spatial")
            con.execute("SELECT ST_Area(ST_MakeEnvelope(0, 0, 2, 3))")
            area = (con.fetchone() or (0,))[0]
    except duckdb.Error as error:
        yield Finding(
            name,
            "fault",
            f"{duckdb.__version__} without its spatial extension ({error})",
            f"pip install duckdb-extension-spatial=={duckdb.__version__}",
        )
        return
    if area != 6:
        yield Finding(name, "fault", f"{shown}: the area of 2 x 3 is {area}", "install it anew")
    else:
        yield Finding(name, "ok", shown)


def torch_devices() -> Iterator[Finding]:
    """PyTorch, and whether a GPU that is there can be used."""
    import torch

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            yield _gpu(number)
        return
    # A driver without a working CUDA is a mistake; a machine without a GPU is none.
    devices = sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))
    shown = f"torch {torch.__version__}, on the CPU ({torch.get_num_threads()} threads)"
    if devices and torch.version.cuda is None:
        yield Finding(
            "torch",
            "warning",
            f"{shown}; {', '.join(devices)} is not used",
            "install a torch that is built for CUDA (pytorch.org says how)",
        )
    elif devices:
        yield Finding(
            "torch",
            "warning",
            f"{shown}; {', '.join(devices)} cannot be used",
            f"see whether `nvidia-smi` works and its driver is new enough for CUDA "
            f"{torch.version.cuda}, and what CUDA_VISIBLE_DEVICES says",
        )
    else:
        yield Finding("torch", "ok", f"{shown}; no NVIDIA GPU")


def _gpu(number: int) -> Finding:
    import torch

    about = torch.cuda.get_device_properties(number)
    left = torch.arange(256.0).reshape(16, 16)
    same = torch.equal(
        (left.to(f"cuda:{number}") @ left.to(f"cuda:{number}").T).cpu(), left @ left.T
    )
    shown = (
        f"torch {torch.__version__}, CUDA {torch.version.cuda}: {about.name}, "
        f"{about.total_memory / 1e9:.0f} GB"
    )
    if not same:
        return Finding(
            f"GPU {number}",
            "fault",
            f"{shown}: a product of matrices is wrong",
            "test the GPU's memory; install torch anew",
        )
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return Finding(
            f"GPU {number}", "note", f"{shown}; no bfloat16", "train with `precision: 16-mixed`"
        )
    return Finding(f"GPU {number}", "ok", shown)

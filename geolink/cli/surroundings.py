"""What `geolink doctor` checks around the installation: folder, memory, network, clock."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from schemas.errors import GeoLinkError

State = Literal["ok", "note", "warning", "fault"]
"""A fault stops what is installed from working; a warning may, some day or somewhere; a note tells
what is not there and need not be."""

_NEEDED_GB, _GOOD_GB, _SHM_GB = 1.0, 20.0, 1.0
_CLOCK_OFF_S, _WAIT_S = 60.0, 5.0


class Finding(NamedTuple):
    """What a check found."""

    check: str
    state: State
    found: str
    remedy: str = ""


def shared_memory() -> Iterator[Finding]:
    """Through which ranks on several GPUs send gradients, where nothing else serves."""
    path = Path("/dev/shm")
    if not path.is_dir():
        yield Finding("/dev/shm", "note", "there is none; runs on several GPUs may need it")
        return
    free = shutil.disk_usage(path).free / 1e9
    if free < _SHM_GB:
        yield Finding(
            "/dev/shm",
            "warning",
            f"{free:.2f} GB are free",
            "runs on several GPUs may stop: give a container --shm-size=2g",
        )
    else:
        yield Finding("/dev/shm", "ok", f"{free:.1f} GB are free")


def prefect() -> Iterator[Finding]:
    """Prefect, and the server that PREFECT_API_URL names."""
    import urllib.request

    shown = f"{version('prefect')}"
    api = os.environ.get("PREFECT_API_URL", "")
    if not api:
        yield Finding(
            "Prefect",
            "note",
            f"{shown}; PREFECT_API_URL is not set",
            "flows run with a server of their own; set it for schedules",
        )
        return
    address = _without_secrets(api)
    try:
        with urllib.request.urlopen(f"{api.rstrip('/')}/health", timeout=_WAIT_S) as answer:
            healthy = answer.status == 200
    except (OSError, ValueError) as error:
        yield Finding(
            "Prefect",
            "fault",
            f"{shown}; {address} does not answer ({error})",
            "start it (`prefect server start`), or correct PREFECT_API_URL",
        )
        return
    state: State = "ok" if healthy else "warning"
    yield Finding("Prefect", state, f"{shown}; {address} {'is' if healthy else 'is not'} healthy")


def place(folder: Path) -> Iterator[Finding]:
    """Whether what GeoLink relies on works in a folder: durable files, links, locks; free space."""
    from schemas.storage_local import LocalStorage, locked

    nearest = next(f for f in (folder.absolute(), *folder.absolute().parents) if f.exists())
    missing = "" if nearest == folder.absolute() else f" ({folder} is made when it is needed)"
    try:
        with tempfile.TemporaryDirectory(dir=nearest, prefix=".geolink-doctor-") as name:
            files = LocalStorage(Path(name))
            created = files.create("a/b", b"1")
            again = files.create("a/b", b"2")
            with locked(Path(name)) as held, locked(Path(name), wait=False) as twice:
                pass
            off = abs(files.now().timestamp() - time.time())
    except (GeoLinkError, OSError) as error:
        yield Finding("folder", "fault", str(error), "give a folder that you may write")
        return
    where = f"{nearest}{missing}"
    if not created or again or not held or twice:
        yield Finding(
            "folder",
            "fault",
            f"{where}: files cannot be created once only, or locked",
            "give a local disk, or mount the network's with locks (NFS 4)",
        )
    elif off > _CLOCK_OFF_S:
        yield Finding(
            "folder",
            "warning",
            f"{where}: its clock is off by {off:,.0f} s",
            "set the clocks of file server and machine (NTP): gc tells age by it",
        )
    else:
        yield Finding("folder", "ok", f"{where}: can be written, linked and locked")
    yield from _space("free disk", nearest)
    cache = _cache_folder()
    if os.stat(cache).st_dev != os.stat(nearest).st_dev:
        yield from _space("free disk of the cache", cache)


def _cache_folder() -> Path:
    """The nearest folder that exists to where extracts and downloads are kept by default."""
    from platformdirs import user_cache_path

    path = user_cache_path("geolink")
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _space(name: str, folder: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(folder).free / 1e9
    shown = f"{free:,.1f} GB in {folder}"
    if free < _NEEDED_GB:
        yield Finding(name, "fault", shown, "free some space, or give another folder")
    elif free < _GOOD_GB:
        yield Finding(
            name,
            "warning",
            shown,
            "a country at 10 m takes more: `geolink build --dry-run` says how much",
        )
    else:
        yield Finding(name, "ok", shown)


def open_files() -> Iterator[Finding]:
    """How many files a process may have open."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 1024:
        yield Finding("open files", "warning", f"{soft:,} a process", "ulimit -n 4096")
    else:
        limited = soft != resource.RLIM_INFINITY
        yield Finding("open files", "ok", f"{soft:,} a process" if limited else "no limit")


def proxy() -> Iterator[Finding]:
    """Variables that send requests through a proxy, or trust its certificate."""
    there = {}
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        lower, upper = os.environ.get(name), os.environ.get(name.upper())
        if lower is not None and upper is not None and lower != upper:
            yield Finding(
                "proxy",
                "warning",
                f"{name} and {name.upper()} differ",
                "set both the same: some libraries read one, some the other",
            )
        if lower or upper:
            value = lower or upper or ""
            there[name] = value if name == "no_proxy" else _without_secrets(value)
    for variable in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GDAL_HTTP_PROXY"):
        if not (path := os.environ.get(variable)):
            continue
        there[variable] = _without_secrets(path)
        if variable != "GDAL_HTTP_PROXY" and not Path(path).exists():
            yield Finding(
                "proxy",
                "warning",
                f"{variable} names {path}, which does not exist",
                "correct it, or unset it",
            )
    shown = ", ".join(f"{name}={value}" for name, value in there.items())
    yield Finding("proxy", "ok", shown or "no variable is set: requests go straight out")


def clock(url: str) -> Iterator[Finding]:
    """The machine's clock beside the `Date` (RFC 9110) that a server answers with."""
    import urllib.error
    import urllib.request
    from email.utils import parsedate_to_datetime

    address = _without_secrets(url)
    try:
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request, timeout=_WAIT_S) as answer:
            date = answer.headers.get("Date")
    except urllib.error.HTTPError as error:
        date = error.headers.get("Date")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        yield Finding(
            "clock",
            "note",
            f"not compared: {address} does not answer ({reason})",
            "without a network, build from local files; else see proxy and DNS",
        )
        return
    if not date:
        yield Finding("clock", "note", f"not compared: {address} sends no date")
        return
    off = time.time() - parsedate_to_datetime(date).timestamp()
    if abs(off) > _CLOCK_OFF_S:
        ahead = "ahead" if off > 0 else "behind"
        yield Finding(
            "clock",
            "warning",
            f"{abs(off):,.0f} s {ahead} of {address}",
            "set it (NTP): signed addresses and object stores refuse it",
        )
    else:
        yield Finding("clock", "ok", f"within {_CLOCK_OFF_S:.0f} s of {address}")


def _without_secrets(url: str) -> str:
    """An address without user, password and query."""
    parts = urlsplit(url)
    if not parts.netloc:
        return url
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

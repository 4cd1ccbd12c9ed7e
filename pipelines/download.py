"""Large files from the web: fetched once, resumed where they broke off, kept by content."""

import hashlib
import json
import logging
import os
import re
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import requests

from pipelines import remote
from pipelines.remote import public, retry_after
from schemas.errors import GeoLinkError, NetworkFault
from schemas.storage import writing
from schemas.storage_local import locked

_log = logging.getLogger(__name__)
_TIMEOUT_S = (10.0, 60.0)
_CHUNK = 1 << 16
"""Bytes written at a time: what is lost at most where a transfer breaks off."""


class _TryAgain(Exception):
    """A fault of network or server that may pass; the wait that the server asks for, seconds."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


def download(url: str, folder: Path, suffix: str) -> Path:
    """Fetch a URL into a folder, named by the SHA-256 of its bytes, or find it there unchanged.

    What was fetched before is asked for by its ETag or date, so that an unchanged file costs one
    small request, and a changed one becomes a new file beside the old. A transfer that breaks off
    goes on where it stopped, also in a later run, if the file is still the same. Length, and the
    MD5 that servers of OSM extracts offer beside it (`URL.md5`), are checked. Network faults,
    5xx and 429 (Retry-After is obeyed) are tried again, by `pipelines.remote`'s times.

    The file is made young, so that `remove_superseded` leaves it while it is in use.

    Raises NetworkFault if it may be had later, GeoLinkError if not.
    """
    if not re.match(r"https?://", url):
        raise GeoLinkError(f"{url} cannot be downloaded; give a path, or a http or https address")
    slot = folder / f"url-{hashlib.sha256(url.encode()).hexdigest()[:24]}"
    with writing(slot):
        slot.mkdir(parents=True, exist_ok=True)
    # One folder a URL: holds what is known of it, and the part that is there; locked by its user.
    with writing(slot), locked(slot), requests.Session() as session:
        session.headers["User-Agent"] = "geolink"
        session.headers["Accept-Encoding"] = "identity"
        for attempt in range(remote.TRIES):
            try:
                path = _fetch(session, url, slot, folder, suffix)
                path.touch()
                return path
            except (_TryAgain, requests.RequestException) as error:
                fault = error
            if attempt + 1 < remote.TRIES:
                asked = fault.wait_s if isinstance(fault, _TryAgain) else 0.0
                wait = max(asked, remote.FIRST_WAIT_S * 2**attempt)
                time.sleep(min(wait, remote.LONGEST_WAIT_S))
    raise NetworkFault(
        f"cannot download {public(url)} ({_brief(fault)}, {remote.TRIES} times); run again, which "
        "goes on where it stopped, or fetch the file yourself and give its path"
    )


def remove_superseded(folder: Path, grace: timedelta) -> list[Path]:
    """Remove downloaded files that their address no longer has, where none of them was used within
    the grace; what was removed. A file that seems to come from the future is young.
    """
    current = {_read(known).get("sha256") for known in folder.glob("url-*/known.json")}
    removed = []
    for path in sorted(folder.glob("*.*")):
        sha256 = path.name.split(".")[0]
        if path.is_symlink() or not re.fullmatch("[0-9a-f]{64}", sha256) or sha256 in current:
            continue
        try:
            if time.time() - path.stat().st_mtime > grace.total_seconds():
                path.unlink()
                removed.append(path)
        except FileNotFoundError:  # another process was faster
            continue
        except OSError as error:
            _log.warning("cannot remove the superseded download %s: %s", path, error)
    for path in removed:
        _log.warning("removed %s: its address has a newer version", path)
    return removed


def _brief(error: Exception) -> str:
    return public(error).splitlines()[0][:200] if str(error) else type(error).__name__


def _fetch(session: requests.Session, url: str, slot: Path, folder: Path, suffix: str) -> Path:
    """One attempt. Raises _TryAgain or requests.RequestException where another may succeed."""
    known = _read(slot / "known.json")
    part, began = slot / "part", _read(slot / "began.json")
    there = folder / f"{known.get('sha256')}{suffix}"
    headers = {}
    if part.exists() and began.get("etag"):
        headers = {"Range": f"bytes={part.stat().st_size}-", "If-Range": began["etag"]}
    elif there.exists():
        headers = {
            name: known[key]
            for name, key in (("If-None-Match", "etag"), ("If-Modified-Since", "modified"))
            if known.get(key)
        }
    with session.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as answer:
        if answer.status_code == 304:
            return there
        whole = _check(url, answer, part)
        if whole:
            part.unlink(missing_ok=True)
            etag = answer.headers.get("ETag", "")
            # A weak tag does not promise the same bytes, so nothing could be added to them.
            began = {
                "etag": "" if etag.startswith("W/") else etag,
                "modified": answer.headers.get("Last-Modified", ""),
                "bytes": int(answer.headers.get("Content-Length", -1)),
            }
            (slot / "began.json").write_text(json.dumps(began), encoding="utf-8")
        if answer.status_code != 416:
            with part.open("ab") as file:
                for chunk in answer.iter_content(_CHUNK):
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
    return _accept(session, url, slot, folder, suffix, began)


def _check(url: str, answer: requests.Response, part: Path) -> bool:
    """Whether an answer brings the whole file; raises where it does not bring what was asked."""
    status = answer.status_code
    if status in (408, 425, 429) or status >= 500:
        raise _TryAgain(f"{status} {answer.reason}", retry_after(answer.headers.get("Retry-After")))
    if status == 206:
        first = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
        if not first or int(first[1]) != part.stat().st_size:
            part.unlink(missing_ok=True)
            raise _TryAgain("the server sent another range than was asked for")
        return False
    if status == 416:  # nothing is missing, or the part is longer than the file: `_accept` tells
        return False
    if status != 200:
        raise GeoLinkError(
            f"cannot download {public(url)}: {status} {answer.reason}; check the address"
        )
    return True


def _accept(
    session: requests.Session,
    url: str,
    slot: Path,
    folder: Path,
    suffix: str,
    began: dict[str, Any],
) -> Path:
    """Check a finished part and give it its name."""
    part = slot / "part"
    size = part.stat().st_size
    if began.get("bytes", -1) >= 0 and size != began["bytes"]:
        if size > began["bytes"]:
            part.unlink()
        raise _TryAgain(f"{size:,} of {began['bytes']:,} bytes came")
    with part.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    stated = _stated_md5(session, url)
    if stated:
        with part.open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != stated:
            part.unlink()
            raise _TryAgain(f"its MD5 is {found}, not {stated} as the server says")
    target = folder / f"{sha256}{suffix}"
    os.replace(part, target)
    known = {"url": url, "sha256": sha256, **began}
    (slot / "known.json").write_text(json.dumps(known), encoding="utf-8")
    (slot / "began.json").unlink(missing_ok=True)
    return target


def _stated_md5(session: requests.Session, url: str) -> str:
    """The MD5 that the server states beside the file, or nothing where it does not."""
    if "?" in url:
        return ""
    answer = session.get(f"{url}.md5", timeout=_TIMEOUT_S)
    if answer.status_code >= 500 or answer.status_code == 429:
        raise _TryAgain(f"its .md5: {answer.status_code} {answer.reason}")
    found = re.match(r"[0-9a-fA-F]{32}\b", answer.text) if answer.status_code == 200 else None
    return found[0].lower() if found else ""


def _read(path: Path) -> dict[str, Any]:
    """A small JSON file of ours; one that a kill left empty or broken counts as missing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

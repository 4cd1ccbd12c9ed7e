"""Files and documents over a network: GDAL's settings, signing, and faults that pass.

Documents (catalogs, tokens) come by `fetch`, rasters are read within `retried`. Both try again
what another try may cure, wait as long as the server asks, and raise `NetworkFault` where it
lasts: what is built never depends on the network's mood. What a URL carries behind its `?` can be
a token; it stays out of every message (`public`).
"""

import itertools
import json
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

import rasterio
import requests
from rasterio.errors import RasterioError
from urllib3.exceptions import HTTPError as Urllib3Error

from schemas.errors import GeoLinkError, NetworkFault

T = TypeVar("T")

_GDAL: Mapping[str, object] = {
    # Few requests: no listing of folders, a file's header in one read, neighbouring ranges as
    # one, parallel ranges over one connection where the server speaks HTTP/2. (Without HEAD, GDAL
    # asks for the whole file to learn its size and hangs up.)
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_INGESTED_BYTES_AT_OPEN": 32_768,
    "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
    "GDAL_HTTP_MULTIPLEX": "YES",
    "GDAL_HTTP_VERSION": "2TLS",
    "GDAL_HTTP_TCP_KEEPALIVE": "YES",
    # What is read of a file is kept while it is open (see `_gdal_path`).
    "VSI_CACHE": "YES",
    "CPL_VSIL_CURL_NON_CACHED": "/vsis3/:/vsigs/:/vsiaz/",
    # A short wait for what passes at once; longer ones, and Retry-After, are for `retried`.
    "GDAL_HTTP_MAX_RETRY": 2,
    "GDAL_HTTP_RETRY_DELAY": 0.5,
    "GDAL_HTTP_RETRY_CODES": "500,502,503,504",
    # A dead or dripping connection is given up.
    "GDAL_HTTP_CONNECTTIMEOUT": 10,
    "GDAL_HTTP_LOW_SPEED_LIMIT": 1_000,
    "GDAL_HTTP_LOW_SPEED_TIME": 30,
    "GDAL_HTTP_TIMEOUT": 300,
}

TRIES = 5
FIRST_WAIT_S = 1.0
"""Before the second try; doubled for every further one, with some chance in it."""
LONGEST_WAIT_S = 120.0
"""A server that asks for a longer wait is given up."""
CONNECT_S, READ_S, WHOLE_S = 10.0, 60.0, 300.0
"""Limits of a document: to connect, without a byte, altogether."""
_BROKEN_AFTER = 3
"""Reads of a file that fail while its server answers well, until the file itself is at fault."""
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_PASSING_TEXT = re.compile(
    r"CURL error|timed out|Timeout|[Cc]onnection (?:was )?reset|"
    r"(?:response code|error code|status)[^0-9]{0,40}(?:408|425|429|5\d\d)"
)


class Refused(GeoLinkError):
    """A server's lasting answer; `status` is its HTTP code."""

    status: int = 0


class _Answer(NamedTuple):
    status: int | None
    """None: no whole answer came."""
    body: bytes
    wait_s: float
    """What Retry-After asks for."""
    reason: str


def is_remote(href: str) -> bool:
    """Whether a file is reached over a network."""
    return urlsplit(href).scheme not in ("", "file") and "://" in href


def local_path(href: str) -> Path:
    """Path of a local href (`file://` or plain)."""
    return Path(unquote(urlsplit(href).path)) if href.startswith("file://") else Path(href)


def public(text: object) -> str:
    """A message without queries and fragments of addresses, which can hold tokens.

    GDAL shortens an address to its last part in some messages.
    """
    plain = re.sub(r"(?<=\S)\?[^\s'\"),]*=[^\s'\"),]*", "", str(text))
    return re.sub(r"((?:://|/vsi)[^\s?#'\"]*)[?#][^\s'\"),]*", r"\1", plain)


def _gdal_env(path: str, sign: str) -> rasterio.Env:
    """GDAL's settings for a remote file; what the user's environment sets is left as it is."""
    options = {k: v for k, v in _GDAL.items() if k not in os.environ}
    if path.startswith("/vsicurl/"):
        # No look for files beside it.
        options["CPL_VSIL_CURL_ALLOWED_FILENAME"] = path
    if sign == "requester-pays":
        options["AWS_REQUEST_PAYER"] = "requester"
    return rasterio.Env(**options)


_opened = itertools.count()


def _gdal_path(address: str) -> str:
    """What GDAL is to open; every call gives another name of the same file.

    GDAL remembers by name, over a process's life: old bytes of a file that has changed since,
    and that a file could not be read which now can. The number is no part of the request.
    """
    if not address.startswith(("http://", "https://")):
        return address
    return f"/vsicurl/{address}#{next(_opened)}"


def retried(href: str, sign: str, read: Callable[[str], T], forget: Callable[[], None]) -> T:
    """What `read` makes of a file, which it opens by the path it gets; tried again where it helps.

    href, sign: as in `pipelines.rasters.Asset`. forget: closes what a failed read left open.

    Raises NetworkFault where the network keeps failing, Refused where the server denies access,
    and else what `read` raised: the file is missing or broken.
    """
    if not is_remote(href):
        with rasterio.Env():
            return read(str(local_path(href)))
    renewed, broken, attempt = False, 0, 0
    while True:
        address = signed(href, sign)
        try:
            path = _gdal_path(address)
            with _gdal_env(path, sign):
                return read(path)
        except (RasterioError, OSError) as error:
            failure: Exception = error
        forget()
        answer = _first_bytes(address, failure)
        if answer.status in (401, 403):
            if renewed or not _forget_token(sign):
                raise _denied(href, answer) from None
            renewed = True
        elif answer.status is None or answer.status in _PASSING:
            attempt += 1
            _pause(href, answer, attempt)
        else:
            broken += 1
            # An answer of 200 that is not whole by the read's account may have been cut.
            if answer.status >= 400 or broken == _BROKEN_AFTER:
                raise failure


def fetch(
    url: str,
    *,
    method: str = "GET",
    params: Mapping[str, Any] | None = None,
    body: object = None,
    headers: Mapping[str, str] | None = None,
    session: requests.Session | None = None,
) -> Any:
    """A JSON document, from a URL or a path; `params` join the URL, `body` is sent as JSON.

    Raises NetworkFault where the network keeps failing, Refused for a lasting error of the
    server, GeoLinkError for what is no JSON, OSError for a local file.
    """
    if not is_remote(url):
        return _parsed(url, local_path(url).read_bytes())
    attempt = 0
    while True:
        answer = _request(
            session or requests, method, url, params=params, json=body, headers=headers
        )
        if answer.status is not None and 200 <= answer.status < 300:
            try:
                return json.loads(answer.body)
            except ValueError:
                # A body without a stated length ends where its connection is cut.
                answer = answer._replace(status=None, reason="an answer that is no whole JSON")
                if attempt + 2 >= TRIES:
                    return _parsed(url, answer.body)
        elif answer.status is not None and answer.status not in _PASSING:
            if answer.status in (401, 403):
                raise _denied(url, answer)
            raise _refusal(f"{public(url)} answers {answer.reason}", answer.status)
        attempt += 1
        _pause(url, answer, attempt)


def signed(href: str, sign: str) -> str:
    """The address at which a file can be read now."""
    kind, _, collection = sign.partition("/")
    if kind != "planetary-computer" or not _takes_token(href):
        return href
    return urlunsplit(urlsplit(href)._replace(query=_token(collection), fragment=""))


_SAS_URL = "https://planetarycomputer.microsoft.com/api/sas/v1/token"
_tokens: dict[str, tuple[str, datetime]] = {}
_tokens_lock = threading.Lock()


def _token(collection: str) -> str:
    """The token of a collection, asked for anew when it has less than a minute to live.

    `PC_SDK_SAS_URL` and `PC_SDK_SUBSCRIPTION_KEY` are the variables of Microsoft's own tools.
    """
    with _tokens_lock:
        token, expires = _tokens.get(collection, ("", datetime.min.replace(tzinfo=UTC)))
        if (expires - datetime.now(UTC)).total_seconds() > 60:
            return token
        key = os.environ.get("PC_SDK_SUBSCRIPTION_KEY")
        url = f"{_sas_url()}/{collection}"
        answer = fetch(url, headers={"Ocp-Apim-Subscription-Key": key} if key else None)
        try:
            token, expiry = str(answer["token"]), str(answer["msft:expiry"])
            expires = datetime.fromisoformat(expiry).astimezone(UTC)
        except (KeyError, TypeError, ValueError):
            raise GeoLinkError(
                f"{url} gives no token with an expiry; check PC_SDK_SAS_URL"
            ) from None
        _tokens[collection] = (token, expires)
        return token


def _forget_token(sign: str) -> bool:
    """Drop the token in use; whether there is a way to get another."""
    kind, _, collection = sign.partition("/")
    with _tokens_lock:
        _tokens.pop(collection, None)
    return kind == "planetary-computer"


def _sas_url() -> str:
    return os.environ.get("PC_SDK_SAS_URL", _SAS_URL).rstrip("/")


def _takes_token(href: str) -> bool:
    """Whether a token may be shown to a host: Azure's storage, or the token's own."""
    host = urlsplit(href).hostname or ""
    return host.endswith(".blob.core.windows.net") or host == urlsplit(_sas_url()).hostname


def _first_bytes(address: str, failure: Exception) -> _Answer:
    """What a server says of a file that could not be read; GDAL does not tell."""
    told = _chain(failure)
    if not address.startswith(("http://", "https://")):
        passing = _PASSING_TEXT.search(told)
        denied = re.search(r"\b(401|403)\b|AccessDenied|InvalidCredentials", told)
        status = None if passing else 403 if denied else 404
        return _Answer(status, b"", 0.0, public(failure))
    answer = _request(requests, "GET", address, headers={"Range": "bytes=0-65535"}, first=65_536)
    if answer.status is not None and answer.status < 400 and _PASSING_TEXT.search(told):
        return answer._replace(status=None, reason=public(failure))
    return answer


def _chain(error: BaseException | None) -> str:
    """The messages of an error and its causes."""
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


def _request(
    by: Any, method: str, url: str, *, first: int | None = None, **arguments: Any
) -> _Answer:
    """One answer, whole (or its `first` bytes), within the limits of time."""
    ends = time.monotonic() + WHOLE_S
    parts = []
    try:
        with by.request(
            method, url, timeout=(CONNECT_S, READ_S), stream=True, **arguments
        ) as answer:
            # As it comes: to fill a buffer from a dripping server could take for ever.
            while part := answer.raw.read1(65_536, decode_content=True):
                parts.append(part)
                if time.monotonic() > ends:
                    return _Answer(None, b"", 0.0, f"no whole answer in {WHOLE_S:g} s")
                if first is not None and sum(map(len, parts)) >= first:
                    break
            reason = f"{answer.status_code} {answer.reason or ''}".strip()
            wait = retry_after(answer.headers.get("Retry-After"))
            return _Answer(answer.status_code, b"".join(parts), wait, reason)
    except Urllib3Error:
        return _Answer(None, b"", 0.0, "the connection was cut")
    except requests.RequestException as error:
        if isinstance(error, requests.exceptions.InvalidURL | requests.exceptions.InvalidSchema):
            raise GeoLinkError(f"{public(url)} is no address that can be asked") from None
        return _Answer(None, b"", 0.0, _plain(error))


def _plain(error: requests.RequestException) -> str:
    """A connection's failure in a few words."""
    kinds: tuple[tuple[type[Exception], str], ...] = (
        (requests.exceptions.SSLError, "its certificate cannot be trusted"),
        (requests.exceptions.ConnectTimeout, "no connection in time"),
        (requests.exceptions.ReadTimeout, "no answer in time"),
        (requests.exceptions.ConnectionError, "no connection"),
    )
    return next((text for kind, text in kinds if isinstance(error, kind)), type(error).__name__)


def retry_after(value: str | None) -> float:
    """Seconds that a Retry-After header asks for (RFC 9110, 10.2.3: seconds or a date)."""
    if not value:
        return 0.0
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return 0.0


def _pause(href: str, answer: _Answer, attempt: int) -> None:
    """Wait before the next try. Raises NetworkFault after the last one."""
    if attempt >= TRIES or answer.wait_s > LONGEST_WAIT_S:
        asks = f", which asks to wait {answer.wait_s:g} s" if answer.wait_s else ""
        raise NetworkFault(
            f"{public(href)} cannot be fetched ({answer.reason}{asks}; tried {attempt} times); "
            "run the same command again when its server can be reached"
        )
    wait = FIRST_WAIT_S * 2 ** (attempt - 1) * (0.75 + random.random() / 2)
    time.sleep(max(answer.wait_s, wait))


def _denied(href: str, answer: _Answer) -> Refused:
    return _refusal(
        f"{public(href)} is refused ({answer.reason}); check `scenes.sign` and credentials",
        answer.status or 403,
    )


def _refusal(text: str, status: int) -> Refused:
    refused = Refused(text)
    refused.status = status
    return refused


def _parsed(where: str, text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise GeoLinkError(f"{public(where)} is no JSON: {error}") from None


class _WithoutQueries(logging.Filter):
    """Keeps signed addresses out of the log."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite a record's message."""
        record.msg, record.args = public(record.getMessage()), None
        return True


for _name in ("rasterio._env", "rasterio._err", "rasterio._base", "rasterio._io", "rasterio.env"):
    logging.getLogger(_name).addFilter(_WithoutQueries())

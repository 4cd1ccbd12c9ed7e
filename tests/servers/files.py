"""A web server of files with byte ranges, tokens and an API behind it, all with faults on demand.

Paths: `/files/<path in the folder>`, `/token/<collection>` (what Planetary Computer's token
service answers), and everything else is passed on to `upstream`, with the name that the client
called, so that the links in its answers lead here again.
"""

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import requests


@dataclass
class Fault:
    """What goes wrong with requests whose path and query match."""

    match: str
    """Regular expression, searched in path and query."""
    kind: Literal["status", "cut", "slow", "close"]
    """An error; half the body, then the end; the body byte by byte; not a word."""
    status: int = 503
    retry_after: str | None = None
    after: int = 0
    """Matching requests that are answered well before the first fault."""
    times: int | None = None
    """Faults before all is well again; None: for ever."""
    seen: int = 0
    done: int = 0


@dataclass(frozen=True)
class Request:
    """A request as it was answered."""

    method: str
    path: str
    """With its query."""
    body: str
    range: str | None
    status: int
    bytes: int
    at_s: float
    connection: int


@dataclass
class Server:
    """A running server."""

    folder: Path
    upstream: str | None
    address: str = ""
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    token_uses: int | None = None
    """If set, files need a token, each good for so many requests."""
    tokens: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def files(self) -> str:
        """Address of the folder."""
        return f"{self.address}/files"

    def of(self, match: str) -> list[Request]:
        """The requests whose path and query match."""
        return [r for r in self.requests if re.search(match, r.path)]

    def fault(self, path: str) -> Fault | None:
        """The fault that a request runs into."""
        with self.lock:
            for fault in self.faults:
                if re.search(fault.match, path):
                    fault.seen += 1
                    left = fault.times is None or fault.done < fault.times
                    if fault.seen > fault.after and left:
                        fault.done += 1
                        return fault
        return None

    def issue(self) -> str:
        """A new token."""
        with self.lock:
            token = f"sig=secret{len(self.tokens)}"
            self.tokens[token] = self.token_uses or 0
            return token

    def admits(self, query: str) -> bool:
        """Whether a file's request carries a token that is still good."""
        if self.token_uses is None:
            return True
        with self.lock:
            self.tokens[query] = self.tokens.get(query, 0) - 1
            return self.tokens[query] >= 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: Server

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""

    def do_GET(self) -> None:
        self._answer(b"")

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])))

    def _answer(self, body: bytes) -> None:
        state = self.server_of
        fault = state.fault(self.path)
        status, headers, data = self._content(body)
        if fault and fault.kind == "status":
            status, data = fault.status, b"no luck"
            headers = {"Retry-After": fault.retry_after} if fault.retry_after else {}
        state.requests.append(
            Request(
                self.command, self.path, body.decode(), self.headers.get("Range"), status,
                len(data), time.monotonic(), self.client_address[1],
            )
        )  # fmt: skip
        if fault and fault.kind == "close":
            self._hang_up()
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            if fault and fault.kind == "cut":
                self.wfile.write(data[: len(data) // 2])
                self._hang_up()
            elif fault and fault.kind == "slow":
                for n in range(len(data)):
                    self.wfile.write(data[n : n + 1])
                    time.sleep(0.2)
            else:
                self.wfile.write(data)
        except OSError:
            self.close_connection = True

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def _content(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of an answer where nothing goes wrong."""
        state, parts = self.server_of, urlsplit(self.path)
        if parts.path.startswith("/token/"):
            answer = {"token": state.issue(), "msft:expiry": "2999-01-01T00:00:00Z"}
            return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()
        if not parts.path.startswith("/files/"):
            return self._passed_on(body)
        if not state.admits(parts.query):
            return 403, {}, b"the signature has expired"
        path = state.folder / unquote(parts.path.removeprefix("/files/"))
        if not path.is_file():
            return 404, {}, b"not here"
        data = path.read_bytes()
        tag = {"ETag": f'"{path.stat().st_mtime_ns:x}-{len(data):x}"'}
        if self.headers.get("If-None-Match") == tag["ETag"]:
            return 304, tag, b""
        wanted = self.headers.get("Range")
        if not wanted or self.headers.get("If-Range", tag["ETag"]) != tag["ETag"]:
            return 200, {"Accept-Ranges": "bytes", **tag}, data
        start, _, end = wanted.removeprefix("bytes=").partition("-")
        first, last = int(start), min(int(end or len(data) - 1), len(data) - 1)
        if first > last:
            return 416, {"Content-Range": f"bytes */{len(data)}"}, b""
        place = {"Content-Range": f"bytes {first}-{last}/{len(data)}", "Accept-Ranges": "bytes"}
        return 206, place | tag, data[first : last + 1]

    def _passed_on(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if self.server_of.upstream is None:
            return 404, {}, b"nothing here"
        answer = requests.request(
            self.command, self.server_of.upstream + self.path, data=body, timeout=60,
            headers={"Host": self.headers["Host"], "Content-Type": "application/json"},
        )  # fmt: skip
        kind = answer.headers.get("Content-Type", "application/json")
        return answer.status_code, {"Content-Type": kind}, answer.content


class _Threads(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that hung up is no news."""


@contextmanager
def serve(folder: Path, *faults: Fault, upstream: str | None = None) -> Iterator[Server]:
    """Serve a folder, and an API if given, for the time of the context."""
    state = Server(folder, upstream, faults=list(faults))
    handler = type("Handler", (_Handler,), {"server_of": state})
    server = _Threads(("127.0.0.1", 0), handler)
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""A real S3 endpoint on loopback (moto), and a proxy in front of it that fails at stated rates."""

import http.client
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import urlsplit

Kind = Literal["500", "503", "slow", "cut", "close", "lost"]
"""Errors; a late answer; half a body, then the end; not a word; done, but not a word of it."""

_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your rate</Message></Error>"
_INTERNAL = b"<Error><Code>InternalError</Code><Message>We encountered one</Message></Error>"


@dataclass
class Proxy:
    """A running proxy."""

    upstream: str
    rates: Mapping[Kind, float] = field(default_factory=dict)
    """Share of the requests that meet each fault; they add up to at most 1."""
    seed: int = 0
    address: str = ""
    slow_s: float = 0.2
    faults: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    """By method."""
    received: int = 0
    sent: int = 0
    """Bytes of bodies, to and from the store."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def draw(self, method: str) -> str:
        """The fault of the next request; empty: none."""
        with self.lock:
            self.requests[method] += 1
            at = self._random.random()
            for kind, rate in self.rates.items():
                if at < rate:
                    self.faults[kind] += 1
                    return kind
                at -= rate
        return ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.proxy.draw(self.command)
        if fault == "close":
            self._hang_up()
            return
        if fault in ("500", "503"):
            self._answer(int(fault), {}, _INTERNAL if fault == "500" else _SLOW_DOWN)
            return
        status, headers, data = self._forward(body)
        if fault == "slow":
            time.sleep(self.proxy.slow_s)
        if fault == "lost":
            self._hang_up()
        elif fault == "cut" and len(data) > 1 and self.command != "HEAD":
            self._answer(status, headers, data, part=len(data) // 2)
            self._hang_up()
        else:
            self._answer(status, headers, data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        parts = urlsplit(self.proxy.upstream)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        try:
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        with self.proxy.lock:
            self.proxy.received += len(body)
            self.proxy.sent += len(data)
        hop = ("connection", "transfer-encoding", "date", "server")
        headers = {k: v for k, v in answer.getheaders() if k.lower() not in hop}
        return answer.status, headers, data

    def _answer(
        self, status: int, headers: Mapping[str, str], data: bytes, part: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() != "content-length":
                self.send_header(name, value)
        length = {k.lower(): v for k, v in headers.items()}.get("content-length")
        stated = length if self.command == "HEAD" and length else str(len(data))
        self.send_header("Content-Length", stated)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:part])

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        """Clients that are killed hang up; keep the test's output clean."""


@contextmanager
def proxy(
    upstream: str, rates: Mapping[Kind, float] | None = None, seed: int = 0
) -> Iterator[Proxy]:
    """A proxy in front of an endpoint."""
    state = Proxy(upstream, rates or {}, seed)
    handler = type("Handler", (_Handler,), {"proxy": state})
    server = _Server(("127.0.0.1", 0), handler)
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def s3() -> Iterator[str]:
    """A real S3 endpoint with an empty bucket `data`; its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        connection = http.client.HTTPConnection(host, port)
        connection.request("POST", "/moto-api/reset")
        connection.getresponse().read()
        connection.request("PUT", "/data")
        connection.getresponse().read()
        connection.close()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def environment(address: str) -> dict[str, str]:
    """The variables by which clients find an endpoint."""
    return {
        "AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip

"""`geolink doctor`: what it finds, and what it takes for a fault."""

import json
import threading
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from geolink.cli import checks, main, surroundings
from geolink.cli.checks import examine
from geolink.cli.surroundings import Finding


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", *arguments])
    return int(stopped.value.code or 0)


def of(found: list[Finding], name: str) -> Finding:
    (one,) = [finding for finding in found if finding.check == name]
    return one


@pytest.fixture
def server_in_2001() -> Iterator[str]:
    """Address of a server whose clock says 9 September 2001."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response_only(404)
            self.send_header("Date", formatdate(1e9, usegmt=True))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_whole_installation_is_usable_and_every_check_says_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(str(tmp_path), "--clock-url", "", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["usable"]
    found = [Finding(**one) for one in told["checks"]]
    assert all(one.found for one in found)
    assert all(one.remedy for one in found if one.state in ("warning", "fault"))
    for name in ("python", "packages", "PROJ", "shard codecs", "GDAL", "DuckDB", "folder"):
        assert of(found, name).state == "ok", name
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_fault_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "installed_extras", set)
    assert run("/proc/geolink", "--clock-url", "") == 1
    text = capsys.readouterr().out
    assert "fault    folder" in text
    assert "-> give a folder that you may write" in text
    assert "not usable yet: 1 fault" in text


def test_a_machine_that_only_trains_is_not_asked_for_gdal_and_the_other_way_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for there, asked, not_asked in (("train", "torch", "GDAL"), ("build", "GDAL", "torch")):
        monkeypatch.setattr(checks, "installed_extras", lambda extra=there: {extra})
        found = examine(tmp_path)
        names = {one.check.partition(" ")[0] for one in found}
        assert not_asked not in names
        assert asked in names
        absent = "extra build" if there == "train" else "extra train"
        assert of(found, absent).state == "note"
        assert "pip install" in of(found, absent).remedy


def test_a_missing_or_too_old_package_is_named() -> None:
    assert checks._wrong(("numpy", ">=2.0")) == ""
    assert checks._wrong(("numpy", ">=99")).endswith("needed is >=99")
    assert checks._wrong(("no-such-package", ">=1")) == "no-such-package is missing"


def test_a_clock_beside_a_server_is_compared_and_silence_is_no_fault(server_in_2001: str) -> None:
    (off,) = surroundings.clock(server_in_2001)
    assert off.state == "warning"
    assert "ahead of http://127.0.0.1" in off.found
    (silent,) = surroundings.clock("http://127.0.0.1:9")
    assert silent.state == "note"


def test_proxies_are_told_without_their_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://me:secret@proxy.example:3128")
    monkeypatch.setenv("HTTPS_PROXY", "http://other.example:3128")
    monkeypatch.setenv("CURL_CA_BUNDLE", "/no/such/bundle.pem")
    found = list(surroundings.proxy())
    assert "secret" not in str(found)
    assert "https_proxy=http://proxy.example:3128" in found[-1].found
    warned = [one.found for one in found if one.state == "warning"]
    assert "https_proxy and HTTPS_PROXY differ" in warned
    assert any("/no/such/bundle.pem" in text for text in warned)


def test_what_breaks_in_a_check_is_a_fault_of_it_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Iterator[Finding]:
        raise OSError("libexpat.so.1: cannot open shared object file")
        yield

    monkeypatch.setattr(checks, "gdal", broken)
    monkeypatch.setattr(checks, "installed_extras", lambda: {"build"})
    found = examine(tmp_path)
    assert of(found, "GDAL").state == "fault"
    assert "libexpat" in of(found, "GDAL").found
    assert of(found, "folder").state == "ok"

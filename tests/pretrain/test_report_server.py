"""The live page: who knows its address sees it, nobody else; Ctrl-C ends it politely."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from configs.errors import UserError
from pretrain.report_server import PageServer, open_server
from tests.pretrain.verbs import call, hear_ctrl_c
from tests.pretrain.watch.run_folders import write_run_folder

ROOT = Path(__file__).parent.parent.parent
SECONDS = 60


@contextmanager
def serving(made: list[int], port: int = 0) -> Iterator[PageServer]:
    """A server whose page says how often it was made."""

    def make() -> str:
        made.append(1)
        return f"<p>page {len(made)}</p>"

    with open_server(make, port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(SECONDS)


def ask(server: PageServer, path: str, method: str = "GET", hosts: tuple[str, ...] | None = None) -> tuple[int, bytes, dict[str, str]]:
    """Status, body, headers."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=SECONDS)
    try:
        connection.putrequest(method, path, skip_host=hosts is not None)
        for host in hosts or ():
            connection.putheader("Host", host)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}
    finally:
        connection.close()


def test_the_address_shows_the_page_as_it_is_now() -> None:
    made: list[int] = []
    with serving(made) as server:
        assert server.server_address[0] == "127.0.0.1"
        with urllib.request.urlopen(server.address, timeout=SECONDS) as answer:
            assert answer.read() == b"<p>page 1</p>"
            headers = {name.lower(): value for name, value in answer.headers.items()}
        assert ask(server, f"/{server.token}/")[1] == b"<p>page 2</p>"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


def test_whoever_does_not_know_the_token_sees_nothing() -> None:
    made: list[int] = []
    with serving(made) as server:
        token = server.token
        assert len(token) >= 32
        near = (f"/{token}", f"/{token}/x", f"/{token}/../", f"/{token[:-1]}/", f"/{token}x/", f"/{token.swapcase()}/", f"/?{token}")
        for path in (*near, "/", "//", "/%2e%2e/etc/passwd", "/etc/passwd", f"/x?token={token}", "/" + "a" * 9000):
            status, body, _ = ask(server, path)
            assert (status, token.encode() in body, b"page" in body) == (404, False, False), path
    assert not made


def test_a_foreign_name_and_other_methods_are_refused() -> None:
    made: list[int] = []
    with serving(made) as server:
        path, port = f"/{server.token}/", server.server_port
        for hosts in (
            *((f"evil.example:{port}",), ("127.0.0.1",), (f"127.0.0.1:{port + 1}",), (), (f"127.0.0.1:{port}", "evil.example")),
            *((f"127.0.0.1:{port}.evil.example",), ("",)),
        ):
            assert ask(server, path, hosts=hosts)[:2] == (403, b"This address is not served under that name."), hosts
        for method in ("POST", "HEAD", "PUT", "DELETE", "OPTIONS", "CONNECT", "TRACE", "get"):
            assert ask(server, path, method)[0] == 501
        assert not made
        assert ask(server, path, hosts=(f"localhost:{port}",))[0] == 200


def test_what_is_no_request_does_no_harm() -> None:
    made: list[int] = []
    with serving(made) as server:
        for sent in (
            b"",
            b"\r\n\r\n",
            b"\x00\xff" * 100,
            b"GET\r\n\r\n",
            b"GET / HTTP/9\r\n\r\n",
            f"GET /{server.token}/\r\n\r\n".encode(),
        ):
            with socket.create_connection(("127.0.0.1", server.server_port), timeout=SECONDS) as connection:
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                said = b""
                while block := connection.recv(4096):
                    said += block
                assert b"page" not in said
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=SECONDS):  # one that says nothing holds up nobody
            assert ask(server, f"/{server.token}/")[0] == 200


def test_a_page_that_cannot_be_made_is_said_and_the_next_one_shown() -> None:
    answers: list[str | Exception] = [UserError("gone <secret>"), "whole"]

    def make() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with open_server(make, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        assert ask(server, f"/{server.token}/")[:2] == (503, b"UserError")
        assert ask(server, f"/{server.token}/")[:2] == (200, b"whole")
        server.shutdown()
        thread.join(SECONDS)


def test_a_port_that_is_taken_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"cannot be had: .*another --port"):
            open_server(str, taken.getsockname()[1])


def test_tokens_differ() -> None:
    with open_server(str, 0) as one, open_server(str, 0) as two:
        assert one.token != two.token


def test_the_verb_serves_until_ctrl_c(tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path / "run", num_steps=60, only=("loss",))
    command = [sys.executable, "-m", "pretrain.cli", "report", str(folder), "--serve"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c)
    timer = threading.Timer(SECONDS, process.kill)
    timer.start()
    try:
        assert process.stderr is not None
        address = re.search(r"http://127\.0\.0\.1:\d+/[\w-]{32,}/", process.stderr.readline())
        assert address is not None
        with urllib.request.urlopen(address[0], timeout=SECONDS) as answer:
            page = answer.read().decode()
        assert "Numbers: Loss" in page
        assert 'http-equiv="refresh"' not in page  # the run is done
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=SECONDS)
    finally:
        timer.cancel()
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert (out, err) == ("", "the page is closed\n")
    assert not (folder / "reports").exists()


def test_a_run_that_is_running_is_read_again(tmp_path: Path) -> None:
    from pretrain.watch.report import RunFacts, make_page

    page = make_page([RunFacts("r", "/r", {"state": "running"})], 10)
    assert '<meta http-equiv="refresh" content="10">' in page
    assert "--serve" in call("report", "--help").out

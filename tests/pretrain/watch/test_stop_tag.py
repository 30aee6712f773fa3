"""The tag `stop` of the W&B run: it makes the file STOP, an old one is removed, and no answer of the service reaches the run."""

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.run.folder import RunFolder
from pretrain.watch.stop_tag import STOP_FILE, watch_stop_tag

ROOT = Path(__file__).parent.parent.parent.parent
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # how the threads are ended here


class Service:
    """Stands in for W&B's public API: the tags of one run, and what happens when it is asked."""

    def __init__(self, *tags: str) -> None:
        self.tags, self.num_asked, self.fails = list(tags), 0, False
        self._kept: SimpleNamespace | None = None

    def flush(self) -> None:
        self._kept = None

    def run(self, path: str) -> Any:
        assert path == "me/proj/id"
        self.num_asked += 1
        if self.fails:
            raise TimeoutError("no answer")
        if self._kept is None:
            self._kept = SimpleNamespace(tags=list(self.tags))
            self._kept.update = self._update
        return self._kept

    def _update(self) -> None:
        assert self._kept is not None
        self.tags = list(self._kept.tags)

    def wait(self, count: int = 3) -> None:
        """Until it was asked so many times more, and answered all but the last."""
        wanted, deadline = self.num_asked + count, time.monotonic() + 20
        while self.num_asked < wanted and time.monotonic() < deadline:
            time.sleep(0.002)
        assert self.num_asked >= wanted


@pytest.fixture(autouse=True)
def _threads_end(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A thread that has seen nothing would ask for ever; here the test's end stops it."""
    over = threading.Event()

    def sleep(seconds: float) -> None:
        if over.wait(seconds):
            raise SystemExit

    monkeypatch.setattr("pretrain.watch.stop_tag.time", SimpleNamespace(sleep=sleep))
    yield
    over.set()
    for thread in threading.enumerate():
        if thread.name == "stop tag":
            thread.join(20)


def watch(service: Service, folder: Path, live: SimpleNamespace, said: list[str]) -> threading.Thread:
    return watch_stop_tag(live, folder, said.append, open_api=lambda: service, look_seconds=0.005)  # type: ignore[arg-type]


def test_the_file_is_the_run_folders_own(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).stop_file == tmp_path / STOP_FILE


def test_a_tag_that_comes_later_makes_the_file(tmp_path: Path) -> None:
    service, live, said = Service("mine"), SimpleNamespace(path="me/proj/id", tags=("mine",)), list[str]()
    thread = watch(service, tmp_path, live, said)
    service.wait()
    assert not (tmp_path / STOP_FILE).exists()
    service.tags.append("stop")
    thread.join(20)
    assert not thread.is_alive()
    assert (tmp_path / STOP_FILE).exists()
    assert service.tags == ["mine", "stop"], "the next start removes it"
    assert len(said) == 1 and "tag stop" in said[0]


def test_the_next_start_removes_the_tag_everywhere_and_a_new_one_counts(tmp_path: Path) -> None:
    """What the live run would send again is cleared too, or the tag came back with its next update."""
    service, live, said = Service("stop", "mine"), SimpleNamespace(path="me/proj/id", tags=("stop", "mine")), list[str]()
    thread = watch(service, tmp_path, live, said)
    service.wait(5)
    assert (service.tags, live.tags) == (["mine"], ("mine",))
    assert not (tmp_path / STOP_FILE).exists() and not said
    service.tags.append("stop")
    thread.join(20)
    assert (tmp_path / STOP_FILE).exists()


def test_a_service_that_fails_is_asked_again_and_its_first_answer_is_the_old_state(tmp_path: Path) -> None:
    service, live, said = Service("stop"), SimpleNamespace(path="me/proj/id", tags=()), list[str]()
    service.fails = True
    thread = watch(service, tmp_path, live, said)
    service.wait()
    service.fails = False
    service.wait(5)
    assert thread.is_alive() and service.tags == [] and not (tmp_path / STOP_FILE).exists() and said == []


def test_an_answer_that_never_comes_blocks_nothing(tmp_path: Path) -> None:
    asked, never = threading.Event(), threading.Event()

    def hang() -> Any:
        asked.set()
        never.wait(60)
        raise SystemExit

    began = time.monotonic()
    thread = watch_stop_tag(SimpleNamespace(path="p", tags=()), tmp_path, pytest.fail, open_api=hang)  # type: ignore[arg-type]
    assert time.monotonic() - began < 1
    assert asked.wait(10)
    assert thread.daemon, "the process may end while it waits"
    never.set()


# --- the real client, and a server that knows as much as it asks for -----------------------------------------


@contextmanager
def server(tags: list[str]) -> Iterator[str]:
    """The address of a server with one run that has these tags."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            query, data = asked["query"], {}
            if "viewer" in query:
                data["viewer"] = {"id": "u", "flags": "{}", "entity": "me", "username": "me", "email": "", "teams": {"edges": []}}
            elif "upsertBucket" in query:
                tags[:] = asked["variables"].get("tags", tags)
                data["upsertBucket"] = {"bucket": described(), "inserted": False}
            elif "project(" in query:
                data["project"] = {"run": described()}
            answer = json.dumps({"data": data}).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    def described() -> dict[str, Any]:
        empty = ("description", "notes", "group", "jobType", "sweepName", "historyKeys", "heartbeatAt")
        texts = {"config": "{}", "summaryMetrics": "{}", "systemMetrics": "{}", "state": "running", "createdAt": "2020-01-01T00:00:00"}
        return {"id": "store", "projectId": "1", "name": "id", "displayName": "mine", "tags": tags, **texts, **dict.fromkeys(empty)}

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


WATCHING = """
import sys, types
from pathlib import Path
from pretrain.watch.stop_tag import watch_stop_tag
live = types.SimpleNamespace(path="me/proj/id", tags=())
thread = watch_stop_tag(live, Path(sys.argv[1]), lambda text: print(text, flush=True), look_seconds=0.2)
thread.join(60)
"""


def test_wandbs_own_client_reads_and_writes_the_tag(tmp_path: Path) -> None:
    tags = ["mine", "stop"]
    with server(tags) as address:
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("WANDB_")},
            "WANDB_BASE_URL": address,
            "WANDB_API_KEY": "k" * 40,
            "HOME": str(tmp_path),
            "TMPDIR": str(tmp_path),
            "PYTHONPATH": str(ROOT),
        }
        process = subprocess.Popen([sys.executable, "-c", WATCHING, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True)
        try:
            deadline = time.monotonic() + 60
            while "stop" in tags and time.monotonic() < deadline:
                time.sleep(0.05)
            assert tags == ["mine"]
            time.sleep(1)
            assert not (tmp_path / STOP_FILE).exists()
            tags.append("stop")
            said, _ = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait(10)
    assert "tag stop" in said
    assert (tmp_path / STOP_FILE).exists()

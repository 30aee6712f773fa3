"""The copy that training does not touch, and the process that writes it."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint.arena import Answer, Arena
from pretrain.checkpoint.blocks import VerifiedFiles
from pretrain.checkpoint.image import Image
from pretrain.checkpoint.writer import write_files

LIMIT_SECONDS = 30


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(1000)
    yield arena
    arena.close()


def image_of(tensor: torch.Tensor, rank: int = 0) -> Image:
    return Image(rank, {"weight|w|0": tensor}, {"rank": rank})


def writer_of(process: psutil.Process) -> psutil.Process:
    (writer,) = [child for child in process.children() if "pretrain.checkpoint.writer" in child.cmdline()]
    return writer


def test_what_is_written_is_what_was_announced_whatever_training_does_since(arena: Arena, tmp_path: Path, seed: int) -> None:
    """The arena grows from 1,000 bytes to 40 MB, the tensor is changed while it is written; three saves, the memory is used again."""
    torch.manual_seed(seed)
    tensor = torch.randn(10_000_000)
    for number in range(3):
        announced = tensor.clone()
        answer = arena.start(tmp_path / f"{number}", image_of(tensor))
        tensor.normal_()
        found = answer(True)
        assert found is not None
        assert found.problem is None
        assert torch.equal(load_file(tmp_path / f"{number}" / "rank_00000.safetensors")["weight|w|0"], announced)
        with VerifiedFiles(tmp_path / f"{number}", found.files) as files:
            assert files.problems(found.files) == []
            assert json.loads(files.read("rank_00000.json"))["rank"] == 0


def test_the_answer_is_not_waited_for(arena: Arena, tmp_path: Path) -> None:
    answer = arena.start(tmp_path / "one", image_of(torch.zeros(10_000_000)))
    asked, deadline = 0, time.monotonic() + LIMIT_SECONDS
    while (found := answer(False)) is None and time.monotonic() < deadline:
        asked += 1
        time.sleep(0.001)
    assert found is not None
    assert found.problem is None
    assert asked > 0


def test_a_writer_that_is_killed_is_a_problem_and_the_next_save_has_another(arena: Arena, tmp_path: Path) -> None:
    answer = arena.start(tmp_path / "one", image_of(torch.zeros(30_000_000)))
    writer_of(psutil.Process()).kill()
    assert answer(True) == Answer({}, "the process that writes checkpoints ended with signal 9")
    answer = arena.start(tmp_path / "two", image_of(torch.ones(10)))
    found = answer(True)
    assert found is not None
    assert found.problem is None


def test_what_stops_a_run_does_not_stop_its_writer(arena: Arena, tmp_path: Path) -> None:
    answer = arena.start(tmp_path / "one", image_of(torch.zeros(10)))
    answer(True)  # it is there and listens
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        writer_of(psutil.Process()).send_signal(number)
    found = arena.start(tmp_path / "two", image_of(torch.zeros(10)))(True)
    assert found is not None
    assert found.problem is None


def test_a_disk_that_is_full_is_told_and_the_next_save_may_fare_better(arena: Arena, tmp_path: Path) -> None:
    arena.start(tmp_path / "zero", image_of(torch.zeros(10)))(True)
    writer = writer_of(psutil.Process())
    writer.rlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    found = arena.start(tmp_path / "one", image_of(torch.zeros(1000)))(True)
    assert found is not None
    assert "File too large" in (found.problem or "")
    writer.rlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    found = arena.start(tmp_path / "two", image_of(torch.zeros(1000)))(True)
    assert found is not None
    assert found.problem is None


def test_a_writer_is_small_and_ends_with_its_rank(tmp_path: Path) -> None:
    """SIGKILL of the rank, in the middle of a save."""
    code = (
        "import sys, time, torch\n"
        "from pathlib import Path\n"
        "from pretrain.checkpoint.arena import Arena\n"
        "from pretrain.checkpoint.image import Image\n"
        "arena = Arena(1000)\n"
        "arena.start(Path(sys.argv[1], 'one'), Image(0, {'weight|w|0': torch.zeros(1000)}, {}))(True)\n"
        "arena.start(Path(sys.argv[1], 'two'), Image(0, {'weight|w|0': torch.zeros(100_000_000)}, {}))\n"
        "print('begun', flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    rank = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=environment)
    assert rank.stdout is not None
    assert rank.stdout.readline() == b"begun\n"
    writer = writer_of(psutil.Process(rank.pid))
    memory = writer.memory_full_info()
    assert memory.uss < 40e6, "its own memory: the arena is shared, and torch is not there"
    rank.kill()
    rank.wait(LIMIT_SECONDS)
    rank.stdout.close()
    deadline = time.monotonic() + LIMIT_SECONDS
    while writer.is_running() and writer.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not writer.is_running() or writer.status() == psutil.STATUS_ZOMBIE


def test_a_writer_that_is_stopped_ends_with_its_rank(tmp_path: Path) -> None:
    """The kernel ends it: stopped, it could not see that nobody listens any more."""
    code = (
        "import sys, time, torch\n"
        "from pathlib import Path\n"
        "from pretrain.checkpoint.arena import Arena\n"
        "from pretrain.checkpoint.image import Image\n"
        "arena = Arena(1000)\n"
        "arena.start(Path(sys.argv[1], 'one'), Image(0, {'weight|w|0': torch.zeros(1000)}, {}))(True)\n"
        "print('written', flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    rank = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=environment)
    assert rank.stdout is not None
    assert rank.stdout.readline() == b"written\n"
    writer = writer_of(psutil.Process(rank.pid))
    writer.suspend()
    rank.kill()
    rank.wait(LIMIT_SECONDS)
    rank.stdout.close()

    def is_alive() -> bool:
        return writer.is_running() and writer.status() != psutil.STATUS_ZOMBIE

    try:
        deadline = time.monotonic() + 5
        while is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not is_alive()
    finally:
        if is_alive():
            writer.kill()


def test_what_is_announced_has_reached_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files, then their folder: on another node nobody else syncs them before the commit gets its name."""
    synced: list[str] = []
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    records = write_files(memoryview(bytes(300)), tmp_path / "commit", [("rank_00000.safetensors", 0, 200), ("rank_00000.json", 200, 100)])
    assert synced == ["rank_00000.safetensors", "rank_00000.json", "commit"]
    assert {name: record["bytes"] for name, record in records.items()} == {"rank_00000.safetensors": 200, "rank_00000.json": 100}

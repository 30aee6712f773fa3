"""Durable writes: whole under the final name or not at all, in the order that survives a power cut."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import durable
from configs.durable import commit_folder, open_plain, remove_folders, sha256_of_file, write_file

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What reached the disk and what was renamed, in order: ("fsync", name) and ("rename", new name)."""
    events: list[tuple[str, str]] = []
    real_fsync, real_rename, real_replace = os.fsync, Path.rename, Path.replace

    def fsync(descriptor: int) -> None:
        events.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        real_fsync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        events.append(("rename", Path(target).name))
        return real_rename(self, target)

    def replace(self: Path, target: Path) -> Path:
        events.append(("rename", Path(target).name))
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(Path, "replace", replace)
    return events


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")


# --- write_file --------------------------------------------------------------------------------------------


def test_a_file_is_written_and_written_over(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_file(path, b"one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a.json"]  # noqa: PTH208  (names only, hidden ones too)


@needs_proc
def test_a_file_reaches_the_disk_before_its_name_and_its_name_before_the_return(tmp_path: Path, order: list[tuple[str, str]]) -> None:
    write_file(tmp_path / "a.json", b"one")
    (first, temporary), *rest = order
    assert first == "fsync"
    assert temporary.startswith(".a.json.")
    assert rest == [("rename", "a.json"), ("fsync", tmp_path.name)]


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is POSIX")
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    """The process may write 1000 bytes to a file and is asked to write 5000: as a full disk, after a part is written."""
    (tmp_path / "a.json").write_bytes(b"old")
    code = (
        "import resource, signal; from pathlib import Path; from configs.durable import write_file\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "for name in ('a.json', 'new.json'):\n"
        "    try: write_file(Path(name), bytes(5000))\n"
        "    except OSError as error: print(type(error).__name__)\n"
        "    else: print('written')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["OSError", "OSError"], done.stderr
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.json", b"old")]


def test_a_crash_before_the_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_file(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError("no power")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no power"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"]


def test_two_writers_of_one_name_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    contents = [bytes([n]) * 100_000 for n in range(4)]
    failures: list[BaseException] = []

    def write(content: bytes) -> None:
        try:
            for _ in range(5):
                write_file(path, content)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert path.read_bytes() in contents
    assert [found.name for found in tmp_path.iterdir()] == ["a"]


# --- commit_folder -----------------------------------------------------------------------------------------


@needs_proc
def test_everything_in_a_folder_reaches_the_disk_before_its_name(tmp_path: Path, order: list[tuple[str, str]]) -> None:
    temporary = tmp_path / "step.tmp"
    (temporary / "inner").mkdir(parents=True)
    for name in ("b.bin", "a.json", "inner/deep.bin"):
        (temporary / name).write_bytes(b"x")
    commit_folder(temporary, tmp_path / "step")
    assert order[-3:] == [("fsync", "step.tmp"), ("rename", "step"), ("fsync", tmp_path.name)]
    assert sorted(order[:-3]) == [("fsync", name) for name in ("a.json", "b.bin", "deep.bin", "inner")]
    assert order.index(("fsync", "deep.bin")) < order.index(("fsync", "inner"))
    assert sorted(path.name for path in (tmp_path / "step").rglob("*")) == ["a.json", "b.bin", "deep.bin", "inner"]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_a_commit_is_never_overwritten(tmp_path: Path, kind: str) -> None:
    final, temporary, other = tmp_path / "step", tmp_path / "step.tmp", tmp_path / "other"
    temporary.mkdir()
    (temporary / "new").write_bytes(b"new")
    if kind == "file":
        final.write_bytes(b"old")
    else:
        (other if kind == "link" else final).mkdir()
        if kind == "link":
            final.symlink_to(other)
        (final / "old").write_bytes(b"old")
    with pytest.raises(OSError):
        commit_folder(temporary, final)
    assert (final if kind == "file" else final / "old").read_bytes() == b"old"
    assert (temporary / "new").read_bytes() == b"new", "what was to be committed is still there"


def test_a_sync_that_fails_gives_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "step.tmp"
    temporary.mkdir()
    (temporary / "a").write_bytes(b"x")

    def fail(path: Path) -> None:
        raise OSError("no power")

    monkeypatch.setattr(durable, "sync_path", fail)
    with pytest.raises(OSError, match="no power"):
        commit_folder(temporary, tmp_path / "step")
    assert not (tmp_path / "step").exists()


# --- the rest ----------------------------------------------------------------------------------------------


@given(st.binary(max_size=100))
def test_sha256_is_that_of_the_whole_file(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    import hashlib

    path = tmp_path_factory.getbasetemp() / "hashed"
    path.write_bytes(content)
    assert sha256_of_file(path) == hashlib.sha256(content).hexdigest()


def test_sha256_reads_more_than_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    whole = sha256_of_file(tmp_path / "a")
    monkeypatch.setattr(durable, "BLOCK_BYTES", 7)
    assert sha256_of_file(tmp_path / "a") == whole


def test_folders_are_removed_and_missing_ones_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    remove_folders([tmp_path / "a", tmp_path / "never"])
    assert not (tmp_path / "a").exists()
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder", "device"])
def test_only_a_plain_file_is_opened_as_one(kind: str, tmp_path: Path) -> None:
    """At once: a pipe that nobody writes is not waited for."""
    path = tmp_path / "file"
    path.write_bytes(b"content")
    with open_plain(path) as file:
        assert file.read() == b"content"
    other = tmp_path / "other"
    if kind in ("link", "dangling"):
        other.symlink_to(path if kind == "link" else tmp_path / "nowhere")
    elif kind == "pipe":
        os.mkfifo(other)
    elif kind == "folder":
        other.mkdir()
    else:
        other = Path("/dev/zero")
    with pytest.raises(OSError):
        open_plain(other)

"""An object store that is played by a folder, for every process that finds it in its environment.

In: PLAYED_STORE, the folder; beside it PLAYED_STORE.down, how often it will not answer; PLAYED_KILL, "before put NAME" or "after put NAME":
where the process that asks is killed, NAME being the end of an object's name. Out: `played://`, an fsspec file system, and a line in
PLAYED_STORE.log for each object that was put or removed. An object is there whole or not at all, and there are no empty folders.
"""

import io
import os
import shutil
import signal
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem


class PlayedStore(LocalFileSystem):
    """Its objects are files below the folder."""

    protocol = "played"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(path).replace("played://", f"{os.environ['PLAYED_STORE']}/").rstrip("/")

    def ls(self, path: str, detail: bool = False, **_: Any) -> list[str]:
        self._answer()
        path = self._strip_protocol(path)
        found = [one for one in Path(path).glob("*") if one.is_file() or any(inner.is_file() for inner in one.rglob("*"))]
        if not found:
            raise FileNotFoundError(path)
        return [str(one) for one in found]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        self._answer()
        return {"size": Path(self._strip_protocol(path)).stat().st_size}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        self._answer()
        return Path(self._strip_protocol(path)).read_bytes()[start:end]

    def open(self, path: str, mode: str = "rb", **_: Any) -> "Upload":
        assert mode == "wb"
        self._answer()
        return Upload(self, self._strip_protocol(path))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        self._answer()
        if mode == "create" and Path(self._strip_protocol(path)).exists():
            raise FileExistsError(path)
        self.put_whole(self._strip_protocol(path), value)

    def rm_file(self, path: str) -> None:
        self._answer()
        Path(self._strip_protocol(path)).unlink()
        note("remove", self._strip_protocol(path))

    def rm(self, path: str, recursive: bool = False, **_: Any) -> None:
        self._answer()
        assert recursive
        shutil.rmtree(self._strip_protocol(path))
        note("remove", self._strip_protocol(path))

    def put_whole(self, path: str, content: bytes) -> None:
        kill("before put", path)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(f"{os.environ['PLAYED_STORE']}.{os.getpid()}")
        temporary.write_bytes(content)
        temporary.replace(path)
        note("put", path)
        kill("after put", path)

    def _answer(self) -> None:
        down = Path(f"{os.environ['PLAYED_STORE']}.down")
        if down.exists() and (times := int(down.read_text())):
            down.write_text(str(times - 1))
            raise ConnectionError("no route to the store")  # transports have exceptions of their own


class Upload(io.BytesIO):
    """An object that is there when it is closed."""

    def __init__(self, store: PlayedStore, path: str) -> None:
        super().__init__()
        self._store, self._path = store, path

    def close(self) -> None:
        if not self.closed:
            self._store.put_whole(self._path, self.getvalue())
        super().close()


def note(what: str, path: str) -> None:
    """A line of the log."""
    with Path(f"{os.environ['PLAYED_STORE']}.log").open("a") as log:
        log.write(f"{what} {path.removeprefix(os.environ['PLAYED_STORE'])}\n")


def kill(where: str, path: str) -> None:
    """End this process, where it is to be killed here."""
    wanted = os.environ.get("PLAYED_KILL", "")
    if wanted.startswith(where) and path.endswith(wanted.removeprefix(where).strip()):
        os.kill(os.getpid(), signal.SIGKILL)


def install(folder: Path) -> None:
    """Make `played://` known to every process that has the folder in its PYTHONPATH, as an installed transport is."""
    about = folder / "played_store-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: played-store\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[fsspec.specs]\nplayed = tests.pretrain.checkpoint.played_store:PlayedStore\n")

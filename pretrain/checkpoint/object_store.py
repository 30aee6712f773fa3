"""An object store, reached through fsspec one call at a time: what fails is tried again, and in the end said in a sentence.

In: URLs of objects (`s3://`, `gs://`, `az://`, whatever fsspec reads). Out: names, sizes, bytes. No torch; fsspec comes with the first one.

What was written is listed and read at once by everybody: S3, GCS and Azure promise that, and nothing here waits for it. An object is there
whole or not at all.
"""

import contextlib
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

WAIT_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 32.0)
"""Before each further try: a network that is away for a minute is waited for; in three minutes of silence a rank is taken for hung."""
T = TypeVar("T")
# Of its own: a run's random numbers do not depend on its network.
_chance = random.Random()


class StoreError(OSError):
    """A store that refuses, or that is not reached. It says nothing of what lies there."""


def names_below(url: str) -> list[str]:
    """Last parts of the names directly below a URL; none where there is nothing. Raises StoreError."""
    try:
        return [str(name).rstrip("/").rpartition("/")[2] for name in _reach(url, lambda system, path: system.ls(path, detail=False))]
    except FileNotFoundError:
        return []


def size_of_object(url: str) -> int:
    """In bytes. Raises FileNotFoundError, StoreError."""
    return int(_reach(url, lambda system, path: system.info(path)["size"]))


def read_object(url: str, first: int = 0, end: int | None = None) -> bytes:
    """Bytes [first, end), or all. Raises FileNotFoundError, StoreError."""
    return _reach(url, lambda system, path: system.cat_file(path, first, end))


def write_object(url: str, blocks: Sequence[memoryview | bytes]) -> None:
    """Blocks, one behind the other, as one object; what stood there is replaced. Raises StoreError."""

    def upload(system: Any, path: str) -> None:
        with system.open(path, "wb") as file:
            for block in blocks:
                file.write(block)

    _reach(url, upload)


def create_object(url: str, content: bytes) -> None:
    """An object that is not there yet; the store itself refuses a second one. Raises FileExistsError, StoreError."""
    try:
        _reach(url, lambda system, path: system.pipe_file(path, content, mode="create"))
    except FileExistsError:
        if read_object(url) != content:  # else it arrived, and only its answer was lost
            raise FileExistsError(f"{url} is there already, and is never overwritten") from None


def remove_object(url: str) -> None:
    """Raises StoreError; that it is gone already is no error."""
    with contextlib.suppress(FileNotFoundError):
        _reach(url, lambda system, path: system.rm_file(path))


def remove_below(url: str) -> None:
    """Everything below a URL that nobody trusts any more. It is tried once: what is left does no harm."""
    with contextlib.suppress(OSError):
        _reach(url, lambda system, path: system.rm(path, recursive=True), ())


def _reach(url: str, act: Callable[[Any, str], T], pauses: Sequence[float] | None = None) -> T:
    """What `act` returns for the file system of a URL and the path in it, tried again behind each pause."""
    import fsspec.core

    for pause in (*(WAIT_SECONDS if pauses is None else pauses), None):
        try:
            system, path = cast("tuple[Any, str]", fsspec.core.url_to_fs(url))
            system.invalidate_cache()  # other ranks and attempts write, too
            return act(system, path)
        except (FileNotFoundError, FileExistsError):
            raise
        except ImportError as error:
            raise StoreError(
                f"{url}: a package is missing ({error}); `pip install s3fs` for s3://, gcsfs for gs://, adlfs for az://"
            ) from None
        except PermissionError as error:
            raise StoreError(f"{url}: the store refuses ({error}); check the credentials in the environment and what they allow") from None
        except Exception as error:  # transports raise exceptions of their own, of no common kind
            if pause is None:
                problem = f"{type(error).__name__}: {error}"
                raise StoreError(f"{url}: {problem}, however often it was tried; check the network, the URL and the credentials") from error
            time.sleep(pause * _chance.uniform(0.75, 1.25))  # not all ranks at once
    raise AssertionError("the last try returns or raises")

"""Host memory that a rank shares with its writer: the files of a save lie in it as they will lie on the disk.

In: the image of a save. Out: a copy of it that training no longer touches, and the writer's answer when it is on the disk. The copy is all
that training waits for; the memory is taken, and touched, before the first step, and pinned where there is a GPU.
"""

import contextlib
import json
import mmap
import os
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import PurePath
from typing import Any, NamedTuple

import torch

from pretrain.checkpoint.blocks import FileRecord
from pretrain.checkpoint.image import Image


class Answer(NamedTuple):
    """How the writing of one rank's files ended."""

    files: dict[str, FileRecord]
    problem: str | None


class Arena:
    """Memory for one save, and the process that writes it. `close` it at the end."""

    def __init__(self, num_bytes: int) -> None:
        """num_bytes: what is expected; it grows where more is needed."""
        self._file = os.memfd_create("checkpoint")
        self._memory = self._bytes = None
        self._process: subprocess.Popen[bytes] | None = None
        self._grow(max(num_bytes, mmap.PAGESIZE))

    def _grow(self, num_bytes: int) -> None:
        os.ftruncate(self._file, num_bytes)
        self._unpin()
        self._memory = mmap.mmap(self._file, num_bytes)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._bytes.zero_()  # the first touch of a page is its price
        if torch.cuda.is_available():
            _cuda().cudaHostRegister(self._bytes.data_ptr(), num_bytes, 0)

    def _unpin(self) -> None:
        if self._bytes is not None and torch.cuda.is_available():
            _cuda().cudaHostUnregister(self._bytes.data_ptr())

    def start(self, folder: PurePath, image: Image) -> Callable[[bool], Answer | None]:
        """Copy the image, and have it written into `folder`. Returns, as soon as what was copied may change, `answer`. Raises OSError.

        The one before must have been answered.
        """
        if self._process is None or self._process.poll() is not None:
            self._process = self._start_writer()
        if len(image) > len(self._memory or b""):
            self._grow(len(image))
        files = image.copy_into(self._bytes)
        request = json.dumps({"folder": str(folder), "files": files}) + "\n"
        assert self._process.stdin is not None
        self._process.stdin.write(request.encode())
        self._process.stdin.flush()
        return self.answer

    def answer(self, wait: bool) -> Answer | None:
        """How it ended, once; None while it is written. A writer that died is a problem, too."""
        process = self._process
        assert process is not None and process.stdout is not None
        if not wait and not select.select([process.stdout], [], [], 0)[0]:
            return None
        line = process.stdout.readline()
        if not line.endswith(b"\n"):
            code = process.wait()
            return Answer({}, f"the process that writes checkpoints ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}")
        answer = json.loads(line)
        return Answer(answer.get("files", {}), answer.get("problem"))

    def differences(self, image: Image) -> list[str]:
        """Keys of tensors whose bytes are not those that lie here, where an image of the same form was copied before."""
        assert self._bytes is not None
        return image.differences(self._bytes)

    def _start_writer(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "pretrain.checkpoint.writer", str(self._file), str(os.getpid())]
        return subprocess.Popen(command, pass_fds=[self._file], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def close(self) -> None:
        """End the writer, after what it was given."""
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._process.communicate()
        self._unpin()
        os.close(self._file)


def _cuda() -> Any:
    """CUDA's own functions, which no type describes."""
    return torch.cuda.cudart()

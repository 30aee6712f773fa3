"""What the operating system says about files, in words that name a way out."""

import errno
import os
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from configs.errors import UserError
from data_pipeline.input_file import InputFile

UNPACKED = 3  # bytes of text in a byte of a compressed file: seldom fewer
TOKENS_BYTES = 0.35  # of shards for each byte of text: seldom fewer
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def explain_file_errors(root: Path) -> Generator[None, None, None]:
    """Turn a full disk, a missing file and a missing permission into UserError; `root` is what is written to."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            raise UserError(
                f"{root}: no room left to write ({os.strerror(error.errno or 0)}); free some space, then start the same "
                "command again: the units that are finished are kept."
            ) from None
        if isinstance(error, FileNotFoundError | PermissionError) and error.filename is not None:
            raise UserError(
                f"{error.filename}: cannot be read or written ({error.strerror}); mend that, then start the same command again."
            ) from None
        raise


def check_room(root: Path, files: Sequence[InputFile]) -> None:
    """Raises UserError when the shards of these files cannot possibly fit beside what lies in `root` already."""
    packed = (".gz", ".zst", ".parquet")
    text = sum(file.num_bytes * (UNPACKED if file.name.lower().endswith(packed) else 1) for file in files if file.kind != "megatron")
    wanted = int(TOKENS_BYTES * text) + sum(file.num_bytes for file in files if file.kind == "megatron")
    there = sum(path.stat().st_size for path in (root / "units").glob("*/*.bin"))
    free = shutil.disk_usage(root).free
    if wanted > free + there:
        raise UserError(
            f"{root}: {free / 1e9:.1f} GB are free, and the shards of {text / 1e9:.1f} GB of text take {wanted / 1e9:.1f} GB at the "
            "very least; free some space, or set data.root to a larger disk."
        )

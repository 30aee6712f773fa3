"""What the operating system says about files, in words that name a way out."""

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import UserError

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

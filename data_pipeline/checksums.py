"""A CRC32C for every 64 KiB of a shard's tokens, so that whoever reads a sample checks just the blocks it lies in.

In: `<prefix>.bin`. Out: `<prefix>.crc32c`, one little-endian 32-bit sum per block. A SHA-256 names the whole file, and needs
all of it; a sum finds every flipped bit and every burst of up to 32 in its block (Castagnoli, Braeuer & Herrmann 1993).
"""

from pathlib import Path

import crc32c
import numpy as np
import numpy.typing as npt

BLOCK_BYTES = 1 << 16
SUFFIX = ".crc32c"


def write_checksums(prefix: Path) -> None:
    """Write `<prefix>.crc32c` for `<prefix>.bin`. Raises OSError."""
    with Path(f"{prefix}.bin").open("rb") as file:
        sums = [crc32c.crc32c(block) for block in iter(lambda: file.read(BLOCK_BYTES), b"")]
    Path(f"{prefix}{SUFFIX}").write_bytes(np.array(sums, dtype="<u4").tobytes())


def read_checksums(content: bytes) -> npt.NDArray[np.uint32]:
    """The sums of a `.crc32c` file's content, in the order of the blocks. Raises ValueError when it is cut off."""
    return np.frombuffer(content, "<u4")


def block_is_whole(content: bytes | memoryview, expected: int) -> bool:
    """Whether a block (the last one may be shorter) has the sum that was written down for it."""
    return crc32c.crc32c(content) == expected

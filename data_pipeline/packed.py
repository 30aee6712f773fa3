"""What is packed, .gz or .zst, to its content: all of it, or an error before the end is taken for one.

In: a file, or a stream that is open. Out: blocks of bounded size. A file that is cut or damaged raises one of `DAMAGES`, at
the latest at its end: a reader goes over all of it before the first document, and `keep_blocks` spares it the second time.
"""

import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

BLOCK_BYTES = 1 << 20
PACKED_BLOCK_BYTES = 1 << 16  # of what is unpacked: small, because zlib copies what a member leaves over
KEPT_BYTES = 64_000_000  # unpacked content up to this is kept from the check for damage, above it is unpacked again
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
DAMAGES = (EOFError, zlib.error, zstandard.ZstdError)


def unpack(path: Path, packed: str) -> Iterator[bytes]:
    """The content of a .gz or .zst file in blocks of bounded size. Raises one of `DAMAGES`, at the latest at its end; OSError."""
    with path.open("rb") as stream:
        if packed == ".zst":
            _check_zstd_frames(stream, path.stat().st_size)
            stream.seek(0)
        yield from unpack_stream(stream, packed)


def unpack_stream(stream: BinaryIO, packed: str) -> Iterator[bytes]:
    """As `unpack`, from an open file; that a zstd frame is cut is not noticed here."""
    return _unpack_zstd(stream) if packed == ".zst" else _unpack_gzip(stream)


def keep_blocks(blocks: Iterable[bytes], kept: list[bytes]) -> Iterator[bytes]:
    """Hand blocks on; at the end `kept` holds them all, or none where they are more than `KEPT_BYTES`."""
    size = 0
    for block in blocks:
        size += len(block)
        if size <= KEPT_BYTES:
            kept.append(block)
        else:
            kept.clear()
        yield block


def _unpack_gzip(stream: BinaryIO) -> Iterator[bytes]:
    member = None
    num_members = 0
    while portion := stream.read(PACKED_BLOCK_BYTES):
        while portion:
            if member is None:
                portion = portion.lstrip(b"\0") if num_members else portion  # members may be padded
                if not portion:
                    break
                member = zlib.decompressobj(wbits=31)  # a gzip header and its checksum are wanted
                num_members += 1
            yield member.decompress(portion, BLOCK_BYTES)
            portion = member.unused_data if member.eof else member.unconsumed_tail
            if member.eof:
                member = None
    if member is not None or not num_members:
        raise EOFError("the gzip file ends before its last member does")


def _unpack_zstd(stream: BinaryIO) -> Iterator[bytes]:
    with zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True, closefd=False) as unpacked:
        while block := unpacked.read(BLOCK_BYTES):
            yield block


def _check_zstd_frames(stream: BinaryIO, num_bytes: int) -> None:
    """Raises EOFError when the file ends within a frame, which the library takes for the end of the content.

    It goes from block header to block header (RFC 8878, 3.1.1) without unpacking.
    """
    cut = EOFError("the zstd file ends before its last frame does")
    position = 0
    while position < num_bytes or position == 0:
        stream.seek(position)
        start = stream.read(8)
        if len(start) < 8:
            raise cut
        if start[:4] != ZSTD_MAGIC:
            if 0x50 <= start[0] <= 0x5F and start[1:4] == b"\x2a\x4d\x18":  # a frame to skip
                position += 8 + int.from_bytes(start[4:8], "little")
                continue
            return  # no frame at all: unpacking says so
        descriptor = start[4]
        is_single = descriptor >> 5 & 1
        content_size = (is_single, 2, 4, 8)[descriptor >> 6]
        position += 5 + (1 - is_single) + (0, 1, 2, 4)[descriptor & 3] + content_size
        is_last = False
        while not is_last:
            stream.seek(position)
            header = stream.read(3)
            if len(header) < 3:
                raise cut
            number = int.from_bytes(header, "little")
            is_last = bool(number & 1)
            position += 3 + (1 if number >> 1 & 3 == 1 else number >> 3)
        position += 4 * (descriptor >> 2 & 1)
    if position > num_bytes:
        raise cut

"""Distinct real text of this machine for benchmarks: the files of its Python installations, headers and documentation.

In: a number of bytes. Out: documents, each text once (by hash), in an order that depends on the files alone. Nothing is
downloaded; what a machine has decides what it can give.
"""

import hashlib
import os
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import orjson
import zstandard

FOLDERS = (sys.prefix, sysconfig.get_path("stdlib"), "/usr/share/doc", "/usr/share", "/usr/lib/python3", "/usr/include", "/usr/share/perl")
LEFT_OUT = (
    ".so",
    ".pyc",
    ".gz",
    ".a",
    ".whl",
    ".png",
    ".bin",
    ".xz",
    ".zip",
    ".parquet",
    ".jpg",
    ".gif",
    ".ico",
    ".woff",
    ".woff2",
    ".svg",
)
LARGEST_BYTES = 2_000_000


def distinct_texts(num_bytes: int) -> Iterator[tuple[str, str]]:
    """(path, text) of files until `num_bytes` of UTF-8 are reached, each text once. Raises SystemExit when there is less."""
    seen: set[bytes] = set()
    left = num_bytes
    for folder in FOLDERS:
        for parent, folders, names in os.walk(folder):
            folders.sort()
            for name in sorted(names):
                path = Path(parent, name)
                content = _read(path)
                digest = hashlib.blake2b(content, digest_size=16).digest()
                if content and digest not in seen:
                    seen.add(digest)
                    yield str(path), content.decode("utf-8")
                    left -= len(content)
                    if left <= 0:
                        return
    raise SystemExit(f"this machine has {(num_bytes - left) / 1e6:.0f} MB of distinct text, {num_bytes / 1e6:.0f} were asked for")


def write_jsonl_zst(folder: Path, num_bytes: int, num_files: int, repeats: int = 1) -> tuple[int, int]:
    """Write `num_files` jsonl.zst of about equal size; gives documents and bytes of text.

    With `repeats` the same texts are written so often under other ids (for memory, where distinct text does not matter).
    """
    folder.mkdir(parents=True)
    texts = list(distinct_texts(num_bytes))
    random.Random(1).shuffle(texts)  # kinds of files lie together in a folder
    files = [zstandard.ZstdCompressor(3).stream_writer((folder / f"part-{number:03d}.jsonl.zst").open("wb")) for number in range(num_files)]
    count = total = 0
    for repeat in range(repeats):
        for path, text in texts:
            files[count % num_files].write(orjson.dumps({"id": f"{repeat}:{path}", "text": text}) + b"\n")
            count += 1
            total += len(text.encode("utf-8"))
    for file in files:
        file.close()
    return count, total


def _read(path: Path) -> bytes:
    """A text file's bytes; b'' for what is none."""
    if path.suffix in LEFT_OUT or path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST_BYTES:
        return b""
    try:
        content = path.read_bytes()
        content.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return b""
    # Peers take the spelling of a special token in a text for the token itself: such files would make the sides differ.
    return b"" if b"\0" in content or b"<|endoftext|>" in content else content

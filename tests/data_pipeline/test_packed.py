"""Packed files: all of the content or none, in little memory."""

import gzip
import random
import tracemalloc

import pytest
import zstandard

from data_pipeline import packed
from data_pipeline.formats import read_file
from tests.data_pipeline.reading import LINES, PACKERS, TEXTS, THOROUGH, describe, outcome, read


@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed_files_of_several_parts(tmp_path, suffix):
    path = tmp_path / f"lines.jsonl{suffix}"
    path.write_bytes(PACKERS[suffix](LINES[:3001]) + PACKERS[suffix](LINES[3001:]))
    assert read(path, "jsonl") == TEXTS


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_damaged_compressed_file_enters_whole_or_not_at_all(tmp_path, suffix, seed):
    """Cut at 120 places, and with a bit flipped at 120: all documents, or one rejection and none."""
    chosen = random.Random(seed)
    path = tmp_path / f"lines.jsonl{suffix}"
    content = PACKERS[suffix](LINES)
    for size in range(len(content)) if THOROUGH else {0, 1, len(content) - 1, *chosen.sample(range(len(content)), 120)}:
        path.write_bytes(content[:size])
        assert read(path, "jsonl") == [("damaged_file", 0, 0)], size
    num_rejected = 0
    flips = chosen.sample(range(len(content)), 120)
    for at in flips:
        flipped = bytearray(content)
        flipped[at] ^= 1 << chosen.randrange(8)
        path.write_bytes(flipped)
        found = read(path, "jsonl")
        assert found in (TEXTS, [("damaged_file", 0, 0)]), at  # some bits of a header mean nothing
        num_rejected += found != TEXTS
    assert num_rejected > 100


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_huge_line_takes_little_memory(tmp_path, suffix):
    """A line of 100 MB (a few kB when packed) under a limit of 1 MB."""
    path = tmp_path / f"lines.jsonl{suffix}"
    content = b'{"text": "' + b"x" * 100_000_000 + b'"}\n{"text": "b"}\n'
    path.write_bytes(PACKERS[suffix](content) if suffix else content)
    file = describe(path, "jsonl")
    del content
    tracemalloc.start()
    found = outcome(read_file(file, path, 1_000_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [("too_large", 0, 0), "b"]
    assert peak < 80_000_000, peak


@pytest.mark.parametrize("suffix", PACKERS)
def test_what_is_too_much_to_keep_is_unpacked_again(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(packed, "KEPT_BYTES", 1000)
    monkeypatch.setattr(packed, "BLOCK_BYTES", 500)
    path = tmp_path / f"lines.jsonl{suffix}"
    path.write_bytes(PACKERS[suffix](LINES))
    assert read(path, "jsonl") == TEXTS
    path.write_bytes(PACKERS[suffix](LINES)[:-3])
    assert read(path, "jsonl") == [("damaged_file", 0, 0)]


def test_odd_but_sound_compressed_files(tmp_path):
    """Empty parts, parts to be skipped, padding, no content size, another level: as the format allows."""
    path = tmp_path / "lines.jsonl.zst"
    pack = PACKERS[".zst"]
    skipped = b"\x5a\x2a\x4d\x18\x03\0\0\0abc"
    streamed = zstandard.ZstdCompressor(level=19, write_content_size=False).compressobj()
    parts = [skipped, pack(LINES[:3001]), pack(b""), skipped, streamed.compress(LINES[3001:]) + streamed.flush(), skipped]
    path.write_bytes(b"".join(parts))
    assert read(path, "jsonl") == TEXTS
    for size in (3, 9, len(b"".join(parts[:4])) - 1, len(b"".join(parts)) - 1):
        path.write_bytes(b"".join(parts)[:size])
        assert read(path, "jsonl") == [("damaged_file", 0, 0)]
    path.write_bytes(b"".join(parts) + b"behind")
    assert read(path, "jsonl") == [("damaged_file", 0, 0)]
    path = tmp_path / "lines.jsonl.gz"
    path.write_bytes(gzip.compress(LINES[:3001]) + gzip.compress(b"") + gzip.compress(LINES[3001:]) + b"\0" * 1000)
    assert read(path, "jsonl") == TEXTS

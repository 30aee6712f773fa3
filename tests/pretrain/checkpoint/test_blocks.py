"""Files in blocks: what is read is what was hashed, and nothing else is given out."""

import hashlib
import io
import random
from pathlib import Path

import pytest

from pretrain.checkpoint import blocks
from pretrain.checkpoint.blocks import DamageError, FileRecord, VerifiedFiles, in_blocks, write_blocks

SIZES = (0, 1, 99, 100, 101, 250, 1000)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)


def write(path: Path, content: bytes) -> FileRecord:
    return write_blocks(path, in_blocks(content))


@pytest.mark.parametrize("size", SIZES)
def test_what_is_written_is_what_is_read(tmp_path: Path, seed: int, size: int) -> None:
    content = random.Random(seed).randbytes(size)
    record = write(tmp_path / "file", content)
    assert record == {"bytes": size, "sha256": [hashlib.sha256(content[at : at + 100]).hexdigest() for at in range(0, size, 100)]}
    assert (tmp_path / "file").read_bytes() == content
    with VerifiedFiles(tmp_path, {"file": record}) as files:
        assert files.read("file") == content
        assert files.problems(["file"]) == []


def test_any_range_is_read_with_its_own_blocks_only(tmp_path: Path, seed: int) -> None:
    chooser = random.Random(seed)
    content = chooser.randbytes(1000)
    record = write(tmp_path / "file", content)
    for _ in range(200):
        first, end = sorted(chooser.choices(range(1001), k=2))
        number = chooser.randrange(10)
        damaged = bytearray(content)
        damaged[number * 100 + chooser.randrange(100)] ^= 1 << chooser.randrange(8)
        (tmp_path / "file").write_bytes(damaged)
        target = bytearray(end - first)
        with VerifiedFiles(tmp_path, {"file": record}) as files:
            if first < end and first // 100 <= number <= (end - 1) // 100:
                with pytest.raises(DamageError, match=rf"file: its SHA-256 .*block {number}"):
                    files.read_into("file", first, memoryview(target))
            else:
                files.read_into("file", first, memoryview(target))
                assert target == content[first:end]


@pytest.mark.parametrize("size", [size for size in SIZES if size])
def test_every_flipped_bit_truncation_and_growth_is_found(tmp_path: Path, seed: int, size: int) -> None:
    content, path = random.Random(seed).randbytes(size), tmp_path / "file"
    records = {"file": write(path, content)}

    def problems() -> list[str]:
        with VerifiedFiles(tmp_path, records) as files:
            return files.problems(["file"])

    for bit in range(size * 8):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert problems() == [f"{path}: its SHA-256 is not the manifest's (block {bit // 800})"]
    for end in range(size):
        path.write_bytes(content[:end])
        assert problems() == [f"{path}: {end} bytes, the manifest says {size}"]
    path.write_bytes(content + b"x")
    assert problems() == [f"{path}: {size + 1} bytes, the manifest says {size}"]
    path.unlink()
    assert problems() == [f"{path}: missing"]
    path.mkdir()
    assert len(problems()) == 1


def test_what_was_hashed_is_given_out_whatever_the_disk_says_later(tmp_path: Path, seed: int) -> None:
    """A file that changes behind its verification changes nothing: it is not read again."""
    content, path = random.Random(seed).randbytes(100), tmp_path / "file"
    records = {"file": write(path, content)}
    with VerifiedFiles(tmp_path, records) as files:
        assert files.problems(["file"]) == []
        path.write_bytes(bytes(100))
        assert files.read("file") == content


def test_a_manifest_with_too_few_sums_or_an_unknown_name_is_damage(tmp_path: Path) -> None:
    record = write(tmp_path / "file", bytes(250))
    with VerifiedFiles(tmp_path, {"file": {**record, "sha256": record["sha256"][:2]}}) as files:
        assert files.problems(["file"]) == [f"{tmp_path / 'file'}: the manifest has 2 sums for 250 bytes"]
        with pytest.raises(DamageError, match="other: not in the manifest"):
            files.read("other")
        with pytest.raises(DamageError, match="2 sums"):
            files.read_into("file", 240, memoryview(bytearray(20)))


def test_a_range_behind_the_end_is_damage(tmp_path: Path) -> None:
    """Nothing is given out that is not in the file, and no wait for it either."""
    records = {"file": write(tmp_path / "file", bytes(250))}
    with VerifiedFiles(tmp_path, records) as files:
        files.read_into("file", 240, memoryview(bytearray(10)))
        with pytest.raises(DamageError, match=r"file: has 250 bytes, wanted those up to 251"):
            files.read_into("file", 240, memoryview(bytearray(11)))


def test_a_disk_that_takes_a_part_at_a_time_gets_all(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux takes 2 GB at most in one call; here it is 7 bytes."""
    content = random.Random(seed).randbytes(250)

    class Slow(io.FileIO):
        def write(self, given: memoryview) -> int:
            return super().write(given[:7])

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode, buffering: Slow(path, mode))
        record = write(tmp_path / "file", content)
    assert ((tmp_path / "file").read_bytes(), record["bytes"]) == (content, 250)

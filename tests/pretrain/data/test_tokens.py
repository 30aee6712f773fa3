"""Tokens read in rows: the right ones, from files that are opened when they are needed, and never a changed bit."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from data_pipeline.checksums import BLOCK_BYTES
from pretrain.data.tokens import TokenFiles, TokenStream
from tests.tiny import write_shard

ROOT = Path(__file__).parent.parent.parent.parent
END = 60_000
DTYPES = ["uint16", "int32"]


def make_files(folder: Path, lengths: list[int], dtype: str = "int32") -> tuple[TokenFiles, list[np.ndarray]]:
    """Files of the given lengths; the tokens count on from file to file up to the end of text, so that each place is known."""
    parts = [np.arange(sum(lengths[:number]), sum(lengths[: number + 1])) % END for number in range(len(lengths))]
    records = [write_shard(folder, f"shard-{number}", "web", [part], dtype) for number, part in enumerate(parts)]
    return TokenFiles(folder, records, dtype, END), parts


def read_rows(files: TokenFiles, places: list[tuple[int, int]], length: int) -> np.ndarray:
    """Rows of the token before each (file, offset) and `length` from there on."""
    rows = np.full((len(places), length + 1), 7, dtype=files.dtype)
    file_n, offset_n = np.array(places, dtype=np.int64).reshape(-1, 2).T
    files.read(file_n, offset_n, rows)
    return rows


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


# --- rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[10], [1, 1, 1], [5, 7], [3, 9, 1, 2]], ids=str)
def test_every_row_of_every_length_is_the_tokens_behind_one_another(tmp_path: Path, lengths: list[int], dtype: str) -> None:
    """From every offset of every file, over as many files as it takes; before a file's first token stands the end of a text."""
    files, parts = make_files(tmp_path, lengths, dtype)
    assert files.dtype == np.dtype(dtype)
    tokens = np.concatenate(parts)
    for file, part in enumerate(parts):
        for offset in range(part.size):
            start = int(part[0]) + offset
            for length in range(1, tokens.size - start + 1):
                (row,) = read_rows(files, [(file, offset)], length)
                assert row.tolist() == [tokens[start - 1] if offset else END, *tokens[start : start + length]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_across_blocks_and_files_in_any_order(tmp_path: Path, seed: int, dtype: str) -> None:
    """Files of several blocks, one of exactly one and one of a token more, asked for many rows at once."""
    block = BLOCK_BYTES // np.dtype(dtype).itemsize
    lengths = [2 * block + 100, block, block + 1, 50]
    chosen = np.random.default_rng(seed)
    parts = [chosen.integers(0, END, length) for length in lengths]
    records = [write_shard(tmp_path, f"shard-{number}", "web", [part], dtype) for number, part in enumerate(parts)]
    tokens = np.concatenate(parts)
    starts = np.cumsum([0, *lengths])
    length = 300
    near = [edge + by for edge in (0, block, 2 * block, *starts[1:-1]) for by in (-length, -length + 1, -2, -1, 0, 1, 2)]
    first_n = np.array([first for first in [*near, *chosen.integers(0, tokens.size - length, 200)] if 0 <= first <= tokens.size - length])
    chosen.shuffle(first_n)
    file_n = np.searchsorted(starts, first_n, side="right") - 1
    rows = read_rows(TokenFiles(tmp_path, records, dtype, END), list(zip(file_n, first_n - starts[file_n], strict=True)), length)
    np.testing.assert_array_equal(rows[:, 1:], tokens[first_n[:, None] + np.arange(length)])
    np.testing.assert_array_equal(rows[:, 0], np.where(np.isin(first_n, starts), END, tokens[first_n - 1]))


def test_no_rows_read_nothing(tmp_path: Path) -> None:
    files, _ = make_files(tmp_path, [10])
    (tmp_path / "shard-0.bin").unlink()
    assert read_rows(files, [], 5).shape == (0, 6)


# --- what was changed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_flipped_bit_in_any_block_that_a_row_touches_is_refused_with_its_place(tmp_path: Path, seed: int, dtype: str) -> None:
    """Rows that lie elsewhere are read; the first that touches the block, if only by the token before it, is refused, and each after it."""
    chosen = random.Random(seed)
    block = BLOCK_BYTES // np.dtype(dtype).itemsize
    size = 3 * block + 77
    path = tmp_path / "shard-0.bin"
    files, (tokens, _) = make_files(tmp_path, [size, 200], dtype)
    records = files._shards
    whole = path.read_bytes()
    for number in range(4):
        first, end = number * block, min(size, (number + 1) * block)
        flip(path, 8 * BLOCK_BYTES * number + chosen.randrange(8 * (end - first) * np.dtype(dtype).itemsize))
        files = TokenFiles(tmp_path, records, dtype, END)
        for offset in (0, 1, first - 100, end + 1, size - 50):
            if offset >= 0 and (offset + 50 <= first or end < offset <= size - 50):
                np.testing.assert_array_equal(read_rows(files, [(0, offset)], 50)[0, 1:], tokens[offset : offset + 50])
        touching = {first, first - 49, (first + end) // 2 - 25, end - 1, end}
        for offset in sorted(offset for offset in touching if 0 <= offset < size):
            for _ in range(2):
                with pytest.raises(UserError) as refusal:
                    read_rows(files, [(0, offset)], 50)
                assert str(refusal.value).startswith(
                    f"{path}: bytes {number * BLOCK_BYTES} to {end * np.dtype(dtype).itemsize - 1} are not those that were built"
                )
        path.write_bytes(whole)


def test_every_bit_of_a_block_counts(tmp_path: Path, seed: int) -> None:
    """The last block is a short one: each of its bits in turn, and bursts of up to 32."""
    chosen = random.Random(seed)
    files, _ = make_files(tmp_path, [40])
    records = files._shards
    path = tmp_path / "shard-0.bin"
    whole = path.read_bytes()
    bursts = [{start + offset for offset in chosen.sample(range(32), chosen.randint(1, 32))} for start in range(0, 40 * 32 - 32, 7)]
    for bits in [{bit} for bit in range(8 * len(whole))] + bursts:
        content = int.from_bytes(whole, "little")
        for bit in bits:
            content ^= 1 << bit
        path.write_bytes(content.to_bytes(len(whole), "little"))
        with pytest.raises(UserError, match="bytes 0 to 159 are not those that were built"):
            read_rows(TokenFiles(tmp_path, records, "int32", END), [(0, 3)], 5)


def test_a_flip_is_found_across_the_border_of_files(tmp_path: Path) -> None:
    files, _ = make_files(tmp_path, [100, 100, 100])
    flip(tmp_path / "shard-1.bin", 5)
    assert read_rows(files, [(0, 50), (2, 0), (2, 7)], 50)[:, 1].tolist() == [50, 200, 207]
    for place in ((0, 51), (1, 0), (1, 3)):
        with pytest.raises(UserError, match=r"shard-1\.bin: bytes 0 to 399 "):
            read_rows(files, [place], 50)


def test_a_block_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a row first touches it, if only by the token before, and however many follow."""
    block = BLOCK_BYTES // 4
    files, _ = make_files(tmp_path, [3 * block])
    looked: list[int] = []

    def look(content: np.ndarray, expected: int) -> bool:
        looked.append(int(content[0]) // block)
        return True

    monkeypatch.setattr("pretrain.data.tokens.block_is_whole", look)
    for offset, expected in (
        (5, [0]),
        (5, [0]),
        (block - 50, [0]),
        (2 * block + 1, [0, 2]),
        (2 * block, [0, 2, 1]),
        (block - 10, [0, 2, 1]),
    ):
        read_rows(files, [(0, offset)], 50)
        assert looked == expected


@pytest.mark.parametrize("change", ["cut by a token", "cut to nothing", "longer by a token"])
def test_a_file_of_another_size_is_refused(tmp_path: Path, change: str) -> None:
    files, _ = make_files(tmp_path, [100, 50])
    path = tmp_path / "shard-1.bin"
    content = path.read_bytes()
    path.write_bytes({"cut by a token": content[:-4], "cut to nothing": b"", "longer by a token": content + content[:4]}[change])
    assert read_rows(files, [(0, 50)], 50)[0, -1] == 99
    with pytest.raises(UserError, match=rf"shard-1\.bin: found {path.stat().st_size} bytes, wanted 200; it is damaged"):
        read_rows(files, [(0, 90)], 50)


@pytest.mark.parametrize("suffix", [".bin", ".crc32c"])
def test_a_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    files, _ = make_files(tmp_path, [100, 50])
    (tmp_path / f"shard-1{suffix}").unlink()
    with pytest.raises(UserError) as refusal:
        read_rows(files, [(1, 5)], 5)
    assert str(refusal.value).startswith(f"{tmp_path}/shard-1{suffix}: no such file, and the manifest names it")


def test_a_folder_in_a_files_place_is_named(tmp_path: Path) -> None:
    files, _ = make_files(tmp_path, [100])
    (tmp_path / "shard-0.crc32c").unlink()
    (tmp_path / "shard-0.crc32c").mkdir()
    with pytest.raises(UserError, match=r"shard-0\.bin: cannot be opened: Is a directory"):
        read_rows(files, [(0, 5)], 5)


def test_changed_sums_are_refused_in_any_bit(tmp_path: Path, seed: int) -> None:
    """Else whoever changes a block could make its sum fit. Also when the sums are another file's, or cut."""
    files, _ = make_files(tmp_path, [3 * BLOCK_BYTES // 4])
    records = files._shards
    path = tmp_path / "shard-0.crc32c"
    whole = path.read_bytes()
    assert len(whole) == 3 * 4
    for bit in range(8 * len(whole)):
        flip(path, bit)
        with pytest.raises(UserError, match=r"shard-0\.crc32c: its SHA-256 differs from the manifest's"):
            read_rows(TokenFiles(tmp_path, records, "int32", END), [(0, 0)], 5)
        path.write_bytes(whole)
    for content in (b"", whole[:4], whole[:-1], whole + whole[:4]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"shard-0\.crc32c: its SHA-256 differs"):
            read_rows(TokenFiles(tmp_path, records, "int32", END), [(0, 0)], 5)
    path.write_bytes(whole)
    assert read_rows(files, [(0, 0)], 5).tolist() == [[END, 0, 1, 2, 3, 4]]


# --- opened when they are read -----------------------------------------------------------------------------


def test_nothing_is_opened_before_it_is_read(tmp_path: Path) -> None:
    """A corpus of any size is opened at once: no file is looked at, none is mapped, until a row of it is read."""
    files, _ = make_files(tmp_path, [100, 50, 70])
    paths = [tmp_path / f"shard-{number}.bin" for number in range(3)]
    stream = TokenStream(files, 0, [100, 50, 70])
    assert (len(stream), stream.locate(np.array([120]))[0].tolist()) == (220, [1])
    assert [is_mapped(path) for path in paths] == [False] * 3
    assert stream.read(110, 20).tolist() == list(range(109, 130))
    assert [is_mapped(path) for path in paths] == [False, True, False]
    assert stream.read(140, 20).tolist() == list(range(139, 160))
    assert [is_mapped(path) for path in paths] == [False, True, True]


def test_more_files_than_a_process_may_usually_open(tmp_path: Path) -> None:
    """Python keeps a descriptor open for every map; the limit is raised by as many as there are files."""
    write_shard(tmp_path, "shard", "web", [np.arange(10)])
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 1000))
from pathlib import Path
import numpy as np
from data_pipeline.records import ShardRecord
from pretrain.data.tokens import TokenFiles
from tests.tiny import write_shard
record = write_shard(Path({str(tmp_path)!r}), "shard", "web", [np.arange(10)])
rows = np.empty((300, 3), np.uint16)
TokenFiles(Path({str(tmp_path)!r}), [record] * 300, "uint16", 0).read(np.arange(300), np.full(300, 4), rows)
assert (rows == [3, 4, 5]).all()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", DTYPES)
def test_announcing_changes_nothing(tmp_path: Path, seed: int, dtype: str) -> None:
    """Of any rows, read or unread, also where a file ends inside: the same rows are read, and the same flips refused."""
    block = BLOCK_BYTES // np.dtype(dtype).itemsize
    lengths = [2 * block + 5, 50]
    files, parts = make_files(tmp_path, lengths, dtype)
    chosen = np.random.default_rng(seed)
    flip(tmp_path / "shard-0.bin", 8 * BLOCK_BYTES + 3)
    for _ in range(3):
        files.announce(np.zeros(100, np.int64), chosen.integers(0, lengths[0], 100), np.full(100, 300))
        files.announce(np.array([0, 0, 1, 1, 1]), np.array([0, lengths[0] - 1, 0, 49, 30]), np.full(5, 40))
        np.testing.assert_array_equal(read_rows(files, [(0, 10), (1, 3)], 40)[:, 1:], [parts[0][10:50], parts[1][3:43]])
        with pytest.raises(UserError, match=f"bytes {BLOCK_BYTES} to"):
            read_rows(files, [(0, block)], 40)


# --- streams -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first_file", "lengths"), [(0, [10]), (0, [5, 7]), (1, [7, 2, 9]), (2, [9])], ids=str)
def test_a_stream_is_one_row_across_its_files(tmp_path: Path, first_file: int, lengths: list[int]) -> None:
    """Neighbouring files of all there are; before its beginning stands the end of a text, whatever file is before it."""
    all_lengths = [3, *lengths, 4] if first_file == 1 else [3, 2, *lengths] if first_file == 2 else [*lengths, 6]
    files, parts = make_files(tmp_path, all_lengths)
    stream = TokenStream(files, first_file, lengths)
    tokens = np.concatenate(parts[first_file : first_file + len(lengths)])
    ends = np.cumsum([0, *lengths])
    assert len(stream) == tokens.size
    file_n, offset_n = stream.locate(np.arange(tokens.size))
    np.testing.assert_array_equal([parts[file][offset] for file, offset in zip(file_n, offset_n, strict=True)], tokens)
    for first in range(tokens.size):
        for length in range(1, tokens.size - first + 1):
            found = stream.read(first, length)
            assert found.dtype == files.dtype
            assert found.tolist() == [END if first in ends else tokens[first - 1], *tokens[first : first + length]]


@pytest.mark.parametrize("lengths", [[], [4], [4, 3]], ids=str)
def test_reading_beyond_the_end_is_refused(tmp_path: Path, lengths: list[int]) -> None:
    files, _ = make_files(tmp_path, lengths)
    stream = TokenStream(files, 0, lengths)
    for first, length in ((-1, 1), (len(stream), 1), (0, len(stream) + 1), (0, 0), (len(stream) + 1, 1)):
        with pytest.raises(IndexError, match=f"of a stream of {len(stream)}"):
            stream.read(first, length)

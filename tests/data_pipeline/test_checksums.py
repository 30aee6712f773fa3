"""The sums are CRC32C of the blocks, and no flipped bit goes by."""

import numpy as np
import pytest

from data_pipeline.checksums import BLOCK_BYTES, SUFFIX, block_is_whole, read_checksums, write_checksums

KNOWN_SUMS = {
    b"123456789": 0xE3069283,  # the check value in catalogues of CRCs
    bytes(32): 0x8A9136AA,  # this one and those below: RFC 3720, B.4
    b"\xff" * 32: 0x62A8AB43,
    bytes(range(32)): 0x46DD794E,
    bytes(range(31, -1, -1)): 0x113FDB5C,
}


def crc32c_slowly(content: bytes) -> int:
    """Bit by bit: Castagnoli's polynomial, reflected, with all bits flipped before and after."""
    sum_so_far = 0xFFFFFFFF
    for byte in content:
        sum_so_far ^= byte
        for _ in range(8):
            sum_so_far = sum_so_far >> 1 ^ (0x82F63B78 if sum_so_far & 1 else 0)
    return sum_so_far ^ 0xFFFFFFFF


@pytest.mark.parametrize(("content", "expected"), KNOWN_SUMS.items())
def test_sums_that_others_published(tmp_path, content: bytes, expected: int):
    assert crc32c_slowly(content) == expected
    (tmp_path / "shard.bin").write_bytes(content)
    write_checksums(tmp_path / "shard")
    assert (tmp_path / f"shard{SUFFIX}").read_bytes() == expected.to_bytes(4, "little")
    assert block_is_whole(memoryview(content), expected)
    assert not block_is_whole(memoryview(content + b"0"), expected)


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES, 2 * BLOCK_BYTES + 1234])
def test_a_sum_for_every_block(tmp_path, seed: int, size: int):
    content = np.random.default_rng(seed).bytes(size)
    (tmp_path / "shard.bin").write_bytes(content)
    write_checksums(tmp_path / "shard")
    sums = read_checksums((tmp_path / f"shard{SUFFIX}").read_bytes())
    blocks = [content[first : first + BLOCK_BYTES] for first in range(0, size, BLOCK_BYTES)]
    assert sums.tolist() == [crc32c_slowly(block) for block in blocks]
    assert all(block_is_whole(memoryview(block), expected) for block, expected in zip(blocks, sums.tolist(), strict=True))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_a_block_of_tokens_is_looked_at_byte_by_byte(seed: int, dtype):
    tokens = np.random.default_rng(seed).integers(0, 65536, 50).astype(dtype)
    assert block_is_whole(tokens.data, crc32c_slowly(tokens.tobytes()))
    assert not block_is_whole(tokens[:-1].data, crc32c_slowly(tokens.tobytes()))


def test_every_flipped_bit_is_found(tmp_path, seed: int):
    whole = np.random.default_rng(seed).bytes(301)
    (tmp_path / "shard.bin").write_bytes(whole)
    write_checksums(tmp_path / "shard")
    (expected,) = read_checksums((tmp_path / f"shard{SUFFIX}").read_bytes()).tolist()
    assert block_is_whole(memoryview(whole), expected)
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        assert not block_is_whole(memoryview(changed), expected), f"bit {bit}"


def test_a_file_of_sums_that_is_cut_off_is_refused():
    assert read_checksums(b"").tolist() == []
    with pytest.raises(ValueError, match="buffer size"):
        read_checksums(bytes(7))

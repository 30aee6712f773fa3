"""What is sealed comes back; what was touched in any bit or byte does not."""

import random

import pytest

from configs.sealed import seal, unseal

FOUND = {"name": "dataset — ü", "counts": {"read": 12, "kept": 1.5}, "list": [None, True, "x"], "empty": {}}


def test_what_is_sealed_comes_back():
    assert unseal(seal(FOUND)) == FOUND
    assert seal(unseal(seal(FOUND))) == seal(FOUND)
    assert unseal(seal({})) == {}


def test_every_flipped_bit_is_found():
    content = seal(FOUND)
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):
            unseal(bytes(flipped))


def test_other_content_is_refused(seed):
    chosen = random.Random(seed)
    for content in (b"", b"[]", b"{}", b"null", b'{"a": 1}', seal(FOUND)[:-20], seal(FOUND) + b" ", chosen.randbytes(50)):
        with pytest.raises(ValueError):
            unseal(content)

"""What is sealed comes back; what was touched in any bit or byte does not."""

import json
import random

import pytest

from configs.sealed import seal, sealed_text, unseal

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


def test_every_cut_and_every_missing_or_doubled_byte_is_found():
    content = seal(FOUND)
    for place in range(len(content)):
        for changed in (content[:place], content[:place] + content[place + 1 :], content[: place + 1] + content[place:]):
            if changed != content:
                with pytest.raises(ValueError):
                    unseal(changed)


def test_a_list_of_plain_values_is_a_line():
    """So a row of a table is found, and compared with another, by what reads lines; the rest is spelt as `json.dumps` does."""
    rows = [["ü\n", 1, 2.5, None, True], ("a", -1), [], {}, [{}], [[[1, 2]]]]
    assert sealed_text(seal({"rows": rows, "none": [], "one": {"two": {"three": ["x", "y"]}}})).decode().splitlines() == [
        "{",
        ' "rows": [',
        '  ["ü\\n", 1, 2.5, null, true],',
        '  ["a", -1],',
        "  [],",
        "  {},",
        "  [",
        "   {}",
        "  ],",
        "  [",
        "   [",
        "    [1, 2]",
        "   ]",
        "  ]",
        " ],",
        ' "none": [],',
        ' "one": {',
        '  "two": {',
        '   "three": ["x", "y"]',
        "  }",
        " }",
        "}",
    ]


def test_what_was_hashed_is_the_mapping_without_its_seal():
    """For a parser of one's own; also where keys inside are called as the seal is, and in another spelling of the same JSON not."""
    found = {"files": {"a": {"sha256": "0" * 64, "bytes": 3}}, "text": '\n "sha256": "x"\n}\n'}
    content = seal(found)
    assert json.loads(sealed_text(content)) == unseal(content) == found
    assert sealed_text(content) == (json.dumps(found, indent=1) + "\n").encode()
    assert sealed_text(seal({})) == b"{}\n"
    with pytest.raises(ValueError):
        unseal(json.dumps(json.loads(content)).encode())

"""Small JSON files that know their own hash: one flipped bit in them is a file that cannot be read, never another value.

In: a mapping. Out: bytes whose last key, `sha256`, is the hash of all that stands before it; and back.
"""

import json
from hashlib import sha256
from typing import Any

SEAL = "sha256"
LAST_LINE_BEGINS, LAST_LINE_ENDS = f'\n "{SEAL}": "'.encode(), b'"\n}\n'
_spell_plain = json.JSONEncoder(ensure_ascii=False).encode


def seal(found: dict[str, Any]) -> bytes:
    """The mapping as JSON, with its hash as the last key."""
    return _spell({**found, SEAL: sha256(_spell(found)).hexdigest()})


def unseal(content: bytes) -> dict[str, Any]:
    """The mapping that `seal` was given. Raises ValueError when the bytes are not what it made."""
    return json.loads(sealed_text(content))


def sealed_text(content: bytes) -> bytes:
    """The JSON that `seal` hashed, for a parser of one's own. Raises ValueError when the bytes are not what it made.

    The hash is taken of the bytes as they stand: a manifest of ten thousand shards is not spelt again to be believed.
    """
    end = content.rfind(LAST_LINE_BEGINS)
    last_line = content[end + len(LAST_LINE_BEGINS) :]
    digest, rest = last_line[:64], last_line[64:]
    if end < 0 or rest != LAST_LINE_ENDS:
        raise ValueError(f"its last line is not the {SEAL} of its own content")
    is_only_key = content[end - 1 : end] != b","
    before = memoryview(content)[: end if is_only_key else end - 1]  # nothing is copied twice
    text = b"".join((before, b"}\n" if is_only_key else b"\n}\n"))
    if digest != sha256(text).hexdigest().encode():
        raise ValueError("its content does not have the SHA-256 that its last line says; at least one bit has changed")
    return text


def _spell(found: dict[str, Any]) -> bytes:
    return (_spell_value(found, "\n") + "\n").encode("utf-8")


def _spell_value(value: Any, line: str) -> str:
    """As `json.dumps` with indent=1, but that a list of plain values, such as a row of a table, stays on one line."""
    inner = line + " "
    if isinstance(value, dict) and value:
        entries: dict[str, Any] = value
        return "{" + ",".join(f"{inner}{_spell_plain(key)}: {_spell_value(one, inner)}" for key, one in entries.items()) + line + "}"
    if isinstance(value, list | tuple) and any(isinstance(one, dict | list | tuple) for one in value):
        return "[" + ",".join(inner + _spell_value(one, inner) for one in value) + line + "]"
    return _spell_plain(value)

"""Small JSON files that know their own hash: one flipped bit in them is a file that cannot be read, never another value.

In: a mapping. Out: bytes whose last key, `sha256`, is the hash of all that stands before it; and back.
"""

import json
from hashlib import sha256
from typing import Any

SEAL = "sha256"
LAST_LINE_BEGINS, LAST_LINE_ENDS = f'\n "{SEAL}": "'.encode(), b'"\n}\n'


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
    body, comma, last_line = content.rpartition(LAST_LINE_BEGINS)
    digest, rest = last_line[:64], last_line[64:]
    if not comma or rest != LAST_LINE_ENDS:
        raise ValueError(f"its last line is not the {SEAL} of its own content")
    text = body.removesuffix(b",") + (b"\n}\n" if body.endswith(b",") else b"}\n")
    if digest != sha256(text).hexdigest().encode():
        raise ValueError("its content does not have the SHA-256 that its last line says; at least one bit has changed")
    return text


def _spell(found: dict[str, Any]) -> bytes:
    return (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode("utf-8")

"""Small JSON files that know their own hash: one flipped bit in them is a file that cannot be read, never another value.

In: a mapping. Out: bytes whose last key, `sha256`, is the hash of all that stands before it; and back.
"""

import json
from hashlib import sha256
from typing import Any

SEAL = "sha256"


def seal(found: dict[str, Any]) -> bytes:
    """The mapping as JSON, with its hash as the last key."""
    return _spell({**found, SEAL: sha256(_spell(found)).hexdigest()})


def unseal(content: bytes) -> dict[str, Any]:
    """The mapping that `seal` was given. Raises ValueError when the bytes are not what it made."""
    found = json.loads(content)
    if not isinstance(found, dict) or SEAL not in found:
        raise ValueError(f"it has no {SEAL} of its own content")
    digest = found.pop(SEAL)
    if digest != sha256(_spell(found)).hexdigest():
        raise ValueError("its content does not have the SHA-256 that its last line says; at least one bit has changed")
    if content != seal(found):
        raise ValueError("it is spelt in another way than it was written; at least one bit has changed")
    return found


def _spell(found: dict[str, Any]) -> bytes:
    return (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode("utf-8")

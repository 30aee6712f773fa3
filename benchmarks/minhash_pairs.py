"""Distinct documents of this machine, edited copies of some, and how alike two texts truly are.

In: numbers of documents. Out: documents of some 3 kB, cut from the text that comes with Python and the system, and pairs of
one and its copy whose true similarity is 0.9 or more; the same on every run of a machine. The truth is counted with
whole sets of shingles.
"""

import random
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHINGLE_WORDS = 5
DOCUMENT_CHARACTERS = 3000
WORDS = re.compile(r"[^\W_]+")


def cut_documents(count: int) -> list[str]:
    """Distinct documents from the text at hand, a few from each file so that they are of many kinds."""
    roots = [sysconfig.get_path("stdlib"), "/usr/share/doc", sysconfig.get_path("purelib")]
    files = [
        file for root in roots for ending in ("*.py", "*.txt", "*.rst", "*.md", "copyright") for file in sorted(Path(root).rglob(ending))
    ]
    random.Random(1).shuffle(files)
    found: dict[str, None] = {}
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        for first in range(0, min(len(text) - DOCUMENT_CHARACTERS, 6 * DOCUMENT_CHARACTERS) + 1, DOCUMENT_CHARACTERS):
            found.setdefault(text[first : first + DOCUMENT_CHARACTERS])
        if len(found) >= count:
            return list(found)[:count]
    raise SystemExit(f"only {len(found)} documents of {DOCUMENT_CHARACTERS} characters in {roots}, not {count}")


def plant(documents: Sequence[str], count: int) -> tuple[list[str], list[tuple[int, int]]]:
    """Edited copies whose true similarity is 0.9 or more, and the pairs (document, its copy behind all documents)."""
    rng = random.Random(2)
    copies: list[str] = []
    pairs: list[tuple[int, int]] = []
    while len(copies) < count:
        index = rng.randrange(len(documents))
        parts = re.split(r"(\s+)", documents[index])
        for _ in range(rng.randint(1, 5)):
            place = rng.randrange(0, len(parts), 2)
            parts[place] = rng.choice(["", "edited", parts[place] + " and more", parts[place][::-1]])
        copy = "".join(parts)
        if 0.9 <= jaccard(shingle_set(documents[index]), shingle_set(copy)) < 1:
            pairs.append((index, len(documents) + len(copies)))
            copies.append(copy)
    return copies, pairs


def shingle_set(text: str) -> set[tuple[str, ...]]:
    """The truth: the words of the text, five by five, as tuples."""
    words = WORDS.findall(text.casefold())
    return {tuple(words[place : place + SHINGLE_WORDS]) for place in range(max(1, len(words) - SHINGLE_WORDS + 1))}


def string_shingles(text: str) -> list[str]:
    """What one writes who has a library for the hashing only."""
    words = WORDS.findall(text.casefold())
    return [" ".join(words[place : place + SHINGLE_WORDS]) for place in range(max(1, len(words) - SHINGLE_WORDS + 1))]


def jaccard(first: set[Any], second: set[Any]) -> float:
    """Shared shingles over all shingles."""
    return len(first & second) / len(first | second)

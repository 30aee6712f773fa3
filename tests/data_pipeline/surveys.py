"""For tests of deduplication: made-up documents, and the surveys of them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from configs.data_section import NearDuplicatesSection
from data_pipeline.minhash import NO_SHINGLES
from data_pipeline.signature_files import write_survey

NEAR = NearDuplicatesSection(similarity=0.5, num_permutations=8, num_bands=4)


@dataclass
class Documents:
    """What is surveyed of made-up documents."""

    hashes: np.ndarray[Any, Any]
    signatures: np.ndarray[Any, Any]


def make_documents(rng: random.Random, count: int, kinds: int) -> Documents:
    """Copies of `kinds` signatures with some numbers changed, so that alike is not transitive; some have no words."""
    pool = [[rng.randrange(3) for _ in range(8)] for _ in range(kinds)]
    rows = [[number if rng.random() < 0.7 else rng.randrange(3) for number in rng.choice(pool)] for _ in range(count)]
    rows = [row if rng.random() < 0.95 else [NO_SHINGLES] * 8 for row in rows]
    # Equal upper halves with different lower ones, and the ends of the range.
    halves = [0, 1, 1 << 63, (1 << 64) - 1]
    hashes = [[rng.choice(halves), rng.randrange(max(1, count // 2))] for _ in range(count)]
    return Documents(np.array(hashes, dtype=np.uint64).reshape(-1, 2), np.array(rows, dtype=np.uint32).reshape(-1, 8))


def write_units(root: Path, documents: Documents, bounds: Sequence[int], near: NearDuplicatesSection | None) -> list[Path]:
    folders = []
    for index, (first, end) in enumerate(pairwise(bounds)):
        folders.append(root / f"unit-{index}")
        folders[-1].mkdir(parents=True)
        blocks = np.array_split(documents.signatures[first:end], 2)
        write_survey(folders[-1], documents.hashes[first:end], blocks if near else (), near)
    return folders

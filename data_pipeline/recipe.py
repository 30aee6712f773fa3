"""What is the same for every unit of a build, and which parts of it decide the bytes.

In: the `data` section, the rules it names, the tokenizer. Out: a `Recipe` that travels with every task, and the facts that
go into fingerprints.
"""

import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from configs.data_section import DataSection
from data_pipeline.cleaning import RuleIdentity
from data_pipeline.input_file import InputFile
from data_pipeline.manifest import FORMAT_VERSION

# What a library gives may change with its version; a dataset names the versions that made it.
LIBRARIES = (
    *("pretrain", "tokenizers", "fastokens", "numpy", "pyarrow", "orjson", "zstandard", "fastwarc", "resiliparse", "rensa"),
    *("spacy", "ftfy", "py3langid", "fasttext-numpy2-wheel"),
)


@dataclass(frozen=True)
class Recipe:
    """All that units have in common."""

    root: Path
    """The dataset's folder, absolute."""
    token: str
    """The build's (see `ownership.py`); it does not go into what is written."""
    data: DataSection
    rules: tuple[RuleIdentity, ...]
    libraries: tuple[tuple[str, str], ...]
    tokenizer_path: Path
    tokenizer_sha256: str = ""
    """Empty before there is a tokenizer."""


def library_versions() -> tuple[tuple[str, str], ...]:
    """Name and version of every installed library that may decide bytes."""
    found: list[tuple[str, str]] = []
    for name in LIBRARIES:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(found)


def cleaning_facts(recipe: Recipe, files: Sequence[InputFile]) -> list[Any]:
    """What decides which documents leave the sources, and how: the files by size and version, the rules, the libraries."""
    return [
        FORMAT_VERSION,
        [{key: value for key, value in asdict(file).items() if key != "root"} for file in files],
        [rule.facts() for rule in recipe.rules],
        recipe.libraries,
        recipe.data.largest_document_bytes,
    ]


def token_facts(recipe: Recipe) -> list[Any]:
    """What decides how documents become shards."""
    data = recipe.data
    return [recipe.tokenizer_sha256, data.tokenizer.end_of_text, data.held_out_fraction, data.seed, data.shard_tokens, data.packed_lengths]


def hash_facts(facts: list[Any]) -> str:
    """SHA-256 over facts that JSON can hold."""
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

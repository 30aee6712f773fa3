"""How two datasets differ.

In: their folders. Out: plain values, ready for JSON; `pretrain/data_view.py` lays them out for people. Nothing is written. No
more is read than is needed: the manifests, and the sidecars of shards that differ.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.durable import sha256_of_file
from configs.errors import UserError
from data_pipeline.manifest import MANIFEST, SPLITS, Manifest, Split, load_manifest
from data_pipeline.records import ShardRecord
from data_pipeline.report import describe_sources
from data_pipeline.show import BATCH_ROWS, input_parts, read_columns, tokenizer_facts

SplitRecord = tuple[Split, ShardRecord]
ID_BYTES = 12  # of a document's id, in memory
HELD_OUT_BIT, TOKENS_SHIFT, BYTES_MASK = 63, 32, 0xFFFFFFFF  # of the word that `_read_words` makes of a document


def compare_datasets(first: Path, second: Path) -> dict[str, Any]:
    """In what two datasets differ, by what their manifests and sidecars say; token ids are not read. Pairs are [first, second].

    Memory: for each document in shards that differ 20 bytes, and 48 while those of its dataset are sorted. Raises UserError
    when one is missing or damaged.
    """
    one, other = load_manifest(first), load_manifest(second)
    hashes = [sha256_of_file(folder / MANIFEST) for folder in (first, second)]
    equal = (first / MANIFEST).read_bytes() == (second / MANIFEST).read_bytes()
    shards = _compare_shards(one, other)
    return {
        "equal": equal,
        "folders": [str(first), str(second)],
        "sha256": hashes,
        "configuration": differing_keys(_without_rules(one), _without_rules(other)),
        "rules": _compare_rules(one.rules, other.rules),
        "libraries": _differing(one.libraries, other.libraries),
        "tokenizer": _differing(tokenizer_facts(one), tokenizer_facts(other)),
        "inputs": _compare_inputs(input_parts(one), input_parts(other)),
        "sources": _pair(describe_sources(one), describe_sources(other)),
        "dropped": _differing(one.documents.dropped, other.documents.dropped),
        "quarantined": _differing(one.documents.quarantined, other.documents.quarantined),
        "shards": {key: len(records) for key, records in shards.items()},
        "documents": _compare_documents(first, second, shards),
    }


def differing_keys(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> dict[str, list[Any]]:
    """Dotted keys of two configurations that differ, with both values; None where there is none.

    What has a name in a list (a source) is matched by it, so that one in front does not rename the rest: one that differs in its
    name alone was renamed, and the list itself differs where those that both have stand in another order. Other lists of mappings
    are matched place by place.
    """
    pairs: dict[str, list[Any]] = {}
    for key, (left, right) in _pair(one, other).items():
        below, other_below = _items(left), _items(right)
        if below is not None and other_below is not None and type(left) is type(right):
            if isinstance(left, list):
                below = _follow_names(below, other_below)
                if [name for name in below if name in other_below] != [name for name in other_below if name in below]:
                    pairs[f"{prefix}{key}"] = [list(below), list(other_below)]
            pairs |= differing_keys(below, other_below, f"{prefix}{key}.")
        elif left != right:
            pairs[f"{prefix}{key}"] = [left, right]
    return pairs


def _items(value: Any) -> dict[str, Any] | None:
    """What stands below a value, by key, by name or by place; None where it is no mapping and no list of mappings to be told apart."""
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        items = {str(item.get("name", place)): item for place, item in enumerate(value)}
        return items if len(items) == len(value) else None
    return value if isinstance(value, dict) else None


def _follow_names(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The items of `one` under the names that they have in `other`, where only the name of one differs."""
    gone, new = one.keys() - other.keys(), other.keys() - one.keys()
    renamed = {old: name for old in gone for name in new if {**one[old], "name": name} == other[name]}
    return {renamed.get(name, name): item for name, item in one.items()}


def _compare_shards(one: Manifest, other: Manifest) -> dict[str, list[SplitRecord]]:
    """Shards whose files all have equal hashes, whatever they are called, and those of either that have no equal."""
    left, right = _by_hashes(one), _by_hashes(other)
    return {
        "equal": [record for key, record in left.items() if key in right],
        "only_in_a": [record for key, record in left.items() if key not in right],
        "only_in_b": [record for key, record in right.items() if key not in left],
    }


def _by_hashes(manifest: Manifest) -> dict[tuple[str, ...], SplitRecord]:
    shards: list[SplitRecord] = [(split, record) for split in SPLITS for record in manifest.shards(split)]
    return {(split, *(record.files[name].sha256 for name in sorted(record.files))): (split, record) for split, record in shards}


def _compare_documents(first: Path, second: Path, shards: dict[str, list[SplitRecord]]) -> dict[str, int]:
    """Documents by id. What stands in equal shards is in both, and alike: an id is only once in a dataset."""
    alike = sum(record.num_documents for _, record in shards["equal"])
    ids_a, words_a = _read_words(first, shards["only_in_a"])
    ids_b, words_b = _read_words(second, shards["only_in_b"])
    in_both = other_tokens = other_split = 0
    for start in range(0, ids_a.size if ids_b.size else 0, BATCH_ROWS):
        ids, words = ids_a[start : start + BATCH_ROWS], words_a[start : start + BATCH_ROWS]
        places = np.minimum(np.searchsorted(ids_b, ids), ids_b.size - 1)
        found = ids_b[places] == ids
        differing = (words ^ words_b[places])[found]
        in_both += int(found.sum())
        other_split += int((differing >> np.uint64(HELD_OUT_BIT)).sum())
        other_tokens += int(((differing & np.uint64((1 << HELD_OUT_BIT) - 1)) != 0).sum())
    return {
        "in_both": alike + in_both,
        "only_in_a": int(ids_a.size) - in_both,
        "only_in_b": int(ids_b.size) - in_both,
        "with_other_num_tokens_or_num_bytes": other_tokens,
        "in_other_split": other_split,
    }


def _read_words(folder: Path, shards: Sequence[SplitRecord]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, np.dtype[np.uint64]]]:
    """Ids of all documents in these shards, sorted, and for each a word of its split, tokens (31 bits) and bytes (32 bits)."""
    total = sum(record.num_documents for _, record in shards)
    ids, words = np.empty(total, dtype=f"S{ID_BYTES}"), np.empty(total, dtype=np.uint64)
    filled = 0
    for split, record in shards:
        held_out = np.uint64(split == "held_out") << np.uint64(HELD_OUT_BIT)
        for identities, num_tokens, num_bytes in read_columns(folder / record.name, ["document_id", "num_tokens", "num_bytes"]):
            part = slice(filled, filled + len(identities))
            filled = part.stop
            if filled > total:
                break
            ids[part] = np.frombuffer(bytes.fromhex("".join(identities.to_pylist())), dtype=ids.dtype)
            tokens, size = (column.to_numpy(zero_copy_only=False).astype(np.uint64) for column in (num_tokens, num_bytes))
            words[part] = held_out | (tokens << np.uint64(TOKENS_SHIFT)) | (size & np.uint64(BYTES_MASK))
    if filled != total:
        raise UserError(f"{folder}: its sidecars have other numbers of documents than its manifest; see `pretrain data verify`.")
    order = np.argsort(ids)
    return ids[order], words[order]


def _compare_inputs(one: dict[str, list[tuple[int, str]]], other: dict[str, list[tuple[int, str]]]) -> dict[str, Any]:
    """Files by `source:file`. Where a file was cut into other parts, only its size can be compared."""
    both = sorted(one.keys() & other.keys())
    sizes = {key: (sum(size for size, _ in one[key]), sum(size for size, _ in other[key])) for key in both}
    cuts = {key for key in both if [size for size, _ in one[key]] != [size for size, _ in other[key]] and sizes[key][0] == sizes[key][1]}
    changed = [key for key in both if one[key] != other[key] and key not in cuts]
    return {
        "num_equal": len(both) - len(changed) - len(cuts),
        "only_in_a": sorted(one.keys() - other.keys()),
        "only_in_b": sorted(other.keys() - one.keys()),
        "changed": changed,
        "of_equal_size_in_other_parts": sorted(cuts),
    }


def _compare_rules(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rules with all that identifies them: settings, files that they read, a user's own source."""
    left, right = ([json.dumps(rule, sort_keys=True) for rule in rules] for rules in (one, other))
    return {
        "only_in_a": [json.loads(rule) for rule in (Counter(left) - Counter(right)).elements()],
        "only_in_b": [json.loads(rule) for rule in (Counter(right) - Counter(left)).elements()],
        "in_other_order": left != right and Counter(left) == Counter(right),
    }


def _without_rules(manifest: Manifest) -> dict[str, Any]:
    return {key: value for key, value in manifest.configuration.items() if key != "clean"}


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Pairs of values that are not equal; None where a key is missing."""
    return {key: pair for key, pair in _pair(one, other).items() if pair[0] != pair[1]}


def _pair(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {key: [one.get(key), other.get(key)] for key in (*one, *(key for key in other if key not in one))}

"""Is what lies in a folder, finished or not, of what the run file and the sources say now? Quick where nothing was touched.

In: what would be built now, and `plan.json`, what the folder's build set out from. Out: a line for each difference. Files are
compared by size and version (modification time, or a store's ETag); in a finished dataset, where only that differs, by bytes.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.data_section import DataSection
from configs.durable import write_file
from configs.errors import UserError
from configs.sealed import seal, unseal
from configs.section import APPLIED, FREE
from data_pipeline.cleaning import RuleIdentity
from data_pipeline.compare import differing_keys
from data_pipeline.formats import hash_input
from data_pipeline.input_file import InputFile
from data_pipeline.manifest import PLAN, SPLITS, Manifest
from data_pipeline.records import InputRecord
from data_pipeline.sources import Plan
from data_pipeline.tokenizer import tokenizer_hash


def describe_configuration(data: DataSection) -> dict[str, Any]:
    """The `data` section as the manifest keeps it: without the keys that may change, and those that were not used."""
    configuration = data.model_dump(mode="json", exclude=_changeable(DataSection))
    for key in _changeable(type(data.tokenizer)):
        del configuration["tokenizer"][key]
    if not data.tokenizer.added_tokens:  # so that a dataset from before there were any is still the same
        del configuration["tokenizer"]["added_tokens"]
    if data.tokenizer.path is not None:
        del configuration["tokenizer"]["vocabulary_size"], configuration["tokenizer"]["training_bytes"]
    return configuration


def describe_plan(data: DataSection, plan: Plan, rules: Sequence[RuleIdentity], libraries: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """All that a build sets out from, ready for JSON. Raises UserError when the tokenizer's file is missing."""
    path = data.tokenizer.path
    if path is not None and not Path(path).is_file():
        raise UserError(f"{path}: no such tokenizer file; correct data.tokenizer.path.")
    return json.loads(
        json.dumps(
            {
                "configuration": describe_configuration(data),
                "rules": [asdict(rule) for rule in rules],
                "libraries": dict(libraries),
                "tokenizer_sha256": path and tokenizer_hash(Path(path)),
                "files": {f"{file.source}:{file.name}": [file.num_bytes, file.version] for file in plan.files},
            }
        )
    )


def write_plan(root: Path, described: dict[str, Any]) -> None:
    """Write down what a build sets out from. Raises OSError."""
    write_file(root / PLAN, seal(described))


def read_plan(root: Path) -> dict[str, Any] | None:
    """What the folder's build set out from; None where none did, or nobody can read it."""
    try:
        return unseal((root / PLAN).read_bytes())
    except (OSError, ValueError):
        return None


def find_changes(root: Path, described: dict[str, Any], plan: Plan, manifest: Manifest | None) -> list[str]:
    """Each key, rule and file in which the folder's build differs from `described`; [] where there was none.

    `manifest` is that of a finished dataset, None for an unfinished one. Raises UserError, OSError.
    """
    before: dict[str, Any] = read_plan(root) or {}
    if manifest is not None:  # what it was made of is what its manifest says, whatever a later start wrote down
        of_manifest: dict[str, Any] = {
            "configuration": manifest.configuration,
            "rules": list(manifest.rules),
            "libraries": manifest.libraries,
        }
        before = {"files": {}, **before, **of_manifest}
    if not before:
        return []
    changes = _changed_keys(before["configuration"], described["configuration"])
    # One line says that a source came, went or has another name: its files are not listed with it.
    both = _source_names(before["configuration"]) & _source_names(described["configuration"])
    changes += _changed_rules(before["rules"], described["rules"])
    if described["tokenizer_sha256"] and described["tokenizer_sha256"] != (
        manifest.tokenizer_sha256 if manifest else before["tokenizer_sha256"]
    ):
        changes.append(f"data.tokenizer.path: {described['configuration']['tokenizer']['path']} is not the tokenizer that was used")
    if manifest is None and before["libraries"] != described["libraries"]:
        keys = sorted(before["libraries"].keys() | described["libraries"].keys())
        pairs = [(key, before["libraries"].get(key), described["libraries"].get(key)) for key in keys]
        changes += [f"{key}: was version {old}, is {new}" for key, old, new in pairs if old != new]
    if manifest is None:
        return changes + _changed_files(both, before["files"], described["files"], {})
    records: dict[str, list[InputRecord]] = {}
    for record in manifest.inputs:
        records.setdefault(f"{record.source}:{record.file}", []).append(record)
    known = before["files"] or {key: [sum(record.bytes for record in parts), None] for key, parts in records.items()}
    parts: dict[str, list[InputFile]] = {}
    for part in (file for unit in plan.units for file in unit.files):
        parts.setdefault(f"{part.source}:{part.name}", []).append(part)
    touched = {
        key: _has_bytes_of(parts[key], records.get(key, []))
        for file in plan.files
        if (key := f"{file.source}:{file.name}") in known and known[key][0] == file.num_bytes and known[key][1] != file.version
    }
    changes += _changed_files(both, known, described["files"], touched)
    if touched and not changes:
        with suppress(OSError):  # only the next comparison would be quicker
            write_plan(root, described)
    return changes


def check_sizes(root: Path, manifest: Manifest) -> None:
    """Raises UserError when a file of a finished dataset is missing or has another size (its bytes are not read)."""
    for split in SPLITS:
        for shard in manifest.shards(split):
            for name, record in shard.files.items():
                path = root / name
                if not path.is_file() or path.stat().st_size != record.bytes:
                    raise UserError(
                        f"{path}: missing or cut off; start the same command again with --rebuild: what is whole is kept, "
                        "the rest is made again."
                    )


def _changeable(section: Any) -> set[str]:
    return {name for name, field in section.model_fields.items() if field.json_schema_extra in (FREE, APPLIED)}


def _changed_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        _spell_change(key, old, new)
        for key, (old, new) in sorted(differing_keys(before, now).items())
        # A moved file is compared by its bytes; a mapping of such a name is a source's.
        if isinstance(old or new, dict) or not key.endswith((".path", ".paths"))
    ]


def _spell_change(key: str, old: Any, new: Any) -> str:
    match (old, new):
        case (None, {"name": name}) if key == f"sources.{name}":
            return f"data.sources: {name} was added"
        case ({"name": name}, None) if key == f"sources.{name}":
            return f"data.sources: {name} was removed"
        case (str(), str()) if key == f"sources.{new}.name":
            return f"data.sources: {old} was renamed to {new}"
        case (list(), list()) if key == "sources":
            return f"data.sources: were in the order {', '.join(old)}, are in the order {', '.join(new)}"
        case _:
            return f"data.{key}: was {old!r}, is {new!r}"


def _source_names(configuration: dict[str, Any]) -> set[str]:
    return {source["name"] for source in configuration["sources"]}


def _changed_rules(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    """Rules are compared by what they read and are made of; names and settings are part of the configuration."""
    if [rule["rule"] for rule in before] != [rule["rule"] for rule in now]:
        return []
    changes: list[str] = []
    for old, new in zip(before, now, strict=True):
        if old["source_sha256"] != new["source_sha256"]:
            changes.append(f"data.clean: the source of {new['rule']} has changed")
        # By content alone: where a list lies changes nothing.
        if [digest for _, digest in old["files"]] != [digest for _, digest in new["files"]]:
            changes.append(f"data.clean: a file that {new['rule']} reads has changed ({', '.join(path for path, _ in new['files'])})")
    return changes


def _changed_files(sources: set[str], before: dict[str, Any], now: dict[str, Any], touched: dict[str, bool]) -> list[str]:
    """A line for each file of these sources that differs; `touched` says of those with another time whether the bytes are equal."""
    before, now = ({key: file for key, file in files.items() if key.partition(":")[0] in sources} for files in (before, now))
    changes = [f"{key}: was there, is gone" for key in before.keys() - now.keys()]
    changes += [f"{key}: was not there" for key in now.keys() - before.keys()]
    for key in before.keys() & now.keys():
        (old_bytes, old_version), (new_bytes, new_version) = before[key], now[key]
        if old_bytes != new_bytes:
            changes.append(f"{key}: had {old_bytes} bytes, has {new_bytes}")
        elif old_version != new_version and not touched.get(key):
            changes.append(f"{key}: has other content" if key in touched else f"{key}: was changed, or touched")
    return sorted(changes)


def _has_bytes_of(parts: list[InputFile], records: list[InputRecord]) -> bool:
    """Whether a file is, part by part, what was read. A remote one is known by its version alone."""
    if any(part.is_remote for part in parts):
        return False
    hashed = [found for part in parts if (found := hash_input(part, part.path)) is not None]
    return hashed == [(record.sha256, record.bytes) for record in records]

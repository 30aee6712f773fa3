"""Is a finished dataset still what the run file and the sources say? Quick where nothing was touched.

In: the manifest and what would be built now. Out: a line for each difference. Files are compared by size and
modification time; where only the time differs, by their bytes.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from configs.durable import sha256_of_file, write_file
from configs.errors import UserError
from configs.schema import DataSection
from data_pipeline.formats import InputFile
from data_pipeline.manifest import MANIFEST, SPLITS, Manifest
from data_pipeline.sources import Plan
from data_pipeline.tokenizer import tokenizer_hash

INPUT_TIMES = "inputs.json"  # beside the manifest, which must not depend on when a file was touched


def describe_configuration(data: DataSection) -> dict[str, Any]:
    """The `data` section as the manifest keeps it: without the keys that may change, and those that were not used."""
    changeable = {name for name, field in DataSection.model_fields.items() if field.json_schema_extra}
    configuration = data.model_dump(mode="json", exclude=changeable)
    if data.tokenizer.path is not None:
        del configuration["tokenizer"]["vocabulary_size"], configuration["tokenizer"]["training_bytes"]
    return configuration


def find_changes(root: Path, manifest: Manifest, data: DataSection, plan: Plan) -> list[str]:
    """Each key and file in which the dataset differs from `data` and `plan`. Raises UserError, OSError."""
    return _changed_keys(manifest, data) + _changed_files(root, manifest, plan)


def write_input_times(root: Path, plan: Plan) -> None:
    """Write down the files' modification times for the next comparison. Raises OSError."""
    times = {_key(file): file.mtime_ns for file in plan.files}
    write_file(root / INPUT_TIMES, json.dumps(times, indent=0).encode())


def check_sizes(root: Path, manifest: Manifest) -> None:
    """Raises UserError when a file of a finished dataset is missing or has another size (its bytes are not read)."""
    for split in SPLITS:
        for shard in manifest.shards(split):
            for name, record in shard.files.items():
                path = root / name
                if not path.is_file() or path.stat().st_size != record.bytes:
                    raise UserError(
                        f"{path}: missing or cut off; delete {root / MANIFEST} and start the same command again: "
                        "what is whole is kept, the rest is made again."
                    )


def _key(file: InputFile) -> str:
    return f"{file.source}:{file.name}"


def _changed_keys(manifest: Manifest, data: DataSection) -> list[str]:
    before, now = _flat(manifest.configuration), _flat(describe_configuration(data))
    changes = [
        f"data.{key}: was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.endswith(".path")  # a moved file is compared by its bytes
    ]
    if data.tokenizer.path is not None:
        path = Path(data.tokenizer.path)
        if not path.is_file():
            raise UserError(f"{path}: no such tokenizer file; correct data.tokenizer.path.")
        if tokenizer_hash(path) != manifest.tokenizer_sha256:
            changes.append(f"data.tokenizer.path: {path} is not the tokenizer that was used")
    return changes


def _changed_files(root: Path, manifest: Manifest, plan: Plan) -> list[str]:
    before = {f"{record.source}:{record.file}": record for record in manifest.inputs}
    now = {_key(file): file for file in plan.files}
    changes = [f"{key}: was there, is gone" for key in before.keys() - now.keys()]
    changes += [f"{now[key].path}: was not there" for key in now.keys() - before.keys()]
    times = _read_times(root)
    touched = False
    for key in before.keys() & now.keys():
        file, record = now[key], before[key]
        if file.num_bytes != record.bytes:
            changes.append(f"{file.path}: had {record.bytes} bytes, has {file.num_bytes}")
        elif file.mtime_ns != times.get(key):
            touched = True
            if sha256_of_file(file.path) != record.sha256:
                changes.append(f"{file.path}: has other content")
    if touched and not changes:
        with suppress(OSError):  # only the next comparison would be quicker
            write_input_times(root, plan)
    return sorted(changes)


def _read_times(root: Path) -> dict[str, int]:
    try:
        times = json.loads((root / INPUT_TIMES).read_bytes())
    except (OSError, ValueError):
        return {}
    return times if isinstance(times, dict) else {}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys; the sources by their names, so that one in front of them does not rename the rest."""
    if isinstance(value, list):
        value = {item["name"]: item for item in value}
    flat: dict[str, Any] = {}
    for key, below in value.items():
        if isinstance(below, dict | list):
            flat |= _flat(below, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = below
    return flat

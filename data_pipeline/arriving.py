"""What a build that is still running will give, unit by unit, so that training may begin on the units that are there.

In: the units of a build in their order. Out: `<root>/arriving.json`, there from the moment the first unit can be made until the
manifest takes its place; and the shards of units that have been committed.
"""

import json
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from configs.durable import write_file
from configs.errors import UserError
from configs.sealed import seal, sealed_text, unseal
from data_pipeline.manifest import FORMAT_VERSION, UNITS, Record, ShardRecord, Split

ARRIVING = "arriving.json"
UNIT = "unit.json"
Shards = dict[Split, tuple[ShardRecord, ...]]


class UnitToCome(Record):
    """A unit of the build, whether it is there or not."""

    source: str
    fingerprint: str
    """Of what it is made of, as in its `unit.json`."""


class Arriving(Record):
    """What is known of a dataset before it is finished."""

    format_version: int
    tokenizer_sha256: str
    vocabulary_size: int
    end_of_text_id: int
    dtype: str
    units: tuple[UnitToCome, ...]


def write_arriving(root: Path, arriving: Arriving) -> None:
    """Write `arriving.json`. Raises OSError."""
    write_file(root / ARRIVING, seal(arriving.model_dump(mode="json")))


def load_arriving(root: Path) -> Arriving | None:
    """What is to come; None where no build has come so far. Raises UserError for one of another version, or a damaged file."""
    try:
        arriving = Arriving.model_validate_json(sealed_text((root / ARRIVING).read_bytes()), strict=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, ValidationError) as error:
        raise UserError(f"{root / ARRIVING}: cannot be read ({error}); start `pretrain data build RUN.yaml` again.") from None
    if arriving.format_version != FORMAT_VERSION:
        raise UserError(f"{root / ARRIVING}: format version {arriving.format_version}, this program reads {FORMAT_VERSION}.")
    return arriving


def load_arrived(root: Path, arriving: Arriving, number: int) -> Shards | None:
    """The shards of unit `number`, named from the dataset's folder; None while it is not there."""
    try:
        found = unseal((root / UNITS / f"{number:05d}" / UNIT).read_bytes())
    except (OSError, ValueError):
        return None
    if found["fingerprint"] != arriving.units[number].fingerprint:
        return None
    shards = TypeAdapter(Shards).validate_json(json.dumps(found["shards"]), strict=True)
    return {split: tuple(place_shard(number, shard) for shard in one) for split, one in shards.items()}


def place_shard(number: int, shard: ShardRecord) -> ShardRecord:
    """A unit's shard, named from the dataset's folder instead of from the unit's."""
    prefix = f"{UNITS}/{number:05d}"
    files = {f"{prefix}/{name}": file for name, file in shard.files.items()}
    return shard.model_copy(update={"name": f"{prefix}/{shard.name}", "files": files})

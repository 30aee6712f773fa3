"""What a build that is still running will give, unit by unit, so that training may begin on the units that are there.

In: the units of a build in their order. Out: `<root>/arriving.json`, there from the moment the first unit can be made until the
manifest takes its place; and the shards of units that have been committed.
"""

import json
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from configs.durable import write_file
from configs.errors import UserError
from configs.sealed import seal, sealed_text, unseal
from data_pipeline.manifest import FORMAT_VERSION, UNITS, VERSION_OF, Split
from data_pipeline.records import Record, ShardRecord

ARRIVING = "arriving.json"
UNIT = "unit.json"
Shards = dict[Split, tuple[ShardRecord, ...]]
SHARDS = TypeAdapter(Shards)


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
    path = root / ARRIVING
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    version = VERSION_OF.match(content)
    if version is not None and int(version[1]) != FORMAT_VERSION:  # before anything else of it is believed
        raise UserError(
            f"{path}: format version {int(version[1])}, this program reads {FORMAT_VERSION}; train with the version that builds it, or "
            "build the dataset with this one into another data.root."
        )
    try:
        return Arriving.model_validate_json(sealed_text(content), strict=True)
    except (ValueError, ValidationError) as error:
        raise UserError(
            f"{path}: cannot be read ({str(error).splitlines()[0]}); start `pretrain data build RUN.yaml` again, which writes it anew."
        ) from None


def load_arrived(root: Path, arriving: Arriving, number: int) -> Shards | None:
    """The shards of unit `number`, named from the dataset's folder; None while it is not there."""
    try:
        return _read_unit(root, number, arriving.units[number].fingerprint)
    except (OSError, ValueError):
        return None


@cache  # what has arrived once is looked for again and again, and of one fingerprint there is one content
def _read_unit(root: Path, number: int, fingerprint: str) -> Shards:
    found = unseal((root / UNITS / f"{number:05d}" / UNIT).read_bytes())
    if found["fingerprint"] != fingerprint:
        raise ValueError("made of something else")
    shards = SHARDS.validate_json(json.dumps(found["shards"]), strict=True)
    return {split: tuple(place_shard(number, shard) for shard in one) for split, one in shards.items()}


def place_shard(number: int, shard: ShardRecord) -> ShardRecord:
    """A unit's shard, named from the dataset's folder instead of from the unit's."""
    prefix = f"{UNITS}/{number:05d}"
    files = {f"{prefix}/{name}": file for name, file in shard.files.items()}
    return shard.model_copy(update={"name": f"{prefix}/{shard.name}", "files": files})

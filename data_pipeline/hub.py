"""Data sets of the Hugging Face hub, as they stream in.

In: a source of format hub, or an `InputFile` of one. Out: what there is of it (shards, size, version), and its rows as
documents. Nothing is copied to this machine. Credentials come from the environment and are written nowhere.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from configs.errors import UserError
from data_pipeline.documents import Document, Rejected
from data_pipeline.input_file import InputFile
from data_pipeline.rows import read_mapping

HUB_POSITIONS = 2**32  # rows that a shard of a hub data set may have: its first row stands at shard x this


def open_hub(source: str, path: str, settings: Mapping[str, Any]) -> tuple[Any, str, int, str]:
    """A hub data set as an iterable one: itself, its split's name, its size in bytes (0: unknown) and its version.

    `path` may also be one of the library's own formats (json, parquet) with `data_files`. Raises UserError when it
    cannot be found or reached.
    """
    import datasets

    arguments = dict(settings)
    split = str(arguments.pop("split", "train"))
    try:
        builder = datasets.load_dataset_builder(path, **arguments)
        dataset = builder.as_streaming_dataset(split=split)
        origins: Any = [getattr(one, "origin_metadata", None) for one in dict(builder.config.data_files or {}).values()]
    except Exception as error:  # the library lets through what each of its transports raises
        raise UserError(
            f"data source {source!r}: the hub data set {path!r} with {dict(settings) or 'no settings'} cannot be opened "
            f"({type(error).__name__}: {str(error)[:300]}); check its name, its settings (name, split, revision), the network, and "
            "HF_TOKEN and HF_HUB_OFFLINE in the environment."
        ) from None
    known = (builder.info.splits or {}).get(split)
    size = int(known.num_bytes or 0) if known is not None else 0
    version = hashlib.sha256(json.dumps([builder.hash, origins], default=str).encode()).hexdigest()[:24]
    return dataset, split, size, version


def read_hub(file: InputFile, largest_bytes: int) -> Iterator[Document | Rejected]:
    """Every row of a hub data set, or of its shard `part` = (shard, of how many), as it streams in.

    A document's position is shard x 2**32 + row. Raises UserError when the data set is not the one that was planned with;
    OSError when it cannot be read to its end.
    """
    whole = replace(file, part=None, part_bytes=file.num_bytes)
    is_repository = "/" in file.root and not Path(file.root).exists()
    # What was opened from a repository stays at the revision found then, and the hub is not asked again for each part.
    dataset = _open_as_planned(whole) if is_repository else _open_as_planned.__wrapped__(whole)
    shard, num_shards = file.part or (0, 1)
    rows = iter(dataset.shard(num_shards=num_shards, index=shard) if num_shards > 1 else dataset)
    number = 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # as in `open_hub`
            raise OSError(f"{file.root}, shard {shard} of {num_shards}, row {number}: {type(error).__name__}: {error}") from error
        if row is None:
            return
        yield read_mapping(file, shard * HUB_POSITIONS + number, row, largest_bytes)
        number += 1


@lru_cache(maxsize=4)
def _open_as_planned(file: InputFile) -> Any:
    dataset, _, _, version = open_hub(file.source, file.root, {key: json.loads(value) for key, value in file.settings})
    if version != file.version:
        raise UserError(f"{file.root} was changed while the build read it; start again, best with a `revision` in the source's settings.")
    return dataset

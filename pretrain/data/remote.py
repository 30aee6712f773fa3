"""A dataset's folder, wherever it is.

In: the `data` section. Out: a folder with the manifest and the tokenizer, the paths of the files that stand beside shards, and a
cache for the shards themselves: copies, where `data.root` is a URL.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from configs.data_section import DataSection
from configs.durable import write_file
from configs.errors import UserError
from data_pipeline.checksums import SUFFIX, read_checksums
from data_pipeline.manifest import MANIFEST, TOKENIZER
from data_pipeline.records import FileRecord, ShardRecord
from pretrain.data.staging import BlockCache, Sleep, stage_files

Find = Callable[[str, FileRecord], Path]
"""From a file's name in the dataset, and what the manifest says of it, to a path."""


def described_in(data: DataSection) -> Path:
    """The folder with `manifest.json` and `tokenizer.json`. Raises UserError: the store has none, or is not reached."""
    if not data.is_remote:
        return Path(data.folder())
    copies = Path(data.cache_folder()) / "files"
    manifest = stage_files(data.folder(), {MANIFEST: None}, copies, tell)[MANIFEST]
    tokenizer = manifest.with_name(TOKENIZER)
    if not tokenizer.exists():  # beside the manifest that it belongs to: the folder's name is the manifest's hash
        write_file(tokenizer, stage_files(data.folder(), {TOKENIZER: None}, copies, tell)[TOKENIZER].read_bytes())
    return manifest.parent


def finder(data: DataSection, sleep: Sleep) -> Find:
    """Gives the path of a file that stands beside a shard: where it is, or a copy. `sleep` as in `stage_files`."""
    if not data.is_remote:
        return lambda name, record: Path(data.folder()) / name
    copies = Path(data.cache_folder()) / "files"
    return lambda name, record: stage_files(data.folder(), {name: record}, copies, tell, sleep)[name]


class Sums:
    """The CRC32C tables of a dataset's shards, fetched when they are first needed, those of a step at once."""

    def __init__(self, data: DataSection, shards: Sequence[ShardRecord], sleep: Sleep) -> None:
        self._data, self._shards, self._sleep = data, tuple(shards), sleep
        self._sums: dict[int, npt.NDArray[np.uint32]] = {}

    def ask(self, files: Iterable[int]) -> None:
        """Fetch the tables of files that have not been needed before. Raises UserError as `stage_files` does."""
        names = {f"{self._shards[file].name}{SUFFIX}": file for file in files if file not in self._sums}
        records = {name: self._shards[file].files[name] for name, file in names.items()}
        copies = Path(self._data.cache_folder()) / "files"
        for name, path in stage_files(self._data.folder(), records, copies, tell, self._sleep).items():
            self._sums[names[name]] = read_checksums(path.read_bytes())

    def __call__(self, file: int) -> npt.NDArray[np.uint32]:
        """The sums of a file's blocks."""
        if file not in self._sums:
            self.ask([file])
        return self._sums[file]


def open_cache(data: DataSection, identity: str, shards: Sequence[ShardRecord], sums: Sums, sleep: Sleep) -> BlockCache:
    """The cache for the tokens of shards. `identity`: the manifest's hash. Raises UserError as `BlockCache` does."""
    files = [(f"{shard.name}.bin", shard.files[f"{shard.name}.bin"].bytes) for shard in shards]
    return BlockCache(data.folder(), files, sums, Path(data.cache_folder()), identity, data.cache_bytes, tell, sleep)


def refuse_remote(data: DataSection, what: str) -> None:
    """Raises UserError where the dataset has to be in a folder."""
    if data.is_remote:
        raise UserError(
            f"data.root is {data.folder()}, and {what} needs a folder; give one with data.root=FOLDER: only training reads by URL."
        )


def tell(text: str) -> None:
    """Say on the terminal what is waited for."""
    print(text, file=sys.stderr, flush=True)

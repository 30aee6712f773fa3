"""A file that a build reads, or a part of it: where it lies, what it is read as, and how a change of it is told.

In: what was found when the build was planned. Out: `InputFile`, which readers, hashes and records all take.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class InputFile:
    """A file of a source, or a part of it, as it was when the build was planned."""

    source: str
    root: str
    """The source's folder, absolute, or a URL's part before `name`; for hub, the data set's name."""
    name: str
    """Path below `root`, with `/`; for hub, the split's name."""
    kind: str
    """text, python, jsonl, parquet, arrow, warc, hub, megatron, or `module:function`."""
    num_bytes: int
    """Of the whole file; of both files of a megatron pair; for hub what is known of it, or 0."""
    version: str
    """What tells a changed file without reading it: its time of modification in ns, its ETag, its revision."""
    text_field: str
    id_field: str | None
    metadata_fields: tuple[str, ...]
    part: tuple[int, int] | None
    """Half-open range of bytes (jsonl: the lines that start there), row groups (parquet) or rows (arrow); for hub, which
    shard of how many; None: the whole file."""
    part_bytes: int
    """About how many bytes the part is; `num_bytes` for a whole file."""
    settings: tuple[tuple[str, str], ...] = ()
    """The source's settings: keys and their values as JSON."""
    function_sha256: str = ""
    """Of the file that defines the function, where the kind is one."""

    @property
    def location(self) -> str:
        """The local path or the URL."""
        return f"{self.root}/{self.name}" if self.is_remote else str(self.path)

    @property
    def path(self) -> Path:
        """Where a local file lies."""
        return Path(self.root) / self.name

    @property
    def is_remote(self) -> bool:
        """Whether the file must be fetched first."""
        return "://" in self.root

    @property
    def packed(self) -> str:
        """.gz or .zst where the name ends so, else nothing."""
        name = self.name.partition("?")[0] if self.is_remote else self.name
        return next((suffix for suffix in (".gz", ".zst") if name.lower().endswith(suffix)), "")


def index_path(path: Path) -> Path:
    """The .idx that stands beside a .bin."""
    return path.with_name(path.name.removesuffix(".bin") + ".idx")

"""Names and things in a source's folder that nobody expects there: each has one defined outcome, soon, and nothing outside is read.

In: a case, which is one scenario. Out: whether the build ended as its scenario says, with just the documents that it names, and
opened no file of the folder beside the corpus.
"""

import io
import json
import os
import random
import socket
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from configs.data_section import DataSection, SourceSection, TokenizerSection
from data_pipeline.manifest import SPLITS, load_manifest
from data_pipeline.shards import read_spans
from tests.faults.builds import build_here
from tests.faults.campaign import Case, Outcome

TIMEOUT_SECONDS = 60
SECRET = "what lies outside is nobody's business"
ODD_NAMES = (
    "new\nline.txt", "carriage\rreturn.txt", "tab\tin it.txt", "'quotes\".txt", "back\\slash.txt", " spaces .txt", "-dash.txt", "*?[x].txt",
    "$(touch x);`y`.txt", "%s{0}.txt", "dots...txt", "a:b.txt", "00000.txt", "unit.json.txt", "\x1b[31mred.txt", "\x7f.txt", "#hash.txt",
    "cafe\u0301.txt", "caf\u00e9.txt", "\u202etxt.exe.txt", "\ufeffmark.txt", "🦊.txt", "\u2028line.txt", "null.txt",
)  # fmt: skip


@dataclass(frozen=True)
class Expected:
    """How a scenario ends."""

    files: frozenset[str] = frozenset({"good.txt"})
    """Those that documents came from."""
    refusal: str = ""
    """A part of what is said, where the build is refused."""
    num_quarantined: int = 0
    source: dict[str, Any] = field(default_factory=dict)
    """What the source's section says besides its name."""
    before: Callable[[], None] = lambda: None
    """To be called in the build's process."""


def check_names(case: Case) -> Outcome:
    """One scenario."""
    make = SCENARIOS[case.number % len(SCENARIOS)]
    corpus, outside = case.folder / "corpus", case.folder / "outside"
    corpus.mkdir()
    outside.mkdir()
    (corpus / "good.txt").write_text("a good text, which is always there")
    (outside / "secret.txt").write_text(SECRET)
    (outside / "secret.jsonl").write_text(json.dumps({"text": SECRET}))
    expected = make(corpus, outside)
    data = _describe(case.folder / "d", expected.source or {"path": str(corpus)})

    def before() -> None:
        _tell_opened(outside)
        expected.before()

    ended = build_here(data, before=before, timeout_seconds=TIMEOUT_SECONDS)
    problems = [f"{line['opened']} was opened" for line in ended.lines if "opened" in line]
    if expected.refusal:
        if ended.status != 2 or expected.refusal not in ended.refusal:
            problems.append(f"wanted {expected.refusal!r}: {ended}")
    elif ended.status != 0:
        problems.append(str(ended))
    else:
        problems += _compare_files(Path(data.folder()), expected)
    return Outcome(1, [f"{make.__name__}: {problem}" for problem in problems])


def link_to_file(corpus: Path, outside: Path) -> Expected:
    """A link to a file outside."""
    (corpus / "link.txt").symlink_to(outside / "secret.txt")
    return Expected()


def link_to_folder(corpus: Path, outside: Path) -> Expected:
    """A link to a folder outside."""
    (corpus / "folder").symlink_to(outside)
    return Expected()


def link_through_glob(corpus: Path, outside: Path) -> Expected:
    """Links that a glob matches, as file and as folder."""
    (corpus / "folder").symlink_to(outside)
    (corpus / "link.txt").symlink_to(outside / "secret.txt")
    return Expected(source={"path": f"{corpus}/*"})


def link_beyond_glob(corpus: Path, outside: Path) -> Expected:
    """A glob that goes on behind a link."""
    (corpus / "folder").symlink_to(outside)
    (corpus / "inner").mkdir()
    (corpus / "inner" / "a.txt").write_text("a text within")
    return Expected(frozenset({"inner/a.txt"}), source={"path": f"{corpus}/*/*.txt"})


def link_in_circle(corpus: Path, outside: Path) -> Expected:
    """Links that lead back, and nowhere."""
    (corpus / "again").symlink_to(corpus)
    (corpus / "self.txt").symlink_to(corpus / "self.txt")
    (corpus / "nowhere.txt").symlink_to(corpus / "none")
    return Expected()


def link_as_source(corpus: Path, outside: Path) -> Expected:
    """A source that is itself a link, by the user's own word, to a folder that holds another."""
    (corpus / "link.txt").symlink_to(outside / "secret.txt")
    (corpus.parent / "named").symlink_to(corpus)
    return Expected(source={"path": str(corpus.parent / "named")})


def link_as_index(corpus: Path, outside: Path) -> Expected:
    """A token shard whose index is a link to a file outside."""
    (corpus / "a.bin").write_bytes(b"\0\0")
    (corpus / "a.idx").symlink_to(outside / "secret.txt")
    return Expected(refusal="data source 'named'", source={"path": str(corpus), "format": "megatron"})


def listed_outside(corpus: Path, outside: Path) -> Expected:
    """A state.json of save_to_disk that lists a file outside."""
    (outside / "data.arrow").write_bytes(b"")
    (corpus / "data.arrow").write_bytes(b"")
    (corpus / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../outside/data.arrow"}]}))
    return Expected(refusal="is not a file below", source={"path": str(corpus), "format": "datasets"})


def pipe(corpus: Path, outside: Path) -> Expected:
    """A FIFO, which would wait for ever."""
    os.mkfifo(corpus / "pipe.txt")
    os.mkfifo(corpus / "pipe.jsonl")
    return Expected()


def pipe_as_source(corpus: Path, outside: Path) -> Expected:
    """A source that is a FIFO."""
    os.mkfifo(corpus / "pipe.txt")
    return Expected(refusal="data source 'named'", source={"path": str(corpus / "pipe.txt")})


def pipe_too_late(corpus: Path, outside: Path) -> Expected:
    """A file that becomes a FIFO after the plan was made."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        path = corpus / "late.txt"
        if event == "open" and str(arguments[0]).endswith(".lock") and path.is_file():
            path.unlink()
            os.mkfifo(path)

    (corpus / "late.txt").write_text("a file when the build was planned")
    return Expected(refusal="was changed while the build read it", before=lambda: sys.addaudithook(hook))


def open_socket(corpus: Path, outside: Path) -> Expected:
    """A socket."""
    with socket.socket(socket.AF_UNIX) as one:
        here = os.open(".", os.O_RDONLY)
        try:
            os.chdir(corpus)  # a socket's path has at most 107 bytes
            one.bind("socket.txt")
        finally:
            os.fchdir(here)
            os.close(here)
    return Expected()


def device(corpus: Path, outside: Path) -> Expected:
    """A source that never ends."""
    return Expected(refusal="data source 'named'", source={"path": "/dev/zero", "format": "text"})


def folder_like_file(corpus: Path, outside: Path) -> Expected:
    """Folders whose names are those of files; what is in them is found."""
    for name in ("rows.jsonl", "text.txt", "empty.parquet", "rows.parquet"):
        (corpus / name).mkdir()
    (corpus / "rows.jsonl" / "a.jsonl").write_text('{"text": "a line within"}')
    (corpus / "text.txt" / "b.txt").write_text("a text within")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a row within"]}), corpus / "rows.parquet" / "part-0.parquet")
    return Expected(frozenset({"good.txt", "rows.jsonl/a.jsonl", "text.txt/b.txt", "rows.parquet/part-0.parquet"}))


def odd_names(corpus: Path, outside: Path) -> Expected:
    """Names with all that a file system lets through and UTF-8 can say."""
    for name in ODD_NAMES:
        (corpus / name).write_text(f"the text of {name!r}")
    return Expected(frozenset({"good.txt", *ODD_NAMES}))


def odd_names_in_quarantine(corpus: Path, outside: Path) -> Expected:
    """The same, of files that cannot be read."""
    for name in ODD_NAMES:
        (corpus / name).write_bytes(b"\xff")
    return Expected(num_quarantined=len(ODD_NAMES))


def odd_folders(corpus: Path, outside: Path) -> Expected:
    """Folders of such names."""
    names = {f"{name}/a.txt" for name in ODD_NAMES if not name.startswith(".")}
    for name in names:
        (corpus / name).parent.mkdir()
        (corpus / name).write_text(f"the text of {name!r}")
    return Expected(frozenset({"good.txt", *(name for name in names)}))


def long_names(corpus: Path, outside: Path) -> Expected:
    """A name as long as names may be, and a path of some three thousand bytes."""
    names = ["n" * 251 + ".txt", "🦊" * 62 + ".txt", "/".join(["d" * 250] * 12 + ["deep.txt"])]
    for name in names:
        (corpus / name).parent.mkdir(parents=True, exist_ok=True)
        (corpus / name).write_text(f"a text under a name of {len(name)} characters")
    return Expected(frozenset({"good.txt", *names}))


def not_unicode(corpus: Path, outside: Path) -> Expected:
    """A name that is not UTF-8."""
    Path(os.fsdecode(os.fsencode(corpus) + b"/\xff\xfe.txt")).write_text("a text that nobody can name")
    return Expected(refusal="is not UTF-8; rename it")


def tar_as_lines(corpus: Path, outside: Path) -> Expected:
    """An archive under the name of a file of lines."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for number in range(3):
            entry = tarfile.TarInfo(f"../../{number}.txt")
            entry.size = 600
            archive.addfile(entry, io.BytesIO(b"line\n" * 120))
    (corpus / "archive.jsonl").write_bytes(packed.getvalue())
    num_lines = sum(bool(line.strip(b" \t\r\x0b\x0c")) for line in packed.getvalue().split(b"\n"))
    return Expected(num_quarantined=num_lines)


def hidden(corpus: Path, outside: Path) -> Expected:
    """Hidden files and folders are left out."""
    (corpus / ".hidden").mkdir()
    (corpus / ".hidden" / "a.txt").write_text("hidden")
    (corpus / ".a.txt").write_text("hidden")
    return Expected()


def dataset_within(corpus: Path, outside: Path) -> Expected:
    """What lies in the folder that is being built is no input."""
    (corpus / "d").mkdir()
    (corpus / "d" / "a.txt").write_text("no input")
    (corpus.parent / "d").symlink_to(corpus / "d")
    return Expected()


SCENARIOS: tuple[Callable[[Path, Path], Expected], ...] = (
    link_to_file, link_to_folder, link_through_glob, link_beyond_glob, link_in_circle, link_as_source, link_as_index, listed_outside,
    pipe, pipe_as_source, pipe_too_late, open_socket, device, folder_like_file, odd_names, odd_names_in_quarantine, odd_folders,
    long_names, not_unicode, tar_as_lines, hidden, dataset_within,
)  # fmt: skip


def _describe(root: Path, source: dict[str, Any]) -> DataSection:
    return DataSection(
        root=str(root),
        sources=(SourceSection(name="named", **source),),
        tokenizer=TokenizerSection(vocabulary_size=300, training_bytes=10_000),
        work_unit_bytes=1000,
        quarantine_limit=1.0,
        held_out_fraction=0.0,
    )


def _tell_opened(outside: Path) -> None:
    """Say a line for every file of a folder that this process opens; to be called in a child."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if Path(path).is_relative_to(outside):
                print(json.dumps({"opened": path}), flush=True)

    sys.addaudithook(hook)


def _compare_files(root: Path, expected: Expected) -> list[str]:
    """What is wrong with which files documents came from, or could not."""
    manifest = load_manifest(root)
    rows = [row for split in SPLITS for shard in manifest.shards(split) for row in read_spans(root / shard.name).to_pylist()]
    problems: list[str] = []
    if (found := {row["file"] for row in rows}) != expected.files:
        problems.append(f"documents came from {sorted(found)}, wanted {sorted(expected.files)}")
    named = [json.loads(line) for path in root.rglob("quarantine.jsonl") for line in path.read_text(encoding="utf-8").splitlines()]
    num_quarantined = sum(manifest.documents.quarantined.values())
    if not num_quarantined == len(named) == expected.num_quarantined:
        problems.append(f"{num_quarantined} were quarantined and {len(named)} named, wanted {expected.num_quarantined}")
    return problems


def prepare_nothing(folder: Path, chosen: random.Random) -> None:
    """The scenarios share nothing."""

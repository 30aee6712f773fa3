"""A small corpus, builds in this process, and one Ray for all tests that need it."""

import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.data_section import DataSection, RuleSection, SourceSection, TokenizerSection
from data_pipeline.arriving import ARRIVING
from data_pipeline.build import BuildResult, build_dataset
from data_pipeline.execution import open_here
from data_pipeline.stages import Progress

SEED = 20261122
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "naïve",
    "東京",
    "emoji",
    "🦊",
    "and",
    "NUL\x00",
    "come\r\n",
    "along",
    "12",
    "345",
    "times",
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """24 text files of about 4 kB in two folders; the same in every test."""
    print(f"seed {SEED}")
    chosen = random.Random(SEED)
    folder = tmp_path / "corpus"
    for number in range(24):
        path = folder / ("even" if number % 2 == 0 else "odd") / f"text-{number:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(" ".join(chosen.choices(WORDS, k=600)).encode())
    return folder


@pytest.fixture
def data_for(tmp_path: Path) -> Callable[..., DataSection]:
    """A `data` section for a folder of small files: a tiny vocabulary and units of some 20 kB."""

    def make(path: Path, root: str = "dataset", **changes: Any) -> DataSection:
        source = {key: changes.pop(key) for key in ("format", "pattern", "text_field") if key in changes}
        settings: dict[str, Any] = {
            "root": str(tmp_path / root),
            "sources": (SourceSection(name="mine", path=str(path), **source),),
            "tokenizer": TokenizerSection(vocabulary_size=400, training_bytes=50_000),
            "held_out_fraction": 0.2,
            "work_unit_bytes": 20_000,
            "workers": 2,
        }
        return DataSection(**{**settings, **changes})

    return make


@pytest.fixture
def two_sources(corpus: Path, tmp_path: Path, data_for: Callable[..., DataSection]) -> DataSection:
    """A `data` section: 24 texts, and 20 rows with names and metadata of which 9 are short and one is unreadable."""
    rows = [{"text": f"short {number}", "url": f"http://x/{number}", "lang": "en"} for number in range(9)]
    rows += [{"text": f"row {number} is\nlong enough to be kept", "url": f"http://y/{number}", "lang": "de"} for number in range(10)]
    rows_file = tmp_path / "rows" / "rows.jsonl"
    rows_file.parent.mkdir()
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "[1]\n")
    sources = (
        SourceSection(name="texts", path=str(corpus)),
        SourceSection(name="rows", path=str(rows_file.parent), id_field="url", metadata_fields=("lang",)),
    )
    return data_for(corpus, sources=sources, clean=(RuleSection(rule="tests.data_pipeline.rules:drop_short"),), quarantine_limit=0.1)


@pytest.fixture
def build() -> Callable[..., BuildResult]:
    """Build in this process."""
    return lambda data, rebuild=False: build_dataset(data, ignore_progress, open_here, rebuild)


@pytest.fixture
def folder(corpus: Path, data_for: Callable[..., DataSection], build: Callable[..., BuildResult]) -> Path:
    """The folder of a small dataset."""
    return build(data_for(corpus)).folder


@pytest.fixture
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is not about power cuts: most of a small build is waiting for the disk."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def hashes() -> Callable[[Path], dict[str, str]]:
    """SHA-256 of every file of a dataset but those of the lock, what is there only during a build, and the report: it has times."""
    others = (".lock", ".owner.json", "report.json", ARRIVING)

    def of(folder: Path) -> dict[str, str]:
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in others)
        return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    return of


@pytest.fixture(scope="session")
def two_workers() -> Iterator[None]:
    """A Ray of two CPUs that builds find running."""
    import ray

    scratch = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        (Path(scratch) / "token").write_text("0" * 64)
        patch.setenv("RAY_AUTH_TOKEN_PATH", f"{scratch}/token")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False, _temp_dir=scratch)
        yield
        ray.shutdown()
    shutil.rmtree(scratch, ignore_errors=True)


def ignore_progress(progress: Progress) -> None:
    pass

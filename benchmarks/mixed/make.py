"""A mixed corpus from the machine's texts to its plan.

In: a folder that is not there yet. Out, in it: the seven sources of configs/data/mixed.yaml; `documents.parquet` with what
must become of every document; `planted.json` with counts; for another folder than the default, the run file to build.
"""

import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from benchmarks.corpus import FOLDERS
from benchmarks.mixed.documents import DATASET, FOLDER, ROOT, RUN_FILE, SOURCES
from benchmarks.mixed.garden import Garden, Judge, gather, mark_exact_duplicates, plant_broken, plant_exact, plant_for_rules, plant_near
from benchmarks.mixed.texts import fetch_packages, open_pools
from benchmarks.mixed.writing import write_damaged_files, write_lists, write_source


def make_corpus(folder: Path, megabytes: float, folders: Sequence[str] | None = None, with_packages: bool = True, seed: int = 1) -> Path:
    """Make the corpus in a folder that is not there yet; gives the run file to build it with. Raises SystemExit."""
    if folder.exists():
        raise SystemExit(f"{folder} is there already; remove it, or name another folder")
    folder.mkdir(parents=True)
    chooser = random.Random(seed)
    questions = write_lists(folder, chooser)
    run_file = write_run_file(folder)
    garden = Garden(Judge(run_file), chooser)
    with tempfile.TemporaryDirectory() as temporary:
        packages = fetch_packages(Path(temporary)) if with_packages else {}
        gather(garden, open_pools(folders or FOLDERS, packages, chooser), int(megabytes * 1e6))
    scale = len(garden.all)
    for number in range(10 + scale // 50):
        plant_exact(garden, number)
        plant_near(garden, number)
    plant_for_rules(garden, questions, scale)
    plant_broken(garden, 1 + scale // 2500)
    for source in SOURCES:
        write_source(folder, source, [planned for planned in garden.all if planned.source is source], chooser)
    write_damaged_files(folder, garden)
    mark_exact_duplicates(garden.all)
    write_plan(folder, run_file, garden, {"seed": seed, "megabytes": megabytes, "packages": sorted(packages)})
    return run_file


def write_run_file(folder: Path) -> Path:
    """The run file for a folder: the project's, or for another folder than its own, a copy in it."""
    if folder.resolve() == (ROOT / FOLDER).resolve():
        return ROOT / RUN_FILE
    text = (ROOT / RUN_FILE).read_text(encoding="utf-8")
    path = folder / Path(RUN_FILE).name
    path.write_text(text.replace(FOLDER, str(folder)).replace(f"root: {DATASET}\n", f"root: {folder}/dataset\n"), encoding="utf-8")
    return path


def write_plan(folder: Path, run_file: Path, garden: Garden, facts: dict[str, Any]) -> None:
    """Write down what must become of every document."""
    documents = sorted(garden.all, key=lambda one: one.order)
    columns: dict[str, list[Any]] = {
        "document_id": [one.identity for one in documents],
        "source": [one.source.name for one in documents],
        "file": [one.file for one in documents],
        "position": [one.position for one in documents],
        "stage": [one.stage for one in documents],
        "reason": [one.expected for one in documents],
        "digest": [one.digest.hex() for one in documents],
        "name": [one.name for one in documents],
        "metadata": [json.dumps(one.metadata) for one in documents],
    }
    assert len(set(columns["document_id"])) == len(documents), "two documents stand in one place"
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "documents.parquet", compression="zstd")
    sources: dict[str, dict[str, Any]] = {}
    for source in SOURCES:
        own = [one for one in documents if one.source is source]
        counted = {stage: Counter(one.expected for one in own if one.stage == stage) for stage in ("dropped", "quarantined")}
        sources[source.name] = {"read": len(own), **{stage: dict(sorted(counts.items())) for stage, counts in counted.items()}}
    pairs = [(sorted(pair[:2], key=lambda one: one.order), pair[2]) for pair in garden.pairs]
    plan = {
        **facts,
        "run_file": os.path.relpath(run_file, folder),
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "planted": dict(sorted(garden.ways.items())),
        "sources": sources,
        "near": [
            {"source": later.source.name, "first": first.identity, "later": later.identity, "similarity": round(similarity, 4)}
            for (first, later), similarity in pairs
        ],
        "addresses": {one.identity: number for one, number in garden.mails},
        "controls": [one.identity for one in garden.controls],
    }
    (folder / "planted.json").write_text(json.dumps(plan, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

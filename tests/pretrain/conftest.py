"""For tests of the `data` verbs: a place with a run file, and a way to run a verb there."""

import json
from functools import partial
from pathlib import Path

import pytest

from data_pipeline import build as conductor
from data_pipeline.execution import open_here
from tests.pretrain.verbs import RULES, RUN_FILE, Run, call


@pytest.fixture(name="place")
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a run file, its sources and a rule. Builds are done in this process and do not wait for the disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr(conductor, "build_dataset", partial(conductor.build_dataset, engine=open_here))
    (tmp_path / "shown_rules.py").write_text(RULES)
    (tmp_path / "run.yaml").write_text(RUN_FILE)
    (tmp_path / "notes").mkdir()
    (tmp_path / "rows").mkdir()
    for number in range(4):
        (tmp_path / "notes" / f"{number}.txt").write_text(f"note {number} on what is so\n" * 30)
    rows = [json.dumps({"text": f"a row with number {number}", "url": f"http://x/{number}", "lang": "en"}) for number in range(7)]
    (tmp_path / "rows" / "a.jsonl").write_text("\n".join([*rows, '{"text": "one"}', '{"text": "two"}', "[1]"]) + "\n")
    return tmp_path


@pytest.fixture(name="run")
def _run(place: Path) -> Run:
    """Run a verb of `pretrain data`; an error of ours is raised."""
    return partial(call, "data")

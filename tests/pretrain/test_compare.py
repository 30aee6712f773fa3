"""`pretrain compare`: which runs are compared in pairs, what is said of them, and what differs in their configurations."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import UserError
from configs.loader import dump_config, load_config
from pretrain.checkpoint.verify import Commit, commit_name, write_manifest
from pretrain.run.folder import RunFolder
from pretrain.state import TrainState
from tests.pretrain.verbs import call

MakeRun = Callable[..., RunFolder]


@pytest.fixture
def make_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> MakeRun:
    """A run of some rows: the same batches, noise of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("training: {sequence_length: 32, global_batch_samples: 8, total_tokens: 256000}\n")
    draw = np.random.default_rng(seed)
    batches = draw.normal(size=1000) * 0.1

    def make(name: str, *overrides: str, rows: int = 1000, offset: float = 0.0, own_noise: float = 0.001, **more: Any) -> RunFolder:
        config = load_config(tmp_path / "mine.yaml", [f"run.name={name}", *overrides])
        folder = RunFolder.of(config)
        folder.path.mkdir(parents=True)
        folder.config_file.write_text(dump_config(config))
        losses = 4 + batches[:rows] + offset + own_noise * draw.normal(size=rows)
        lines = [
            {"step": n, "tokens_seen": 256 * n, "attempt": 1, "loss": loss, "tokens_per_second": 1000.0, "memory/host_bytes": 1e9, **more}
            for n, loss in enumerate(losses.tolist(), start=1)
        ]
        (folder.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 10')
        return folder

    return make


def commit(run: RunFolder, step: int, skipped: tuple[tuple[int, int], ...] = (), **identity: str) -> None:
    folder = run.checkpoints / commit_name(step)
    folder.mkdir(parents=True)
    write_manifest(Commit(folder, TrainState(step, 8 * step, 256 * step, 0, skipped), {}, identity, {}, 1, 1, 2.5, 1_700_000_000))


def as_json(*runs: RunFolder) -> dict[str, Any]:
    return json.loads(call("compare", *(run.path for run in runs), "--json").out)


def test_what_is_said(make_run: MakeRun) -> None:
    base, hot = make_run("base"), make_run("hot", "optimizer.peak_lr=1e-3", offset=-0.01, tokens_per_second=1500.0)
    out = call("compare", base.path, "hot").out
    assert "hot has the lower loss in the last tenth, beyond the noise of the curves." in out
    assert re.search(r"^loss last tenth \(243k tokens\): -0\.0\d+ nats per token, 95 %: -0\.0\d+ to -0\.0\d+$", out, re.MULTILINE)
    assert "both saw the same samples in the same order; rows are compared in pairs" in out
    assert "tokens/s: 1.50k against 1k, 1.500 times" in out.replace("1.00k", "1k") and "memory: 1.00 GB against 1.00 GB, 1.000 times" in out
    assert "held out: no evaluation" in out and "optimizer.peak_lr  0.0003  0.001" in out
    found = as_json(base, hot)
    assert found["is_paired"] and found["differing_keys"] == {"optimizer.peak_lr": [0.0003, 0.001]} and found["goodput"] == [None, None]
    assert found["losses"][0]["difference"] == pytest.approx(-0.01, abs=0.001) and found["losses"][0]["high"] < 0
    assert found["speed_ratio"] == 1.5


def test_a_run_and_itself(make_run: MakeRun) -> None:
    base = make_run("base")
    out = call("compare", "base", "base").out
    assert "Their losses are the same, row by row." in out and out.count("+0.0000 nats per token, 95 %: +0.0000 to +0.0000") == 5
    assert "No key of their configurations differs." in out
    assert {(one["difference"], one["low"], one["high"]) for one in as_json(base, base)["losses"]} == {(0.0, 0.0, 0.0)}


@pytest.mark.parametrize(
    ("override", "doubt"),
    [
        ("run.seed=7", "run.seed differs"),
        ("training.packing=best_fit", "training.packing differs"),
        ("data.held_out_fraction=0.3", "data.held_out_fraction differs"),
        ("model.num_layers=3", None),
        ("training.micro_batch_samples=2", None),
        ("objective.z_loss=1e-4", None),
        ("watch.log_every_steps=3", None),
    ],
)
def test_what_makes_a_pair(make_run: MakeRun, override: str, doubt: str | None) -> None:
    more = ["data.packed_lengths=[32]"] if "packing" in override else []
    found = as_json(make_run("one", *more), make_run("two", *more, override, offset=0.001))
    assert found["not_paired_because"] == doubt and found["is_paired"] == (doubt is None)
    assert (found["losses"][0]["high"] - found["losses"][0]["low"] < 0.002) == (doubt is None), "batches are ten times as noisy"


def test_commits_say_whether_the_data_was_the_same(make_run: MakeRun) -> None:
    """Whatever the run files call it, and also where they say nothing of it."""
    one, two, three, four = make_run("one"), make_run("two", "data.root=elsewhere"), make_run("three"), make_run("four")
    for run, source, skipped in ((one, "a", ()), (two, "a", ()), (three, "b", ()), (four, "a", ((8, 16),))):
        commit(run, 5, skipped, mixture="m", tokenizer="t", source=source)
    assert as_json(one, two)["not_paired_because"] is None
    assert as_json(one, three)["not_paired_because"] == "their data differs up to step 5"
    assert as_json(one, four)["not_paired_because"] == "one of them went back and left samples out"
    assert "not in pairs, as their data differs" in call("compare", "one", "three").out


def test_other_tokenizers_are_said(make_run: MakeRun) -> None:
    one, two = make_run("one"), make_run("two")
    commit(one, 5, tokenizer="t")
    commit(two, 5, tokenizer="u")
    assert "Their tokenizers differ" in call("compare", "one", "two").out and not as_json(one, two)["same_tokenizer"]


def test_too_short_to_tell(make_run: MakeRun) -> None:
    make_run("one", rows=30)
    make_run("two")
    out = call("compare", "one", "two").out
    assert "too short to tell: its last tenth has 3 logged rows, wanted 8." in out and "95 %" not in out
    make_run("three", rows=0)
    assert "no range of tokens in common" in call("compare", "one", "three").out


def test_where_there_is_no_run(make_run: MakeRun) -> None:
    make_run("one")
    with pytest.raises(UserError, match="holds no run"):
        call("compare", "one", "other")

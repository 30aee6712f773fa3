"""What rank 0 writes down: every kind of row by its keys, and that they fit one table."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import RunConfig
from pretrain.state import TrainState
from pretrain.watch.evaluate import HeldOut
from pretrain.watch.journal import Journal
from pretrain.watch.metrics import read_rows, read_run
from pretrain.watch.slow_ranks import SlowRank, Spread
from pretrain.watch.step_times import PARTS
from pretrain.watch.utilisation import training_flops

CONFIG = RunConfig.model_validate({"watch": {"wandb": "disabled", "device_tflops": 50.0}})
EVERY_ROW = {"step", "tokens_seen", "attempt", "time"}
TIMES = {"step_seconds": 0.75, **{f"seconds/{part}": 0.15 for part in PARTS}}


def state(step: int) -> TrainState:
    return TrainState(step=step, tokens_seen=1000 * step, skipped_steps=2)


def test_every_kind_of_row(tmp_path: Path) -> None:
    began = time.time()
    with Journal(CONFIG, tmp_path, 3, TrainState(), True, torch.device("cpu"), num_devices=4) as journal:
        journal.step(state(10), 2.5, 1e-3, 0.75, 0.0, 512.0, TIMES)
        journal.step(state(11), math.nan, 1e-3, math.inf, 0.0)
        journal.norms(state(11), {"parameter_norm": 3.0, "norm/weights/blocks.0": 2.0})
        web = HeldOut(3.0, None, 40)
        journal.held_out(state(12), HeldOut(2.5, 1.25, 100, {"books": HeldOut(2.0, 1.0, 60), "web": web}))
        journal.ranks(state(13), Spread(SlowRank(2, "node1", 1.1, 0.5), 0.45, []))
        journal.saved(state(14), 0.125, 5000, is_durable=True, problems=[])
        journal.saved(state(15), 0.25, 5000, is_durable=False, problems=["step 14 could not be saved."])
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert all(set(row) >= EVERY_ROW and row["attempt"] == 3 and began - 0.001 <= row["time"] <= time.time() + 0.001 for row in rows)
    logged, nothing, norms, held_out, ranks, durable, fast = (
        {key: value for key, value in row.items() if key not in EVERY_ROW} for row in rows
    )
    rate = logged["tokens_per_second"]
    assert rate > 0 and logged["memory/host_bytes"] > 10_000_000
    flops = training_flops(CONFIG)
    assert flops is not None
    assert {name: logged[f"mfu/{name}"] for name in flops._fields} == pytest.approx(
        {name: rate * value / (4 * 50e12) for name, value in flops._asdict().items()}
    )
    assert logged["tokens_per_second_per_device"] == pytest.approx(rate / 4)
    fixed = {"loss": 2.5, "learning_rate": 1e-3, "gradient_norm": 0.75, "skipped_steps": 2, "loss_scale": 512.0, **TIMES}
    assert {key: logged[key] for key in fixed} == fixed
    measured = {"tokens_per_second", "tokens_per_second_per_device", "data_wait_share", "memory/host_bytes"}
    assert set(logged) == {*fixed, *measured, *(f"mfu/{name}" for name in flops._fields)}
    assert "loss" not in nothing and nothing["gradient_norm"] is None and "loss_scale" not in nothing
    assert norms == {"parameter_norm": 3.0, "norm/weights/blocks.0": 2.0}
    assert held_out == {
        "held_out/nats_per_token": 2.5,
        "held_out/bits_per_byte": 1.25,
        "held_out/num_tokens": 100,
        "held_out/books/nats_per_token": 2.0,
        "held_out/books/bits_per_byte": 1.0,
        "held_out/books/num_tokens": 60,
        "held_out/web/nats_per_token": 3.0,
        "held_out/web/num_tokens": 40,
    }
    assert set(ranks) == {"ranks/slowest", "ranks/slowest_node", "ranks/slowest_ratio", "ranks/median_seconds"}
    assert durable == {"checkpoint/stall_seconds": 0.125, "checkpoint/bytes": 5000, "checkpoint/kind": "durable"}
    assert fast == {"checkpoint/stall_seconds": 0.25, "checkpoint/bytes": 5000, "checkpoint/kind": "fast"}
    columns: dict[str, list[Any]] = read_run(tmp_path).to_pydict()
    assert columns["step"] == [10, 11, 12, 13, 14, 15]
    assert (columns["parameter_norm"][1], columns["tokens_per_second"][1]) == (3.0, nothing["tokens_per_second"]), "of one step"


def test_problems_of_a_save_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Journal(CONFIG, tmp_path, 1, TrainState(), True) as journal:
        journal.saved(state(15), 0.25, 5000, is_durable=True, problems=["step 14 could not be saved."])
    assert "WARNING: step 14 could not be saved. Training goes on." in capsys.readouterr().err


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with Journal(CONFIG, tmp_path, 1, TrainState(), is_writer=False) as journal:
        journal.step(state(1), 2.5, 1e-3, 0.75, 0.0)
        journal.saved(state(1), 0.25, 5000, True, [])
    assert list(tmp_path.iterdir()) == []


def test_a_row_is_one_line_of_json_whatever_a_node_is_called(tmp_path: Path) -> None:
    with Journal(CONFIG, tmp_path, 1, TrainState(), True) as journal:
        journal.ranks(state(50), Spread(SlowRank(0, "no\nde\u2028 ü", 1.0, 0.5), 0.5, []))
    (line,) = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    assert json.loads(line)["ranks/slowest_node"] == "no\nde\u2028 ü"

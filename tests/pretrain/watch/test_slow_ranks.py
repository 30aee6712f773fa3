"""Which ranks are slower than the others: pure, then with two real ranks of which one sleeps."""

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as distributed

from configs.schema import RunConfig
from pretrain.engine.parallel import Layout
from pretrain.state import TrainState
from pretrain.watch.journal import Journal
from pretrain.watch.metrics import read_rows
from pretrain.watch.slow_ranks import WINDOW, Pace, SlowRank, Spread, compare_ranks, find_slow
from pretrain.watch.step_times import StepClock
from tests.tiny import write_tiny_dataset

ALONE = Layout(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(name="_alone")
def _alone() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [
        ((1.0, 1.0, 1.0), []),
        ((1.0, 1.19), []),
        ((1.0, 1.21), [1]),
        ((2.0, 1.0), [0]),  # of two, the faster one is the measure
        ((1.0, 1.0, 1.3, 1.5), [3, 2]),
        ((5.0, 5.0, 1.0, 1.0), [0, 1]),
        ((0.010, 0.014), []),  # noise
        ((0.010, 0.016), [1]),
        ((0.0, 0.0, 1.0), []),  # nothing to compare with
        ((1.0,), []),
    ],
)
def test_who_is_slow(seconds: tuple[float, ...], slow: list[int]) -> None:
    nodes = [f"node{rank}" for rank in range(len(seconds))]
    found = find_slow(seconds, seconds, nodes)
    assert [one.rank for one in found] == slow
    assert all(one.node == nodes[one.rank] and one.seconds == seconds[one.rank] for one in found)


def test_a_rank_that_was_slow_in_half_of_the_steps_is_not_named() -> None:
    assert find_slow([1.0, 1.1], [1.0, 3.0], ["a", "b"]) == []
    assert find_slow([1.0, 1.3], [1.0, 3.0], ["a", "b"]) == [SlowRank(1, "b", 3.0, 3.0)]


def test_it_is_said_and_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RunConfig.model_validate({"watch": {"wandb": "disabled"}})
    with Journal(config, tmp_path, 2, TrainState(), is_writer=True) as journal:
        slow = [SlowRank(3, "node7", 1.5, 0.3), SlowRank(1, "node2", 1.25, 0.25)]
        journal.ranks(TrainState(step=51), Spread(slow[0], 0.2, slow))
        journal.ranks(TrainState(step=101), Spread(SlowRank(2, "node7", 1.01, 0.202), 0.2, []))
    said = capsys.readouterr().err
    assert "step 51: slower than the median rank: rank 3 on node7 (1.50 times, 300 ms a step), rank 1 on node2 (1.25 times, 250 ms" in said
    spread, row, calm = read_rows(tmp_path / "metrics.jsonl")
    for found, rank, ratio in ((spread, 3, 1.5), (calm, 2, 1.01)):
        assert {key: value for key, value in found.items() if "ranks/" in key} == {
            "ranks/slowest": rank,
            "ranks/slowest_node": "node7",
            "ranks/slowest_ratio": ratio,
            "ranks/median_seconds": 0.2,
        }
    assert {key: value for key, value in row.items() if key.startswith("slow_ranks/")} == {
        "slow_ranks/rank": 3,
        "slow_ranks/node": "node7",
        "slow_ranks/ratio": 1.5,
        "slow_ranks/seconds": 0.3,
        "slow_ranks/num_ranks": 2,
    }


def test_a_rank_that_sleeps_in_each_step_is_named_and_a_calm_run_names_nobody(run_on_ranks: Callable[..., list[Any]]) -> None:
    """Over three windows: calm; rank 1 sleeps in its forwards; rank 0 waits for its data; and single hiccups name nobody."""
    first, second = run_on_ranks("tests.pretrain.watch.on_slow_ranks:walk", 2)
    assert first == second
    node = first["node"]
    for found, rank in zip(first["found"], (None, 1, 0, None), strict=True):
        if rank is None and not found:
            continue  # on a busy machine the exchange is not there within two steps
        ((step, slow, slowest, median_seconds),) = found
        assert WINDOW < step <= WINDOW + 2, "once in a window, behind its end"
        assert slowest[2] >= 1.0 and median_seconds > 0.01
        assert [named[:2] for named in slow] == ([[rank, node]] if rank is not None else [])
        assert all(named == slowest and 1.7 < named[2] < 2.6 for named in slow)
    print(first["found"])


@pytest.mark.long
def test_the_loop_names_a_slow_rank(run_on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    """Two micro-steps of 20 ms more on rank 1."""
    write_tiny_dataset(tmp_path / "data")
    arguments = {"dataset": str(tmp_path / "data"), "runs": str(tmp_path / "runs")}
    first, second = run_on_ranks("tests.pretrain.watch.on_slow_ranks:train_slowly", 2, arguments)
    assert first["outcome"] == second["outcome"] == "done"
    spread, row = first["rows"]
    assert spread["step"] == row["step"] > WINDOW
    assert (spread["ranks/slowest"], spread["ranks/slowest_ratio"]) == (1, row["slow_ranks/ratio"])
    assert (row["slow_ranks/rank"], row["slow_ranks/node"], row["slow_ranks/num_ranks"]) == (1, socket.gethostname(), 1)
    assert row["slow_ranks/seconds"] >= 0.04


@pytest.mark.usefixtures("_alone")
def test_it_costs_less_than_a_five_hundredth_of_a_step() -> None:
    """Of a step of 10 ms, the smallest that anybody trains: 20 us. Two micro-steps and a step; the best of many windows counts."""
    pace, clock, least = Pace(ALONE), StepClock(ALONE.device), float("inf")
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(WINDOW):
            for part in ("data_wait", "other", *2 * ("forward", "backward", "optimizer", "other")):
                clock.enter(part)
            pace.after_step(clock.end_step(0.0))
        least = min(least, (time.perf_counter() - began) / WINDOW)
    print(f"{1e6 * least:.1f} us a step")
    assert least < 20e-6


@pytest.mark.usefixtures("_alone")
def test_alone_nobody_is_slow() -> None:
    pace, clock = Pace(ALONE), StepClock(ALONE.device)
    found: list[Spread] = []
    for step in range(3 * WINDOW + 1):
        if spread := pace.after_step(clock.end_step(0.1 * step)):
            found.append(spread)
    assert all(spread.slow == [] and spread.slowest.rank == 0 for spread in found)  # how many are there in time is the machine's affair


def test_the_slowest_rank_is_told_however_little_slower_it_is() -> None:
    nodes = ["a", "b", "c"]
    assert compare_ranks([1.0, 1.0, 1.0], [1.0, 1.1, 1.0], nodes) == Spread(SlowRank(1, "b", 1.1, 1.1), 1.0, [])
    slow = SlowRank(2, "c", 1.5, 1.5)
    assert compare_ranks([1.0, 1.0, 1.5], [1.0, 1.1, 1.5], nodes).slow == [SlowRank(2, "c", 1.5 / 1.1, 1.5)] != [slow]
    assert compare_ranks([0.0], [0.0], ["a"]) == Spread(SlowRank(0, "a", 1.0, 0.0), 0.0, []), "nothing was measured"

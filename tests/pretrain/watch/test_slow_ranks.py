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
from pretrain.watch.slow_ranks import WINDOW, Pace, SlowRank, find_slow
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
        journal.slow_ranks(TrainState(step=51), [SlowRank(3, "node7", 1.5, 0.3), SlowRank(1, "node2", 1.25, 0.25)])
    said = capsys.readouterr().err
    assert "step 51: slower than the median rank: rank 3 on node7 (1.50 times, 300 ms a step), rank 1 on node2 (1.25 times, 250 ms" in said
    (row,) = read_rows(tmp_path / "metrics.jsonl")
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
    calm, forwards, data, hiccups = first["found"]
    assert calm == hiccups == []
    for found, rank in ((forwards, 1), (data, 0)):
        ((step, (named,)),) = found
        assert WINDOW < step <= WINDOW + 2, "once in a window, behind its end"
        assert named[:2] == [rank, node]
        assert 1.7 < named[2] < 2.6
    print(first["found"])


@pytest.mark.long
def test_the_loop_names_a_slow_rank(run_on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    """Two micro-steps of 20 ms more on rank 1."""
    write_tiny_dataset(tmp_path / "data")
    arguments = {"dataset": str(tmp_path / "data"), "runs": str(tmp_path / "runs")}
    first, second = run_on_ranks("tests.pretrain.watch.on_slow_ranks:train_slowly", 2, arguments)
    assert first["outcome"] == second["outcome"] == "done"
    (row,) = first["rows"]
    assert row["step"] > WINDOW
    assert (row["slow_ranks/rank"], row["slow_ranks/node"], row["slow_ranks/num_ranks"]) == (1, socket.gethostname(), 1)
    assert row["slow_ranks/seconds"] >= 0.04


@pytest.mark.usefixtures("_alone")
def test_it_costs_less_than_a_five_hundredth_of_a_step() -> None:
    """Of a step of 10 ms, the smallest that anybody trains: 20 us. Two micro-steps and a step; the best of many windows counts."""
    pace, least = Pace(ALONE), float("inf")
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(WINDOW):
            for _ in range(2):
                with pace.forward():
                    pass
            pace.after_step(0.0)
        least = min(least, (time.perf_counter() - began) / WINDOW)
    print(f"{1e6 * least:.1f} us a step")
    assert least < 20e-6


@pytest.mark.usefixtures("_alone")
def test_alone_nobody_is_slow() -> None:
    pace = Pace(ALONE)
    found: list[SlowRank] = []
    for step in range(3 * WINDOW):
        with pace.forward():
            pass
        found += pace.after_step(0.1 * step)
    assert found == []

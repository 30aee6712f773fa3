"""The common verdict on a step: its mean loss, read a step later; what is not finite ends the run; a stop is seen by all."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as distributed

from pretrain.engine.parallel import Layout
from pretrain.watch.verdicts import Told, Verdicts

ALONE = Layout(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture
def _alone() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def send(verdicts: Verdicts, step: int, *losses: float, num_valid: float = 2.0, **answers: bool) -> None:
    for loss in losses:
        verdicts.add(torch.tensor(loss))
    verdicts.send(step, torch.tensor(num_valid), **{"stop_asked": False, "save_written": False, "applied": True} | answers)


@pytest.mark.usefixtures("_alone")
def test_read_a_step_later_or_now() -> None:
    verdicts = Verdicts(ALONE)
    with pytest.raises(RuntimeError, match="no step has been sent"):
        verdicts.read(now=False)
    send(verdicts, 1, 3.0, 5.0)
    assert verdicts.read(now=False) == Told(1, 4.0, stop_asked=False, num_written=0, applied=True), (
        "at the first step there is no earlier one"
    )
    send(verdicts, 2, 1.0, stop_asked=True, save_written=True, applied=False)
    assert verdicts.read(now=False).step == 1
    second = Told(2, 0.5, stop_asked=True, num_written=1, applied=False)
    assert verdicts.read(now=True) == second
    assert verdicts.read(now=True) == second, "reading twice is reading once"
    send(verdicts, 3)
    assert verdicts.read(now=False) == second
    assert verdicts.read(now=True) == Told(3, 0.0, stop_asked=False, num_written=0, applied=True), "the sum begins anew at every step"


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_told_of_its_step_alone(value: float) -> None:
    verdicts = Verdicts(ALONE)
    send(verdicts, 7, 1.0, value, applied=False)
    send(verdicts, 8, 1.0)
    assert verdicts.read(now=True) == Told(8, 0.5, stop_asked=False, num_written=0, applied=True)
    told = verdicts.read(now=False)
    assert (told.step, str(told.loss), told.applied) == (7, str(value), False)


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("asked", ["nnnnnnnn", "yyyyyyyy", "nynnyynn", "ynnnnnny", "--y-n--y"])
def test_every_step_is_news_once_and_in_order(asked: str) -> None:
    """However it was read: at once, a step later, or not at all for some steps."""
    verdicts, heard = Verdicts(ALONE), []
    for step, how in enumerate(asked, start=1):
        send(verdicts, step, float(step))
        if how != "-":
            verdicts.read(now=how == "y")
            heard += verdicts.news()
    verdicts.read(now=True)
    heard += verdicts.news()
    assert [(told.step, told.loss) for told in heard] == [(step, step / 2) for step in range(1, 9)]
    assert verdicts.news() == []


@pytest.mark.usefixtures("_alone")
def test_many_small_losses_are_summed_in_float64() -> None:
    verdicts = Verdicts(ALONE)
    send(verdicts, 1, 2.0**25, *[1.0] * 1000, num_valid=1.0)
    assert verdicts.read(now=True).loss == 2.0**25 + 1000  # float32 would have lost every one of them


def test_all_ranks_hear_the_same(run_on_ranks: Callable[..., list[Any]]) -> None:
    """Two ranks: one verdict for both, also when only one is asked to stop, or has written, or sees what is not finite; evaluation too."""
    ranks = run_on_ranks("tests.pretrain.watch.on_ranks:hear_verdicts", 2)
    assert ranks[0] == ranks[1]
    (heard,) = {tuple(map(str, rank["heard"])) for rank in ranks}
    assert heard == (
        "Told(step=1, loss=0.75, stop_asked=False, num_written=0, applied=True)",
        "Told(step=1, loss=0.75, stop_asked=False, num_written=0, applied=True)",
        "Told(step=2, loss=1.25, stop_asked=True, num_written=2, applied=True)",
        "Told(step=3, loss=nan, stop_asked=False, num_written=0, applied=False)",
        "step 4 was applied on 1 of 2 ranks",
    )
    # nats 1 + 2 + 3 + 4 over 5 + 6 + 7 + 8 targets: whichever rank saw them
    assert ranks[0]["held_out"] == {"nats_per_token": 10 / 26, "bits_per_byte": ranks[0]["bits_per_byte"], "num_tokens": 26, "sources": {}}


@pytest.mark.usefixtures("_alone")
def test_a_step_that_some_ranks_applied_is_a_defect() -> None:
    """One of two says so: their weights differ from here on, and nothing that is trained is worth anything."""
    verdicts = Verdicts(Layout(0, 2, 0, 2, torch.device("cpu")))
    send(verdicts, 1, 3.0)
    with pytest.raises(RuntimeError, match="step 1 was applied on 1 of 2 ranks"):
        verdicts.read(now=True)

"""The common verdict on a step: its mean loss, read a step later; what is not finite ends the run; a stop is seen by all."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as distributed

from configs.errors import UserError
from pretrain.engine.parallel import Layout
from pretrain.watch.verdicts import Verdicts

ALONE = Layout(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture
def _alone() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def send(verdicts: Verdicts, step: int, *losses: float, num_valid: float = 2.0, stop: bool = False) -> None:
    for loss in losses:
        verdicts.add(torch.tensor(loss))
    verdicts.send(step, num_valid, stop)


@pytest.mark.usefixtures("_alone")
def test_read_a_step_later_or_now() -> None:
    verdicts = Verdicts(ALONE)
    with pytest.raises(RuntimeError, match="no step has been sent"):
        verdicts.read(now=False)
    send(verdicts, 1, 3.0, 5.0)
    assert verdicts.read(now=False) == (4.0, False), "at the first step there is no earlier one"
    send(verdicts, 2, 1.0, stop=True)
    assert verdicts.read(now=False) == (4.0, False)
    assert verdicts.read(now=True) == (0.5, True)
    assert verdicts.read(now=True) == (0.5, True), "reading twice is reading once"
    send(verdicts, 3)
    assert verdicts.read(now=False) == (0.5, True)
    assert verdicts.read(now=True) == (0.0, False), "the sum begins anew at every step"


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_said_with_its_step(value: float) -> None:
    verdicts = Verdicts(ALONE)
    send(verdicts, 7, 1.0, value)
    send(verdicts, 8, 1.0)
    assert verdicts.read(now=True) == (0.5, False)
    with pytest.raises(UserError, match=rf"the loss of step 7 is {value}; lower optimizer\.peak_lr"):
        verdicts.read(now=False)


@pytest.mark.usefixtures("_alone")
def test_many_small_losses_are_summed_in_float64() -> None:
    verdicts = Verdicts(ALONE)
    send(verdicts, 1, 2.0**25, *[1.0] * 1000, num_valid=1.0)
    assert verdicts.read(now=True) == (2.0**25 + 1000, False)  # float32 would have lost every one of them


def test_all_ranks_hear_the_same(run_on_ranks: Callable[..., list[Any]]) -> None:
    """Two ranks: one verdict for both, also when only one is asked to stop or sees what is not finite; evaluation too."""
    ranks = run_on_ranks("tests.pretrain.watch.on_ranks:hear_verdicts", 2)
    assert ranks[0] == ranks[1]
    (heard,) = {tuple(map(str, rank["heard"])) for rank in ranks}
    assert heard == (
        "(0.75, False)",
        "(0.75, False)",
        "(1.25, True)",
        "the loss of step 3 is nan; lower optimizer.peak_lr, or look at the data of that step.",
    )
    # nats 1 + 2 + 3 + 4 over 5 + 6 + 7 + 8 targets: whichever rank saw them
    assert ranks[0]["held_out"] == {"nats_per_token": 10 / 26, "bits_per_byte": ranks[0]["bits_per_byte"], "num_tokens": 26}

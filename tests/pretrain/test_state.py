"""The state of a run: four integers that come back out of a file as they went in."""

import json

import pytest

from pretrain.state import TrainState


def test_advances_once_per_step_also_on_a_skipped_one() -> None:
    state = TrainState().advance(4, 1024, applied=True).advance(4, 1024, applied=False).advance(4, 1024, applied=True)
    assert state == TrainState(step=3, samples_seen=12, tokens_seen=3072, skipped_steps=1)


def test_a_state_is_never_changed() -> None:
    state = TrainState(step=1)
    assert state.advance(1, 1, applied=True) is not state
    assert state == TrainState(step=1)
    with pytest.raises(AttributeError):
        state.step = 2  # type: ignore[misc]


def test_comes_back_out_of_json() -> None:
    state = TrainState(step=10**9, samples_seen=2**53 + 1, tokens_seen=2**62 + 3, skipped_steps=7)
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state


@pytest.mark.parametrize("mapping", [{"step": "many"}, {"step": None}, {"steps": 3}], ids=str)
def test_what_is_no_state_is_refused(mapping: dict[str, object]) -> None:
    with pytest.raises((TypeError, ValueError)):
        TrainState.from_json(mapping)

"""The state of a run: a few integers that come back out of a file as they went in."""

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


@pytest.mark.parametrize("skipped", [(), ((0, 1),), ((5, 7), (100, 2**53 + 1), (2**62, 2**62 + 9))], ids=str)
def test_what_was_skipped_comes_back_as_it_was(skipped: tuple[tuple[int, int], ...]) -> None:
    """As tuples of integers: the order's identity is a hash of them, and a state can be hashed and compared."""
    state = TrainState(step=3, skipped_samples=skipped)
    again = TrainState.from_json(json.loads(json.dumps(state.to_json())))
    assert again == state
    assert again.skipped_samples == skipped
    assert hash(again) == hash(state)
    assert TrainState(**state.to_json()) == state
    assert state.advance(4, 32, applied=True).skipped_samples == skipped


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "many"},
        {"step": None},
        {"steps": 3},
        {"skipped_samples": [[1]]},
        {"skipped_samples": [["a", 2]]},
        {"skipped_samples": None},
    ],
    ids=str,
)
def test_what_is_no_state_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises((TypeError, ValueError)):
        TrainState.from_json(TrainState().to_json() | changes)

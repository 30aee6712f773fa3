"""Every key of the schema, changed at a resume: all of their classes, a seeded sample of what the classes promise, and that it can fail."""

import random
from pathlib import Path

import pytest

from tests.faults import keys
from tests.faults.campaign import Case, run_kind, run_sample
from tests.faults.keys import EFFECTIVE, ELSEWHERE, KEYS, KINDS

SHARES = {"free_keys": 0.1, "applied_keys": 0.2}
TIMEOUT_SECONDS = 300


def test_every_key_has_the_class_that_the_command_holds(seed: int) -> None:
    """All of them: the ranks are left out."""
    result = run_kind(KINDS["changed_keys"], seed, range(len(KEYS)))
    assert result.problems == []
    assert result.tried == result.passed == len(KEYS) > 100


@pytest.mark.parametrize("kind", SHARES)
def test_sample(kind: str, seed: int) -> None:
    """Real training, in a process of its own."""
    run_sample("keys", kind, seed, SHARES[kind], TIMEOUT_SECONDS)


def test_what_is_applied_to_the_weights_is_tried_whole() -> None:
    """A new key of these sections needs a value here."""
    sections = ("optimizer.", "schedule.", "training.total_tokens")
    applied = {key.name for key in KEYS if key.at_resume == "applied" and key.name.startswith(sections)}
    assert applied == EFFECTIVE.keys() | ELSEWHERE


@pytest.mark.parametrize(("name", "wrong"), [("model.width", "free"), ("optimizer.peak_lr", "free"), ("watch.log_every_steps", "applied"),
                                             ("optimizer.peak_lr", "refused"), ("run.attempts_in_vain", "refused")])  # fmt: skip
def test_a_key_that_is_treated_otherwise_than_its_class_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, wrong: str
) -> None:
    (number,) = (number for number, key in enumerate(KEYS) if key.name == name)
    monkeypatch.setattr(keys, "KEYS", [key._replace(at_resume=wrong) if key.name == name else key for key in KEYS])
    assert keys.change_key(Case(number, random.Random(0), tmp_path, None)).problems != []

"""A seeded sample of the fault campaign, another one each time, and that the campaign can fail.

`make faults` runs all of it.
"""

import pytest

from tests.faults.builds import differences
from tests.faults.campaign import Case, Kind, Outcome, choose_cases, run_kind, run_sample
from tests.faults.data import KINDS
from tests.faults.lines import read_independently

TIMEOUT_SECONDS = 400
SHARES = {
    "worker_kills": 0.05,
    "driver_kills": 0.1,
    "kill_points": 0.1,
    "fuzzed_lines": 0.1,
    "cut_files": 0.2,
    "full_disk": 0.2,
    "flipped_bits": 0.05,
    "changed_inputs": 0.15,
    "poison": 0.2,
    "hostile_names": 1.0,
    "two_builds": 0.2,
}


def test_every_kind_is_sampled():
    assert SHARES.keys() == KINDS.keys()


@pytest.mark.parametrize("kind", SHARES)
def test_sample(kind, seed):
    """In a process of its own: cases fork, which the threads of other tests would not survive."""
    run_sample("data", kind, seed, SHARES[kind], TIMEOUT_SECONDS)


def test_a_failure_is_told_with_what_repeats_it(tmp_path):
    def check(case: Case) -> Outcome:
        if case.number == 1:
            raise ValueError("broken")
        return Outcome(3, ["wrong"] if case.number == 2 else [])

    kind = Kind("some", 3, 3, lambda folder, chosen: None, check)
    result = run_kind(kind, 5, range(3))
    assert (result.tried, result.passed, result.seed) == (9, 3, 5)
    assert result.problems[0].startswith("case 1: ") and "ValueError: broken" in result.problems[0]
    assert result.problems[1] == "case 2: wrong"


def test_a_sample_has_at_least_one_case_and_depends_on_its_seed():
    kind = Kind("some", 1000, 1, lambda folder, chosen: None, lambda case: Outcome(1, []))
    assert len(choose_cases(kind, 1, 1e-9)) == 1 and choose_cases(kind, 1, 1.0) == list(range(1000))
    assert choose_cases(kind, 1, 0.01) == choose_cases(kind, 1, 0.01) != choose_cases(kind, 2, 0.01)


def test_differences_are_named():
    assert differences({"a": "1"}, {"a": "1"}) == []
    assert differences({"a": "1", "b": "1"}, {"a": "2", "c": "1"}) == ["a has other bytes; b should not be there; c is missing"]


def test_the_oracle_knows_lines():
    content = b'\xef\xbb\xbf{"text": "\xc3\xa9"}\r\n\n \t\n{"text": ""}\n[1]\n{"text": "\\ud800"}\n{"text": "a", "n": NaN}\n\xff\n'
    assert read_independently(content) == ({0: 2, 59: 1}, 6)

"""When silence is a stall, and whose fault it is: decisions over readings and times that are made up here."""

import math

import pytest

from configs.stall_section import StallSection
from pretrain.run.heartbeat import Phase, Reading
from pretrain.run.outcome import Outcome
from pretrain.run.stacks import Place
from pretrain.run.watchdog import SILENT, Late, Watchdog, decide_stalled, limit_of, spell, who_did_not_arrive

LEARNED = StallSection()
GIVEN = StallSection(start_seconds=7.0, step_seconds=3.0, save_seconds=5.0, end_seconds=4.0)


def reading(acts: int, phase: Phase = "step", step: int = 1, waits: int = 0) -> Reading:
    return Reading(123, phase, step, acts, waits)


@pytest.mark.parametrize(
    ("phase", "section", "longest", "limit"),
    [
        ("start", LEARNED, {}, 1800),
        ("start", LEARNED, {"start": 500.0}, 1800),  # what was before the first step says nothing of its compilation
        ("step", LEARNED, {}, 1800),
        ("step", LEARNED, {"step": 0.3}, 180),
        ("step", LEARNED, {"step": 40.0}, 400),
        ("save", LEARNED, {"step": 40.0}, 1800),
        ("save", LEARNED, {"step": 1.0, "save": 60.0}, 600),
        ("end", LEARNED, {"end": 1.0}, 120),
        ("gone", LEARNED, {}, math.inf),
        ("gone", GIVEN, {}, math.inf),
        ("start", GIVEN, {}, 7),
        ("step", GIVEN, {"step": 900.0}, 3),
        ("evaluate", GIVEN, {}, 1800),
        ("end", GIVEN, {}, 4),
    ],
)
def test_limits(phase: Phase, section: StallSection, longest: dict[Phase, float], limit: float) -> None:
    assert limit_of(phase, section, longest) == limit


def test_a_rank_is_late_when_its_limit_has_passed_and_not_before() -> None:
    watchdog = Watchdog(GIVEN, range(2))
    assert watchdog.look({0: reading(1), 1: reading(1)}, 100.0) == []
    for n in range(1, 7):  # 3.0 s
        assert watchdog.look({0: reading(1 + n), 1: reading(1)}, 100.0 + n / 2) == []
    (late,) = watchdog.look({0: reading(9), 1: reading(1)}, 103.1)
    assert late == Late(1, reading(1), pytest.approx(3.1), 3.0)


def test_signs_of_life_without_acts_keep_a_rank_alive() -> None:
    watchdog = Watchdog(GIVEN, range(1))
    assert not any(watchdog.look({0: reading(1, waits=n)}, 100.0 + n) for n in range(100))


def test_a_rank_that_never_says_anything_is_late_after_the_start() -> None:
    watchdog = Watchdog(GIVEN, range(2))
    looks = [watchdog.look({0: reading(n)}, float(n)) for n in range(9)]
    assert looks[:8] == [[]] * 8
    assert looks[8] == [Late(1, SILENT, 8.0, 7.0)]


def test_a_rank_that_has_ended_is_never_late() -> None:
    watchdog = Watchdog(GIVEN, range(1))
    assert not any(watchdog.look({0: reading(5, "gone")}, float(n)) for n in range(1000))


def test_a_supervisor_that_slept_has_seen_nothing() -> None:
    """Of an hour between two looks counts a second, however often."""
    watchdog = Watchdog(GIVEN, range(1))
    assert watchdog.look({0: reading(1)}, 0.0) == []
    assert watchdog.look({0: reading(1)}, 3600.0) == []
    assert watchdog.look({0: reading(1)}, 7200.0) == []
    assert watchdog.look({0: reading(2)}, 7201.0) == []
    assert [bool(watchdog.look({0: reading(2)}, 7201.0 + n)) for n in range(1, 6)] == [False, False, False, True, True]


def test_limits_are_learned_from_what_was_seen() -> None:
    """A step of 30 s allows 300 s; a save is not judged by steps; the hang itself teaches nothing."""
    watchdog, now = Watchdog(LEARNED, range(1)), 0.0

    def silent_for(seconds: int, said: Reading) -> list[Late]:
        nonlocal now
        late: list[Late] = []
        for _ in range(seconds):
            now += 1.0
            late = watchdog.look({0: said}, now)
        return late

    assert silent_for(600, reading(1, "start")) == []  # compiling
    assert silent_for(30, reading(2)) == []
    assert silent_for(1000, reading(3, "save")) == []
    assert silent_for(301, reading(4)) == []
    (late,) = silent_for(1, reading(4))
    assert late == Late(0, reading(4), 301.0, 300.0)


BUSY = Place("sleeping", ("data/batches.py:12 in next_step",))
WAITING = Place("sleeping", ("engine/parallel.py:40 in gather",), in_collective=True)
STOPPED = Place("stopped", ("model/decoder.py:7 in forward",))


def late(rank: int, acts: int) -> Late:
    return Late(rank, reading(acts, step=8), 12.4, 10.0)


@pytest.mark.parametrize(
    ("acts", "places", "named"),
    [
        ((5, 5), (WAITING, STOPPED), 1),
        ((4, 5), (WAITING, STOPPED), 1),  # what is stopped cannot arrive, whatever it had done
        ((4, 5), (WAITING, WAITING), 0),
        ((5, 4), (BUSY, BUSY), 1),
        ((5, 5), (WAITING, BUSY), 1),
        ((5, 5), (BUSY, WAITING), 0),
        ((5, 5), (WAITING, WAITING), None),
        ((6, 5, 5), (BUSY, WAITING, BUSY), 2),
    ],
)
def test_who_did_not_arrive(acts: tuple[int, ...], places: tuple[Place, ...], named: int | None) -> None:
    found = who_did_not_arrive([late(rank, count) for rank, count in enumerate(acts)], dict(enumerate(places)))
    assert (None if found is None else found.rank) == named


def test_it_is_said_in_a_line() -> None:
    both = [late(0, 5), late(1, 5)]
    assert spell(both, {0: WAITING, 1: STOPPED}, "rank {} on node7".format) == (
        "rank 1 on node7 did not arrive: silent for 12 s in phase step, step 8 (limit 10 s); its process is stopped, at model/decoder.py:7 "
        "in forward"
    )
    threads = Place("sleeping", (*BUSY.lines, "data/corpus.py:3 in read"))
    assert spell(both, {0: WAITING, 1: threads}, "rank {} on node7".format).endswith(
        "at data/batches.py:12 in next_step (other threads: data/corpus.py:3 in read)"
    )
    text = spell(both, {0: WAITING, 1: WAITING}, "rank {} on n".format)
    assert text.startswith("all ranks wait for each other; rank 0 on n silent for 12 s")
    assert (
        spell([Late(1, SILENT, 8.0, 7.0)], {0: BUSY}, "rank {} on n".format)
        == "rank 1 on n never said anything: silent for 8 s in phase start, step 0 (limit 7 s)"
    )
    assert spell([late(0, 1)], {0: Place("disk-sleep")}, "rank {} on n".format).endswith("(limit 10 s); its process is disk-sleep")


@pytest.mark.parametrize(
    ("phases", "step", "records", "status", "is_fault", "message"),
    [
        (("step", "step"), 5, {}, 75, True, "HUNG"),
        (("save", "end"), 10, {}, 75, True, "HUNG"),  # one has not saved yet
        (("end",), 10, {}, 0, False, "done: 10 steps of 10\nIt did not end by itself: HUNG"),
        (("end",), 5, {}, 75, False, "stopped and saved: 5 steps of 10\nIt did not end by itself: HUNG"),
        (("end",), 10, {1: Outcome("done", "all")}, 0, False, "all\nIt did not end by itself: HUNG"),
        (("step",), 5, {0: Outcome("mistake", "wrong")}, 2, False, "wrong\nIt did not end by itself: HUNG"),  # it said so, then hung
        (("step",), 5, {0: Outcome("defect", "broken")}, 1, True, "rank 0 failed:\nbroken\nIt did not end by itself: HUNG"),
    ],
)
def test_what_is_made_of_it(
    phases: tuple[Phase, ...], step: int, records: dict[int, Outcome], status: int, is_fault: bool, message: str
) -> None:
    late = [Late(rank, reading(1, phase, step), 12.0, 10.0) for rank, phase in enumerate(phases)]
    assert decide_stalled(late, "HUNG", records, total_steps=10)[:3] == (status, message, is_fault)

"""Profiles: exactly the steps that were asked for are traced, on the ranks that were asked for.

That a training does not notice is in test_samples.py.
"""

import json
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.watch_section import ProfileSection
from pretrain.engine.parallel import Layout
from pretrain.watch.breakdown import break_down, read_events, to_markdown
from pretrain.watch.profile import Profile

OPERATIONS = (torch.sin, torch.cos, torch.tan, torch.exp, torch.log, torch.sqrt)
"""What step 1, 2, ... of `train` does, so that one can tell from a trace which steps are in it."""


def layout(rank: int = 0, size: int = 1) -> Layout:
    return Layout(rank, size, rank, size, torch.device("cpu"))


def is_tracing() -> bool:
    return torch._C._autograd._profiler_enabled()


def train(
    folder: Path,
    steps: tuple[int, int] | None,
    *,
    start: int = 0,
    end: int = 6,
    rank: int = 0,
    ranks: tuple[int, ...] = (0,),
    within: Callable[[int], None] = lambda step: None,
) -> tuple[list[str], list[int]]:
    """Steps of a loop that begins behind the step `start`. Returns what was said, and the steps in which a profiler was on."""
    said: list[str] = []
    traced: list[int] = []
    with Profile(ProfileSection(steps=steps, ranks=ranks), folder, 1, layout(rank, 2), said.append) as profile:
        for step in range(start + 1, end + 1):
            profile.begin(step)
            OPERATIONS[step - 1](torch.ones(4))
            within(step)
            traced += [step] if is_tracing() else []
            profile.end(step)
            assert not is_tracing() or steps is None or step < steps[1]
    assert not is_tracing()
    return said, traced


def files(folder: Path) -> list[str]:
    """Everything in a run folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def steps_in(trace: Path) -> list[int]:
    """The steps of `train` whose operations a trace holds."""
    names = {event.name for event in read_events(trace)}
    return [number for number, operation in enumerate(OPERATIONS, 1) if f"aten::{operation.__name__}" in names]


def names_of(steps: str, *ranks: int) -> list[str]:
    return sorted(f"profile/attempt-1/steps-{steps}/rank-{rank}.{kind}" for rank in ranks for kind in ("json", "json.gz", "md"))


def test_exactly_these_steps_are_traced(tmp_path: Path) -> None:
    said, traced = train(tmp_path, (3, 4))
    folder = tmp_path / "profile" / "attempt-1" / "steps-3-4"
    assert files(tmp_path) == names_of("3-4", 0)
    assert traced == steps_in(folder / "rank-0.json.gz") == [3, 4]
    assert len(said) == 1
    assert said[0].startswith("steps 3 to 4: a step took ")
    assert said[0].endswith(str(folder / "rank-0.md"))
    found = break_down(read_events(folder / "rank-0.json.gz"))
    assert found.steps == (3, 4)
    assert json.loads((folder / "rank-0.json").read_text()) == json.loads(json.dumps(found.to_json()))
    assert (folder / "rank-0.md").read_text() == to_markdown(found, "Steps 3 to 4 on rank 0")
    assert found.computation + found.exposed_communication + found.nothing == pytest.approx(found.seconds)


@pytest.mark.parametrize(("steps", "start", "end", "left"), [((1, 2), 0, 6, "1-2"), ((2, 5), 3, 6, "4-5"), ((3, 5), 2, 4, "3-4")])
def test_steps_at_the_edges_of_an_attempt(tmp_path: Path, steps: tuple[int, int], start: int, end: int, left: str) -> None:
    """The first step of all, without a warm-up; a resumed attempt, and one that ends in the middle: what there is of them."""
    said, traced = train(tmp_path, steps, start=start, end=end)
    assert files(tmp_path) == names_of(left, 0)
    first, last = map(int, left.split("-"))
    assert traced == steps_in(tmp_path / f"profile/attempt-1/steps-{left}/rank-0.json.gz") == list(range(first, last + 1))
    assert len(said) == 1


@pytest.mark.parametrize(("steps", "start", "end"), [(None, 0, 6), ((1, 3), 3, 6), ((5, 6), 0, 3), ((2, 3), 0, 0)])
def test_there_is_no_profiler_where_no_step_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, int] | None, start: int, end: int
) -> None:
    """None were; all are past; the attempt ends before the first."""
    monkeypatch.delattr(torch.profiler, "profile")
    assert train(tmp_path, steps, start=start, end=end) == ([], [])
    assert files(tmp_path) == []


def test_an_attempt_that_ends_behind_the_warm_up_leaves_nothing(tmp_path: Path) -> None:
    assert train(tmp_path, (5, 6), end=4) == ([], [])
    assert files(tmp_path) == []


def test_events_are_not_made_objects_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large trace that would take minutes, in which all ranks wait."""
    monkeypatch.delattr(torch.autograd.profiler.profile, "_parse_kineto_results")
    train(tmp_path, (3, 4))
    assert files(tmp_path) == names_of("3-4", 0)


@pytest.mark.gpu
def test_on_a_gpu_kernels_are_told_and_memory_is_kept(tmp_path: Path) -> None:
    weight = torch.ones(512, 512, device="cuda")
    said: list[str] = []
    section, where = ProfileSection(steps=(2, 3)), Layout(0, 1, 0, 1, torch.device("cuda", 0))
    with Profile(section, tmp_path, 1, where, said.append) as profile:
        for step in range(1, 5):
            profile.begin(step)
            weight = (weight @ weight) / 512
            profile.end(step)
    folder = tmp_path / "profile" / "attempt-1" / "steps-2-3"
    assert files(folder) == ["rank-0-memory.pickle", "rank-0.json", "rank-0.json.gz", "rank-0.md"]
    found = break_down(read_events(folder / "rank-0.json.gz"))
    assert found.device == "cuda"
    assert found.computation > 0
    assert {"aten::mm", "aten::div"} <= {row.name for row in found.operations}
    assert found.computation + found.exposed_communication + found.copies + found.nothing == pytest.approx(found.seconds)
    assert len(said) == 1


def test_what_fails_in_a_traced_step_leaves_the_trace(tmp_path: Path) -> None:
    def fail(step: int) -> None:
        if step == 4:
            raise MemoryError("out of memory")

    with pytest.raises(MemoryError, match="out of memory"):
        train(tmp_path, (3, 5), within=fail)
    assert not is_tracing()
    assert files(tmp_path) == names_of("3-4", 0)
    assert steps_in(tmp_path / "profile/attempt-1/steps-3-4/rank-0.json.gz") == [3, 4]


def test_only_chosen_ranks_trace(tmp_path: Path) -> None:
    """Rank 0 says where the others' traces are, and that there is no such rank."""
    assert train(tmp_path, (2, 3), rank=0, ranks=(1,)) == ([f"steps 2 to 3 were traced on rank 1; {tmp_path}/profile/attempt-1"], [])
    assert train(tmp_path, (2, 3), rank=1, ranks=(1,)) == ([], [2, 3])
    assert files(tmp_path) == names_of("2-3", 1)
    said, _ = train(tmp_path, (2, 3), rank=0, ranks=(7,))
    assert said == ["WARNING: nothing was traced: profile.ranks is [7], and there are 2 (0 to 1)."]


@pytest.mark.parametrize("bound", [0, 5000])
def test_a_full_disk_is_a_warning(tmp_path: Path, bound: int) -> None:
    """No file can grow beyond a bound, as on a full disk: said, nothing partial is left, and the steps go on."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bound, limit[1]))
        said, traced = train(tmp_path, (2, 4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert traced == [2, 3, 4]
    assert len(said) == 1
    assert said[0].startswith("WARNING: the profile of rank 0 could not be made (")
    assert files(tmp_path) == []


def test_a_profiler_that_cannot_start_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Another tool holds what it needs, say."""

    def refuse(self: Any) -> None:
        raise RuntimeError("CUPTI is in use")

    monkeypatch.setattr(torch.profiler.profile, "start_trace", refuse)
    warning = "WARNING: the profile of rank 1 could not be made (CUPTI is in use). Training goes on."
    assert train(tmp_path, (2, 4), rank=1, ranks=(1,)) == ([], [])
    assert capsys.readouterr().err.splitlines() == [warning]
    assert train(tmp_path, (2, 4)) == ([warning.replace("rank 1", "rank 0")], [])
    assert files(tmp_path) == []

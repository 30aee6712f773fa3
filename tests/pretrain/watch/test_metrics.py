"""metrics.jsonl: each step exactly once, however often the run was killed."""

import json
import random
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain.watch import metrics
from pretrain.watch.metrics import MetricsLog, Throughput, cut_back, read_rows, read_run


def rows(steps: range, attempt: int = 1) -> list[dict[str, Any]]:
    return [{"step": step, "attempt": attempt, "loss": 1 / (step + 3), "gradient_norm": None} for step in steps]


def write(path: Path, some: list[dict[str, Any]]) -> None:
    log = MetricsLog(path)
    for row in some:
        log.write(row)


def test_rows_come_back_to_the_bit_and_at_once(tmp_path: Path, seed: int) -> None:
    """Each is in the file when `write` returns: a kill afterwards takes nothing."""
    path = tmp_path / "metrics.jsonl"
    log, expected = MetricsLog(path), []
    for step in range(20):
        row = {"step": step, "loss": (seed + step) / 7, "tiny": 5e-324 * step, "words": "naïve\u2028東京", "none": None}
        log.write(row)
        expected.append(row)
        assert read_rows(path) == expected


def test_there_may_be_no_file(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "metrics.jsonl") == []
    cut_back(tmp_path / "metrics.jsonl", 5)
    assert list(tmp_path.iterdir()) == []


def test_a_line_torn_anywhere_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, rows(range(1, 4)))
    content = path.read_bytes()
    last = content.rindex(b"\n", 0, len(content) - 1) + 1
    for end in range(last, len(content) - 1):
        path.write_bytes(content[:end])
        assert read_rows(path) == rows(range(1, 3)), content[last:end]
    path.write_bytes(content[:-1])  # only the line end is missing: the row is whole
    assert read_rows(path) == rows(range(1, 4))


@pytest.mark.parametrize("step", [0, 1, 5, 9, 10, 100])
def test_cut_back_is_exact(tmp_path: Path, step: int) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, rows(range(1, 11)))
    before = path.read_bytes().splitlines(keepends=True)
    cut_back(path, step)
    assert path.read_bytes() == b"".join(before[:step]), "what is kept is kept byte for byte"
    assert list(tmp_path.iterdir()) == [path]


def test_an_evaluation_at_the_step_stays_with_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [{"step": 5, "loss": 1.0}, {"step": 5, "held_out/nats_per_token": 2.0}, {"step": 6, "loss": 3.0}])
    cut_back(path, 5)
    assert [sorted(row) for row in read_rows(path)] == [["loss", "step"], ["held_out/nats_per_token", "step"]]


def test_after_kills_every_step_is_there_exactly_once(tmp_path: Path) -> None:
    """Commits at 10 and 20; killed at 17 and, in the middle of a line, at 23."""
    path = tmp_path / "metrics.jsonl"
    write(path, rows(range(1, 18)))
    cut_back(path, 10)
    write(path, rows(range(11, 24), attempt=2))
    with path.open("a") as file:
        file.write('{"step": 24, "lo')
    cut_back(path, 20)
    write(path, rows(range(21, 31), attempt=3))
    assert read_rows(path) == rows(range(1, 11)) + rows(range(11, 21), 2) + rows(range(21, 31), 3)
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_torn_line_of_an_attempt_that_was_killed_is_closed_by_the_next(tmp_path: Path) -> None:
    """Of files that are not cut back."""
    path = tmp_path / "timeline.jsonl"
    write(path, rows(range(1, 3)))
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    write(path, rows(range(4, 6)))
    assert read_rows(path) == rows(range(1, 3)) + rows(range(4, 6))


@pytest.fixture(params=[50_000, 2], ids=["at once", "in portions"])
def portions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many steps become columns at once makes no difference."""
    monkeypatch.setattr(metrics, "PORTION_STEPS", request.param)


@pytest.mark.usefixtures("portions")
def test_a_run_is_a_table_with_a_row_for_each_step(tmp_path: Path) -> None:
    """Kinds of rows are merged by column; a torn last line is left out; of a step that two attempts wrote the later one's row counts."""
    told: list[dict[str, Any]] = [
        {"step": 1, "attempt": 1, "loss": 3, "gradient_norm": None},
        {"step": 2, "attempt": 1, "loss": 2.5, "gradient_norm": None, "learning_rate": 1e-3},
        {"step": 2, "attempt": 1, "held_out/nats_per_token": 2.75, "held_out/num_tokens": 99},
        {"step": 3, "attempt": 1, "loss": 2.25, "only/first": 1},
        {"step": 3, "attempt": 2, "loss": 2.125},
        {"step": 3, "attempt": 2, "slow_ranks/node": "node7"},
        {"step": 4, "attempt": 2, "rollback/samples": [[1, 2]]},
        {"step": 5, "attempt": 2, "rollback/samples": "none"},
    ]
    write(tmp_path / "metrics.jsonl", told)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    table = read_run(tmp_path)
    assert str(table.schema.field("step").type) == "int64"
    assert {name: str(table.schema.field(name).type) for name in ("loss", "gradient_norm", "held_out/num_tokens", "slow_ranks/node")} == {
        "loss": "double",
        "gradient_norm": "double",
        "held_out/num_tokens": "int64",
        "slow_ranks/node": "string",
    }
    columns = table.to_pydict()
    assert columns["step"] == [1, 2, 3, 4, 5]
    assert columns["attempt"] == [1, 1, 2, 2, 2]
    assert columns["loss"] == [3.0, 2.5, 2.125, None, None]
    assert columns["held_out/nats_per_token"] == [None, 2.75, None, None, None]
    assert columns["slow_ranks/node"] == [None, None, "node7", None, None]
    assert columns["rollback/samples"] == [None, None, None, "[[1, 2]]", '"none"']
    assert columns.get("only/first", [None] * 5) == [None] * 5, "a row that was written again is gone as a whole"


def test_a_run_without_metrics_is_an_empty_table(tmp_path: Path) -> None:
    table = read_run(tmp_path)
    assert (table.num_rows, table.column_names) == (0, ["step"])


@pytest.mark.usefixtures("portions")
def test_steps_of_a_table_ascend_and_are_there_once_whatever_order_they_were_written_in(tmp_path: Path, seed: int) -> None:
    chosen = random.Random(seed)
    told = [{"step": chosen.randrange(50), "attempt": 1, chosen.choice("abc"): number} for number in range(300)]
    write(tmp_path / "metrics.jsonl", told)
    columns = read_run(tmp_path).to_pydict()
    assert columns["step"] == sorted({row["step"] for row in told})
    for name in "abc":
        last = {row["step"]: row[name] for row in told if name in row}
        assert columns[name] == [last.get(step) for step in columns["step"]]


def test_an_attempt_that_slept_through_its_replacement_adds_nothing(tmp_path: Path) -> None:
    """Also where it had not written anything before."""
    for number, before in enumerate((range(1, 8), range(0))):
        path = tmp_path / f"metrics-{number}.jsonl"
        asleep = MetricsLog(path)
        for row in rows(before):
            asleep.write(row)
        cut_back(path, 5)
        write(path, rows(range(6, 11), attempt=2))
        now = read_rows(path)
        assert asleep.write(rows(range(8, 9))[0]) is None
        assert read_rows(path) == now


def test_a_row_that_is_written_in_part_comes_again(tmp_path: Path) -> None:
    """A disk that is full in the middle of a row: said, and behind it the whole row stands below the torn one."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    one, two, three, four = rows(range(1, 5))
    assert log.write(one) is None
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limit[1]))
        assert "20 of" in (log.write(two) or "")
        assert "File too large" in (log.write(three) or "")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert log.write(four) is None
    assert read_rows(path) == [one, two, three, four]


def test_throughput_and_waiting_are_over_the_time_since_the_last_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    throughput = Throughput(5000)  # tokens of earlier attempts count for nothing
    now[0] = 104.0
    assert throughput.since_last(5800, 1.0) == (200.0, 0.25)
    now[0] = 105.0
    assert throughput.since_last(5900, 1.0) == (100.0, 0.0)
    now[0] = 107.0
    assert throughput.since_last(5900, 3.0) == (0.0, 1.0)
    assert throughput.since_last(5900, 3.0) == (0.0, 0.0), "no time has passed"
    assert time.monotonic() == 107.0

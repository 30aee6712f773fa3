"""Where a step goes: by arithmetic of intervals, on traces of which every answer is known."""

import gzip
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.watch.breakdown import (
    Event,
    Gap,
    Operation,
    break_down,
    intersect,
    own_times,
    read_events,
    seconds_of,
    subtract,
    summarize,
    to_markdown,
    unite,
)

INTERVALS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda pair: (float(min(pair)), float(max(pair)))), max_size=8)


def ticks(intervals: list[tuple[float, float]]) -> set[int]:
    """The same as a set of unit intervals."""
    return {tick for began, ended in intervals for tick in range(int(began), int(ended))}


@given(INTERVALS, INTERVALS)
def test_intervals_are_sets(some: list[tuple[float, float]], others: list[tuple[float, float]]) -> None:
    one, other = unite(some), unite(others)
    assert ticks(one) == ticks(some)
    assert all(left[1] < right[0] for left, right in pairwise(one))
    assert ticks(subtract(one, other)) == ticks(some) - ticks(others)
    assert ticks(intersect(one, other)) == ticks(some) & ticks(others)
    assert seconds_of(one) == pytest.approx(len(ticks(some)) / 1e6)


def test_what_an_event_took_itself_leaves_out_what_it_called() -> None:
    events = [
        Event("cpu_op", "outer", 0, 100, "a"),
        Event("cpu_op", "inner", 10, 40, "a"),
        Event("cpu_op", "innermost", 20, 30, "a"),
        Event("cpu_op", "inner", 40, 50, "a"),
        Event("cpu_op", "behind", 100, 110, "a"),
        Event("cpu_op", "elsewhere", 5, 95, "b"),
    ]
    found = [(event.name, round(seconds * 1e6)) for event, seconds in own_times(events)]
    assert sorted(found) == sorted([("outer", 60), ("inner", 20), ("innermost", 10), ("inner", 10), ("behind", 10), ("elsewhere", 90)])


ON_CPU = [
    Event("user_annotation", "step 3", 1000, 2000, "main"),
    Event("user_annotation", "step 4", 5000, 5500, "main"),
    Event("cpu_op", "aten::linear", 1100, 1400, "main"),
    Event("cpu_op", "aten::addmm", 1150, 1350, "main"),
    Event("cpu_op", "c10d::allreduce_", 1500, 1550, "main"),  # only starts what gloo's thread does
    Event("user_annotation", "gloo:all_reduce", 1350, 1650, "gloo"),
    Event("cpu_op", "aten::copy_", 1400, 1450, "gloo"),
    Event("cpu_op", "aten::linear", 5000, 5500, "main"),
    Event("cpu_op", "aten::evaluate", 2500, 4500, "main"),  # between two steps
    Event("user_annotation", "gloo:all_reduce", 4800, 5100, "gloo"),
    Event("user_annotation", "Optimizer.step", 1700, 1900, "main"),
]


def test_on_a_cpu_operations_and_collectives_are_told_apart() -> None:
    found = break_down(ON_CPU)
    assert (found.device, found.steps, found.num_steps) == ("cpu", (3, 4), 2)
    assert found.seconds == pytest.approx(1500e-6)
    assert found.seconds_per_step == pytest.approx(750e-6)
    assert found.seconds_between_steps == pytest.approx(3000e-6)
    assert found.computation == pytest.approx(800e-6)
    assert found.communication == pytest.approx(400e-6)  # 1350 to 1650 and 5000 to 5100
    assert found.exposed_communication == pytest.approx(250e-6)  # 1400 to 1650
    assert found.nothing == pytest.approx(450e-6)
    assert found.copies == 0
    rows = {row.name: (pytest.approx(row.seconds), pytest.approx(row.share), row.count) for row in found.operations}
    assert rows == {
        "aten::linear": (600e-6, 0.4, 2),
        "aten::addmm": (200e-6, 200 / 1500, 1),
        "c10d::allreduce_": (50e-6, 50 / 1500, 1),
    }
    assert [row.name for row in found.operations] == ["aten::linear", "aten::addmm", "c10d::allreduce_"]
    assert found.collectives == (Operation("gloo:all_reduce", pytest.approx(400e-6), pytest.approx(400 / 1500), 2),)
    assert found.kernels == ()
    assert found.num_gaps == 2
    assert found.longest_gaps == (
        Gap(pytest.approx(350e-6), pytest.approx(650e-6), "gloo:all_reduce", "a step's end"),
        Gap(pytest.approx(100e-6), 0.0, "a step's beginning", "aten::linear"),
    )


ON_GPU = [
    Event("user_annotation", "step 1", 0, 100, "main"),  # the host is done long before the device
    Event("user_annotation", "step 2", 100, 200, "main"),
    Event("user_annotation", "step 3", 1000, 1100, "main"),
    Event("cpu_op", "aten::mm", 10, 20, "main", 1),
    Event("cpu_op", "nccl:all_gather", 30, 40, "main", 2),
    Event("cpu_op", "aten::mm", 110, 120, "main", 3),
    Event("cpu_op", "aten::copy_", 130, 140, "main", 4),
    Event("cpu_op", "aten::evaluate", 300, 310, "main", 5),
    Event("cpu_op", "aten::mm", 1010, 1020, "main", 6),
    Event("kernel", "gemm", 50, 150, 7, 1),
    Event("kernel", "ncclDevKernel_AllGather_RING_LL", 100, 250, 20, 2),
    Event("kernel", "gemm", 200, 300, 7, 3),
    Event("gpu_memcpy", "Memcpy DtoH", 290, 340, 8, 4),
    Event("kernel", "gemm", 400, 900, 7, 5),  # an evaluation between two steps
    Event("gpu_memset", "Memset", 1050, 1060, 7, None),
    Event("kernel", "gemm", 1060, 1160, 7, 6),
]


def test_on_a_gpu_a_step_lasts_until_what_it_started_has_ended() -> None:
    found = break_down(ON_GPU)
    assert (found.device, found.steps) == ("cuda", (1, 3))
    # 0 to 340, the end of the second step's copy, and 1000 to 1160; the evaluation's kernel is in neither.
    assert found.seconds == pytest.approx(500e-6)
    assert found.seconds_between_steps == pytest.approx(660e-6)
    assert found.computation == pytest.approx(300e-6)
    assert found.communication == pytest.approx(150e-6)
    assert found.exposed_communication == pytest.approx(50e-6)  # 150 to 200
    assert found.copies == pytest.approx(50e-6)  # 300 to 340, 1050 to 1060
    assert found.nothing == pytest.approx(100e-6)  # 0 to 50, 1000 to 1050
    rows = {row.name: (pytest.approx(row.seconds), row.count) for row in found.operations}
    assert rows == {"aten::mm": (300e-6, 3), "nccl:all_gather": (150e-6, 1), "aten::copy_": (50e-6, 1), "Memset": (10e-6, 1)}
    assert {row.name: row.count for row in found.kernels} == {
        "gemm": 3,
        "ncclDevKernel_AllGather_RING_LL": 1,
        "Memcpy DtoH": 1,
        "Memset": 1,
    }
    assert [row.name for row in found.collectives] == ["ncclDevKernel_AllGather_RING_LL"]
    assert {(gap.behind, gap.before) for gap in found.longest_gaps} == {("a step's beginning", "gemm"), ("a step's beginning", "Memset")}


@st.composite
def traces(draw: st.DrawFn) -> list[Event]:
    """Steps one behind the other, and anything at all beside them."""
    ends = sorted(draw(st.sets(st.integers(1, 300), min_size=2, max_size=6)))
    spans = [
        Event(
            "user_annotation", f"step {number}", ends[number], ends[number] + draw(st.integers(1, ends[number + 1] - ends[number])), "main"
        )
        for number in range(len(ends) - 1)
    ]
    kinds = [("cpu_op", "aten::mm"), ("user_annotation", "gloo:all_reduce"), ("cpu_op", "c10d::allreduce_")]
    if draw(st.booleans()):
        kinds += [("kernel", "gemm"), ("kernel", "ncclDevKernel_AllReduce"), ("gpu_memcpy", "Memcpy HtoD")]
    places = st.tuples(st.sampled_from(kinds), st.integers(0, 310), st.integers(0, 60), st.sampled_from(["main", "other"]))
    events = [
        Event(category, name, began, began + length, thread, draw(st.one_of(st.none(), st.integers(1, 4))))
        for (category, name), began, length, thread in draw(st.lists(places, max_size=25))
    ]
    return draw(st.permutations([*spans, *events]))


@given(traces())
def test_the_parts_add_up_whatever_the_trace_holds(events: list[Event]) -> None:
    found = break_down(events)
    parts = (found.computation, found.exposed_communication, found.copies, found.nothing)
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(found.seconds)
    assert found.exposed_communication <= found.communication + 1e-12
    assert sum(gap.seconds for gap in found.longest_gaps) <= found.nothing + 1e-12
    json.dumps(found.to_json())
    to_markdown(found, "any")


def test_a_trace_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="no step"):
        break_down(ON_CPU[2:])


def chrome(events: list[Event]) -> dict[str, Any]:
    """As torch.profiler writes it, with what is not an event with a duration."""
    rows: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}},
        {"ph": "s", "cat": "fwdbwd", "id": 1, "ts": 3.0, "pid": 1, "tid": 1, "name": "fwdbwd"},
        {
            "ph": "X",
            "cat": "Trace",
            "name": "PyTorch Profiler (0)",
            "ts": 0,
            "dur": 9999,
            "pid": "Spans",
            "tid": "PyTorch Profiler",
            "args": {},
        },
    ]
    for event in events:
        link = {} if event.link is None else {"External id": event.link}
        row = {"ph": "X", "cat": event.category, "name": event.name, "pid": 1, "tid": event.thread, "ts": event.began}
        rows.append({**row, "dur": event.ended - event.began, "args": {**link, "Input Dims": [[2, 3]]}})
    return {"schemaVersion": 1, "distributedInfo": {"rank": 0}, "traceEvents": rows, "traceName": "x"}


def test_a_trace_is_read_as_it_was_written_or_not_at_all(tmp_path: Path) -> None:
    plain, packed, torn = tmp_path / "plain.json", tmp_path / "packed.json.gz", tmp_path / "torn.json"
    text = json.dumps(chrome(ON_GPU))
    plain.write_text(text)
    packed.write_bytes(gzip.compress(text.encode()))
    torn.write_text(text[: len(text) // 2])
    assert read_events(plain) == read_events(packed) == ON_GPU
    with pytest.raises(ValueError):
        read_events(torn)
    with pytest.raises(OSError):
        read_events(tmp_path / "missing.json")


def test_the_page_says_the_numbers() -> None:
    page = to_markdown(break_down(ON_CPU), "Steps 3 to 4 on rank 1")
    assert page.startswith("# Steps 3 to 4 on rank 1\n\nA step took 0.8 ms, on average over 2;")
    assert "| computation | 0.400 | 53.3% |" in page
    assert "| communication that nothing hides | 0.125 | 16.7% |" in page
    assert "| nothing runs | 0.225 | 30.0% |" in page
    assert "| `aten::linear` | 0.300 | 40.0% | 1 |" in page
    assert "0.200 ms a step, waiting for other ranks included, 38% of it beside computation." in page
    assert "## The longest of 2 times in which nothing ran" in page
    assert summarize(break_down(ON_CPU)) == (
        "a step took 0.00075 s under the tracer: 53% computation, 17% communication that nothing hides, 30% nothing runs"
    )


def test_names_of_kernels_do_not_break_a_table() -> None:
    found = break_down(ON_GPU)
    wild = replace(found, operations=tuple(Operation(f"void f<`|`, {number}>" + "x" * 200, 1e-6, 0.1, 1) for number in range(30)))
    rows = [line for line in to_markdown(wild, "any").splitlines() if "void f<" in line]
    assert len(rows) == 20
    assert all(row.count("|") == 5 and row.count("`") == 2 for row in rows)
    assert "| 10 others |" in to_markdown(wild, "any")

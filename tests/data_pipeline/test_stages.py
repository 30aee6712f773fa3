"""A stage is one stage, however often units of it are made again; a stage of nothing is none."""

from dataclasses import dataclass
from pathlib import Path

from data_pipeline.execution import open_here
from data_pipeline.report import StageReport
from data_pipeline.sources import WorkUnit
from data_pipeline.stages import Progress, run_stage

HERE = Path("/nowhere")


@dataclass(frozen=True)
class Task:
    unit: WorkUnit
    was_there: bool = False


@dataclass(frozen=True)
class Done:
    was_there: bool
    peak_bytes: int = 7

    def measure(self) -> tuple[int, int, int]:
        return 1, 10, 100


def make(task: Task) -> Done:
    return Done(task.was_there)


def test_units_that_are_made_again_are_counted_once():
    told, stages = list[Progress](), list[StageReport]()
    tasks = [Task(WorkUnit(number, ()), was_there=number == 0) for number in range(3)]
    with open_here(1, HERE) as run:
        assert list(run_stage("tokens", make, tasks, told.append, run, stages)) == [0, 1, 2]
        seconds = stages[0].seconds
        assert list(run_stage("tokens", make, tasks[2:], told.append, run, stages)) == [2]
    [stage] = stages
    assert (stage.stage, stage.num_units, stage.num_units_kept, stage.seconds > seconds > 0) == ("tokens", 3, 1, True)
    assert (stage.num_documents, stage.num_bytes, stage.num_tokens, stage.peak_worker_bytes) == (3, 30, 300, 7)  # it was made twice
    assert [(one.done, one.total, one.num_documents) for one in told] == [(0, 3, 0), (1, 3, 0), (2, 3, 1), (3, 3, 2), (3, 3, 3)]


def test_a_stage_without_a_unit_is_not_told():
    told, stages = list[Progress](), list[StageReport]()
    with open_here(1, HERE) as run:
        assert run_stage("survey", make, list[Task](), told.append, run, stages) == {}
    assert told == [] and stages == []

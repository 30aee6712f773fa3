"""Tasks whose workers die, whose code fails, whose user erred."""

import os
from pathlib import Path

import pytest

from configs.errors import UserError
from data_pipeline.execution import run_here, run_on_ray

HERE = Path("/nowhere")  # Ray is running: no scratch is needed


def double(task: int) -> int:
    return 2 * task


@pytest.mark.parametrize("run", [run_here, run_on_ray])
def test_every_task_gives_one_result(run, two_workers):
    assert sorted(run(double, range(20), 2, HERE)) == list(range(0, 40, 2))


def test_a_worker_that_dies_is_replaced(tmp_path, two_workers):
    def die_once(task: int) -> int:
        if task == 3 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), 9)
        return task

    assert sorted(run_on_ray(die_once, range(6), 2, HERE)) == list(range(6))
    assert (tmp_path / "died").exists()


def test_a_task_that_always_kills_its_worker_ends_the_build(tmp_path, two_workers):
    def die(task: str) -> None:
        with (tmp_path / "tries").open("a") as file:
            file.write("x")
        os.kill(os.getpid(), 9)

    with pytest.raises(RuntimeError, match="died 4 times: unit 7 of poison"):
        list(run_on_ray(die, ["unit 7 of poison"], 1, HERE))
    assert (tmp_path / "tries").read_text() == "xxxx"


def test_errors_of_the_function_come_through(two_workers):
    def fail(task: str) -> None:
        raise UserError("mend this") if task == "user" else ZeroDivisionError(task)

    with pytest.raises(UserError, match=r"^mend this$"):
        list(run_on_ray(fail, ["user"], 1, HERE))
    with pytest.raises(RuntimeError, match="this task failed: defect"):
        list(run_on_ray(fail, ["defect"], 1, HERE))

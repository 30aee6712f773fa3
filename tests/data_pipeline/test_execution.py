"""Tasks whose workers die, whose code fails, whose user erred."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import UserError
from data_pipeline import execution
from data_pipeline.execution import Failed, open_here, open_ray

HERE = Path("/nowhere")  # Ray is running: no scratch is needed


def double(task: int) -> int:
    return 2 * task


@pytest.mark.parametrize("engine", [open_here, open_ray])
def test_every_task_gives_one_result(engine, two_workers):
    with engine(2, HERE) as run:
        assert sorted(run(double, range(20))) == [(task, 2 * task) for task in range(20)]
        assert list(run(double, [])) == []


def test_where_nothing_is_said_every_cpu_of_the_cluster_works(tmp_path, two_workers, monkeypatch):
    """Those that Ray counts; this process may have others."""
    monkeypatch.setattr(execution, "count_cores", lambda: 64)

    def meet(task: int) -> bool:
        (tmp_path / f"{task}").touch()
        until = time.monotonic() + 20
        while not (tmp_path / f"{1 - task}").exists() and time.monotonic() < until:
            time.sleep(0.01)
        return (tmp_path / f"{1 - task}").exists()

    with open_ray(None, HERE) as run:
        assert sorted(run(meet, range(2))) == [(0, True), (1, True)]
        assert execution._count_cpus() == 2


def test_a_worker_that_dies_is_replaced(tmp_path, two_workers):
    def die_once(task: int) -> int:
        if task == 3 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), 9)
        return task

    with open_ray(2, HERE) as run:
        assert sorted(run(die_once, range(6))) == [(task, task) for task in range(6)]
    assert (tmp_path / "died").exists()


def test_a_task_that_always_kills_its_worker_is_given_up_and_the_rest_goes_on(tmp_path, two_workers):
    def die(task: str) -> str:
        if task != "poison":
            return task
        with (tmp_path / "tries").open("a") as file:
            file.write("x")
        os.kill(os.getpid(), 9)
        raise AssertionError

    with open_ray(1, HERE) as run:
        assert dict(run(die, ["first", "poison", "last"])) == {
            "first": "first",
            "poison": Failed("its worker died 4 times"),
            "last": "last",
        }
    assert (tmp_path / "tries").read_text() == "xxxx"


@pytest.mark.parametrize("engine", [open_here, open_ray])
def test_errors_of_the_function_come_through(engine, two_workers):
    def fail(task: str) -> None:
        raise {"user": UserError("mend this"), "disk": OSError(28, "full"), "defect": ZeroDivisionError("zero")}[task]

    with engine(1, HERE) as run:
        with pytest.raises(UserError, match=r"^mend this$"):
            list(run(fail, ["user"]))
        with pytest.raises(OSError, match="full") as caught:
            list(run(fail, ["disk"]))
        assert caught.value.errno == 28
        assert list(run(fail, ["defect"])) == [("defect", Failed("ZeroDivisionError: zero"))]


def test_one_process_may_start_one_ray_after_the_other(tmp_path):
    """In a process of its own: the other tests share a Ray that is there."""
    program = (
        "import sys, tempfile\n"
        "from pathlib import Path\n"
        "from data_pipeline.execution import open_ray\n"
        "for number in (1, 2):\n"
        "    with tempfile.TemporaryDirectory(prefix='ray', dir='/tmp') as scratch, open_ray(1, Path(scratch)) as run:\n"
        "        print(list(run(lambda task: -task, [number])))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=90)
    assert (done.returncode, done.stdout) == (0, "[(1, -1)]\n[(2, -2)]\n"), done.stderr

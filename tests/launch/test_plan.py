"""The plan of a launch: what it is made of, that it holds no secret, and that its script and its environment arrive as they were meant."""

import dataclasses
import json
import random
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.cluster import ClusterConfig
from configs.loader import load_config
from launch.plan import (
    as_json,
    as_text,
    count_processes,
    node_environment,
    render_environment,
    render_node_script,
    resolve_run,
)
from tests.launch.plans import CODE, LAUNCH_ID, a_plan, a_run

GOLDEN = Path(__file__).parent / "golden"
JOB = {
    "python": "/shared/venv/bin/python",
    "setup": ("module load cuda/12.8", 'export PATH="/opt/site bin:$PATH"'),
    "environment": {"NCCL_IB_HCA": "mlx5", "ODD": 'it\'s "$HOME", `x`\n$(touch x)', "PYTHONPATH": "/shared/site packages"},
    "network_interface": "ib0",
    "scratch": "/local",
}
HOSTILE = (
    "",
    "'",
    '"',
    "a,b=c;d",
    "$HOME",
    "$(touch x)",
    "`touch x`",
    "a\nb\n",
    "\\",
    "\\'",
    "!!",
    "é",
    "\udcff",
    " a\tb ",
    "*",
    "~",
    "#",
    "-n",
    "\r",
)
SHELLCHECK = Path(sys.executable).with_name("shellcheck")


# --- what is rendered --------------------------------------------------------------------------------------


def test_the_node_script_is_the_golden_one(tmp_path: Path) -> None:
    assert render_node_script(a_plan(tmp_path, job=JOB)) == (GOLDEN / "node.sh").read_text()


def test_the_environment_is_the_golden_one(tmp_path: Path) -> None:
    assert render_environment(node_environment(a_plan(tmp_path, job=JOB))) == (GOLDEN / "environment").read_text()


@pytest.mark.parametrize("name", ["node.sh", "environment"])
def test_what_bash_reads_is_clean(name: str) -> None:
    # SC1091: a file that is sourced is not there. SC2016: that nothing is expanded in a value is what single quotes are there for.
    arguments = [SHELLCHECK, "--norc", "--shell=bash", "--exclude=SC1091,SC2016", GOLDEN / name]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def sourced(file: Path, folder: Path) -> dict[bytes, bytes]:
    """What a process has of its environment that was started behind `source FILE`."""
    script = 'source "$1"; exec env -0'
    done = subprocess.run(["bash", "-c", script, "bash", file], cwd=folder, env={"PATH": "/usr/bin:/bin"}, capture_output=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, b"")
    return dict(row.split(b"=", 1) for row in done.stdout.split(b"\0") if row)


def test_hostile_values_arrive_byte_for_byte(tmp_path: Path, seed: int) -> None:
    """Also any letters put together by chance; and nothing of them is run."""
    chooser = random.Random(seed)
    letters = [*"'\"$`\\(){}[]!*?~#&|;<>, =\n\t\r aé%", "\x01", "\x7f", "\udc80", "\udcff"]
    values = [*HOSTILE, *("".join(chooser.choices(letters, k=chooser.randrange(40))) for _ in range(200))]
    variables = {f"VALUE_{number}": value for number, value in enumerate(values)}
    (tmp_path / "environment").write_bytes(render_environment(variables).encode("utf-8", "surrogateescape"))
    found = sourced(tmp_path / "environment", tmp_path)
    assert {name: found.get(name.encode()) for name in variables} == {
        name: value.encode("utf-8", "surrogateescape") for name, value in variables.items()
    }
    assert [path.name for path in tmp_path.iterdir()] == ["environment"]


@pytest.mark.parametrize("folder", ["/shared/it's mine/$(touch x)", '/shared/a "b"\nc', "/shared/`x`; touch x"])
def test_hostile_folders_are_one_word_in_the_script(tmp_path: Path, folder: str) -> None:
    plan = a_plan(tmp_path)
    plan = dataclasses.replace(plan, folder=folder, code=dataclasses.replace(CODE, source=f"{folder}/code"))
    words = shlex.split(render_node_script(plan), comments=True)
    assert words[words.index("source") + 1] == f"{folder}/environment"
    assert words[words.index("cd") + 1] == f"{folder}/code"
    assert f"{folder}/run.yaml" in words


def test_the_script_becomes_the_command(tmp_path: Path) -> None:
    plan = a_plan(tmp_path)
    last = shlex.split(render_node_script(plan).splitlines()[-1])
    assert last == ["exec", *plan.train_command("$1", "$2")]
    wanted = [plan.run_file, "--nodes", "2", "--node", "$1", "--rendezvous", "$2", "--launch", LAUNCH_ID]
    assert last[1 : 5 + len(wanted)] == ["python3", "-m", "pretrain.cli", "train", *wanted]


def test_a_setup_that_fails_ends_the_node(tmp_path: Path) -> None:
    """And one that reads a variable which is not set goes on: what sites give out for modules does."""
    for line, status in (("false", 1), ('echo "$NOBODY_SET_THIS"', 7)):
        script = render_node_script(a_plan(tmp_path, job={"setup": (line,)})).splitlines()
        cut = "\n".join(["exit 7" if line.startswith(("source", "cd", "exec")) else line for line in script])
        done = subprocess.run(["bash", "-c", cut, "bash", "0", "here:1"], capture_output=True, timeout=30, check=False)
        assert done.returncode == status


# --- what it is made of ------------------------------------------------------------------------------------


def test_the_code_comes_before_every_other(tmp_path: Path) -> None:
    assert node_environment(a_plan(tmp_path))["PYTHONPATH"] == CODE.source
    assert node_environment(a_plan(tmp_path, job=JOB))["PYTHONPATH"] == f"{CODE.source}:/shared/site packages"
    assert "PYTHONPATH" not in node_environment(a_plan(tmp_path, "kubernetes"))
    assert node_environment(a_plan(tmp_path, job=JOB | {"environment": {"TMPDIR": "/mine"}}))["TMPDIR"] == "/mine"


def test_only_named_variables_are_passed_and_never_their_values(tmp_path: Path) -> None:
    shell = {"WANDB_API_KEY": "canary-of-a-secret", "AWS_SECRET_ACCESS_KEY": "canary-of-another", "HF_HOME": "/shell"}
    plan = a_plan(tmp_path, shell=shell, job={"environment": {"HF_HOME": "/file"}})
    assert plan.passed == ("WANDB_API_KEY",)  # what the cluster file says itself is its own
    everything = as_text(plan) + json.dumps(as_json(plan)) + repr(plan) + render_node_script(plan)
    assert "canary" not in everything
    assert "/file" in everything


@pytest.mark.parametrize(
    ("overrides", "hardware", "processes"),
    [
        ([], {}, 2),
        (["parallel.cpu_processes=3"], {}, 3),
        (["parallel.cpu_processes=3"], {"gpu": "L4", "gpus_per_node": 8}, 8),
        (["parallel.processes=4"], {"gpu": "L4", "gpus_per_node": 8}, 4),
    ],
)
def test_processes_of_a_node(tmp_path: Path, overrides: list[str], hardware: dict[str, Any], processes: int) -> None:
    cluster = ClusterConfig.model_validate({"name": "here", "hardware": hardware})
    config = a_run(tmp_path, "training.global_batch_samples=96", *overrides)
    assert count_processes(config, cluster) == processes
    assert resolve_run(config, cluster, "/home/me").parallel.processes == processes


RELATIVE = """
run: {name: mine, root: runs}
data:
  cache: cache
  sources: [{name: notes, path: notes}, {name: web, path: "s3://bucket/web"}, {name: hub, path: some/set, format: hub},
    {name: own, path: "{stdlib}"}, {name: home, path: ~/notes}]
  clean: [{rule: bad_words, settings: {paths: [words.txt, /there/more.txt]}}, gopher_quality]
  tokenizer: {path: tokenizer.json}
model: {initial_weights: weights}
performance: {compile_cache: compiled}
checkpoint: {fast_folder: fast, fast_every_steps: 10}
evaluate: {tasks: [task.yaml]}
"""


def test_paths_are_absolute_for_nodes_that_start_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(RELATIVE)
    cluster = ClusterConfig(name="here")
    config = resolve_run(load_config(tmp_path / "mine.yaml"), cluster, "/home/me")
    assert config.run.root == "/home/me/runs"
    assert config.data.root == "/home/me/datasets/notes"
    assert config.data.cache == "/home/me/cache"
    assert [one.path for one in config.data.sources] == ["/home/me/notes", "s3://bucket/web", "some/set", "{stdlib}", "~/notes"]
    assert config.data.clean[0].settings == {"paths": ("/home/me/words.txt", "/there/more.txt")}
    assert (config.data.tokenizer.path, config.model.initial_weights) == ("/home/me/tokenizer.json", "/home/me/weights")
    assert (config.performance.compile_cache, config.checkpoint.fast_folder) == ("/home/me/compiled", "/home/me/fast")
    assert config.evaluate.tasks == ("/home/me/task.yaml",)
    assert resolve_run(config, cluster, "/elsewhere") == config


def test_what_nodes_read_is_what_was_resolved(tmp_path: Path) -> None:
    plan = a_plan(tmp_path)
    (tmp_path / "run.yaml").write_text(plan.configuration)
    config = load_config(tmp_path / "run.yaml")
    assert (config.run.name, config.run.root, config.parallel.processes) == ("mine", "/shared/runs", 2)
    assert plan.run_folder == "/shared/runs/mine"
    assert plan.run_file == f"/shared/runs/mine/launches/{LAUNCH_ID}/run.yaml"
    assert config == resolve_run(a_run(tmp_path), plan.cluster, "/home/me")


def test_two_plans_can_be_compared(tmp_path: Path) -> None:
    one = json.dumps(as_json(a_plan(tmp_path, job=JOB)))
    assert json.dumps(as_json(a_plan(tmp_path, job=JOB))) == one
    assert json.dumps(as_json(a_plan(tmp_path))) != one


def test_a_person_can_read_it(tmp_path: Path) -> None:
    text = as_text(a_plan(tmp_path, shell={"HF_TOKEN": "canary"}))
    assert "2 nodes x 2 processes = 4" in text
    assert f"{LAUNCH_ID} by slurm" in text
    assert "/shared/pretrain (commit 0123456789ab)" in text
    assert "HF_TOKEN, as this shell has it" in text
    assert shlex.join(a_plan(tmp_path).train_command("NODE", "HOST:PORT")) in text

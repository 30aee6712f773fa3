"""The verb `launch`, on this machine: what a node would run is run here, and what cannot work is refused before anything is there.

The interpreter of the node is a stand-in that writes down what it was given, where a test is not about the training itself.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from launch.local import HOST, find_port
from tests.pretrain.verbs import call
from tests.tiny import write_tiny_dataset

ROOT = Path(__file__).parent.parent.parent
RUN_FILE = """
data: {root: shards, tokenizer: {vocabulary_size: 300}}
model: {vocabulary_size: 320, num_layers: 2, width: 48, num_heads: 4, feed_forward_width: 80, largest_context: 64}
training: {sequence_length: 32, global_batch_samples: 8, micro_batch_samples: 2, total_tokens: 2560}
schedule: {warmup_tokens: 512, decay_tokens: 1024}
parallel: {cpu_processes: 2}
"""
STAND_IN = f"""#!{sys.executable}
import json, os, signal, sys, time
if sys.argv[3] == "doctor":
    sys.exit(0)
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))
told = {{"arguments": sys.argv[1:], "environment": dict(os.environ), "pid": os.getpid(), "folder": os.getcwd()}}
with open(os.environ["TOLD"] + ".part", "w") as file:
    json.dump(told, file)
os.rename(file.name, os.environ["TOLD"])
if os.environ["STATUS"] == "wait":
    time.sleep(60)
sys.exit(int(os.environ["STATUS"]))
"""
SECTIONS = (
    "cluster.slurm={}",
    "cluster.hosts={hosts: [a, b]}",
    "cluster.kubernetes={image: pretrain:1, volumes: [{claim: all, path: /}], secrets: {WANDB_API_KEY: [a, b]}}",
    "cluster.ray={address: 'http://127.0.0.1:8265'}",
)


@pytest.fixture(scope="module", name="shards")
def _shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    write_tiny_dataset(folder)
    return folder


@pytest.fixture(name="here", autouse=True)
def _here(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run file, its data and a stand-in interpreter; nothing in it may become another process."""
    shutil.copytree(shards, tmp_path / "shards")
    (tmp_path / "mine.yaml").write_text(RUN_FILE)
    (tmp_path / "stand-in").write_text(STAND_IN)
    (tmp_path / "stand-in").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "canary-of-a-secret")
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("a process was started"))
    monkeypatch.setattr(subprocess, "Popen", _only_git(subprocess.Popen))
    return tmp_path


def _only_git(popen: Any) -> Any:
    class OnlyGit(popen):
        def __init__(self, arguments: Any, *rest: Any, **named: Any) -> None:
            assert arguments[0] in ("git", sys.executable), f"a process was started: {arguments}"
            super().__init__(arguments, *rest, **named)

    return OnlyGit


def refusal(*arguments: str) -> str:
    """What the verb says; and it has left nothing."""
    before = tree(Path.cwd())
    with pytest.raises(UserError) as caught:
        call("launch", *arguments)
    assert tree(Path.cwd()) == before
    return str(caught.value)


def tree(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in folder.rglob("*")}


def launched(here: Path, status: str, *overrides: str) -> subprocess.Popen[str]:
    """The command itself, in a process of its own, with a stand-in for the node."""
    arguments = ["launch", "local", "mine.yaml", f"cluster.job.python={here}/stand-in", *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOLD": str(here / "told"), "STATUS": status}
    return subprocess.Popen(
        [sys.executable, "-m", "pretrain.cli", *arguments], cwd=here, env=environment, stderr=subprocess.PIPE, text=True
    )


# --- the dry run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["local", "slurm", "kubernetes", "hostfile", "ray"])
def test_a_dry_run_shows_everything_and_touches_nothing(here: Path, kind: str) -> None:
    before = tree(here)
    nodes = "1" if kind == "local" else "2"
    done = call("launch", kind, "mine.yaml", "run.name=other", *SECTIONS, "--cluster", "this-machine", "--nodes", nodes, "--dry-run")
    assert done.status == 0
    assert f"other in {here}/runs/other" in done.out
    assert "--- run.yaml\n" in done.out
    assert f"root: {here}/runs\n" in done.out
    assert "canary" not in done.out + done.err
    assert tree(here) == before


@pytest.mark.parametrize(
    ("kind", "files"), [("slurm", {"job.sh", "ray-node.sh"}), ("kubernetes", {"rayjob.yaml"}), ("ray", {"ray-job.sh"})]
)
def test_a_build_of_data_needs_no_data_and_no_node_script(here: Path, kind: str, files: set[str]) -> None:
    shutil.rmtree(here / "shards")
    done = call("launch", kind, "mine.yaml", *SECTIONS, "--cluster", "this-machine", "--nodes", "2", "--data", "--dry-run", "--json")
    found = json.loads(done.out)
    assert found["plan"]["builds_data"]
    told = {"cluster.yaml", "environment"} if kind != "kubernetes" else set()
    assert set(found["files"]) == {"run.yaml", "plan.json"} | told | files
    assert "a build needs a folder" in refusal(kind, "mine.yaml", *SECTIONS, "data.root=s3://a/b", "--cluster", "this-machine", "--data")


@pytest.mark.parametrize(("options", "nodes"), [([], 2), (["--nodes", "1"], 1), (["cluster.nodes=1"], 1)])
def test_over_ssh_all_hosts_are_taken(options: list[str], nodes: int) -> None:
    found = json.loads(call("launch", "hostfile", "mine.yaml", *options, "--cluster", "hosts", "--dry-run", "--json").out)
    assert found["plan"]["nodes"] == nodes


def test_a_dry_run_answers_json() -> None:
    found = json.loads(call("launch", "local", "mine.yaml", "--dry-run", "--json").out)
    assert found["plan"]["processes_per_node"] == 2
    assert found["plan"]["passed"] == ["WANDB_API_KEY"]
    assert set(found["files"]) == {"run.yaml", "plan.json", "cluster.yaml", "node.sh", "environment"}
    assert json.loads(found["files"]["plan.json"]) == found["plan"]


# --- the launch --------------------------------------------------------------------------------------------


def test_the_node_is_told_what_was_planned(here: Path) -> None:
    process = launched(here, "0", 'cluster.job.environment={ODD: "it\'s $(touch x), a\\nb"}', "run.name=other")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    told = json.loads((here / "told").read_text())
    assert told["pid"] == process.pid  # the command has become the node: whatever is sent to it arrives
    (folder,) = (here / "runs" / "other" / "launches").iterdir()
    plan = json.loads((folder / "plan.json").read_text())
    assert told["arguments"][:4] == ["-m", "pretrain.cli", "train", f"{folder}/run.yaml"]
    options = dict(zip(told["arguments"][4::2], told["arguments"][5::2], strict=True))
    assert (options["--nodes"], options["--node"], options["--launch"]) == ("1", "0", plan["launch_id"])
    assert options["--rendezvous"].startswith(f"{HOST}:")
    environment = told["environment"]
    assert (environment["ODD"], environment["WANDB_API_KEY"]) == ("it's $(touch x), a\nb", "canary-of-a-secret")
    assert environment["PYTHONPATH"] == told["folder"] == f"{folder}/code"
    assert (folder / "code" / "pretrain" / "cli.py").read_bytes() == (ROOT / "pretrain" / "cli.py").read_bytes()
    assert not (here / "x").exists()
    assert "canary" not in said
    assert [path.name for path in folder.iterdir() if path.is_file() and "canary" in path.read_text()] == ["environment"]


@pytest.mark.parametrize("status", [0, 1, 2, 75])
def test_the_exit_status_is_the_nodes(here: Path, status: int) -> None:
    process = launched(here, str(status))
    process.communicate(timeout=60)
    assert process.returncode == status


def test_a_signal_reaches_the_node(here: Path) -> None:
    process = launched(here, "wait")
    try:
        deadline = time.monotonic() + 60
        while not (here / "told").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 75


def test_the_code_here_is_run_where_it_lies(here: Path) -> None:
    process = launched(here, "0", "--code", "here")
    process.communicate(timeout=60)
    assert json.loads((here / "told").read_text())["environment"]["PYTHONPATH"] == str(ROOT)
    (folder,) = (here / "runs" / "mine" / "launches").iterdir()
    assert not (folder / "code").exists()


def test_a_port_that_is_taken_is_passed_over() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port < find_port(port) < port + 100


# --- what is refused ---------------------------------------------------------------------------------------


def test_a_kind_without_a_cluster() -> None:
    assert refusal("slurm", "mine.yaml").startswith("launch slurm needs --cluster C")
    assert "there is no cluster 'slurm-h10'" in refusal("slurm", "mine.yaml", "--cluster", "slurm-h10")
    assert "slurm.partitions: there is no such key" in refusal("local", "mine.yaml", "cluster.slurm.partitions=x")


def test_data_that_is_not_there_or_not_finished(here: Path) -> None:
    (here / "shards" / "manifest.json").rename(here / "shards" / "not-yet")
    assert str(here / "shards") in refusal("local", "mine.yaml")


def test_data_of_another_tokenizer(here: Path) -> None:
    (here / "tokenizer.json").write_text((here / "shards" / "tokenizer.json").read_text().replace("<|endoftext|>", "<|end|>"))
    assert "was built with another tokenizer" in refusal("local", "mine.yaml", "data.tokenizer.path=tokenizer.json")
    shutil.copy(here / "shards" / "tokenizer.json", here / "tokenizer.json")
    assert call("launch", "local", "mine.yaml", "data.tokenizer.path=tokenizer.json", "--dry-run").status == 0


def test_a_batch_that_does_not_divide() -> None:
    said = refusal("slurm", "mine.yaml", "cluster.slurm={}", "--cluster", "this-machine", "--nodes", "3")
    assert said.startswith("3 nodes x 2 processes: a global batch of 8 samples does not divide by 6 ranks")


def test_a_parent_that_is_not_there() -> None:
    assert "holds no run" in refusal("local", "mine.yaml", "start_from=runs/base@10")


def test_a_folder_that_is_no_run(here: Path) -> None:
    (here / "runs" / "mine").mkdir(parents=True)
    (here / "runs" / "mine" / "thesis.tex").write_text("x")
    assert "exists and holds no run" in refusal("local", "mine.yaml")


def test_a_disk_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(1, 1, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "more checkpoints of" in refusal("local", "mine.yaml")


def test_a_second_launch_of_the_same_run_is_taken(here: Path) -> None:
    """What the first has left in the run folder is no other run."""
    for _ in range(2):
        process = launched(here, "75")
        process.communicate(timeout=60)
        assert process.returncode == 75
    assert len(list((here / "runs" / "mine" / "launches").iterdir())) == 2


# --- the training itself -----------------------------------------------------------------------------------


@pytest.mark.sample
def test_a_launch_that_was_stopped_ends_as_one_that_never_was(here: Path) -> None:
    """With the real interpreter: two processes, a signal behind the second step, and the same launch once more."""
    from pretrain.checkpoint.index import state_hash
    from pretrain.checkpoint.verify import list_commits, read_commit

    def start(name: str) -> subprocess.Popen[str]:
        watch = "watch={log_every_steps: 1, wandb: disabled}"
        settings = [
            "run.deterministic=true",
            watch,
            "checkpoint.every_steps=null",
            "evaluate.every_steps=null",
            "training.total_tokens=7680",
        ]
        command = [sys.executable, "-m", "pretrain.cli", "launch", "local", "mine.yaml", f"run.name={name}", *settings]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, cwd=here, env=environment, stderr=subprocess.PIPE, text=True)

    def finish(process: subprocess.Popen[str], status: int) -> None:
        try:
            _, said = process.communicate(timeout=400)
        finally:
            process.kill()
        assert process.returncode == status, said

    finish(start("whole"), 0)
    stopped, rows = start("stopped"), here / "runs" / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while (not rows.is_file() or len(rows.read_text().splitlines()) < 2) and time.monotonic() < deadline and stopped.poll() is None:
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    finish(stopped, 75)
    finish(start("stopped"), 0)
    newest = [read_commit(list_commits(here / "runs" / name / "checkpoints")[0]) for name in ("whole", "stopped")]
    assert [commit.state.step for commit in newest] == [30, 30]
    assert state_hash(newest[0]) == state_hash(newest[1])
    assert len(list_commits(here / "runs" / "stopped" / "checkpoints")) == 2

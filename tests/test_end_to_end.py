"""The whole way by the command line: text -> shards -> train -> kill -> resume -> verify -> generate, right and wrong."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.tiny import tiny_texts

RUN_FILE = """
data:
  root: {root}/shards
  sources: [{{name: sums, path: {root}/text, format: jsonl}}]
  tokenizer: {{vocabulary_size: 300}}
  held_out_fraction: 0.1
  work_unit_bytes: 8000
model: {{vocabulary_size: 320, num_layers: 2, width: 64, num_heads: 4, feed_forward_width: 128, largest_context: 64, dropout: 0.1}}
training: {{sequence_length: 32, global_batch_samples: 4, micro_batch_samples: 1, total_tokens: 25600}}
optimizer: {{peak_lr: 5e-3}}
run: {{root: {root}/runs, deterministic: true}}
parallel: {{cpu_processes: 2}}
checkpoint: {{every_steps: 20}}
evaluate: {{every_steps: 100}}
watch: {{log_every_steps: 1}}
"""
TOTAL_STEPS = 200
LIMIT_SECONDS = 240


def pretrain(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command and check its exit status."""
    done = subprocess.run(
        [sys.executable, "-m", "pretrain.cli", *map(str, arguments)], capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    assert done.returncode == status, (arguments, done.returncode, done.stdout[-2000:], done.stderr[-4000:])
    assert "Traceback" not in done.stderr or status not in (0, 2, 75), done.stderr
    return done


@pytest.fixture(scope="module", name="place")
def _place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text and a run file whose shards are built."""
    root = tmp_path_factory.mktemp("whole-way")
    (root / "text").mkdir()
    for part in range(3):
        rows = [json.dumps({"text": text}) for text in tiny_texts(60, seed=part)]
        (root / "text" / f"part-{part}.jsonl").write_text("\n".join(rows) + "\n")
    (root / "sums.yaml").write_text(RUN_FILE.format(root=root))
    built = pretrain("data", "build", root / "sums.yaml")
    assert "180 documents" in built.stderr
    return root


TIMES = ("time", "tokens_per_second", "data_wait_share", "step_seconds", "seconds/", "mfu/", "memory/", "attempt")
"""What differs in the rows of equal runs, by how it begins."""
OF_TIMES = ("ranks/", "slow_ranks/", "checkpoint/")
"""Rows that do."""


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics, without what differs between equal runs."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    plain = [row for row in rows if not any(key.startswith(OF_TIMES) for key in row)]
    return [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in plain]


def test_data_show_verify_and_a_second_build(place: Path) -> None:
    shown = json.loads(pretrain("data", "show", place / "sums.yaml", "--json").stdout)
    assert shown["documents"] == {"read": 180, "kept": 180, "dropped": {}, "quarantined": {}}
    assert json.loads(pretrain("data", "verify", place / "shards", "--json").stdout)["problems"] == []
    assert "nothing to do" in pretrain("data", "build", place / "sums.yaml").stderr


def test_a_rank_killed_at_a_random_step_changes_nothing(place: Path, seed: int) -> None:
    """SIGKILL one rank at a random step: nothing of that attempt is left; the next one, in the same command, ends with the undisturbed
    run's bits."""
    from pretrain.checkpoint.index import state_hash
    from pretrain.checkpoint.verify import read_commit

    chooser = random.Random(seed)
    run_file, killed, whole = place / "sums.yaml", place / "runs" / "killed", place / "runs" / "whole"
    pretrain("train", run_file, "run.name=whole")
    step = chooser.randrange(1, TOTAL_STEPS - 60)
    command = [sys.executable, "-m", "pretrain.cli", "train", str(run_file), "run.name=killed"]
    supervisor = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline, metrics, family = time.monotonic() + LIMIT_SECONDS, killed / "metrics.jsonl", []
    while time.monotonic() < deadline and supervisor.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= step:
            family = psutil.Process(supervisor.pid).children(recursive=True)
            ranks = [process for process in psutil.Process(supervisor.pid).children() if "pretrain.train" in process.cmdline()]
            assert len(ranks) == 2
            chooser.choice(ranks).send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    psutil.wait_procs(family, timeout=30)
    assert [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE] == []
    _, said = supervisor.communicate(timeout=LIMIT_SECONDS)
    assert supervisor.returncode == 0, said
    assert "was ended by SIGKILL" in said
    assert "the next attempt begins" in said
    assert "Traceback" not in said
    assert not (killed / "lease.json").exists()
    hashes = {run.name: state_hash(read_commit(run / "checkpoints" / f"step-{TOTAL_STEPS:08d}")) for run in (whole, killed)}
    print(f"killed at step {step}: {hashes}")
    assert hashes["killed"] == hashes["whole"]
    assert rows_of(killed) == rows_of(whole)
    attempts = [json.loads(line) for line in (killed / "attempts.jsonl").read_text().splitlines()]
    assert [(row["attempt"], row["status"]) for row in attempts] == [(1, 75), (2, 0)]
    assert (killed / "wandb" / "run-id").read_text() in " ".join(path.name for path in (killed / "wandb").iterdir())

    before = {path: path.stat().st_mtime_ns for path in killed.rglob("*") if path.is_file()}
    assert "is done" in pretrain("train", run_file, "run.name=killed").stderr
    assert {path: path.stat().st_mtime_ns for path in killed.rglob("*") if path.is_file()} == before


def test_planted_bit_flips_are_found_and_an_older_commit_is_used(place: Path, seed: int) -> None:
    """One bit in a checkpoint, one in a shard: verify names the file; training falls back and says so; generate as well."""
    run = place / "runs" / "flipped"
    pretrain("train", place / "sums.yaml", "run.name=flipped", "training.total_tokens=7680")
    listed = json.loads(pretrain("checkpoints", "list", run, "--json").stdout)
    assert [row["step"] for row in listed] == [60, 40, 20]
    assert "every byte" in pretrain("checkpoints", "verify", run).stdout
    chooser = random.Random(seed)
    flip_a_bit(run / "checkpoints" / "step-00000060" / "rank_00001.safetensors", chooser)
    found = pretrain("checkpoints", "verify", run, status=2).stdout
    assert "step-00000060/rank_00001.safetensors: its SHA-256" in found
    written = pretrain("generate", run, "--prompt", "1 plus 1 is", "--max-tokens", "8", "--temperature", "0")
    assert written.stdout.startswith("1 plus 1 is")
    assert "damaged" in written.stderr
    assert "step-00000040" in written.stderr

    (run / "checkpoints" / "step-00000060").rename(run / "checkpoints" / "step-00000059")  # the run is not finished then
    again = pretrain("train", place / "sums.yaml", "run.name=flipped", "training.total_tokens=7680")
    assert "moved to" in again.stderr
    assert "resumed from step-00000040" in again.stderr
    assert [path.name for path in (run / "checkpoints" / "rejected").iterdir()] == ["step-00000059"]
    assert [row["step"] for row in rows_of(run) if "loss" in row] == list(range(1, 61))

    shard = place / "shards" / "units" / "00000" / "train-00000.bin"
    clean = shard.read_bytes()
    flip_a_bit(shard, chooser)
    assert "units/00000/train-00000.bin" in pretrain("data", "verify", place / "shards", status=2).stdout
    shard.write_bytes(clean)


def flip_a_bit(path: Path, chooser: random.Random) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    place = chooser.randrange(len(content))
    content[place] ^= 1 << chooser.randrange(8)
    path.write_bytes(bytes(content))
    print(f"{path.name}: byte {place}")


def test_what_is_wrong_is_said_and_nothing_is_made(place: Path, tmp_path: Path) -> None:
    """Bad input: exit status 2, a sentence or two that name it, no traceback, no run folder."""
    run_file = place / "sums.yaml"
    cases: dict[str, tuple[list[object], list[str]]] = {
        "unknown key": (["train", run_file, "optimizer.lr=1"], ["optimizer.lr", "optimizer.peak_lr"]),
        "batch": (["train", run_file, "training.micro_batch_samples=4"], ["does not divide by 2 ranks", "training.global_batch_samples=8"]),
        "no data": (["train", run_file, f"data.root={tmp_path}/none"], ["no dataset", "pretrain data build"]),
        "no corpus": (["data", "build", run_file, f"data.root={tmp_path}/d", "data.sources=[{name: a, path: /nowhere}]"], ["/nowhere"]),
        "no run": (["generate", tmp_path], ["holds no run"]),
        "no file": (["train", place / "smus.yaml"], ["no such file", "sums.yaml"]),
    }
    for name, (arguments, words) in cases.items():
        overrides = [f"run.root={tmp_path}/runs"] if arguments[0] == "train" else []
        said = pretrain(*arguments, *overrides, status=2).stderr
        assert all(word in said for word in words), (name, said)
    assert [path for path in (tmp_path / "runs").rglob("*") if path.is_file()] == []


def test_a_run_folder_of_another_configuration_lists_the_keys(place: Path) -> None:
    """The folder keeps its run: the differing key is named, what may change is accepted by the schema (test_schema.py)."""
    pretrain("train", place / "sums.yaml", "run.name=mine", "training.total_tokens=256")
    said = pretrain("train", place / "sums.yaml", "run.name=mine", "training.total_tokens=256", "model.dropout=0.2", status=2).stderr
    assert "model.dropout: the folder has 0.1, asked for 0.2" in said
    assert "run.name=" in said


@pytest.mark.parametrize(
    "arguments", [[], ["bogus"], ["train"], ["config", "show", "x.yaml", "--foo"], ["generate", "a", "--temperature", "abc"]], ids=" ".join
)
def test_a_usage_error_is_a_few_lines_and_status_2(arguments: list[str]) -> None:
    done = pretrain(*arguments, status=2)
    assert "Usage: pretrain" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_flipped_bit_in_a_shard_is_never_learnt_from(place: Path, seed: int) -> None:
    """It ends the run when it is read, or, verified before, no run folder is made; the messages name the file and how to repair
    it, and that works."""
    shard = place / "shards" / "units" / "00000" / "train-00000.bin"
    clean = shard.read_bytes()
    flip_a_bit(shard, random.Random(seed))
    said = pretrain("train", place / "sums.yaml", "run.name=meets-damaged-data", status=2).stderr
    assert re.search(r"units/00000/train-00000\.bin: bytes \d+ to \d+ are not those that were built", said)
    assert not list((place / "runs" / "meets-damaged-data" / "checkpoints").glob("step-*"))
    said = pretrain("train", place / "sums.yaml", "run.name=on-damaged-data", "data.verify_before_training=true", status=2).stderr
    assert "units/00000/train-00000.bin: its SHA-256 differs" in said
    assert "`pretrain data build RUN.yaml --rebuild` keeps what is whole" in said
    assert not (place / "runs" / "on-damaged-data").exists()
    manifest = (place / "shards" / "manifest.json").read_bytes()
    pretrain("data", "build", place / "sums.yaml", "--rebuild")
    assert shard.read_bytes() == clean
    assert (place / "shards" / "manifest.json").read_bytes() == manifest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_stop_at_any_moment_of_a_start_is_polite(place: Path, number: signal.Signals, seed: int) -> None:
    """A stop signal before the ranks are ready to hear it is passed on when they are: 75, no word of memory, nothing left."""
    seconds = random.Random(seed).uniform(0, 5)
    lease = place / "runs" / f"early-{number.name}" / "lease.json"
    command = [sys.executable, "-m", "pretrain.cli", "train", str(place / "sums.yaml"), f"run.name=early-{number.name}"]
    process = subprocess.Popen([*command, "training.total_tokens=25_600_000"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not lease.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    print(f"{number.name} after {seconds:.2f} s")
    assert process.returncode == 75, said
    assert "memory" not in said
    assert "Traceback" not in said


def test_a_file_called_stop_stops_a_run_and_the_next_start_removes_it(place: Path) -> None:
    run = place / "runs" / "touched"
    command = [sys.executable, "-m", "pretrain.cli", "train", str(place / "sums.yaml"), "run.name=touched"]

    def start(until: Callable[[], bool], ask: Callable[[subprocess.Popen[str]], object]) -> str:
        process = subprocess.Popen([*command, "training.total_tokens=25_600_000"], stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not until() and time.monotonic() < deadline:
            time.sleep(0.02)
        ask(process)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 75, said
        return said

    metrics = run / "metrics.jsonl"
    said = start(lambda: metrics.is_file() and metrics.stat().st_size > 0, lambda _: (run / "STOP").touch())
    assert "stopped and saved at step" in said
    said = start(lambda: not (run / "STOP").exists(), lambda process: process.send_signal(signal.SIGUSR1))
    assert f"{run / 'STOP'} was there and is removed" in said


def test_a_build_that_is_stopped_says_so_and_goes_on(place: Path) -> None:
    """SIGTERM in the middle of a build: 75 and a sentence; the same command ends with the same manifest."""
    command = [sys.executable, "-m", "pretrain.cli", "data", "build", str(place / "sums.yaml"), f"data.root={place}/stopped"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (place / "stopped" / "tokenizer.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "interrupted; the finished units" in said and "the same command goes on" in said
    pretrain("data", "build", place / "sums.yaml", f"data.root={place}/stopped")
    assert (place / "stopped" / "manifest.json").read_bytes() == (place / "shards" / "manifest.json").read_bytes()


def test_help_answers_at_once() -> None:
    """`pretrain --help` in under half a second (the best of three: the machine may be busy)."""
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        assert "demo" in pretrain("--help").stdout
        seconds.append(time.monotonic() - began)
    assert min(seconds) < 0.5

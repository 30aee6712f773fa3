"""Whole trainings with planted secrets: what they leave behind, print and show in their command lines holds none of them.

In: a case's number, which says what becomes of the training. Out: every place where a secret was found, and every file that others
could read, though the umask let them.
"""

import json
import os
import random
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.faults.campaign import Case, Outcome
from tests.tiny import write_tiny_dataset
from tests.training import TINY

ROOT = Path(__file__).parent.parent.parent
SECONDS = 120
NAMES = (
    *("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("GITHUB_TOKEN", "OPENAI_API_KEY", "AZURE_STORAGE_KEY", "GOOGLE_API_KEY", "RAY_AUTH_TOKEN", "SLACK_BOT_TOKEN", "DB_PASSWORD"),
    *("MY_SECRET", "LICENSE_KEY", "SSH_PASSPHRASE", "SERVICE_CREDENTIALS"),
)
ELSEWHERE = ("HTTPS_PROXY", "netrc", "hub")
NUM_SECRETS = len(NAMES) + len(ELSEWHERE)
RUNS = ("done", "fails", "refused")
"""Trained to the end; ended by an exception that holds all secrets; refused for a value that is one."""
FAILING = """
import logging, os, sys, warnings
from pathlib import Path

import torch


def fail(*_):
    secrets = [os.environ[name] for name in {names!r}] + [os.environ["HTTPS_PROXY"]]
    secrets += [(Path.home() / name).read_text().strip() for name in (".netrc", ".cache/huggingface/token")]
    print("printed", *secrets)
    print("told", *map(repr, secrets), file=sys.stderr)
    logging.error("logged %s", secrets)
    warnings.warn("warned of " + " ".join(secrets))
    raise ValueError("failed with " + " and ".join(secrets))


class Failing(torch.optim.AdamW):
    step = fail


def open_failing(groups, section):
    return Failing(groups)
"""


def prepare(folder: Path, chosen: random.Random) -> Path:
    """The tokens that all cases train on."""
    write_tiny_dataset(folder / "shards", num_documents=90, seed=chosen.randrange(1000))
    return folder / "shards"


def train_with_secrets(case: Case) -> Outcome:
    """One training by the command line, watched while it runs."""
    kind = RUNS[case.number]
    secrets = {name: f"canary{number}{case.chosen.randbytes(20).hex()}"[:40] for number, name in enumerate((*NAMES, *ELSEWHERE))}
    home = case.folder / "home"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    (home / ".netrc").write_text(f"machine api.wandb.ai login user password {secrets['netrc']}\n")
    (home / ".cache" / "huggingface" / "token").write_text(secrets["hub"])
    (case.folder / "failing.py").write_text(FAILING.format(names=NAMES))
    (case.folder / "mine.yaml").write_text("")
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "HF_"))},
        **{name: secrets[name] for name in NAMES},
        "HTTPS_PROXY": f"http://me:{secrets['HTTPS_PROXY']}@127.0.0.1:9",
        "HOME": str(home),
        "WANDB_MODE": "offline",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(case.folder)]),
    }
    settings = {
        **{key: value for key, value in TINY.items() if key != "watch"},
        "data.root": str(case.prepared),
        "run.root": str(case.folder / "runs"),
        "watch.log_every_steps": "1",
        "training": "{sequence_length: 32, global_batch_samples: 8, micro_batch_samples: 2, total_tokens: 1280}",
        "schedule": "{warmup_tokens: 256, decay_tokens: 256}",
        "run.attempts_in_vain": "1",
        **({"optimizer.kind": "failing:open_failing", "parallel.cpu_processes": "1"} if kind == "fails" else {}),
    }
    if kind == "refused":  # in a file: on a command line everybody on the machine has seen it
        (case.folder / "mine.yaml").write_text(f"watch: {{wandb_entity: {secrets['MY_SECRET']}}}")
    command = [sys.executable, "-m", "pretrain.cli", "train", "mine.yaml", *(f"{key}={value}" for key, value in settings.items())]
    status, said, seen = _watch(command, environment, case.folder)
    run = case.folder / "runs" / "mine"
    wanted = {"done": 0, "fails": 1, "refused": 2}[kind]
    problems = [] if status == wanted else [f"{kind}: ended with {status}, wanted {wanted}: {said[-1500:]}"]
    problems += [f"{kind}: {name} is in {place}" for name, secret in secrets.items() for place in _places(secret, run, said, seen)]
    if kind == "refused" and run.exists():
        problems.append("refused: a run folder was made")
    if kind == "fails" and not (said.count("[MY_SECRET]") >= 5 and "[MY_SECRET]" in (run / "attempts.jsonl").read_text()):
        problems.append("fails: the exception is not told without its secrets, which would prove nothing")
    if kind == "done" and not any("wandb" in path.parts for path in run.rglob("*.wandb")):
        problems.append("done: nothing was tracked, which would prove nothing")
    return Outcome(NUM_SECRETS, problems + [f"{kind}: {problem}" for problem in _open_to_others(run)])


def _watch(command: list[str], environment: dict[str, str], folder: Path) -> tuple[int, str, list[str]]:
    """Run a command with an umask of 0. Returns its exit status, all that it printed, and every command line in its family meanwhile."""
    log, seen = folder / "printed.txt", set[str]()
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output, umask=0)
        deadline = time.monotonic() + SECONDS
        try:
            while process.poll() is None and time.monotonic() < deadline:
                for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                    try:
                        seen.add(json.dumps(member.cmdline()))
                    except psutil.Error:
                        continue
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.terminate()
                time.sleep(5)
                process.kill()
            process.wait(10)
    return process.returncode, log.read_text(errors="replace"), sorted(seen)


def _places(secret: str, run: Path, said: str, seen: list[str]) -> list[str]:
    """Where a secret was found."""
    found = ["what was printed"] if secret in said else []
    found += [f"the command line {line[:200]}" for line in seen if secret in line]
    for path in run.rglob("*"):
        if path.is_file() and not path.is_symlink() and (secret.encode() in path.read_bytes() or secret in path.name):
            found.append(f"{path.relative_to(run)}")
    return found


def _open_to_others(run: Path) -> list[str]:
    """The run folder is its owner's alone, and so is all that is in it."""
    if not run.exists():
        return []
    mode = stat.S_IMODE(run.stat().st_mode)
    wrong = [] if mode == 0o700 else [f"the run folder has mode {mode:04o}"]
    loose = [path for path in run.rglob("*") if not path.is_symlink() and path.stat().st_mode & 0o077]
    return wrong + [f"{path.relative_to(run)} has mode {stat.S_IMODE(path.stat().st_mode):04o}" for path in loose[:5]]

"""`pretrain demo --torture`: a training whose ranks are killed at random, and the same one undisturbed. Both must end with equal bits.

In: how many kills, a seed. Out: two run folders, a line for each kill, the hashes of both ends, and status 0 only if everything is equal:
weights, moments and counters of the last commit; loss, learning rate and gradient norm of every step. The kills come from outside (SIGKILL
to a process that the training started), and the training has to go on by itself.
"""

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from configs.durable import write_file
from configs.errors import EXIT_DEFECT, EXIT_DONE, UserError
from configs.loader import dump_config, load_config
from configs.schema import RunConfig
from pretrain.build import build_with_progress
from pretrain.checkpoint.index import state_hash
from pretrain.checkpoint.verify import list_commits, read_commit
from pretrain.demo import RUN_FILE, choose_run, start_training
from pretrain.run.folder import RunFolder
from pretrain.run.ranks import RANK_MODULE
from pretrain.watch.metrics import METRICS_FILE, read_rows

STEPS, SAVE_EVERY = 100, 10
LOOK_SECONDS = 0.02
COMPARED = ("step", "tokens_seen", "loss", "learning_rate", "gradient_norm", "skipped_steps")
"""Of each row; the rest is about time."""


@dataclass(frozen=True)
class End:
    """How a run ended."""

    state: str
    """SHA-256 of all that training goes on from."""
    steps: list[list[Any]]
    """Of each logged step what is compared."""
    attempts: int

    @staticmethod
    def of(folder: RunFolder) -> "End":
        """Raises DamageError for a commit that is not what was committed."""
        rows = [[row[key] for key in COMPARED] for row in read_rows(folder.path / METRICS_FILE) if "loss" in row]
        return End(state_hash(read_commit(list_commits(folder.checkpoints)[0])), rows, len(folder.attempts()))


def run_torture(corpus: Path | None, kills: int, seed: int | None = None, packaged: Path = RUN_FILE) -> int:
    """Do it on the demo's data and model; returns the exit status. Raises UserError for what cannot be used."""
    began = time.monotonic()
    say = Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print
    chooser = random.Random(seed := random.SystemRandom().randrange(2**31) if seed is None else seed)
    config = choose_run(corpus, packaged)
    say("1/3  text, tokenizer, shards")
    build_with_progress(config.data, say)
    calm_file, killed_file = write_run_files(config, kills)
    calm, killed = (RunFolder.of(load_config(file)) for file in (calm_file, killed_file))

    say("\n2/3  a training that nothing happens to")
    with start_training(calm_file) as process:
        if status := process.wait():
            return status
    wanted = End.of(calm)

    last = len(wanted.steps) * 9 // 10
    at = sorted(chooser.sample(range(1, last), min(kills, last - 1)))
    say(f"\n3/3  the same, and a rank is killed (SIGKILL) soon behind steps {', '.join(map(str, at))} (seed {seed})")
    status, num_killed = _train_and_kill(killed_file, killed, at, chooser, say)
    if status != EXIT_DONE:
        say(f"the training that was killed {num_killed} times did not go on by itself; what it did is in {killed.path}")
        return status
    found = End.of(killed)

    say(f"\n     calm    {len(wanted.steps)} steps in {_count(wanted.attempts, 'attempt')}, state {wanted.state}")
    say(f"     killed  {len(found.steps)} steps in {_count(found.attempts, 'attempt')}, state {found.state}")
    different = differences(wanted, found)
    say("\n".join(f"     {one}" for one in different) or f"     equal: every bit, behind {_count(num_killed, 'kill')}")
    say(f"done in {time.monotonic() - began:.0f} s; the runs are {calm.path} and {killed.path}")
    return EXIT_DEFECT if different else EXIT_DONE


def write_run_files(config: RunConfig, kills: int) -> tuple[Path, Path]:
    """Run files of two short, equal, deterministic runs under names that are free. Raises UserError where none is."""
    root, training = Path(config.run.root).resolve(), config.training
    steps = min(STEPS, training.total_steps)
    total_tokens = steps * training.global_batch_samples * training.sequence_length
    overrides = [
        "run.deterministic=true",
        f"run.attempts_in_vain={kills + 1}",  # kills may follow one another before the next save
        f"training.total_tokens={total_tokens}",
        f"schedule.decay_tokens={total_tokens // 2}",
        f"checkpoint.every_steps={SAVE_EVERY}",
        "watch.log_every_steps=1",
        "watch.wandb=disabled",
    ]
    root.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1000):
        names = [f"torture-{kind}{f'-{number}' if number > 1 else ''}" for kind in ("calm", "killed")]
        if not any((root / name).exists() for name in names):
            break
    else:
        raise UserError(f"{root} holds a thousand tortures; delete some.")
    files = [root / f"{name}.yaml" for name in names]
    for file, name in zip(files, names, strict=True):
        write_file(file, dump_config(config).encode())
        write_file(file, dump_config(load_config(file, [*overrides, f"run.name={name}"])).encode())
    return files[0], files[1]


def differences(wanted: End, found: End) -> list[str]:
    """A sentence for each thing that is not equal; none: all is."""
    different = [] if found.state == wanted.state else ["NOT equal: the states"]
    for one, other in zip(wanted.steps, found.steps, strict=False):
        if one != other:
            return [*different, f"NOT equal, first at step {one[0]}: {dict(zip(COMPARED, one, strict=True))} and then {other}"]
    return different + ([] if len(wanted.steps) == len(found.steps) else ["NOT equal: the number of steps"])


def _train_and_kill(run_file: Path, folder: RunFolder, at: list[int], chooser: random.Random, say: Any) -> tuple[int, int]:
    """Train; once a new attempt has come to the next of these steps, kill one of its ranks. Returns the status and how many were killed."""
    num_killed, killed_attempt = 0, 0
    with start_training(run_file) as process:
        while process.poll() is None:
            time.sleep(LOOK_SECONDS)
            rows = read_rows(folder.path / METRICS_FILE) if num_killed < len(at) else []
            if not rows or rows[-1]["attempt"] <= killed_attempt or rows[-1]["step"] < at[num_killed]:
                continue
            time.sleep(chooser.uniform(0, 0.3))  # at any place of a step, or of a save
            if not (ranks := _ranks_of(process.pid)):
                continue
            rank = chooser.choice(sorted(ranks))
            ranks[rank].kill()
            num_killed, killed_attempt = num_killed + 1, rows[-1]["attempt"]
            say(f"     kill {num_killed} of {len(at)}: rank {rank} (pid {ranks[rank].pid}), behind step {rows[-1]['step']}")
        return process.returncode, num_killed


def _ranks_of(pid: int) -> dict[int, psutil.Process]:
    """The processes of the ranks that a training has now, by rank."""
    ranks: dict[int, psutil.Process] = {}
    try:
        for child in psutil.Process(pid).children():
            if RANK_MODULE in child.cmdline():
                ranks[int(child.environ()["RANK"])] = child
    except (psutil.NoSuchProcess, psutil.AccessDenied, KeyError):  # they are ending
        return {}
    return ranks


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"

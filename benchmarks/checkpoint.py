"""What a checkpoint costs: how long training stands still, how close the disk is, how soon a killed run goes on; beside the peers.

Run: .venv/bin/python benchmarks/checkpoint.py [--quick] [--json] [--rounds 5] [--rows saves recovery] [--folder FOLDER]

In: nothing; a decoder with random weights that has taken a step, in bf16 at ZeRO stage 1, on one rank and on two, on CPUs: 300 MB of
state (15 MB with --quick). All sides write the same tensors, into the same folder, and sync them; they take turns in one process group,
and each row gives medians over the rounds, of the slowest rank. Sides:

    ours                as the loop saves: the copy that training waits for, then the writer's process, then the commit
    in the loop         the same with checkpoint.asynchronous: false: copy, write and commit while training waits
    the disk            a plain loop over the same bytes, 16 MiB at a time, and one fsync; for reading the same without fsync, of files
                        that were dropped from the page cache
    torch.save          of the same tensors, with an fsync
    DCP                 torch.distributed.checkpoint.async_save of the same tensors, the engine of torchtitan; its files are not hashed

The loss of time by a save is that of its stall and of the ten steps behind it beyond ten undisturbed ones, as a share of the 50 steps
between two saves; the cores that the writer needs are the ones that train. Recovery: `pretrain train` with the demo's model on two ranks,
one of which is killed (SIGKILL) behind its second checkpoint; the parts are told apart by what the command says, when its ranks began, and
the first row of the next attempt. With --json one object per row.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import yaml
from data import row, show, tell
from step import ALLOCATOR, write_tokens

from pretrain.watch.metrics import METRICS_FILE, read_rows

ROOT = Path(__file__).parent.parent
STEPS_BEHIND, STEPS_BETWEEN = 10, 50
LIMIT_SECONDS = 1800
SIZES = {
    "full": {"vocabulary_size": 8192, "num_layers": 6, "width": 512, "feed_forward_width": 1408},
    "quick": {"vocabulary_size": 2048, "num_layers": 2, "width": 192, "feed_forward_width": 512},
}
DEMO = {"vocabulary_size": 8192, "num_layers": 4, "width": 320, "num_heads": 5, "feed_forward_width": 832, "qk_norm": "head"}
KILL_STEP = 25
"""Behind the second of two checkpoints, which is committed by then."""
PARTS = {
    "noticed": "until the supervisor begins the next attempt",
    "started": "until its ranks are started",
    "imported": "until they have imported all",
    "loaded": "until the checkpoint is verified and loaded",
    "stepped": "until the first step is in metrics.jsonl",
}


def main() -> None:
    """Print every row as soon as its figures are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of 15 MB, one recovery")
    parser.add_argument("--json", action="store_true", help="one object per row")
    parser.add_argument("--rounds", type=int, default=None, help="5, or 1 with --quick")
    parser.add_argument("--rows", nargs="*", default=["saves", "recovery"], help="only these: saves recovery")
    parser.add_argument("--folder", type=Path, default=None, help="on the file system to measure (default: the one of temporary files)")
    options = parser.parse_args()
    rounds = options.rounds or (1 if options.quick else 5)
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=options.folder) as scratch:
        for one in rows_of(Path(scratch), "quick" if options.quick else "full", rounds, options.rows):
            print(json.dumps(one) if options.json else show(one), flush=True)


def rows_of(folder: Path, size: str, rounds: int, wanted: list[str]) -> Iterator[dict[str, Any]]:
    """Row after row."""
    for ranks in (1, 2) if "saves" in wanted else ():
        own = folder / f"{ranks}-ranks"
        own.mkdir()
        yield from save_rows(ranks, measure_saves(own, size, ranks, rounds))
    if "recovery" in wanted:
        write_tokens(folder / "data")
        yield from recovery_rows([recover(folder, number) for number in range(min(rounds, 3))])


# --- saves and loads ---------------------------------------------------------------------------------------------


def save_rows(ranks: int, answer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of one number of ranks."""
    sides, size = answer["sides"], answer["bytes"]
    busy = f"{size / 1e6:.0f} MB, {ranks} of {os.cpu_count()} cores train, load of the machine {os.getloadavg()[0]:.1f}"

    def times(side: str, key: str = "total") -> list[float]:
        return [one[key] for one in sides[side]]

    def compare(name: str, ours: list[float], peer: list[float], target: float | None = None) -> dict[str, Any]:
        note = f"ours {spread(ours)} ms, the other {spread(peer)} ms; {busy}"
        return row(f"{name}, {ranks} ranks", "ms", 1e3 * statistics.median(ours), 1e3 * statistics.median(peer), target, True, note)

    def rates(name: str, ours: list[float], peer: list[float], target: float) -> dict[str, Any]:
        one, other = (size / statistics.median(seconds) / 1e6 for seconds in (ours, peer))
        note = f"ours {spread(ours)} ms, the disk {spread(peer)} ms; {busy}"
        return row(f"{name}, {ranks} ranks", "MB/s", one, other, target, note=note)

    stall = times("asynchronous", "stall")
    yield compare("stall of a save, beside a save in the loop", stall, times("synchronous"), 0.05)
    yield compare("stall, beside torch.save", stall, times("torch_save"))
    yield compare("stall, beside DCP's async_save", stall, times("dcp", "stall"))
    yield compare("until the commit, beside torch.save", times("asynchronous"), times("torch_save"))
    yield compare("until the commit, beside DCP's end", times("asynchronous"), times("dcp"))
    yield rates("writing, beside the disk", times("asynchronous", "written"), times("write_plainly"), 0.8)
    yield rates("verifying and loading, beside the disk", times("load"), times("read_plainly"), 0.6)
    undisturbed, behind = times("steps", "undisturbed"), times("steps", "behind a save")
    lost = [(late - calm) / (calm * STEPS_BETWEEN / STEPS_BEHIND) for calm, late in zip(undisturbed, behind, strict=True)]
    note = f"{100 * min(lost):.2f} to {100 * max(lost):.2f}, a step takes {100 * statistics.median(undisturbed):.0f} ms; {busy}"
    yield row(f"time lost to a save in {STEPS_BETWEEN} steps, {ranks} ranks", "%", 100 * statistics.median(lost), None, 1, True, note)


def spread(seconds: list[float]) -> str:
    """From where to where, in milliseconds."""
    return f"{1e3 * min(seconds):.0f}-{1e3 * max(seconds):.0f}"


def measure_saves(folder: Path, size: str, ranks: int, rounds: int) -> dict[str, Any]:
    """What the sides answer in a process group of their own."""
    file = write_run(
        folder, SIZES[size] | {"num_heads": 4, "largest_context": 128, "tied_head": True}, ranks, length=64, total_tokens=64_000
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(Path(__file__).with_name("checkpoint_sides.py")), str(file), str(folder), str(rounds), str(STEPS_BEHIND)]
    tell(f"  {size} size, {ranks} ranks")
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in range(ranks):
            of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            environment = child_environment() | of_rank | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
            stack.callback(lambda process=processes[-1]: (process.kill(), process.wait()))
        answers = [process.communicate(timeout=LIMIT_SECONDS)[0] for process in processes]
        if any(process.returncode for process in processes):
            raise SystemExit(f"{' '.join(command)} ended with {[process.returncode for process in processes]}")
    return json.loads(answers[0].splitlines()[-1])


def child_environment() -> dict[str, str]:
    """As ranks are started, on a CPU and a core each."""
    ours = {**ALLOCATOR, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    return {**os.environ, **ours}


def write_run(folder: Path, model: dict[str, Any], ranks: int, length: int, total_tokens: int, **sections: Any) -> Path:
    """A run file on CPUs."""
    run = {
        "run": {"name": "bench", "root": str(folder / "runs")},
        "data": {"root": str(folder / "data"), "tokenizer": {"vocabulary_size": 2048}},
        "model": model,
        "training": {
            "sequence_length": length, "micro_batch_samples": 2, "global_batch_samples": 2 * ranks, "total_tokens": total_tokens,
            "separate_documents": False, "restart_positions": False,
        },
        "parallel": {"zero_stage": 1, "cpu_processes": ranks},
        "performance": {"compile": False},
        "evaluate": {"every_steps": None},
        "watch": {"log_every_steps": 1, "wandb": "disabled"},
        **sections,
    }  # fmt: skip
    file = folder / "bench.yaml"
    file.write_text(yaml.safe_dump(run))
    return file


# --- recovery ----------------------------------------------------------------------------------------------------


def recovery_rows(found: list[dict[str, float]]) -> Iterator[dict[str, Any]]:
    """The whole, and its parts."""
    whole = [sum(one.values()) for one in found]
    note = f"{min(whole):.1f}-{max(whole):.1f} s, load of the machine {os.getloadavg()[0]:.1f}"
    yield row("SIGKILL of a rank to the next attempt's first step, 2 ranks", "s", statistics.median(whole), None, 15, True, note)
    for part, said in PARTS.items():
        yield row(f"of that, {said}", "s", statistics.median(one[part] for one in found), note="a part has no peer")


def recover(folder: Path, number: int) -> dict[str, float]:
    """Kill a rank, and see when what follows has happened. Returns seconds by part."""
    own = folder / f"recovery-{number}"
    (own / "tmp").mkdir(parents=True)
    (own / "data").symlink_to(folder / "data")
    model = DEMO | {"largest_context": 1024, "tied_head": True}
    saves = {"every_steps": 10, "keep": 2}
    file = write_run(own, model, 2, length=256, total_tokens=1024 * 2000, checkpoint=saves)
    file.write_text(file.read_text().replace("vocabulary_size: 2048", "vocabulary_size: 8192"))  # that of the tokens
    rows, said = own / "runs" / "bench" / METRICS_FILE, list[tuple[float, str]]()
    command = [sys.executable, "-m", "pretrain.cli", "train", str(file)]
    environment = child_environment() | {"TMPDIR": str(own / "tmp")}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def listen() -> None:
        assert process.stdout is not None
        said.extend((time.time(), line) for line in process.stdout)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()

    def until(what: str, find: Callable[[], float | None]) -> float:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            if (when := find()) is not None:
                return when
            time.sleep(0.01)
        raise SystemExit(f"{what}: not seen\n{''.join(line for _, line in said)[-3000:]}")

    def heard(words: str) -> Callable[[], float | None]:
        return lambda: next((when for when, line in list(said) if words in line), None)

    def stepped(attempt: int, step: int) -> Callable[[], float | None]:
        def look() -> float | None:
            found = [one for one in read_rows(rows)[-1:] if one["attempt"] == attempt and one["step"] >= step] if rows.exists() else []
            return time.time() if found else None

        return look

    try:
        until("the first attempt's steps", stepped(1, KILL_STEP))
        first = ranks_of(process.pid)
        os.kill(min(first), signal.SIGKILL)
        at = [time.time()]
        at.append(until("the next attempt", heard("the next attempt begins")))
        at.append(until("its ranks", lambda: max(new) if len(new := new_ranks(process.pid, first)) == 2 else None))
        at.append(until("their imports", lambda: newest_ready(own / "tmp", ranks_of(process.pid).keys())))
        at.append(until("its beginning", heard("every byte verified")))
        at.append(until("its first step", stepped(2, 1)))
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
        listener.join(5)
    parts = dict(zip(PARTS, (after - before for before, after in pairwise(at)), strict=True))
    tell("  recovery: " + ", ".join(f"{part} {seconds:.2f} s" for part, seconds in parts.items()))
    return parts


def ranks_of(supervisor: int) -> dict[int, float]:
    """Its ranks: when each began, in seconds since 1970."""
    found: dict[int, float] = {}
    for child in psutil.Process(supervisor).children():
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
            if "pretrain.train" in child.cmdline():
                found[child.pid] = began(child.pid)
    return found


def began(pid: int) -> float:
    """When a process began, in seconds since 1970, to a hundredth. (psutil counts from the boot, which is known in whole seconds only.)"""
    since_boot = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)


def new_ranks(supervisor: int, first: dict[int, float]) -> list[float]:
    """When those began that are not among the first."""
    return [when for pid, when in ranks_of(supervisor).items() if pid not in first]


def newest_ready(folder: Path, pids: Any) -> float | None:
    """When the last of these ranks said that it is ready, once all have."""
    said = [path.stat().st_mtime for path in folder.glob("pretrain-*/outcomes/*.ready") if int(path.stem) in pids]
    return max(said) if len(said) == 2 else None


if __name__ == "__main__":
    main()

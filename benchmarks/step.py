"""How fast a training step is, beside transformers' models and beside a bare loop without DeepSpeed, in one run.

Run: .venv/bin/python benchmarks/step.py [--quick] [--json] [--rounds 5] [--rows NAME ...] [--profile]

In: nothing; random tokens are written as shards into a temporary folder. Each side is a fresh process every round, and the sides of
a row take turns; a process takes steps until its code is compiled and then gives the median of its next ones. Each row gives medians
over the rounds, and their spread. Sides:

    ours            `pretrain train` itself: the supervisor, the loop, DeepSpeed, data, metrics of every step (metrics.jsonl is read)
    bare            the same compiled model in a plain loop: weights in bf16, a flat fp32 copy of them that torch's fused AdamW
                    changes, clipping at 1, the loss asked for at each step; no DeepSpeed, no data
    bf16 states     the same with weights and moments in bf16 and no fp32 copy: for a model of 8 B on one GPU
    watching        what the loop does for its figures in a step that is logged, by itself
    transformers    transformers' model of the same sizes with random weights, compiled whole, under bf16 autocast, with torch's fused
                    AdamW and clipping at 1, as its users train it; on a CPU also without autocast, in fp32

On a CPU all have the same allocator settings (those that `pretrain train` sets for its ranks) and two threads. On a GPU the models are
larger. Rows say by which formula which share of which peak is used: of 989 TFLOP/s, dense bf16, on H100 and H200; on a CPU of what one
large product in fp32 reaches there and then. With --profile: one process runs the bare step and DeepSpeed's, and prints in which
operations they differ. With --json one object per row.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from data import row, show, tell
from loader import make_manifest
from step_sides import LARGE_CASES, Case, cases, configure, profile

from configs.schema import RunConfig
from data_pipeline.checksums import write_checksums
from data_pipeline.manifest import write_manifest
from data_pipeline.records import Counts, FileRecord, ShardRecord
from data_pipeline.shards import ShardWriter

ROOT = Path(__file__).parent.parent
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(8 << 30), "MALLOC_MMAP_THRESHOLD_": str(4 << 30)}
PEAK_FLOPS = 989e12
"""Of H100 and H200 in bf16, dense."""
Side = Callable[[], dict[str, float]]


def main() -> None:
    """The rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of fewer steps")
    parser.add_argument("--json", action="store_true", help="one object per row")
    parser.add_argument("--rounds", type=int, default=None, help="5, or 1 with --quick")
    names = f"{' '.join(cases())} deepspeed watching " + ("large" if torch.cuda.is_available() else "ranks allocator documents")
    parser.add_argument("--rows", nargs="*", default=None, help=f"only these: {names}")
    parser.add_argument("--profile", action="store_true", help="in which operations DeepSpeed's step and the bare one differ")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="step-") as scratch:
        folder = Path(scratch)
        write_tokens(folder / "data")
        if options.profile:
            profile(folder)
            return
        steps, rounds = (8, options.rounds or 1) if options.quick else (14, options.rounds or 5)
        for one in rows_of(folder, steps, rounds, options.rows):
            print(json.dumps(one) if options.json else show(one), flush=True)


def rows_of(folder: Path, steps: int, rounds: int, wanted: list[str] | None) -> Iterator[dict[str, Any]]:
    """Row after row."""
    for name, case in cases().items():
        if wanted is None or name in wanted:
            yield from beside_transformers(folder, name, case, steps, rounds)
    first = next(iter(cases()))
    if wanted is None or "deepspeed" in wanted:
        sides = {"ours": ours(folder, first, steps), "bare": in_process("bare", first, steps)}
        found = take_turns(sides, rounds)
        yield compare("DeepSpeed and all beside a bare loop", found, "ours", "bare", cases()[first], target=0.97)
    if wanted is None or "watching" in wanted:
        answers = take_turns({"watching": in_process("watching", first, 40 * steps), "ours": ours(folder, first, steps)}, rounds)
        watching, step = (statistics.median(one["seconds"] for one in answers[side]) for side in ("watching", "ours"))
        yield row("a step's verdicts and a row in metrics.jsonl and W&B offline", "ms", watching * 1e3)
        yield row("the same as a share of the step", "%", 100 * watching / step, None, 0.2, most=True)
    if torch.cuda.is_available():
        if wanted is None or "large" in wanted:
            yield from large_rows(steps, rounds)
        return
    if wanted is None or "ranks" in wanted:
        one_thread = {"OMP_NUM_THREADS": "1"}
        sides = {
            "two ranks": ours(folder, first, steps, ranks=2, environment=one_thread),
            "one rank": ours(folder, first, steps, environment=one_thread),
        }
        found = take_turns(sides, rounds)
        yield compare("two ranks with ZeRO-1 beside one, a thread each", found, "two ranks", "one rank", cases()[first], 1.6, times=2)
    if wanted is None or "allocator" in wanted:
        sides = {"ours": ours(folder, first, steps), "default": ours(folder, first, steps, environment=dict.fromkeys(ALLOCATOR, "131072"))}
        yield compare("the allocator's settings beside its defaults", take_turns(sides, rounds), "ours", "default", cases()[first])
    if wanted is None or "documents" in wanted:
        sides = {"apart": ours(folder, first, steps, apart=True), "together": ours(folder, first, steps)}
        yield compare("documents kept apart beside not", take_turns(sides, rounds), "apart", "together", cases()[first])
        sides = {"compiled": ours(folder, first, steps), "eager": ours(folder, first, steps, compiled=False)}
        yield compare("compiled beside eager", take_turns(sides, rounds), "compiled", "eager", cases()[first])


def beside_transformers(folder: Path, name: str, case: Case, steps: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Ours beside transformers' model of the same sizes; on a GPU also the share of its peak."""
    sides = {"ours": ours(folder, name, steps), "transformers": in_process("transformers", name, steps)}
    if not torch.cuda.is_available():
        sides["transformers fp32"] = in_process("transformers fp32", name, steps)
    found = take_turns(sides, rounds)
    target = {"llama": 1.5, "gpt2": 1.2}.get(name)
    yield compare(f"{name}, beside transformers' (compiled, bf16 autocast)", found, "ours", "transformers", case, target)
    if "transformers fp32" in found:
        yield compare(f"{name}, beside transformers' (compiled, fp32)", found, "ours", "transformers fp32", case)
    for side, peaks in found.items():
        yield row(f"{name}, peak memory of {side}", "GB", statistics.median(one["peak_bytes"] for one in peaks) / 1e9)
    rate = statistics.median(tokens_per_second(case, one["seconds"]) for one in found["ours"])
    yield row(f"{name}, ours", "tokens/s", rate, None, {"olmo2-1b": 59_000, "gpt2-124m": 520_000}.get(name))
    yield from utilisation_rows(configure(folder, name, steps, 1, True, False), name, case, rate)


def utilisation_rows(config: RunConfig, name: str, case: Case, rate: float) -> Iterator[dict[str, Any]]:
    """Model FLOPs utilisation by each formula. Nothing is computed again in these cases, so the hardware's share is the causal one."""
    from pretrain.model.operations import tabulate_model

    per_token = tabulate_model(config.model, case.micro_batch, case.length, 2).training_flops_per_token()
    peak, what = PEAK_FLOPS, "its bf16 peak"
    if not torch.cuda.is_available():
        peak, what = in_process("peak", name, 9)()["flops"], "a product of 2,048 cubed"
    for formula, said, goal in (("palm", "PaLM's formula", {"llama-1b": 0.55}.get(name)), ("causal", "causal and hardware", None)):
        label = f"{name}, share of {peak / 1e12:.3g} TFLOP/s ({what}), {said}"
        yield row(label, "%", 100 * rate * per_token[formula] / peak, None, goal and 100 * goal)


def large_rows(steps: int, rounds: int) -> Iterator[dict[str, Any]]:
    """What one GPU holds with bf16 states only, in a bare loop: `pretrain train` keeps weights and moments in fp32."""
    for name, case in LARGE_CASES.items():
        if torch.cuda.get_device_properties(0).total_memory < 130e9:
            tell(f"  {name}: needs a GPU of 141 GB")
            continue
        answers = take_turns({name: in_process("bf16 states", name, steps)}, rounds)[name]
        rate = statistics.median(tokens_per_second(case, one["seconds"]) for one in answers)
        yield row(f"{name}, a bare loop with bf16 states", "tokens/s", rate, None, 10_000)
        yield row(f"{name}, its peak memory", "GB", statistics.median(one["peak_bytes"] for one in answers) / 1e9)


def compare(
    name: str, found: dict[str, list[dict[str, float]]], one: str, other: str, case: Case, target: float | None = None, times: int = 1
) -> dict[str, Any]:
    """A row of tokens per second of two sides, `times`: how much more than a micro-batch the first learns from in a step."""
    rates = {side: [tokens_per_second(case, answer["seconds"]) for answer in answers] for side, answers in found.items()}
    rates[one] = [rate * times for rate in rates[one]]
    note = ", ".join(f"{side} {min(rates[side]):,.0f}-{max(rates[side]):,.0f}" for side in (one, other))
    return row(name, "tokens/s", statistics.median(rates[one]), statistics.median(rates[other]), target, note=note)


def tokens_per_second(case: Case, seconds: float) -> float:
    """Of one rank."""
    return case.micro_batch * case.accumulation * case.length / seconds


def take_turns(sides: dict[str, Side], rounds: int) -> dict[str, list[dict[str, float]]]:
    """What each side answers, round by round; a first round, in which code is compiled, is not counted."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            answer = side()
            tell(f"  round {number} {name}: {answer['seconds'] * 1e3:.1f} ms a step, {answer['peak_bytes'] / 1e9:.2f} GB")
            if number:
                found[name].append(answer)
    return found


# --- ours --------------------------------------------------------------------------------------------------------


def ours(
    folder: Path,
    name: str,
    steps: int,
    ranks: int = 1,
    environment: dict[str, str] | None = None,
    compiled: bool = True,
    apart: bool = False,
) -> Side:
    """`pretrain train` from its start to its end; of its steps the later ones count."""

    def measure() -> dict[str, float]:
        shutil.rmtree(folder / "runs", ignore_errors=True)
        configure(folder, name, steps, ranks, compiled, apart)
        command = [sys.executable, "-m", "pretrain.cli", "train", str(folder / "step.yaml")]
        peak_bytes = run_quietly(command, {"OMP_NUM_THREADS": str(os.cpu_count() or 1)} | (environment or {}))
        rows = [json.loads(line) for line in (folder / "runs/step/metrics.jsonl").read_text().splitlines()]
        case = cases()[name]
        per_step = case.micro_batch * case.accumulation * case.length * ranks
        times = [per_step / one["tokens_per_second"] for one in rows if "tokens_per_second" in one]
        return {"seconds": statistics.median(times[len(times) // 3 :]), "peak_bytes": peak_bytes}

    return measure


def run_quietly(command: list[str], environment: dict[str, str]) -> float:
    """Run a command to its end; gives the largest memory of one of its processes. What it said is shown where it failed."""
    done = subprocess.run(
        [sys.executable, "-c", WRAPPER, *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True, check=False, timeout=1800,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return float(done.stdout.splitlines()[-1])


# Runs a command and prints, in a line of its own, the peak of its largest process.
WRAPPER = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(code)
"""


# --- sides in a process of their own -----------------------------------------------------------------------------


def in_process(side: str, name: str, steps: int) -> Side:
    """A side that is a loop in a process of its own, with the allocator's settings and threads of ours."""

    def measure() -> dict[str, float]:
        command = [sys.executable, str(Path(__file__).with_name("step_sides.py")), side, name, str(steps)]
        environment = {} if torch.cuda.is_available() else {**ALLOCATOR, "OMP_NUM_THREADS": str(os.cpu_count() or 1)}
        environment |= {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=1800)
        if done.returncode:
            raise SystemExit(f"{side} failed:\n{done.stderr[-4000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    return measure


# --- tokens ------------------------------------------------------------------------------------------------------


def write_tokens(folder: Path) -> None:
    """A shard of 4 million random tokens in documents of 500, with its manifest."""
    import numpy as np

    from configs.durable import sha256_of_file

    rng = np.random.default_rng(1)
    name, prefix = "units/00000/train", folder / "units/00000/train"
    prefix.parent.mkdir(parents=True)
    documents = [rng.integers(0, 8000, 500, dtype=np.uint16) for _ in range(8000)]
    with ShardWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add_documents(documents)
    write_checksums(prefix)
    counts = Counts(num_tokens=4_000_000, num_documents=8000, num_bytes=16_000_000)
    files = {
        f"{name}{suffix}": FileRecord(bytes=Path(f"{prefix}{suffix}").stat().st_size, sha256=sha256_of_file(Path(f"{prefix}{suffix}")))
        for suffix in (".bin", ".idx", ".crc32c")
    }
    record = ShardRecord(name=name, files=files, sources={"random": counts}, **counts.model_dump())
    write_manifest(folder, make_manifest([record], (), "uint16", 8192))


if __name__ == "__main__":
    main()

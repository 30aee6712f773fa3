"""Run folders for tests of what reads them: written by the contract, row by row, as a run of that many steps would have left them."""

import json
import math
import random
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

TOKENS_PER_STEP = 4096
POSITION = ("step", "tokens_seen", "attempt", "time")
BEGAN = 1_760_000_000.0


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run_folder(
    folder: Path,
    num_steps: int = 300,
    attempts: int = 3,
    seed: int = 7,
    sources: tuple[str, ...] = ("web", "code"),
    only: tuple[str, ...] | None = None,
) -> Path:
    """A finished run whose attempts but the last were killed, with every kind of row. Its data is not there.

    only: the values of rows that are written, for a page that is drawn at once; None: all.
    """
    chosen = random.Random(seed)
    folder.mkdir(parents=True)
    tokens = num_steps * TOKENS_PER_STEP
    (folder / "run.yaml").write_text(
        f"data: {{root: {folder}/no-such-data, tokenizer: {{vocabulary_size: 300}}}}\n"
        "model: {vocabulary_size: 320, num_layers: 2, width: 48, num_heads: 4, largest_context: 64}\n"
        f"training: {{sequence_length: 64, global_batch_samples: 64, micro_batch_samples: 2, total_tokens: {tokens}}}\n"
        f"schedule: {{warmup_tokens: {tokens // 10}, decay_tokens: {tokens // 4}}}\n"
        f"optimizer: {{peak_lr: {0.001 * seed}}}\n"
        f"run: {{root: {folder.parent}, name: {json.dumps(folder.name)}}}\n"
    )
    environment = {"python": "3.11", "versions": {"torch": "2.13", "wandb": None}, "git_commit": "0" * 40, "host": "node-1", "cpu_count": 8}
    (folder / "environment.json").write_text(json.dumps(environment))
    write_lines(folder / "metrics.jsonl", list(metric_rows(num_steps, attempts, chosen, sources, only)))
    each = num_steps // attempts
    rows: list[dict[str, Any]] = []
    timeline: list[dict[str, Any]] = []
    for attempt in range(1, attempts + 1):
        began, last = BEGAN + 1000 * attempt, attempt == attempts
        first, end = (attempt - 1) * each, num_steps if last else attempt * each + 7
        rows.append(
            {
                "attempt": attempt,
                "host": "node-1",
                "started": iso(began),
                "end": iso(began + 800),
                "status": 0 if last else 1,
                "cause": "done" if last else "rank 1 was killed by SIGKILL",
                "first_step": first,
                "last_step": end,
                "committed": num_steps if last else attempt * each,
            }
        )
        phases = [
            (0, "start", first),
            (20, "first_step", first),
            (30, "step", first + 1),
            (500, "evaluate", end - 5),
            (530, "step", end - 5),
        ]
        phases += [(700, "save", end), (720, "end" if last else "step", end)]
        timeline += [
            {"attempt": attempt, "time": began + second, "phase": phase, "step": step, "waited": second / 50}
            for second, phase, step in phases
        ]
    write_lines(folder / "attempts.jsonl", rows)
    write_lines(folder / "timeline.jsonl", timeline)
    write_lines(
        folder / "samples.jsonl",
        [
            {"step": step, "tokens_seen": step * TOKENS_PER_STEP, "attempt": 1, "prompt": prompt, "text": f" text at {step}\nin two lines."}
            for step in range(50, num_steps + 1, 50)
            for prompt in ("Once upon a time", "def read_file(path):")
        ],
    )
    profile = folder / "profile" / "attempt-1" / "steps-10-13"
    profile.mkdir(parents=True)
    (profile / "rank-0.md").write_text("| operation | ms |\n| --- | --- |\n| aten::mm | 12.5 |\n")
    (profile / "rank-0.json.gz").write_bytes(b"\x1f\x8b")
    return folder


def iso(seconds: float) -> str:
    """As attempts.jsonl has it."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")


def metric_rows(
    num_steps: int, attempts: int, chosen: random.Random, sources: tuple[str, ...], only: tuple[str, ...] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of metrics.jsonl, each step once."""
    for row in _all_rows(num_steps, attempts, chosen, sources):
        yield {key: value for key, value in row.items() if only is None or key in (*only, *POSITION)}


def _all_rows(num_steps: int, attempts: int, chosen: random.Random, sources: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    each = num_steps // attempts
    for step in range(1, num_steps + 1):
        attempt = min(attempts, (step - 1) // each + 1)
        loss = 3 + 7 * math.exp(-step / (num_steps / 6)) + chosen.gauss(0, 0.06)
        row = {"step": step, "tokens_seen": step * TOKENS_PER_STEP, "attempt": attempt, "time": BEGAN + step}
        seconds = {part: abs(chosen.gauss(mean, mean / 20)) for part, mean in SECONDS.items()}
        rate = TOKENS_PER_STEP / sum(seconds.values())
        yield {
            **row,
            "loss": loss,
            "learning_rate": 1e-3 * min(1, step / (num_steps / 10)),
            "gradient_norm": abs(chosen.gauss(1.2, 0.2)) + (30 if step == num_steps // 2 else 0),
            "tokens_per_second": rate,
            "tokens_per_second_per_device": rate / 2,
            "data_wait_share": seconds["data_wait"] / sum(seconds.values()),
            "skipped_steps": 0,
            "step_seconds": sum(seconds.values()),
            **{f"seconds/{part}": value for part, value in seconds.items()},
            "mfu/palm": rate / 60_000,
            "mfu/causal": rate / 65_000,
            "mfu/hardware": rate / 50_000,
            "memory/allocated_bytes": 41_000_000_000 + 1_000_000 * (step % 7),
            "memory/reserved_bytes": 52_000_000_000,
            "memory/host_bytes": 3_000_000_000 + 100_000 * step,
        }
        if step % 50 == 0:
            yield {**row, "ranks/slowest": 1, "ranks/slowest_node": "node-1", "ranks/slowest_ratio": 1.1, "ranks/median_seconds": 0.1}
            held_out = {"held_out/nats_per_token": loss + 0.1, "held_out/bits_per_byte": (loss + 0.1) / 2.5, "held_out/num_tokens": 10_000}
            for number, source in enumerate(sources):
                held_out[f"held_out/{source}/nats_per_token"] = loss + 0.2 * number
                held_out[f"held_out/{source}/bits_per_byte"] = (loss + 0.2 * number) / 2.5
                held_out[f"held_out/{source}/num_tokens"] = 5000
            yield {**row, **held_out}
            layers = {f"norm/gradients/layers.{n}": 0.1 * (n + 1) for n in range(12)} | {
                f"norm/weights/layers.{n}": 2.0 + n for n in range(12)
            }
            yield {**row, "parameter_norm": 12.0 + step / num_steps, **layers}
            yield {**row, "task/arithmetic/exact_match": step / num_steps}
            yield {**row, "checkpoint/stall_seconds": 0.2 + step % 3, "checkpoint/bytes": 1_000_000, "checkpoint/kind": "durable"}
        if step == num_steps // 2:
            yield {**row, "spike/loss": 9.0, "spike/median": 3.1, "spike/deviations": 12.0}


SECONDS = {"data_wait": 0.002, "forward": 0.03, "backward": 0.06, "optimizer": 0.01, "other": 0.003}

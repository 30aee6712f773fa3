"""The demo: the whole way, end to end, on this machine, in minutes. Every number it prints was measured in that run.

In: nothing (or a corpus). Out: token shards, a trained run folder, a paragraph of text. Each part is the command that a
user would give; this file only gives them one after the other.
"""

import lzma
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from math import gcd
from pathlib import Path
from statistics import median

import yaml
from rich.console import Console

from configs.changes import differing_keys
from configs.durable import write_file
from configs.errors import EXIT_DONE, EXIT_RESUMABLE, UserError
from configs.loader import PACKAGED, dump_config, load_config
from configs.schema import RunConfig
from data_pipeline.manifest import load_manifest
from data_pipeline.shards import Shard
from data_pipeline.tokenizer import load_tokenizer
from pretrain.build import build_with_progress
from pretrain.checkpoint.verify import is_committed, list_commits, read_commit
from pretrain.run.folder import RunFolder
from pretrain.run.signals import end_with_parent
from pretrain.watch.metrics import METRICS_FILE, read_rows
from pretrain.write import write_text

RUN_FILE = PACKAGED / "runs" / "demo.yaml"
BLOCK_BYTES = 1 << 16
WAIT_GOAL = 0.001
"""The share of its time that training may wait for data."""


def run_demo(corpus: Path | None, prompt: str | None, packaged: Path = RUN_FILE) -> int:
    """Do everything that the `packaged` run file describes; returns the exit status. Raises UserError for a corpus that cannot be used."""
    began = time.monotonic()
    say = Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print
    config = choose_run(corpus, packaged)
    folder = RunFolder.of(config)

    say("1/5  text, tokenizer, shards")
    build_with_progress(config.data, say)
    manifest = load_manifest(Path(config.data.folder()))
    run_file = folder.path.parent / f"{config.run.name}.yaml"
    run_file.parent.mkdir(parents=True, exist_ok=True)
    write_file(run_file, dump_config(config).encode())

    total = config.training.total_steps
    say(f"\n2/5  training to half way ({total // 2} of {total} steps), then a stop, as a preemption would")
    first = _train(run_file, folder, stop_at_step=total // 2)
    if first == EXIT_DONE:
        say("     (it was already past that)")
    elif first != EXIT_RESUMABLE:
        return first
    say("\n3/5  a fresh process resumes from its checkpoint and trains to the end")
    second = _train(run_file, folder, stop_at_step=None)
    if second != EXIT_DONE:
        return second

    say("\n4/5  held-out text: the model and xz")
    comparison = _compare_with_xz(Path(config.data.folder()), config, folder)
    say(f"     {comparison}")

    say("\n5/5  a paragraph")
    prompt = prompt if prompt is not None else ("def read_lines(path):\n" if corpus is None else "")
    pieces = write_text(folder, prompt, say=say, max_new_tokens=160, temperature=0.7, top_k=None, top_p=0.95, seed=0)
    sys.stdout.write("".join(pieces) + "\n")
    sys.stdout.flush()

    newest = read_commit(list_commits(folder.checkpoints)[0])
    say(
        f"\ndone in {time.monotonic() - began:.0f} s\n"
        f"  shards      {config.data.folder()}: {sum(shard.num_tokens for shard in manifest.shards('train')):,} tokens to learn from\n"
        f"  run         {folder.path}: {newest.state.step} steps, {newest.state.tokens_seen:,} tokens, "
        f"{len(folder.attempts())} attempts\n"
        f"  held out    {comparison}\n"
        f"  data wait   {describe_data_wait(folder, config.training.sequence_length, config.training.steps.samples_before)}\n"
        f"next:\n"
        f'  pretrain generate {_short(folder.path)} --prompt "class " --temperature 0.5\n'
        f"  pretrain checkpoints verify {_short(folder.path)}\n"
        f"  pretrain train {_short(run_file)} run.name=longer training.total_tokens={4 * config.training.total_tokens}"
    )
    return EXIT_DONE


def _compare_with_xz(dataset: Path, config: RunConfig, folder: RunFolder) -> str:
    """Bits per byte of the held-out text: the model's last evaluation, and xz."""
    text = held_out_text(dataset, config.data.tokenizer.end_of_text)
    bits = [row["held_out/bits_per_byte"] for row in read_rows(folder.path / METRICS_FILE) if "held_out/bits_per_byte" in row]
    if not text or not bits:
        return "nothing: the corpus has too few documents to keep one back"
    model_bits, xz_bits = bits[-1], xz_bits_per_byte(text)
    verdict = "below" if model_bits < xz_bits else f"above, by {model_bits - xz_bits:.3f}"
    return f"{len(text):,} bytes: model {model_bits:.3f} bits per byte, xz -9 in 64 kB blocks {xz_bits:.3f} (model {verdict})"


def describe_data_wait(folder: RunFolder, num_tokens: int, samples_before: Callable[[int], int] = int) -> str:
    """The share of its time that training (rank 0) waited for data: of all logged steps, and the median of the rows that log them.

    samples_before: how many samples, each of `num_tokens` tokens, are seen before a step; int: one is seen in each.

    A row spans the steps since the row before it, or since its attempt began: the first one of an attempt also holds the wait for
    what is read first. Saves and evaluations between steps are part of the time. Steps that no row tells of are left out.
    """
    begins = {attempt["attempt"]: attempt.get("first_step") for attempt in folder.attempts()}
    last_step, num_steps, seconds, seconds_waited = 0, 0, 0.0, 0.0
    shares: list[float] = []
    for row in read_rows(folder.path / METRICS_FILE):
        if "data_wait_share" not in row:
            continue
        begin = begins.get(row["attempt"]) or 0
        # An attempt that crashed does not know its beginning.
        first_step = begin if last_step < begin < row["step"] else last_step
        took = (samples_before(row["step"]) - samples_before(first_step)) * num_tokens / row["tokens_per_second"]
        last_step, num_steps, seconds = row["step"], num_steps + row["step"] - first_step, seconds + took
        seconds_waited += row["data_wait_share"] * took
        shares.append(row["data_wait_share"])
    if not shares:
        return "nothing: no step was logged"
    return (
        f"{100 * seconds_waited / seconds:.4f} % of the time of {num_steps} steps ({seconds:.0f} s), {100 * median(shares):.4f} % in the "
        f"median of their {len(shares)} rows in {METRICS_FILE} (goal: under {100 * WAIT_GOAL:g} %)"
    )


def held_out_text(dataset: Path, end_of_text: str) -> bytes:
    """The held-out documents' text, read back from the shards (byte-level tokens lose nothing)."""
    manifest = load_manifest(dataset)
    tokenizer = load_tokenizer(dataset / "tokenizer.json", end_of_text)
    parts: list[str] = []
    for described in manifest.shards("held_out"):
        shard = Shard(dataset / described.name)
        parts += [
            tokenizer.decode([int(token) for token in shard.document(i)[:-1]], skip_special_tokens=False)
            for i in range(shard.num_documents)
        ]
    return "".join(parts).encode()


def xz_bits_per_byte(text: bytes) -> float:
    """What `xz -9` needs for the text cut into blocks of 64 kB, in bits per byte of text."""
    blocks = [text[start : start + BLOCK_BYTES] for start in range(0, len(text), BLOCK_BYTES)]
    return 8 * sum(len(lzma.compress(block, preset=9)) for block in blocks) / max(1, len(text))


def choose_run(corpus: Path | None, packaged: Path) -> RunConfig:
    """The demo's configuration, under the first name that is free or holds this very demo, unfinished."""
    overrides: list[str] = []
    if corpus is not None:
        if not corpus.exists():
            raise UserError(f"{corpus}: no such file or folder; --corpus wants a folder, .txt, .jsonl[.gz|.zst] or .parquet.")
        name = load_name(corpus)
        source = {"name": name, "path": str(corpus.resolve())}
        overrides = [
            f"data.sources={yaml.safe_dump([source], default_flow_style=True, width=100_000).strip()}",
            f"data.root=datasets/{name}",
        ]
        overrides.append("data.held_out_fraction=0.05")
    import torch

    base = load_config(packaged, overrides)
    if devices := torch.cuda.device_count():
        samples = gcd(*base.training.steps.sizes)
        ranks = max(n for n in range(1, devices + 1) if samples % n == 0)
        overrides += [f"parallel.processes={ranks}", f"training.micro_batch_samples={samples // ranks}"]
    for number in range(1, 1000):
        name = "demo" if number == 1 else f"demo-{number}"
        config = load_config(packaged, [*overrides, f"run.name={name}"])
        folder = RunFolder.of(config)
        if not folder.config_file.is_file():
            return config
        if not is_committed(folder.checkpoints, config.training.total_steps) and not differing_keys(folder.load_config(), config):
            return config
    raise UserError("runs/ holds a thousand demos; delete some.")


def load_name(corpus: Path) -> str:
    """A dataset's name from its corpus' own."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in corpus.resolve().name.split(".")[0]).strip("._-")[:60] or "corpus"


def _train(run_file: Path, folder: RunFolder, stop_at_step: int | None) -> int:
    """`pretrain train RUN.yaml` in a process of its own; at a step, ask it to stop as a scheduler would (SIGTERM)."""
    with start_training(run_file) as process:
        while process.poll() is None:
            time.sleep(0.5)
            rows = read_rows(folder.path / METRICS_FILE) if stop_at_step is not None else []
            if rows and rows[-1]["step"] >= (stop_at_step or 0):
                process.send_signal(signal.SIGTERM)
                stop_at_step = None
        return process.returncode


@contextmanager
def start_training(run_file: Path) -> Generator[subprocess.Popen[bytes], None, None]:
    """`pretrain train RUN.yaml` in a process of its own; nothing of it is left behind."""
    stop_with_us = partial(end_with_parent, os.getpid(), signal.SIGTERM)  # a demo that is killed leaves no training behind
    process = subprocess.Popen(
        [sys.executable, "-m", "pretrain.cli", "train", str(run_file)], preexec_fn=stop_with_us, env={**os.environ, "PYTHONSAFEPATH": "1"}
    )
    try:
        yield process
    except KeyboardInterrupt:
        process.wait(60)  # Ctrl-C reached it too: it is saving
        raise
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)

"""How fast and how lean the data pipeline is, beside its peers, in one run: jsonl.zst to shards, sidecars, hashes, manifest.

Run: .venv/bin/python benchmarks/data.py [--quick] [--json] [--peer-python PYTHON]

In: distinct text of this machine (`corpus.py`), 400 MB (40 with --quick) in 24 jsonl.zst files, and a byte-level tokenizer of
32,768 entries made from it. The sides take turns, and each row gives medians of the rounds:

    ours        build_dataset on Ray, two workers that are warm (what starting Ray takes is a row of its own)
    pool        the same functions on multiprocessing instead of Ray
    bare        what is left when nothing is promised: unpack, parse, encode with fastokens, write ids, two processes
    datatrove   0.10.1: JsonlReader and DocumentTokenizer, two local workers; one round, it takes minutes

Then builds with 1, 2 and 4 workers, which have to give the same bytes; builds of one text and of ten times that text (under
other ids), whose workers have to need the same memory; and, each with a script of its own, the filters (`data_filters.py`) and
deduplication (`data_minhash.py`). With --json one object per row: name, unit, ours, peer, ratio, target, met.

datatrove lives in an environment of its own below the cache folder ($XDG_CACHE_HOME or ~/.cache)/pretrain/peers, which
`data_filters.py` makes too; --peer-python takes a Python that has it.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

# One core for each worker, whatever the libraries would like to take.
os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", RAY_USAGE_STATS_ENABLED="0")
sys.path.insert(0, str(Path(__file__).parent))

import data_filters
import fastokens
import numpy as np
import orjson
import zstandard
from corpus import distinct_texts, write_jsonl_zst

from configs.data_section import DataSection, SourceSection, TokenizerSection
from configs.durable import sha256_of_file
from data_pipeline.build import BuildResult, build_dataset
from data_pipeline.execution import Run, open_ray
from data_pipeline.sources import plan_units, read_unit
from data_pipeline.tokenizer import train_tokenizer

END = "<|endoftext|>"
WORKERS = 2
NUM_FILES = 24
PEER = """
import json, sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
corpus, tokenizer, output, tasks = sys.argv[1:]
if __name__ == "__main__":
    steps = [
        JsonlReader(corpus, compression="zstd", glob_pattern="*.jsonl.zst"),
        DocumentTokenizer(output, tokenizer_name_or_path=tokenizer, eos_token="<|endoftext|>", shuffle_documents=False),
    ]
    LocalPipelineExecutor(steps, tasks=int(tasks), workers=2, logging_dir=output + "-logs").run()
"""


def main() -> None:
    """Print every row as soon as it is measured."""
    parser = argparse.ArgumentParser(description="How fast and lean the data pipeline is, beside its peers.")
    parser.add_argument("--quick", action="store_true", help="a tenth of the text, fewer rounds: about a minute")
    parser.add_argument("--json", action="store_true", help="one object per row")
    parser.add_argument("--peer-python", help="a Python with datatrove 0.10.1; without it an environment is made")
    options = parser.parse_args()
    peer = options.peer_python or data_filters.make_peer_environment()
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as name:
        for row in measure(Path(name), options.quick, peer):
            print(json.dumps(row) if options.json else show(row), flush=True)
        for script in ("data_filters.py", "data_minhash.py"):
            command = [sys.executable, str(Path(__file__).with_name(script)), "--json", "--peer-python", peer]
            lines = subprocess.run([*command, *(["--quick"] if options.quick else [])], capture_output=True, text=True, check=True).stdout
            for line in lines.splitlines():
                print(line if options.json else show(json.loads(line)), flush=True)


def measure(folder: Path, quick: bool, peer: str) -> Iterator[dict[str, Any]]:
    """All rows of the whole way."""
    corpus, tokenizer = folder / "corpus", folder / "tokenizer.json"
    num_documents, num_bytes = write_jsonl_zst(corpus, 40_000_000 if quick else 400_000_000, NUM_FILES)
    sample = (text for _, text in distinct_texts(30_000_000))
    tokenizer.write_text(train_tokenizer(sample, 32768, END).to_str(), encoding="utf-8")
    tell(f"{num_documents} documents, {num_bytes / 1e6:.0f} MB of text, {NUM_FILES} files, {os.cpu_count()} cores")
    with started_ray(folder, WORKERS) as (run, seconds):
        yield row("start-up of a local Ray, to its first result", "s", seconds, target=6, most=True)
        with started_pool(WORKERS) as pool:
            sides: dict[str, Callable[[], float]] = {
                "ours": partial(time_build, corpus, folder / "ours", tokenizer, run),
                "pool": partial(time_build, corpus, folder / "pool", tokenizer, pool),
                "bare": partial(time_bare, corpus, folder / "bare", tokenizer, pool),
            }
            seconds_of = take_turns(sides, 3 if quick else 5)
    seconds_of["datatrove"] = [time_peer(corpus, folder / "datatrove", tokenizer, peer)]
    num_tokens = count_tokens(folder / "bare")
    assert count_tokens(folder / "ours") == num_tokens == count_tokens(folder / "datatrove"), "the sides differ in what they made"
    rates = {side: num_tokens / 1e6 / statistics.median(times) / WORKERS for side, times in seconds_of.items()}
    spread = {side: f"{min(times):.2f}-{max(times):.2f} s" for side, times in seconds_of.items()}
    unit = "M tokens/s per core"
    yield row("whole way, beside datatrove", unit, rates["ours"], rates["datatrove"], 12, note=spread["ours"])
    yield row("whole way, beside bare encoding", unit, rates["ours"], rates["bare"], 0.5, note=spread["bare"])
    yield row("Ray beside multiprocessing, same functions", unit, rates["ours"], rates["pool"], 1 / 1.1, note=spread["pool"])
    yield from measure_parts(corpus, folder, tokenizer, num_bytes)
    yield from measure_scaling(corpus, folder, tokenizer, num_tokens, 1 if quick else 3)
    yield from measure_memory(folder, tokenizer, quick)


def measure_parts(corpus: Path, folder: Path, tokenizer: Path, num_bytes: int) -> Iterator[dict[str, Any]]:
    """What a unit's time is spent on, in this process, by leaving out more and more."""

    def read() -> None:
        for unit in plan_units(section(corpus, folder / "none", tokenizer, 1)).units:
            for _ in read_unit(unit, 50_000_000):
                pass

    encoder = fastokens.Tokenizer.from_file(str(tokenizer))
    texts = [line["text"] for path in sorted(corpus.iterdir())[:4] for line in read_lines(path)]

    def encode() -> None:
        for start in range(0, len(texts), 100):
            encoder.encode_batch_flat(texts[start : start + 100], False, True)

    whole = min(time_build(corpus, folder / "here", tokenizer, run_here) for _ in range(2))
    share = num_bytes / sum(len(text.encode()) for text in texts)
    parts = {"reading and parsing": min(timed(read) for _ in range(2)), "encoding": min(timed(encode) for _ in range(2)) * share}
    parts["checks, shuffling, writing, hashing, syncing"] = whole - sum(parts.values())
    for name, seconds in parts.items():
        yield row(f"of one core's time: {name}", "%", 100 * seconds / whole)


def measure_scaling(corpus: Path, folder: Path, tokenizer: Path, num_tokens: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Workers change the time and not a byte."""
    times: dict[int, list[float]] = {1: [], 2: [], 4: []}
    hashes: set[str] = set()
    for _ in range(rounds):
        for workers in times:
            with started_ray(folder, workers) as (run, _):
                time_build(corpus, folder / "scaled", tokenizer, run, workers)  # its workers load libraries and the tokenizer
                times[workers].append(time_build(corpus, folder / "scaled", tokenizer, run, workers))
            hashes.add(sha256_of_file(folder / "scaled" / "manifest.json"))
    one, two, four = (num_tokens / 1e6 / statistics.median(times[workers]) for workers in (1, 2, 4))
    yield row("two workers beside one", "M tokens/s", two, one, 1.8)
    yield row("four workers beside one (on 2 cores: nothing to gain)", "M tokens/s", four, one)
    yield row("different manifests among builds with 1, 2 and 4 workers", "manifests", len(hashes), target=1, most=True)


def measure_memory(folder: Path, tokenizer: Path, quick: bool) -> Iterator[dict[str, Any]]:
    """Largest resident memory of a worker: for a text, and for the same text ten times under other ids."""
    peaks: list[float] = []
    size = 20_000_000 if quick else 200_000_000
    for repeats in (1, 10):
        corpus = folder / f"repeated-{repeats}"
        write_jsonl_zst(corpus, size, 16 * repeats, repeats)
        with started_ray(folder, WORKERS) as (run, _):
            shutil.rmtree(folder / "memory", ignore_errors=True)
            result = build(corpus, folder / "memory", tokenizer, run)
        peaks.append(max(stage["peak_worker_bytes"] for stage in result.report["stages"]) / 1e6)
        yield row(f"peak of a worker, {size * repeats / 1e6:.0f} MB of text", "MB", peaks[-1], target=1000, most=True)
        shutil.rmtree(corpus)
    yield row("peak of a worker, ten times the text beside the text", "MB", peaks[1], peaks[0], 1.1, most=True)


# --- the sides -------------------------------------------------------------------------------------------------


def section(corpus: Path, root: Path, tokenizer: Path, workers: int) -> DataSection:
    """The build that is measured: no rules, the tokenizer given."""
    source = SourceSection(name="text", path=str(corpus), id_field="id")
    settings = TokenizerSection(path=str(tokenizer))
    return DataSection(root=str(root), sources=(source,), tokenizer=settings, workers=workers, work_unit_bytes=1)


def build(corpus: Path, root: Path, tokenizer: Path, run: Run, workers: int = WORKERS) -> BuildResult:
    """A build into a folder that is not there yet, by workers that are."""
    engine: Callable[[int, Path], AbstractContextManager[Run]] = lambda *_: nullcontext(run)  # noqa: E731
    return build_dataset(section(corpus, root, tokenizer, workers), lambda _: None, engine)


def time_build(corpus: Path, root: Path, tokenizer: Path, run: Run, workers: int = WORKERS) -> float:
    """Seconds of a whole build; what an earlier one left goes first, untimed."""
    shutil.rmtree(root, ignore_errors=True)
    return timed(lambda: build(corpus, root, tokenizer, run, workers))


def time_bare(corpus: Path, output: Path, tokenizer: Path, run: Run) -> float:
    """Seconds of nothing but unpacking, parsing, encoding and writing ids, side by side."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    return timed(lambda: list(run(partial(encode_bare, str(tokenizer), output), sorted(corpus.iterdir()))))


def encode_bare(tokenizer: str, output: Path, path: Path) -> None:
    """One file's ids, uint16, an end of text behind each document."""
    encoder = BARE.setdefault(tokenizer, fastokens.Tokenizer.from_file(tokenizer)) if tokenizer not in BARE else BARE[tokenizer]
    end = np.array([encoder.token_to_id(END)], dtype=np.uint16)
    with (output / f"{path.name}.bin").open("wb") as file:
        for line in read_lines(path):
            ids, _ = encoder.encode_batch_flat([line["text"]], False, True)
            file.write(np.frombuffer(ids, np.uint32).astype(np.uint16).tobytes() + end.tobytes())


BARE: dict[str, Any] = {}


def time_peer(corpus: Path, output: Path, tokenizer: Path, python: str) -> float:
    """Seconds of datatrove, its start included (a few of several minutes)."""
    script = output.with_name("peer.py")
    script.write_text(PEER, encoding="utf-8")
    command = [python, str(script), str(corpus), str(tokenizer), str(output), str(NUM_FILES)]
    return timed(lambda: subprocess.run(command, check=True, capture_output=True, timeout=1800))


def read_lines(path: Path) -> Iterator[dict[str, str]]:
    """The objects of a jsonl.zst."""
    content = zstandard.ZstdDecompressor().stream_reader(path.open("rb")).read()
    yield from map(orjson.loads, content.splitlines())


def run_here(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Generator[tuple[Any, Any], None, None]:
    """One task after the other, in this process."""
    yield from ((task, function(task)) for task in tasks)


@contextmanager
def started_ray(folder: Path, workers: int) -> Iterator[tuple[Run, float]]:
    """A local Ray whose workers have imported all they need, and the seconds to its first result."""
    scratch = Path(tempfile.mkdtemp(prefix="r", dir=folder.parent))
    try:
        with open_ray(workers, scratch) as run:
            seconds = timed(lambda: list(run(warm, [0])))
            list(run(warm, range(4 * workers)))
            yield run, seconds
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def started_pool(workers: int) -> Iterator[Run]:
    """Processes of multiprocessing, warm as well."""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:

        def run(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Generator[tuple[Any, Any], None, None]:
            yield from pool.imap_unordered(partial(call, function), tasks)

        list(run(warm, range(4 * workers)))
        yield run


def call(function: Callable[[Any], Any], task: Any) -> tuple[Any, Any]:
    """A task with its result."""
    return task, function(task)


def warm(task: int) -> int:
    """Import what units need, and take long enough for every worker to get one."""
    import data_pipeline.units  # noqa: F401

    time.sleep(0.2)
    return task


# --- figures ---------------------------------------------------------------------------------------------------


def take_turns(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, round by round; a first round of each is not counted."""
    for side in sides.values():
        side()
    return {
        name: list(times)
        for name, times in zip(sides, zip(*([side() for side in sides.values()] for _ in range(rounds)), strict=True), strict=True)
    }


def timed(function: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def count_tokens(folder: Path) -> int:
    """Tokens of uint16 in a folder's files of ids."""
    suffixes = (".bin", ".ds")
    return sum(path.stat().st_size // 2 for path in folder.rglob("*") if path.suffix in suffixes)


def row(
    name: str, unit: str, ours: float, peer: float | None = None, target: float | None = None, most: bool = False, note: str = ""
) -> dict[str, Any]:
    """A row; the target is for the ratio where there is a peer, and is a bound from above with `most`."""
    ratio = None if peer is None else ours / peer
    measured = ours if ratio is None else ratio
    met = None if target is None else (measured <= target if most else measured >= target)
    return {"name": name, "unit": unit, "ours": ours, "peer": peer, "ratio": ratio, "target": target, "met": met, "note": note}


def show(row: dict[str, Any]) -> str:
    """A row for people."""
    peer = f"{row['peer']:10.2f}  x{row['ratio']:7.2f}" if row.get("peer") is not None else " " * 20
    target = "" if row.get("target") is None else f"target {row['target']:g} {'met' if row['met'] else 'MISSED'}"
    return f"{row['name']:62} {row['ours']:10.2f} {peer} {row['unit']:22} {target} {row.get('note', '')}".rstrip()


def tell(line: str) -> None:
    """A line that is not a result."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

"""How fast training reads its tokens and how soon it can start, beside Megatron-core and a bare numpy reader, in one run.

Run: .venv/bin/python benchmarks/loader.py [--quick] [--json] [--peer-python PYTHON]

In: nothing; a corpus of 1 billion uint16 tokens (100 million with --quick) is made up in 8 shards, documents of 500 tokens on
average, in a temporary folder. Samples have 2,048 targets, micro-batches 16 samples, global batches 256. Each side is a fresh
process that reads in one thread; the page cache is hot and every page mapped, where the name of a row does not say otherwise.
The sides take turns, and each row gives medians of the rounds, and their spread:

    ours        Batches, in full random order: tokens, labels, document boundaries and restarted positions as int32 tensors, every
                block of a file compared with its CRC32C when it is first touched
    bare        what is left when nothing is promised: memmap, a permutation drawn beforehand, int64 tokens and labels, no batches
    Megatron    megatron-core 0.16.1: GPTDataset over the same files, index built beforehand, sample by sample and never put into
                batches; all shards in an order drawn beforehand, so that nothing of blending is counted. Its positions do not
                restart; a row of its own has it restart them, which is what ours does always

Seconds are of the processor, which a machine that others use changes less, but for the thread's and where a disk is waited for.
How many pages the kernel had to give for each sample is noted: where memory is not used again that is half of the time.
Then what the order alone costs; a start and a resume on a manifest of 15 trillion tokens in 10,000 shards, which is made up and
needs no shards; and the same corpus when it has to come from the disk. With --json one object per row: name, unit, ours, peer,
ratio, target, met, note.

megatron-core lives below the cache folder ($XDG_CACHE_HOME or ~/.cache)/pretrain/peers, as for the tests; --peer-python takes
a Python that has it.
"""

import argparse
import gc
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import numpy as np
import torch
from data import row, show, take_turns, tell

from configs.durable import sha256_of_file
from configs.schema import MixtureSection, RunConfig, TrainingSection
from data_pipeline.checksums import write_checksums
from data_pipeline.manifest import FORMAT_VERSION, Manifest, write_manifest
from data_pipeline.records import Counts, DocumentCounts, FileRecord, InputRecord, ShardRecord
from data_pipeline.shards import ShardWriter
from pretrain.data import corpus as corpus_module
from pretrain.data.batches import Batches
from pretrain.data.corpus import Corpus, open_corpus
from pretrain.data.order import DataOrder, SourceSize

MEGATRON = "megatron-core==0.16.1"
LENGTH, MICRO_BATCH, GLOBAL_BATCH = 2048, 16, 256
STEP_TOKENS = LENGTH * GLOBAL_BATCH
NUM_SHARDS = 8
DOCUMENT_TOKENS = 500
VOCABULARY, END_OF_TEXT = 50_257, 50_256
TARGET_RATE, TARGET_RATIO, TARGET_SHARE = 200.0, 5.0, 0.5
TARGET_MILLISECONDS, TARGET_MEGABYTES = 100.0, 100.0
KINDS = ("ours", "first epoch", "first touch", "threaded", "bare")
LARGE_SHARDS, LARGE_TOKENS, LARGE_SOURCES, LARGE_BATCH = 10_000, 15 * 10**12, 5, 2048

# A process that opens the datasets, says how long that took, and then answers each line [restart positions?, seconds] as `serve`
# does.
PEER = """
import json, os, sys, time
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what a library prints is no answer

def answer(found):
    print(json.dumps(found), file=answers, flush=True)

prefixes, cache, length, vocabulary, end = json.loads(sys.argv[1])
try:
    import numpy, torch
    from megatron.core.datasets import helpers
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split
except Exception as error:
    answer({"why": f"{type(error).__name__}: {error}"[:200]})
    sys.exit()
torch.set_num_threads(1)

class Tokenizer:
    vocab_size, eod, pad, unique_identifiers = vocabulary, end, -1, {"class": "numbers"}

def open_datasets(restart):
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=length, blend=(prefixes, None), split="1,0,0", path_to_cache=cache, tokenizer=Tokenizer(),
        reset_position_ids=restart, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )
    files = [GPTDataset.build_low_level_dataset(prefix, config) for prefix in prefixes]
    documents = [numpy.arange(file.sequence_lengths.size, dtype=numpy.int32) for file in files]
    return [GPTDataset(*one, None, Split.train, config) for one in zip(files, prefixes, documents)]

def timed_open():
    began = time.perf_counter()
    open_datasets(False)
    return time.perf_counter() - began

built, cached = timed_open(), timed_open()
size = sum(os.path.getsize(os.path.join(cache, name)) for name in os.listdir(cache))
datasets = {restart: open_datasets(restart) for restart in (False, True)}
for one in datasets[False] + datasets[True]:
    numpy.asarray(one.dataset.bin_reader._bin_buffer)[:: 1024].sum()  # every page is mapped
pairs = [(number, sample) for number, one in enumerate(datasets[False]) for sample in range(len(one))]
order = [pairs[index] for index in numpy.random.default_rng(1).permutation(len(pairs))]
place = 0
answer({"built": built, "cached": cached, "bytes": size})
for line in sys.stdin:
    restart, seconds = json.loads(line)
    chosen, began, passed, count = datasets[restart], time.process_time(), 0.0, 0
    while passed < seconds:
        for _ in range(64):
            number, sample = order[place]
            found = chosen[number][sample]
            place = (place + 1) % len(order)
        count += 64
        passed = time.process_time() - began
    assert found["tokens"].shape == found["labels"].shape == (length,)
    answer({"pace": passed / (count * length) * 1e6})
"""


def main() -> None:
    """Print every row as soon as it is measured."""
    parser = argparse.ArgumentParser(description="How fast training reads its tokens and how soon it can start, beside its peers.")
    parser.add_argument("--quick", action="store_true", help="a tenth of the tokens, shorter rounds: under a minute")
    parser.add_argument("--json", action="store_true", help="one object per row")
    parser.add_argument("--peer-python", help="a Python with megatron-core 0.16.1; without it the wheel is fetched")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.start:
        print(json.dumps(start(options.start)))
        return
    if options.read:
        serve(options.read[0], Path(options.read[1]))
        return
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as name:
        for found in measure(Path(name), options.quick, options.peer_python):
            print(json.dumps(found) if options.json else show(found), flush=True)


def measure(folder: Path, quick: bool, peer_python: str | None) -> Iterator[dict[str, Any]]:
    """All rows."""
    rounds, seconds = (3, 0.5) if quick else (5, 3.0)
    dataset = folder / "dataset"
    began = time.perf_counter()
    num_tokens = write_dataset(dataset, 100_000_000 if quick else 1_000_000_000)
    tell(f"{num_tokens / 1e6:.0f} M tokens in {NUM_SHARDS} shards, written in {time.perf_counter() - began:.0f} s; {os.cpu_count()} cores")
    sides = {kind: Side([sys.executable, str(Path(__file__).resolve()), "--read", kind, str(dataset)]) for kind in KINDS}
    sides["Megatron"] = peer = start_megatron(dataset, folder / "index", peer_python)
    try:
        for side in sides.values():
            side.wait()
        yield from measure_speed(sides, rounds, seconds)
    finally:
        for side in sides.values():
            side.close()
    yield from measure_order(rounds, seconds)
    yield from measure_start(folder, dataset, peer, rounds, num_tokens)
    yield from measure_cold(dataset, rounds, 5 if quick else 40)


# --- speed -----------------------------------------------------------------------------------------------------


def measure_speed(sides: dict[str, "Side"], rounds: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Tokens per second of all sides, in turns."""
    turns: dict[str, Callable[[], float]] = {kind: partial(side.read, seconds) for kind, side in sides.items() if not side.why}
    if "Megatron" in turns:
        turns |= {kind: partial(sides["Megatron"].read, [kind == "restarting", seconds]) for kind in ("Megatron", "restarting")}
    if broken := [f"{kind}: {sides[kind].why}" for kind in KINDS if sides[kind].why]:
        raise SystemExit("\n".join(broken))
    paces = take_turns(turns, rounds)
    rate = {kind: 1 / statistics.median(found) for kind, found in paces.items()}
    spread = {kind: f"{1 / max(found):.0f}-{1 / min(found):.0f}" for kind, found in paces.items()}

    def tell_of(kind: str) -> str:
        return f"{spread['ours']} beside {spread[kind]}" if kind in spread else f"no peer: {sides['Megatron'].why}"

    def tell_alone(kind: str) -> str:
        return f"{spread[kind]}; {sides[kind].faults:.1f} pages given for each sample"

    unit, ours = "M tokens/s", rate["ours"]
    yield row("random order, all blocks checked before", unit, ours, target=TARGET_RATE, note=tell_alone("ours"))
    yield row("a first epoch: every block is checked", unit, rate["first epoch"], target=TARGET_RATE, note=tell_alone("first epoch"))
    yield row("all blocks for the first time (a rank of many)", unit, rate["first touch"], note=tell_alone("first touch"))
    yield row("the first of these, read ahead by the thread", unit, rate["threaded"], note=tell_alone("threaded"))
    yield row("beside the bare reader", unit, ours, rate["bare"], TARGET_SHARE, note=tell_of("bare"))
    target = TARGET_RATIO if "Megatron" in rate else None
    yield row("beside Megatron's GPTDataset", unit, ours, rate.get("Megatron"), target, note=tell_of("Megatron"))
    yield row("beside GPTDataset with reset_position_ids", unit, ours, rate.get("restarting"), note=tell_of("restarting"))


def serve(kind: str, dataset: Path) -> None:
    """One side of ours: answers each line, of seconds, with the seconds that a million tokens took in so long."""
    if kind == "bare":
        step = read_bare(dataset, is_hot=True)
    else:
        batches, corpus, _ = open_batches(dataset)
        epoch = sum(source.num_samples for source in corpus.sources) // GLOBAL_BATCH
        step = read_ahead(batches) if kind == "threaded" else read_directly(batches)
        if kind in ("ours", "threaded"):
            for _ in range(epoch):
                step()
    print("{}", flush=True)
    for line in sys.stdin:
        faults, seconds = getrusage(RUSAGE_SELF).ru_minflt, float(line)
        if kind == "first epoch":
            found, num_tokens = pace_of_new(dataset, 0, epoch, 0)
        elif kind == "first touch":  # so few steps that hardly a block comes twice
            found, num_tokens = pace_of_new(dataset, 1, max(1, epoch // 256), seconds)
        else:
            found, num_tokens = pace(step, seconds, time.perf_counter if kind == "threaded" else time.process_time)
        faults = (getrusage(RUSAGE_SELF).ru_minflt - faults) / (num_tokens / LENGTH)
        print(json.dumps({"pace": found, "faults": faults}), flush=True)
    if kind == "threaded":
        batches.close()


def open_batches(dataset: Path) -> tuple[Batches, Corpus, DataOrder]:
    """The dataset opened anew, for the only rank."""
    config = configure(dataset)
    corpus = open_corpus(config)
    order = DataOrder(corpus.sources, config.mixture, config.training, config.run.seed)
    return Batches(corpus, order, config.training, 0, 1, torch.device("cpu")), corpus, order


def configure(dataset: Path, global_batch_samples: int = GLOBAL_BATCH) -> RunConfig:
    """A run on the dataset."""
    training = {
        "sequence_length": LENGTH,
        "micro_batch_samples": MICRO_BATCH,
        "global_batch_samples": global_batch_samples,
        "total_tokens": LARGE_TOKENS,
    }
    data = {"root": str(dataset), "tokenizer": {"path": "unused"}}
    return RunConfig.model_validate({"data": data, "training": training, "model": {"vocabulary_size": 2**17, "largest_context": LENGTH}})


def read_directly(batches: Batches) -> Callable[[], int]:
    """Steps one behind the other without the thread; gives the tokens of each."""
    seen = 0

    def step() -> int:
        nonlocal seen
        found = batches._read_step(seen)
        seen += GLOBAL_BATCH
        return sum(batch.tokens_BT.numel() for batch in found)

    return step


def read_ahead(batches: Batches) -> Callable[[], int]:
    """The same by the thread."""
    return lambda: sum(batch.tokens_BT.numel() for batch in batches.next_step())


def read_bare(dataset: Path, is_hot: bool) -> Callable[[], int]:
    """As many samples as a step has, each as int64 tokens and labels of its own."""
    files = [np.asarray(np.memmap(path, np.uint16, mode="r")) for path in sorted(dataset.rglob("*.bin"))]
    for file in files if is_hot else ():
        file[::2048].sum()  # every page is mapped
    samples = np.concatenate(
        [np.stack([np.full(starts.size, number), starts], 1) for number, starts in ((n, row_starts(f)) for n, f in enumerate(files))]
    )
    order = np.random.default_rng(1).permutation(samples).tolist()
    place = 0

    def step() -> int:
        nonlocal place
        for _ in range(GLOBAL_BATCH):
            number, start = order[place]
            place = (place + 1) % len(order)
            text = torch.from_numpy(files[number][start : start + LENGTH + 1].astype(np.int64))
            _tokens, _labels = text[:-1].contiguous(), text[1:].contiguous()
        return STEP_TOKENS

    return step


def row_starts(tokens: np.ndarray) -> np.ndarray:
    """Where each sample of a file begins."""
    return np.arange((tokens.size - 1) // LENGTH) * LENGTH


def pace(step: Callable[[], int], seconds: float, clock: Callable[[], float] = time.process_time) -> tuple[float, int]:
    """Seconds that a million tokens take, over whole steps and so long at least; and how many tokens those were."""
    began, passed, num_tokens = clock(), 0.0, 0
    while passed < seconds:
        num_tokens += step()
        passed = clock() - began
    return passed / num_tokens * 1e6, num_tokens


def pace_of_new(dataset: Path, num_skipped: int, num_steps: int, seconds: float) -> tuple[float, int]:
    """The same, of so many steps behind the first ones of a corpus that is opened anew, again and again for so long at least."""
    passed, num_tokens = 0.0, 0
    while passed < seconds or not num_tokens:
        step = read_directly(open_batches(dataset)[0])
        for _ in range(num_skipped):
            step()
        began = time.process_time()
        num_tokens += sum(step() for _ in range(num_steps))
        passed += time.process_time() - began
    return passed / num_tokens * 1e6, num_tokens


# --- order and start -------------------------------------------------------------------------------------------


def measure_order(rounds: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Places alone, of 7 billion samples in each source."""
    why = "no peer: Megatron's order is an index, read in its rows above"
    for num_sources, batch in ((1, GLOBAL_BATCH), (5, GLOBAL_BATCH), (5, 16 * GLOBAL_BATCH)):
        training = TrainingSection(sequence_length=LENGTH, global_batch_samples=batch, micro_batch_samples=MICRO_BATCH)
        sources = [SourceSize(f"source-{number}", (7_000_000_000,), ("none",)) for number in range(num_sources)]
        order = DataOrder(sources, MixtureSection(), training, 1)
        seen = 0

        def step(order: DataOrder = order, batch: int = batch) -> int:
            nonlocal seen
            order.places(order.numbers(seen, batch))
            seen += batch
            return batch

        found = [1000 * pace(step, seconds / 3)[0] for _ in range(rounds)]  # nanoseconds, as a sample counts as a token here
        name = f"order alone, {num_sources} source{'s'[: num_sources - 1]} of 7e9 samples, {batch} samples a step"
        yield row(name, "ns/sample", statistics.median(found), note=f"{min(found):.0f}-{max(found):.0f}; {why}")


def measure_start(folder: Path, dataset: Path, peer: "Side", rounds: int, num_tokens: int) -> Iterator[dict[str, Any]]:
    """From nothing to the places of the first step and of the millionth, each time in a fresh process."""
    write_large_manifest(folder / "large")
    size = (folder / "large" / "manifest.json").stat().st_size / 1e6
    found = [start_alone(folder / "large") for _ in range(rounds)]
    middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
    total = [one["manifest"] + one["corpus"] + one["order"] for one in found]
    name = f"start and resume, {LARGE_TOKENS / 1e12:.0f} T tokens in {LARGE_SHARDS} shards"
    why = f"a manifest of {size:.1f} MB; no peer at this size"
    spread = f"{min(total):.0f}-{max(total):.0f}; {why}"
    yield row(name, "ms", statistics.median(total), target=TARGET_MILLISECONDS, most=True, note=spread)
    for part, what in {
        "manifest": "reading the manifest",
        "corpus": "opening the corpus",
        "order": "the order, and places of steps 0 and 1,000,000",
    }.items():
        yield row(f"of it: {what}", "ms", middle[part])
    yield row("its memory at its peak", "MB", middle["peak"], target=TARGET_MEGABYTES, most=True, note=f"kept {middle['kept']:.0f}")
    here = [start_alone(dataset) for _ in range(rounds // 2)]
    ours = statistics.median(one["manifest"] + one["corpus"] + one["order"] for one in here)
    corpus, no_peer = f"{num_tokens / 1e9:.1f} B tokens, beside GPTDataset's", f"no peer: {peer.why}"
    built, size = (None, None) if peer.why else (1000 * peer.facts["built"], peer.facts["bytes"] / 1e6)
    cached = "" if peer.why else f"its start with the index cached: {1000 * peer.facts['cached']:.0f} ms"
    yield row(f"start, {corpus} with its index built", "ms", ours, built, note=cached or no_peer)
    yield row(f"index on disk, {corpus}", "MB", 0, size, note=no_peer if peer.why else "")


def start_alone(dataset: Path) -> dict[str, float]:
    """`start` in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--start", str(dataset)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def start(dataset: Path) -> dict[str, float]:
    """Milliseconds of each part, and MB above what the imports had taken."""
    manifest_seconds = 0.0
    load = corpus_module.load_manifest

    def timed_load(folder: Path) -> Manifest:
        nonlocal manifest_seconds
        began = time.perf_counter()
        found = load(folder)
        manifest_seconds = time.perf_counter() - began
        return found

    corpus_module.load_manifest = timed_load
    config = configure(dataset, LARGE_BATCH)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory_of_this_process()["VmRSS"]
    began = time.perf_counter()
    corpus = open_corpus(config)
    opened = time.perf_counter()
    order = DataOrder(corpus.sources, config.mixture, config.training, config.run.seed)
    for step in (0, 1_000_000):
        order.places(order.numbers(step * LARGE_BATCH, LARGE_BATCH))
    ended = time.perf_counter()
    after = memory_of_this_process()
    return {
        "manifest": 1000 * manifest_seconds,
        "corpus": 1000 * (opened - began - manifest_seconds),
        "order": 1000 * (ended - opened),
        "peak": after["VmHWM"] - before,
        "kept": after["VmRSS"] - before,
    }


def memory_of_this_process() -> dict[str, float]:
    """VmRSS, VmHWM and others, in MB."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {key.rstrip(":"): int(value) * 1024 / 1e6 for key, value, *unit in (line for line in lines if line[-1] == "kB")}


# --- cold ------------------------------------------------------------------------------------------------------


def measure_cold(dataset: Path, rounds: int, num_steps: int) -> Iterator[dict[str, Any]]:
    """The first steps of a run whose files are not in memory."""
    kinds = ("ours", "never", "bare")
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    reads: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            gc.collect()  # pages that are mapped stay in memory
            drop_from_memory(dataset)
            step = read_bare(dataset, is_hot=False) if kind == "bare" else read_cold(dataset, kind)
            before, began = bytes_read(), time.perf_counter()
            num_tokens = sum(step() for _ in range(num_steps))
            rates[kind].append(num_tokens / 1e6 / (time.perf_counter() - began))
            reads[kind].append((bytes_read() - before) / num_tokens)
            del step
    rate, read = ({kind: statistics.median(found) for kind, found in one.items()} for one in (rates, reads))
    spread = {kind: f"{min(found):.1f}-{max(found):.1f}" for kind, found in rates.items()}
    if max(read.values()) < 1:
        tell("hardly anything was read from a disk: the folder seems to lie in memory, and the next rows say nothing")
    name, unit, ours = f"cold, {num_steps} steps", "M tokens/s", rate["ours"]
    for kind, beside in {"bare": "the bare reader", "never": "blocks that are not announced"}.items():
        yield row(f"{name}, beside {beside}", unit, ours, rate[kind], note=f"{spread['ours']} beside {spread[kind]}")
    yield row(f"{name}: read from the disk, beside the bare reader", "bytes/token", read["ours"], read["bare"], note="2 are wanted")


def drop_from_memory(dataset: Path) -> None:
    """Every file's pages out of the page cache."""
    for path in dataset.rglob("*.bin"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_cold(dataset: Path, kind: str) -> Callable[[], int]:
    """Steps without the thread whose blocks are announced as they are, or never."""
    batches, corpus, _ = open_batches(dataset)
    if kind == "never":
        corpus.streams[0].files.announce = lambda *_: None
    return read_directly(batches)


def bytes_read() -> int:
    """What this process had the disk read."""
    facts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(facts["read_bytes"])


# --- the corpora -----------------------------------------------------------------------------------------------


def write_dataset(folder: Path, num_tokens: int) -> int:
    """Shards of random ids with a manifest, as the pipeline would leave them but for the sidecars; gives their tokens."""
    records: list[ShardRecord] = []
    for number in range(NUM_SHARDS):
        rng = np.random.default_rng(number)
        ids = rng.integers(0, END_OF_TEXT, num_tokens // NUM_SHARDS, dtype=np.uint16)
        wanted = ids.size // DOCUMENT_TOKENS
        ends = np.unique(np.append(rng.choice(ids.size - 1, wanted - 1), ids.size - 1))
        ids[ends] = END_OF_TEXT
        name = f"units/{number:05d}/train"
        prefix = folder / name
        prefix.parent.mkdir(parents=True)
        with ShardWriter(prefix, ids.dtype) as writer:
            writer.add_documents(np.split(ids, ends[:-1] + 1))
        write_checksums(prefix)
        counts = Counts(num_tokens=ids.size, num_documents=ends.size, num_bytes=4 * ids.size)
        files = {
            f"{name}{suffix}": FileRecord(bytes=Path(f"{prefix}{suffix}").stat().st_size, sha256=sha256_of_file(Path(f"{prefix}{suffix}")))
            for suffix in (".bin", ".idx", ".crc32c")
        }
        records.append(ShardRecord(name=name, files=files, sources={"text": counts}, **counts.model_dump()))
    write_manifest(folder, make_manifest(records, (), "uint16", VOCABULARY))
    return sum(record.num_tokens for record in records)


def write_large_manifest(folder: Path) -> None:
    """A manifest of shards that are not there: as many inputs as shards, of several sources."""
    folder.mkdir()
    hashes = (hashlib.sha256(str(number).encode()).hexdigest() for number in range(10**9))
    each = LARGE_TOKENS // LARGE_SHARDS
    records: list[ShardRecord] = []
    inputs: list[InputRecord] = []
    sizes = {".bin": 4 * each, ".idx": 20 * each // DOCUMENT_TOKENS, ".crc32c": 4 * each // 16384, ".documents.parquet": each // 20}
    for number in range(LARGE_SHARDS):
        name, source = f"units/{number:05d}/train-00000", f"source-{number * LARGE_SOURCES // LARGE_SHARDS}"
        counts = Counts(num_tokens=each, num_documents=each // DOCUMENT_TOKENS, num_bytes=4 * each + number)
        files = {f"{name}{suffix}": FileRecord(bytes=size, sha256=next(hashes)) for suffix, size in sizes.items()}
        records.append(ShardRecord(name=name, files=files, sources={source: counts}, **counts.model_dump()))
        inputs.append(InputRecord(source=source, file=f"part-{number:05d}.jsonl.zst", bytes=2 * each + number, sha256=next(hashes)))
    write_manifest(folder, make_manifest(records, inputs, "int32", 128_256))


def make_manifest(records: Sequence[ShardRecord], inputs: Sequence[InputRecord], dtype: str, vocabulary_size: int) -> Manifest:
    """All the shards to learn from; nothing is held out."""
    num_documents: dict[str, int] = {}
    for record in records:
        for source, counts in record.sources.items():
            num_documents[source] = num_documents.get(source, 0) + counts.num_documents
    return Manifest(
        format_version=FORMAT_VERSION,
        tokenizer_sha256="0" * 64,
        vocabulary_size=vocabulary_size,
        end_of_text="<|endoftext|>",
        end_of_text_id=END_OF_TEXT,
        dtype=dtype,
        configuration={},
        rules=(),
        libraries={},
        sources={name: DocumentCounts(read=count, kept=count) for name, count in num_documents.items()},
        inputs=tuple(inputs),
        splits={"train": tuple(records), "held_out": ()},
    )


# --- processes -------------------------------------------------------------------------------------------------


class Side:
    """A process that says something about itself and then answers lines with lines, all of them JSON."""

    def __init__(self, command: Sequence[str], environment: dict[str, str] | None = None, folder: Path | None = None) -> None:
        self.why: str | None = None
        """Why it cannot be had."""
        self.facts: dict[str, Any] = {}
        self.faults = 0.0
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment and {**os.environ, **environment}, cwd=folder
        )

    def wait(self) -> None:
        """Until it is ready, or says why it never will be."""
        self.facts = self._answer()
        self.why = self.facts.pop("why", None)

    def read(self, question: Any) -> float:
        """Seconds that a million tokens take."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.faults = answer.get("faults", 0.0)
        return answer["pace"]

    def close(self) -> None:
        """End the process by ending its input."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"why": f"its process ended with {self._process.wait()}; its last words are above"}


def start_megatron(dataset: Path, cache: Path, python: str | None) -> Side:
    """Megatron-core's side; in this Python, with what the cache folder has or pip fetches, where no other is given."""
    prefixes = sorted(str(path.with_suffix("")) for path in dataset.rglob("*.bin"))
    task = json.dumps([prefixes, str(cache), LENGTH, VOCABULARY, END_OF_TEXT])
    environment = {"CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    if python is None:
        environment["PYTHONPATH"] = str(fetch_megatron())
    # In another folder, where a foreign Python finds none of our modules.
    return Side([python or sys.executable, "-W", "ignore", "-c", PEER, task], environment, cache.parent)


def fetch_megatron() -> Path:
    """The folder of the wheel. Where pip cannot fetch it, it stays without it, and Megatron's process says that it is not there."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pretrain" / "peers" / MEGATRON.replace("==", "-")
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".megatron-", dir=folder.parent) as temporary:
            command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
            if not subprocess.run([*command, "--target", f"{temporary}/site", MEGATRON]).returncode:
                shutil.move(f"{temporary}/site", folder)
    return folder


if __name__ == "__main__":
    main()

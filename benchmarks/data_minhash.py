"""How fast and how well near duplicates are found: ours against datasketch, datatrove, and rensa on shingles as strings.

In: nothing; the documents are cut from the text of this machine (`minhash_pairs.py`). Out: a table, or with `--json` one
object per row: name, unit, ours, peer, ratio, target, met, and the spread over the rounds.

    .venv/bin/python benchmarks/data_minhash.py --peer-python FOLDER/bin/python

Memory is read as Linux shows it.

A library is a peer where the given Python (else this one) imports it (`minhash_peers.py`). All run on one thread each, in
turns, each round on documents of its own, the same for all.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from minhash_pairs import DOCUMENT_CHARACTERS, SHINGLE_WORDS, cut_documents, jaccard, plant, shingle_set
from minhash_peers import BANDS, PEERS, PERMUTATIONS, Array, Peer

from configs.data_section import DeduplicationSection, NearDuplicatesSection
from data_pipeline.dedup import count_matches, find_duplicates, near_partition, needed_matches
from data_pipeline.minhash import band_hashes, signatures
from data_pipeline.signature_files import write_survey
from data_pipeline.union_find import connected_components

SIMILARITY = 0.8
SETTINGS = NearDuplicatesSection(similarity=SIMILARITY, num_permutations=PERMUTATIONS, num_bands=BANDS, shingle_words=SHINGLE_WORDS)
ROUNDS = 5
TARGET_SPEED = 5000
TARGET_RECALL = 0.99
TARGET_MEMORY = 500


def sign_with_ours(texts: Sequence[str]) -> tuple[Array, Array]:
    """Signatures and the hashes of their bands, by the module under test."""
    found = [signatures(texts[first : first + 200], SETTINGS) for first in range(0, len(texts), 200)]
    return np.concatenate(found), np.concatenate([band_hashes(block, BANDS) for block in found])


def row(name: str, unit: str, ours: float, target: float | None = None, most: bool = False, **more: Any) -> dict[str, Any]:
    """One line of the result; `most`: the target is not to be exceeded."""
    peer = more.pop("peer", None)
    met = None if target is None else (ours <= target if most else ours >= target)
    ratio = ours / peer if peer else None
    return {"name": name, "unit": unit, "ours": ours, "peer": peer, "ratio": ratio, "target": target, "met": met, **more}


def measure_speed(documents: Sequence[str], peers: Sequence[Peer], folder: Path) -> Iterator[dict[str, Any]]:
    """Text to signatures and bands, in turns."""
    sign_with_ours(documents[:50])
    ours: list[float] = []
    theirs: dict[str, list[float]] = {peer.name: [] for peer in peers}
    for index in range(ROUNDS):
        part = documents[index::ROUNDS]
        started = time.perf_counter()
        sign_with_ours(part)
        ours.append(len(part) / (time.perf_counter() - started))
        for peer in peers:
            if not peer.why:
                theirs[peer.name].append(len(part) / peer.sign(part, folder)[0])
    name = f"text to signatures and bands, {len(documents)} documents of {DOCUMENT_CHARACTERS} characters, against"
    for peer in peers:
        speeds = theirs[peer.name]
        more: dict[str, Any] = {"peer": median(speeds), "peer_spread": [min(speeds), max(speeds)]} if speeds else {"why": peer.why}
        yield row(f"{name} {peer.label}", "documents/s, a core", median(ours), TARGET_SPEED, ours_spread=[min(ours), max(ours)], **more)


def cluster(signed: Array, folder: Path) -> tuple[Array, Callable[[int, int], bool]]:
    """Each document's cluster by our stage, and whether two documents were found alike by themselves."""
    with tempfile.TemporaryDirectory(dir=folder) as survey:
        write_survey(Path(survey), np.zeros((len(signed), 2), dtype=np.uint64), [signed], SETTINGS)
        edges = [near_partition([Path(survey)], band, 0, 1, None, SETTINGS).pairs for band in range(BANDS)]
    bands = band_hashes(signed, BANDS)

    def alike(first: int, second: int) -> bool:
        return bool((bands[first] == bands[second]).any() and count_matches(signed[first], signed[second]) >= needed_matches(SETTINGS))

    return connected_components(np.concatenate(edges), len(signed)), alike


def judge(signed: Array, texts: Sequence[str], pairs: Sequence[tuple[int, int]], folder: Path) -> dict[str, float]:
    """Recall on the planted pairs; of all pairs in one cluster, those that are too different, found directly or in between."""
    labels, alike = cluster(signed, folder)
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels.tolist()):
        members.setdefault(label, []).append(index)
    total = direct = between = 0
    lowest = 1.0
    for group in members.values():
        sets = {index: shingle_set(texts[index]) for index in group} if len(group) > 1 else {}
        for first, second in combinations(group, 2):
            total += 1
            truth = jaccard(sets[first], sets[second])
            if truth < SIMILARITY:
                found = alike(first, second)
                direct += found
                between += not found
                lowest = min(lowest, truth) if found else lowest
    recall = sum(labels[first] == labels[second] for first, second in pairs) / max(1, len(pairs))
    return {"recall": float(recall), "pairs": total, "direct": direct, "between": between, "lowest": lowest}


def measure_quality(documents: Sequence[str], count: int, peers: Sequence[Peer], folder: Path) -> Iterator[dict[str, Any]]:
    """What is found and what should not be, with every library's signatures through the same bands and comparisons.

    The truth is told by our words. datatrove's are others (its own splitting, and all numbers are alike), so that pairs which
    differ in numbers count as too different in its rows, although it means them to be alike.
    """
    copies, pairs = plant(documents, count)
    texts = [*documents, *copies]
    ours = judge(sign_with_ours(texts)[0], texts, pairs, folder)
    real = judge(sign_with_ours(documents)[0], documents, [], folder)
    below = f"below {SIMILARITY}"
    for peer in peers:
        theirs = None if peer.why else judge(peer.sign(texts, folder)[1], texts, pairs, folder)
        theirs_real = None if peer.why else judge(peer.sign(documents, folder)[1], documents, [], folder)

        def versus(key: str, found: dict[str, float] | None, why: str | None = peer.why) -> dict[str, Any]:
            return {"peer": found[key]} if found else {"why": why}

        yield row(
            f"recall of {count} planted pairs of true similarity 0.9 or more, against {peer.label}",
            "share",
            ours["recall"],
            TARGET_RECALL,
            **versus("recall", theirs),
        )
        for what, mine, their in (
            (f"{len(documents)} real documents", real, theirs_real),
            (f"{len(documents)} real documents and {count} copies", ours, theirs),
        ):
            for kind, key in (("found alike directly", "direct"), ("that only others connect", "between")):
                yield row(
                    f"{what}: pairs in one cluster that are truly {below}, {kind}, against {peer.label}",
                    "pairs",
                    mine[key],
                    **versus(key, their),
                    pairs_in_clusters=[found["pairs"] for found in (mine, their) if found],
                )
        if peer is peers[0]:
            yield row(f"lowest true similarity of a pair found alike directly, {len(documents)} real documents", "share", real["lowest"])


def read_status(name: str) -> int:
    """What Linux says of this process's memory, in bytes (getrusage's peak is the parent's where that was larger)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def watch_memory(stop: threading.Event, peak: list[int]) -> None:
    """The most private memory of this process, in bytes; pages of mapped files are the system's to take back."""
    while not stop.wait(0.01):
        peak[0] = max(peak[0], read_status("RssAnon"))


def stage(num_documents: int) -> None:
    """A process of its own: a synthetic survey of 40 units, and the whole stage over it; prints seconds and peak memory."""
    near = NearDuplicatesSection(num_permutations=32, num_bands=16)
    rng = np.random.default_rng(1)
    num_units = 40
    each = num_documents // num_units
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root) / f"{index:05d}" for index in range(num_units)]
        earlier_hashes, earlier_rows = np.zeros((0, 2), dtype=np.uint64), np.zeros((0, 32), dtype=np.uint32)
        started = time.perf_counter()
        for folder in folders:
            hashes = rng.integers(0, 1 << 64, (each, 2), dtype=np.uint64)
            rows = rng.integers(0, 1 << 32, (each, 32), dtype=np.uint32)
            if len(earlier_hashes):
                copies = rng.permutation(each)[: each // 5]  # a tenth are copies of the unit before, a tenth nearly so
                hashes[copies[::2]] = earlier_hashes[copies[::2]]
                rows[copies] = earlier_rows[copies]
                rows[copies[1::2], 3] = 0
            folder.mkdir()
            write_survey(folder, hashes, [rows], near)
            earlier_hashes, earlier_rows = hashes, rows
        surveyed = time.perf_counter() - started
        del earlier_hashes, earlier_rows

        def run(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterable[tuple[Any, Any]]:
            return ((task, function(task)) for task in tasks)

        stop, peak = threading.Event(), [0]
        threading.Thread(target=watch_memory, args=(stop, peak), daemon=True).start()
        started = time.perf_counter()
        found = find_duplicates(folders, DeduplicationSection(near=near), Path(root) / "work", run, lambda _step, _done, _total: None)
        seconds = time.perf_counter() - started
        stop.set()
        counts = found.counts
        dropped = [counts.num_exact_duplicates, counts.num_near_duplicates]
        print(json.dumps({"seconds": seconds, "surveyed": surveyed, "peak": peak[0], "dropped": dropped}))


def long_document(kind: str) -> None:
    """A process of its own: the signature of a document of 50 MB; prints the process's peak memory, in bytes, and seconds."""
    part, times, end = {
        "letters": ("a b c d e ", 5_000_000, ""),
        "one word": ("a", 50_000_000, ""),
        "han": ("漢字", 8_333_333, ""),
        "wide": ("a b c d e ", 4_999_999, "\U0001f600"),  # one character that makes Python spend four bytes on all
    }[kind]
    text = part * times + end
    started = time.perf_counter()
    signatures([text], NearDuplicatesSection())
    seconds = time.perf_counter() - started
    print(json.dumps({"peak": read_status("VmHWM"), "seconds": seconds}))


def run_alone(*options: str) -> dict[str, Any]:
    """What this file prints in a process of its own."""
    return json.loads(subprocess.run([sys.executable, __file__, *options], check=True, capture_output=True, text=True).stdout)


def measure_scale(num_documents: int) -> Iterator[dict[str, Any]]:
    """Time and memory of the stage, and of one long document."""
    found = run_alone("--stage", str(num_documents))
    name = f"exact and near stage, {num_documents} documents in 40 units, 16 bands of 2, all tasks one after another"
    why = "datatrove's four steps read its own files, and verify nothing"
    yield row(name, "s", found["seconds"], why=why, dropped=found["dropped"], survey_seconds=found["surveyed"])
    yield row(f"{name}: peak of private memory", "MB", found["peak"] / 1e6, why=why)
    for kind in ("letters", "one word", "han", "wide"):
        found = run_alone("--long", kind)
        yield row(
            f"one document of 50 MB ({kind}): peak of the process, the text included", "MB", found["peak"] / 1e6, TARGET_MEMORY, True,
            why="ours only", seconds=found["seconds"],
        )  # fmt: skip


def show(found: dict[str, Any]) -> str:
    """One row for people."""
    numbers = [f"ours {found['ours']:,.4g}"]
    numbers += [f"peer {found['peer']:,.4g}"] if found["peer"] is not None else [f"no peer ({found['why']})"] if "why" in found else []
    numbers += [f"ratio {found['ratio']:.3g}"] if found["ratio"] is not None else []
    numbers += [f"target {found['target']:,g}: {'met' if found['met'] else 'MISSED'}"] if found["target"] is not None else []
    more = {
        key: value
        for key, value in found.items()
        if key.endswith("spread") or key in ("seconds", "survey_seconds", "dropped", "pairs_in_clusters")
    }
    return f"{found['name']} [{found['unit']}]\n    {', '.join(numbers)} {more or ''}"


def main() -> None:
    """Measure, and print each row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="one object per row")
    parser.add_argument("--quick", action="store_true", help="fewer documents: less than a minute")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that imports the peers")
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--long", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"  # one core; rensa starts its threads at first use
    if options.stage:
        return stage(options.stage)
    if options.long:
        return long_document(options.long)
    documents = cut_documents(500 if options.quick else 6000)
    peers = [Peer(name, options.peer_python) for name in PEERS]
    try:
        with tempfile.TemporaryDirectory() as folder:
            for rows in (
                measure_speed(documents, peers, Path(folder)),
                measure_quality(documents, 200 if options.quick else 2000, peers, Path(folder)),
                measure_scale(100_000 if options.quick else 2_000_000),
            ):
                for found in rows:
                    print(json.dumps(found) if options.json else show(found), flush=True)
    finally:
        for peer in peers:
            peer.close()
    return None


if __name__ == "__main__":
    main()

"""Token shards and Megatron: what is written here Megatron-core reads, and what others wrote is adopted and trains.

The first tests write pairs of .bin and .idx by hand, byte by byte as Megatron's documentation of the index has them. The
rest asks Megatron-core 0.16.1 itself: its wheel is fetched once, from the configured package index and without its
dependencies, into $XDG_CACHE_HOME (or ~/.cache)/pretrain/peers/megatron-core-0.16.1, never into this environment, and is
imported by one other process. Where it cannot be had, these tests are skipped and say why.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from configs.data_section import DataSection, DeduplicationSection, SourceSection, TokenizerSection
from configs.errors import UserError
from data_pipeline.build import BuildResult, build_dataset
from data_pipeline.execution import open_here
from data_pipeline.manifest import SPLITS, Manifest, load_manifest
from data_pipeline.shards import Shard, read_spans
from data_pipeline.tokenizer import load_tokenizer, train_tokenizer
from data_pipeline.verify import verify_dataset
from tests.tiny import END_OF_TEXT, tiny_texts

MEGATRON = "megatron-core==0.16.1"
INSTALL_SECONDS = 120
CODES = {"uint16": 8, "int32": 4}  # of the types, in Megatron's index
WIDE_ENTRIES = 70_000  # more than uint16 holds

Documents = Sequence[Sequence[Sequence[int]]]
"""Of each document its sequences, of each sequence its ids."""

PEER = """
import json, sys
import numpy, torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

task = json.loads(sys.stdin.read())
for prefix, (dtype, documents) in task["write"].items():
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=numpy.dtype(dtype).type)
    for number, sequences in enumerate(documents):
        if number % 2:  # the two ways that it has
            builder.add_document(torch.tensor([one for ids in sequences for one in ids]), list(map(len, sequences)))
        else:
            for ids in sequences:
                builder.add_item(torch.tensor(ids))
            builder.end_document()
    builder.finalize(prefix + ".idx")
found = {}
for prefix in task["read"]:
    dataset = IndexedDataset(prefix)
    bounds = dataset.document_indices.tolist()
    documents = [[dataset[number].tolist() for number in range(*pair)] for pair in zip(bounds[:-1], bounds[1:])]
    found[prefix] = [str(dataset[0].dtype), documents]
print(json.dumps(found))
"""


# --- what stands on the disk, without Megatron --------------------------------------------------------------


def write_pair(prefix: Path, dtype: str, documents: Documents) -> None:
    """A .bin and its .idx, byte by byte."""
    sequences = [ids for document in documents for ids in document]
    ids = [one for sequence in sequences for one in sequence]
    Path(f"{prefix}.bin").write_bytes(struct.pack(f"<{len(ids)}{'H' if dtype == 'uint16' else 'i'}", *ids))
    width = 2 if dtype == "uint16" else 4
    starts, bounds = [0], [0]
    for sequence in sequences:
        starts.append(starts[-1] + len(sequence) * width)
    for document in documents:
        bounds.append(bounds[-1] + len(document))
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(sequences), len(bounds))
    index += struct.pack(f"<{len(sequences)}i", *map(len, sequences)) + struct.pack(f"<{len(sequences)}q", *starts[:-1])
    Path(f"{prefix}.idx").write_bytes(index + struct.pack(f"<{len(bounds)}q", *bounds))


def save_small_tokenizer(path: Path) -> Tokenizer:
    """300 entries, so that the shards hold uint16."""
    tokenizer = train_tokenizer(tiny_texts(200, 3), 300, END_OF_TEXT)
    tokenizer.save(str(path))
    return tokenizer


def save_wide_tokenizer(path: Path) -> Tokenizer:
    """More entries than uint16 holds: bytes, then words that are pieces of their own."""
    pieces = [END_OF_TEXT, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"piece-{number}" for number in range(WIDE_ENTRIES))]
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.save(str(path))
    return tokenizer


def make_documents(tokenizer: Tokenizer, highest_id: int, seed: int) -> Documents:
    """Of every shape: one sequence and several, with an end of text at the end, within, and nowhere; empty ones."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    texts = [tokenizer.encode(text).ids for text in [*tiny_texts(40, seed), "naïve 東京 🦊", " ", "\n\x00"]]
    highest = min(highest_id, tokenizer.get_vocab_size() - 1)
    texts.append([highest, texts[0][0], highest])
    shapes: list[Callable[[list[int], list[int]], list[list[int]]]] = [
        lambda one, other: [one],
        lambda one, other: [[*one, end]],
        lambda one, other: [one, other],
        lambda one, other: [one, [*other, end]],
        lambda one, other: [[*one, end], [*other, end]],
        lambda one, other: [[], one, []],
        lambda one, other: [[end]],
        lambda one, other: [[]],
        lambda one, other: [],
    ]
    return [shapes[number % len(shapes)](ids, texts[-1 - number]) for number, ids in enumerate(texts)]


def expected_ids(document: Sequence[Sequence[int]], end: int) -> list[int]:
    """A document's ids as they must come out: all its sequences, and one end of text behind them."""
    ids = [one for sequence in document for one in sequence]
    return ids if ids and ids[-1] == end else [*ids, end]


def build(root: Path, tokenizer: Path, *sources: SourceSection, **changes: Any) -> BuildResult:
    """A dataset of these sources, made in this process."""
    settings: dict[str, Any] = {
        "root": str(root),
        "sources": sources,
        "tokenizer": TokenizerSection(path=str(tokenizer)),
        "held_out_fraction": 0.2,
        "shard_tokens": 500,
    }
    return build_dataset(DataSection(**{**settings, **changes}), lambda progress: None, open_here)


def stored_documents(folder: Path) -> dict[tuple[str, str, int], tuple[list[int], dict[str, Any]]]:
    """Every document of a dataset, by source, file and position: its ids and its row of the sidecar."""
    stored: dict[tuple[str, str, int], tuple[list[int], dict[str, Any]]] = {}
    manifest = load_manifest(folder)
    for record in (record for split in SPLITS for record in manifest.shards(split)):
        shard = Shard(folder / record.name)
        rows = read_spans(folder / record.name).to_pylist()
        assert [row["first_token"] for row in rows] == shard.document_starts[:-1].tolist()
        for number, row in enumerate(rows):
            key = row["source"], row["file"], row["position"]
            assert key not in stored, "a document is stored twice"
            stored[key] = shard.document(number).tolist(), row
    return stored


def check_adopted(result: BuildResult, source: str, file: str, documents: Documents, tokenizer: Tokenizer) -> None:
    """Ids, counts, bytes and sidecars are those of the documents that a pair holds."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    stored = {key: value for key, value in stored_documents(result.folder).items() if key[0] == source}
    assert set(stored) == {(source, file, number) for number in range(len(documents))}
    for number, document in enumerate(documents):
        ids, row = stored[source, file, number]
        text = tokenizer.decode([one for sequence in document for one in sequence], skip_special_tokens=True)
        assert ids == expected_ids(document, end)
        assert (row["num_tokens"], row["num_bytes"]) == (len(ids), len(text.encode()))
        assert (row["name"], row["metadata"]) == (None, None)
    manifest = result.manifest
    counts = manifest.sources[source]
    assert (counts.read, counts.kept, counts.dropped, counts.quarantined) == (len(documents), len(documents), {}, {})
    given = [shard.sources[source] for split in SPLITS for shard in manifest.shards(split) if source in shard.sources]
    assert sum(one.num_documents for one in given) == len(documents)
    assert sum(one.num_tokens for one in given) == sum(row["num_tokens"] for _, row in stored.values())
    assert sum(one.num_bytes for one in given) == sum(row["num_bytes"] for _, row in stored.values())
    assert verify_dataset(result.folder) == []


@pytest.mark.parametrize("found", CODES)
@pytest.mark.parametrize("save, stored", [(save_small_tokenizer, "uint16"), (save_wide_tokenizer, "int32")])
def test_a_pair_is_adopted_whatever_its_type(tmp_path: Path, seed: int, found: str, save: Callable[[Path], Tokenizer], stored: str) -> None:
    tokenizer = save(tmp_path / "tokenizer.json")
    documents = make_documents(tokenizer, np.iinfo(found).max, seed)
    write_pair(tmp_path / "made", found, documents)
    source = SourceSection(name="others", path=str(tmp_path / "made"), format="megatron")
    result = build(tmp_path / "data", tmp_path / "tokenizer.json", source)
    assert result.manifest.dtype == stored
    assert {len(result.manifest.shards(split)) > 0 for split in SPLITS} == {True}
    check_adopted(result, "others", "made.bin", documents, tokenizer)
    content = (tmp_path / "made.idx").read_bytes() + (tmp_path / "made.bin").read_bytes()
    (record,) = result.manifest.inputs
    assert (record.file, record.bytes, record.sha256) == ("made.bin", len(content), sha256(content).hexdigest())
    again = build(tmp_path / "data", tmp_path / "tokenizer.json", source)
    assert (again.outcome, again.manifest) == ("unchanged", result.manifest)


def test_tokens_are_adopted_beside_text_that_is_deduplicated(tmp_path: Path, seed: int) -> None:
    """A folder of pairs between two sources of text: only the text is looked at, and nothing changes places."""
    tokenizer = save_small_tokenizer(tmp_path / "tokenizer.json")
    texts = [text + f" {number}" for number, text in enumerate(tiny_texts(30, seed))]
    for name, lines in {"first": texts[:20], "last": texts[10:]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    pairs = {name: make_documents(tokenizer, 299, seed + 1) for name in ("one", "two")}
    (tmp_path / "pairs").mkdir()
    for name, documents in pairs.items():
        write_pair(tmp_path / "pairs" / name, "uint16", documents)  # equal documents: of tokens each one stays
    result = build(
        tmp_path / "data",
        tmp_path / "tokenizer.json",
        SourceSection(name="first", path=str(tmp_path / "first.jsonl")),
        SourceSection(name="others", path=str(tmp_path / "pairs"), format="megatron"),
        SourceSection(name="last", path=str(tmp_path / "last.jsonl")),
        deduplicate=DeduplicationSection(),
        work_unit_bytes=2000,
    )
    counts = result.manifest.sources
    assert (counts["first"].kept, counts["last"].kept, counts["last"].dropped) == (20, 10, {"exact_duplicate": 10})
    assert counts["others"].kept == sum(map(len, pairs.values()))
    stored = stored_documents(result.folder)
    for name, documents in pairs.items():
        found = [stored["others", f"{name}.bin", number][0] for number in range(len(documents))]
        assert found == [expected_ids(document, tokenizer.token_to_id(END_OF_TEXT)) for document in documents]


@pytest.mark.parametrize("foreign", [300, 65_535])
def test_a_foreign_id_is_refused_and_nothing_is_finished(tmp_path: Path, foreign: int) -> None:
    tokenizer = save_small_tokenizer(tmp_path / "tokenizer.json")
    write_pair(tmp_path / "made", "uint16", [[[1, 2]], [[3], [foreign, 4]]])
    source = SourceSection(name="others", path=str(tmp_path / "made.bin"), format="megatron")
    assert tokenizer.get_vocab_size() == 300
    with pytest.raises(UserError, match=rf"document 1 of made.bin \(source others\) has the token id {foreign}, .* ids 0 to 299; set"):
        build(tmp_path / "data", tmp_path / "tokenizer.json", source)
    assert not (tmp_path / "data" / "manifest.json").exists()


# --- Megatron's own reader and writer -----------------------------------------------------------------------


@pytest.fixture(scope="session", name="megatron")
def _megatron() -> Path:
    """The folder that holds Megatron-core; the test is skipped where it cannot be had."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pretrain" / "peers" / MEGATRON.replace("==", "-")
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            pytest.skip(f"{MEGATRON} cannot be kept: {error}")
        with tempfile.TemporaryDirectory(prefix=".megatron-", dir=folder.parent) as temporary:
            _install(Path(temporary) / "site")
            if not folder.is_dir():
                shutil.move(Path(temporary) / "site", folder)  # whole, or not at all
    return folder


def _install(target: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", "--retries", "1"]
    command += ["--timeout", "20", "--no-deps", "--only-binary", ":all:", "--target", str(target), MEGATRON]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{MEGATRON} cannot be had: pip took more than {INSTALL_SECONDS} s")
    if done.returncode:
        pytest.skip(f"{MEGATRON} cannot be had: {(done.stderr.strip() or 'pip gave no reason').splitlines()[-1]}")


def ask_megatron(
    megatron: Path, read: Sequence[Path], write: dict[Path, tuple[str, Documents]]
) -> dict[Path, tuple[str, list[list[list[int]]]]]:
    """Have Megatron-core write pairs and then read others: of each its type and every document's sequences."""
    task = {"read": [str(prefix) for prefix in read], "write": {str(prefix): pair for prefix, pair in write.items()}}
    environment = {**os.environ, "PYTHONPATH": str(megatron), "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PEER], input=json.dumps(task), env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return {Path(prefix): (dtype, documents) for prefix, (dtype, documents) in json.loads(done.stdout.splitlines()[-1]).items()}


def all_prefixes(folder: Path, manifest: Manifest) -> list[Path]:
    return [folder / record.name for split in SPLITS for record in manifest.shards(split)]


@pytest.mark.long
def test_megatron_reads_what_is_written_here_and_what_it_wrote_trains_here(
    tmp_path: Path, seed: int, megatron: Path, run_on_ranks: Callable[..., list[Any]]
) -> None:
    """One process of Megatron's for all of it, as its import takes seconds."""
    small, wide = save_small_tokenizer(tmp_path / "small.json"), save_wide_tokenizer(tmp_path / "wide.json")
    end = small.token_to_id(END_OF_TEXT)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*tiny_texts(200, seed), "naïve 東京 🦊"]))
    text = SourceSection(name="text", path=str(tmp_path / "texts.jsonl"))
    ours = {name: build(tmp_path / name, tmp_path / f"{name}.json", text) for name in ("small", "wide")}
    assert {name: result.manifest.dtype for name, result in ours.items()} == {"small": "uint16", "wide": "int32"}
    prefixes = [prefix for result in ours.values() for prefix in all_prefixes(result.folder, result.manifest)]
    (tmp_path / "theirs").mkdir()
    theirs = {dtype: make_documents(small, 299, seed + number) for number, dtype in enumerate(CODES)}
    found = ask_megatron(megatron, prefixes, {tmp_path / "theirs" / dtype: (dtype, documents) for dtype, documents in theirs.items()})

    assert len(prefixes) > 10 and set(found) == set(prefixes)
    for name, result in ours.items():
        tokenizer = load_tokenizer(result.folder / "tokenizer.json", END_OF_TEXT)
        read: list[str] = []
        for prefix in all_prefixes(result.folder, result.manifest):
            dtype, documents = found[prefix]
            shard = Shard(prefix)
            assert dtype == result.manifest.dtype
            assert documents == [[shard.document(number).tolist()] for number in range(shard.num_documents)]
            read += [tokenizer.decode(ids[:-1]) for ((*ids,),) in documents]
        assert sorted(read) == sorted(json.loads(line)["text"] for line in (tmp_path / "texts.jsonl").read_text().splitlines()), name
    assert wide.get_vocab_size() > 65_536

    source = SourceSection(name="theirs", path=str(tmp_path / "theirs"), format="megatron")
    adopted = build(tmp_path / "adopted", tmp_path / "small.json", source)
    stored = stored_documents(adopted.folder)
    for dtype, documents in theirs.items():
        assert [stored["theirs", f"{dtype}.bin", number][0] for number in range(len(documents))] == [
            expected_ids(document, end) for document in documents
        ]
    case = {"training__total_tokens": "512", "schedule": "{decay_tokens: 0}", "evaluate__every_steps": "null"}
    here = {"dataset": str(adopted.folder), "runs": str(tmp_path / "runs"), "cases": {"two-steps": case}}
    # With time for DeepSpeed to compile what it wants, if this is the first training of a machine.
    trained = run_on_ranks("tests.training:train_runs", 1, here, timeout_seconds=300)[0]["two-steps"]
    assert (trained["outcome"], trained["steps"], len(trained["losses"])) == ("done", [0, 2], 2)
    assert all(2 < float.fromhex(loss) < 8 for _, loss, _, _ in trained["losses"])

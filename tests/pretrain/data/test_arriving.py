"""Training on a build that still runs: what is fed is what the finished dataset gives, whatever arrives when, and nothing twice."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from configs.data_section import DataSection, SourceSection, TokenizerSection
from configs.durable import write_file
from configs.errors import UserError
from configs.loader import dump_config
from configs.schema import RunConfig
from configs.sealed import seal, unseal
from data_pipeline import build as conductor
from data_pipeline.arriving import ARRIVING
from data_pipeline.build import build_dataset
from data_pipeline.documents import identify_document, place_document
from data_pipeline.execution import open_here
from data_pipeline.manifest import SPLITS, Manifest, load_manifest
from data_pipeline.records import ShardRecord
from data_pipeline.tokenizer import train_tokenizer
from pretrain import cli
from pretrain import start as beginning
from pretrain import train as loop
from pretrain.checkpoint.index import state_hash
from pretrain.checkpoint.verify import Commit, read_commit
from pretrain.data import batches as batches_module
from pretrain.data.batches import Batches, MicroBatch
from pretrain.data.corpus import open_corpus
from pretrain.data.order import DataOrder
from pretrain.mixture_view import check_repeats
from pretrain.run import supervisor
from pretrain.run.folder import RunFolder
from pretrain.run.heartbeat import UNHEARD
from pretrain.state import TrainState
from tests.tiny import END_OF_TEXT, tiny_texts

CPU = torch.device("cpu")
T, GLOBAL, UNIT_BYTES, HELD_OUT = 32, 6, 3000, 0.3
KINDS = {
    "sums": ("empty", "mixed", "short", "held_out", "short", "empty", "mixed", "mixed", "train", "short", "held_out"),
    "more": ("train", "short", "mixed", "short", "mixed", "empty"),
}
"""Of each source what its units hold: nothing; documents of both splits; less than a sample; held-out text alone; no held-out text."""
ONE, TWO = ("sums",), ("sums", "more")
WEIGHTS = {"sums": 2.0, "more": 1.0}


@dataclass(frozen=True)
class Built:
    """A finished dataset, and what announced it while it was built."""

    folder: Path
    announced: bytes

    @cached_property
    def manifest(self) -> Manifest:
        return load_manifest(self.folder)

    @cached_property
    def sources(self) -> list[str]:
        """Of every unit, its source."""
        return [unit["source"] for unit in json.loads(self.announced)["units"]]

    @cached_property
    def _units(self) -> dict[str, list[list[ShardRecord]]]:
        return {
            split: [[one for one in self.manifest.shards(split) if one.name.startswith(f"units/{number:05d}/")] for number in range(99)]
            for split in SPLITS
        }

    def shards(self, source: str, split: str = "train") -> list[list[ShardRecord]]:
        """Of every unit of a source its shards."""
        return [self._units[split][number] for number, name in enumerate(self.sources) if name == source]


def write_unit(folder: Path, number: int, kind: str, seed: int) -> None:
    """A file that becomes a unit of its own, under a name by which its documents go to the splits that are wanted."""
    texts = tiny_texts(40, seed)
    size = UNIT_BYTES * 2 // 3  # two of them are more than a unit
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    if kind == "mixed":
        wanted = random.Random(seed).randint(size, UNIT_BYTES - 250)
        lines = lines[: next(count for count in range(len(lines)) if sum(map(len, lines[:count])) >= wanted)]
    else:
        text = {"empty": "", "short": "1 plus"}.get(kind, texts[0] + texts[1])
        lines = [json.dumps({"text": text, "pad": "x" * (size - len(text))}) + "\n"]
    assert size <= sum(map(len, lines)) <= UNIT_BYTES
    offsets = np.cumsum([0, *(len(line) for line in lines[:-1])]).tolist()
    for salt in range(10_000):
        name = f"{number:02d}-{salt}.jsonl"
        held_out = [place_document(identify_document(folder.name, name, offset)) < HELD_OUT for offset in offsets]
        if (len(set(held_out)) == 2) if kind == "mixed" else (held_out == [kind == "held_out"]):
            (folder / name).write_text("".join(lines))
            return
    raise AssertionError("no name was found")


def write_text(folder: Path, names: Sequence[str], seed: int) -> None:
    folder.mkdir()
    for source in names:
        (folder / source).mkdir()
        for number, kind in enumerate(KINDS[source]):
            write_unit(folder / source, number, kind, seed + 100 * number + len(source))
    train_tokenizer(tiny_texts(50, 1), 300, END_OF_TEXT).save(str(folder / "tokenizer.json"))


def section_of(folder: Path) -> DataSection:
    """The text in a folder as what a build is made of."""
    return DataSection(
        sources=tuple(SourceSection(name=name, path=str(folder / name)) for name in KINDS if (folder / name).is_dir()),
        tokenizer=TokenizerSection(path=str(folder / "tokenizer.json")),
        held_out_fraction=HELD_OUT,
        work_unit_bytes=UNIT_BYTES,
        shard_tokens=400,  # so that a unit may have several shards
        packed_lengths=(T,),
        train_while_building=True,
    )


def build(data: DataSection, folder: Path) -> Built:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        patch.setattr(conductor, "_tidy", lambda root: None)
        build_dataset(data.model_copy(update={"root": str(folder)}), lambda progress: None, open_here)
    announced = (folder / ARRIVING).read_bytes()
    (folder / ARRIVING).unlink()
    return Built(folder, announced)


@pytest.fixture(name="make")
def _make(tmp_path: Path, seed: int) -> Callable[..., Built]:
    def make(names: Sequence[str] = ONE) -> Built:
        write_text(tmp_path / "text", names, seed)
        built = build(section_of(tmp_path / "text"), tmp_path / "finished")
        assert [name for name in names for _ in KINDS[name]] == built.sources, "each file is a unit"
        return built

    return make


def config_of(folder: Path, names: Sequence[str] = ONE, packing: str = "chop", micro: int = 1, **changes: Any) -> RunConfig:
    """A run of the small kind; `changes` by dotted key with `__`."""
    stages = [{"weights": WEIGHTS}] if names == TWO else [{}]
    content: dict[str, Any] = {
        "data": {"root": str(folder), "tokenizer": {"path": "unused"}, "train_while_building": True},
        "mixture": {"stages": stages},
        "model": {"vocabulary_size": 320, "num_layers": 1, "width": 16, "num_heads": 2, "feed_forward_width": 24, "largest_context": 64},
        "training": {
            "sequence_length": T,
            "packing": packing,
            "global_batch_samples": GLOBAL,
            "micro_batch_samples": micro,
            "total_tokens": 1000 * T * GLOBAL,
        },
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        content.setdefault(section, {})[name] = value
    return RunConfig.model_validate_json(json.dumps(content))


def order_of(config: RunConfig) -> DataOrder:
    return DataOrder(open_corpus(config).sources, config.mixture, config.training, config.run.seed)


def open_batches(config: RunConfig, rank: int = 0, num_ranks: int = 1, start: int = 0) -> Batches:
    return Batches(open_corpus(config), order_of(config), config.training, rank, num_ranks, CPU, start, lambda: open_corpus(config))


# --- a build that is played -------------------------------------------------------------------------------------


class Build:
    """A dataset that comes unit by unit, as a build commits them."""

    def __init__(self, built: Built, folder: Path) -> None:
        self.built, self.folder, self.there = built, folder, set[int]()
        (folder / "units").mkdir(parents=True)
        shutil.copy(built.folder / "tokenizer.json", folder)
        (folder / ARRIVING).write_bytes(built.announced)

    def deliver(self, *numbers: int) -> None:
        for number in numbers:
            temporary = self.folder / "units" / f".tmp-{number:05d}"
            shutil.copytree(self.built.folder / "units" / f"{number:05d}", temporary)
            temporary.rename(self.folder / "units" / f"{number:05d}")
            self.there.add(number)

    def end(self) -> None:
        shutil.copy(self.built.folder / "manifest.json", self.folder)
        (self.folder / ARRIVING).unlink()

    def arrived(self, source: str) -> tuple[list[list[ShardRecord]], bool]:
        """The shards of each unit of a source up to the first that is not there, and whether that is all."""
        numbers = [number for number, name in enumerate(self.built.sources) if name == source]
        known = next((place for place, number in enumerate(numbers) if number not in self.there), len(numbers))
        return self.built.shards(source)[:known], known == len(numbers)

    def has_begun(self) -> bool:
        """Whether of each source a unit with text is there, or all of it."""
        for source in dict.fromkeys(self.built.sources):
            known, is_complete = self.arrived(source)
            held_out = self.built.shards(source, "held_out")[: len(known)]
            if not is_complete and not any(train or other for train, other in zip(known, held_out, strict=True)):
                return False
        return True

    def holds(self, cursors: dict[str, int], packing: str) -> bool:
        """Whether so many samples of each source are there; counted by hand."""
        for source, cursor in cursors.items():
            known, is_complete = self.arrived(source)
            shards = [shard for unit in known for shard in unit]
            whole = sum(shard.num_tokens for shard in shards) // T
            packed = sum(shard.packings[str(T)].num_packs for shard in shards)
            if not is_complete and cursor > (whole if packing == "chop" else packed):
                return False
        return True


def assert_equal(found: list[MicroBatch], expected: list[MicroBatch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.num_valid == other.num_valid
        for name in ("tokens_BT", "labels_BT", "documents_BT", "positions_BT"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def read(config: RunConfig, num_steps: int, rank: int = 0, num_ranks: int = 1, start: int = 0) -> list[list[MicroBatch]]:
    """Steps of a dataset that is there."""
    reader = open_batches(config, rank, num_ranks, start)
    steps = [reader.next_step() for _ in range(num_steps)]
    reader.close()
    return steps


@pytest.fixture(name="_quick")
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "ARRIVAL_POLL_SECONDS", 0.002)


# --- sample for sample ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("packing", ["chop", "best_fit"])
@pytest.mark.parametrize("names", [ONE, TWO], ids=["one source", "two sources"])
def test_what_arrives_is_fed_as_what_was_there_before(
    make: Callable[..., Built], tmp_path: Path, seed: int, names: Sequence[str], packing: str, num_ranks: int
) -> None:
    """Units in any order, through more than two epochs, at any number of ranks: a step is there as soon as its samples are, and not
    before; it is that of the finished dataset, and so is the identity of what has been seen."""
    built, chosen = make(names), random.Random(seed)
    finished = config_of(built.folder, names, packing, micro=2 if num_ranks != 2 else 1)
    order = order_of(finished)
    num_steps = math.ceil(2.3 * max(one.num_samples for one in order.sources) * (1.5 if names == TWO else 1) / GLOBAL)
    expected = [read(finished, num_steps, rank, num_ranks) for rank in range(num_ranks)]
    build = Build(built, tmp_path / "arriving")
    config = config_of(build.folder, names, packing, micro=2 if num_ranks != 2 else 1)
    disorder = chosen.choice([0, 0, 3, 100])
    to_come = sorted(
        range(len(built.sources)), key=lambda number: number - built.sources.index(built.sources[number]) + chosen.uniform(0, disorder)
    )
    print(to_come)

    def go_on() -> None:
        build.deliver(to_come.pop(0))
        if not to_come and chosen.random() < 0.5:
            build.end()

    while not build.has_begun():
        assert not open_corpus(config).has_begun
        go_on()
    assert open_corpus(config).has_begun
    readers = [open_batches(config, rank, num_ranks) for rank in range(num_ranks)]
    num_waits = 0
    for step in range(num_steps):
        seen = (step + 1) * GLOBAL
        while not build.holds(order.mixture.cursors(seen), packing):
            assert not readers[0].is_ready(0.03) and not any(reader.is_ready(0) for reader in readers)
            go_on()
            num_waits += 1
        for rank, reader in enumerate(readers):
            assert reader.is_ready(20)
            assert_equal(reader.next_step(), expected[rank][step])
            assert reader.order.identity(seen) == order.identity(seen)
    assert not to_come and (num_waits > 3 or disorder)
    for reader in readers:
        reader.close()


@pytest.mark.parametrize("packing", ["chop", "best_fit"])
@pytest.mark.parametrize("names", [ONE, TWO], ids=["one source", "two sources"])
def test_a_source_is_seen_unit_by_unit_and_each_sample_once_per_epoch(
    make: Callable[..., Built], names: Sequence[str], packing: str
) -> None:
    """Also the samples that go from one unit into the next, or over several: they come with the unit that completes them."""
    built = make(names)
    config = config_of(built.folder, names, packing)
    order = order_of(config)
    rows: dict[str, list[list[tuple[int, ...]]]] = {}  # of each source the targets of each unit's samples, read naively
    num_crossing = 0
    for source in names:
        left_over: list[int] = []
        for shards in built.shards(source):
            tokens = [np.fromfile(built.folder / f"{shard.name}.bin", "uint16").tolist() for shard in shards]
            if packing == "chop":
                num_crossing += bool(left_over and sum(map(len, tokens)) >= T)
                left_over += [token for one in tokens for token in one]
                num_samples = len(left_over) // T
                samples = [tuple(left_over[place * T : (place + 1) * T]) for place in range(num_samples)]
                left_over = left_over[num_samples * T :]
            else:
                samples = [sample for shard, one in zip(shards, tokens, strict=True) for sample in packed_targets(built.folder, shard, one)]
            rows.setdefault(source, []).append(samples)
    assert packing == "best_fit" or num_crossing > 1
    per_epoch = {source: [sample for unit in units for sample in unit] for source, units in rows.items()}
    num_steps = math.ceil(3 * sum(map(len, per_epoch.values())) * 1.5 / GLOBAL)
    places = order.places(np.arange(num_steps * GLOBAL))
    fed: dict[str, list[tuple[int, ...]]] = {source: [] for source in names}
    labels = [label for step in read(config, num_steps) for batch in step for label in batch.labels_BT.tolist()]
    for source, label in zip(places.source_n.tolist(), labels, strict=True):
        fed[order.sources[source].name].append(tuple(label))
    for source, units in rows.items():
        num_epochs = len(fed[source]) // len(per_epoch[source])
        assert num_epochs >= 2
        for epoch in range(num_epochs):
            at = epoch * len(per_epoch[source])
            for samples in units:
                assert Counter(fed[source][at : at + len(samples)]) == Counter(samples)
                at += len(samples)
        first, second = (fed[source][epoch * len(per_epoch[source]) :][: len(per_epoch[source])] for epoch in (0, 1))
        assert first != second and first != per_epoch[source], "it is shuffled, each time otherwise"


def packed_targets(folder: Path, shard: ShardRecord, tokens: list[int]) -> list[tuple[int, ...]]:
    """The targets of a shard's packs, of the file as numpy reads it."""
    _, num_packs, *rest = np.load(folder / f"{shard.name}.packed-{T}.npy").tolist()
    firsts, counts = np.array(rest[num_packs + 1 :]).reshape(2, -1).tolist()
    samples = []
    for pack in range(num_packs):
        pieces = range(rest[pack], rest[pack + 1])
        found = [token for piece in pieces for token in tokens[firsts[piece] : firsts[piece] + counts[piece]]]
        samples.append((*found, *[-100] * (T - len(found))))
    return samples


@pytest.mark.usefixtures("_quick")
def test_the_second_epoch_waits_for_the_last_unit_even_if_that_teaches_nothing(make: Callable[..., Built], tmp_path: Path) -> None:
    """How long an epoch is, nobody knows before."""
    built = make()
    finished = config_of(built.folder)
    (source,) = open_corpus(finished).sources
    expected = read(finished, 2 * source.num_samples // GLOBAL)
    build = Build(built, tmp_path / "arriving")
    assert built.shards("sums")[-1] == [] and built.shards("sums", "held_out")[-1] != []
    build.deliver(*range(len(built.sources) - 1))
    reader = open_batches(config_of(build.folder))
    num_steps = source.num_samples // GLOBAL
    for step in range(num_steps):
        assert reader.is_ready(20)
        assert_equal(reader.next_step(), expected[step])
    for _ in range(5):
        assert not reader.is_ready(0.02)
    assert reader.order.missing((num_steps + 1) * GLOBAL) == "sums"
    build.deliver(len(built.sources) - 1)
    for step in range(num_steps, len(expected)):
        assert_equal(reader.next_step(), expected[step])
    reader.close()


# --- waiting ----------------------------------------------------------------------------------------------------


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_closing_ends_a_waiting_thread_at_once(make: Callable[..., Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However seldom it looks; and one that was never asked for anything."""
    monkeypatch.setattr(batches_module, "ARRIVAL_POLL_SECONDS", 60.0)
    build = Build(make(), tmp_path / "arriving")
    for asked in (True, False):
        reader = open_batches(config_of(build.folder))
        if asked:
            assert not reader.is_ready(0.05)
            assert len(threads()) == 1
        began = time.monotonic()
        reader.close()
        assert time.monotonic() - began < 1
        assert threads() == []
        with pytest.raises(RuntimeError):
            reader.next_step()


@pytest.mark.usefixtures("_quick")
def test_a_step_that_is_asked_for_comes_when_its_unit_does(make: Callable[..., Built], tmp_path: Path) -> None:
    """And what was waited, asking or not, is counted."""
    built = make()
    build = Build(built, tmp_path / "arriving")
    config, finished = config_of(build.folder), config_of(built.folder)
    reader = open_batches(config)
    assert not reader.is_ready(0.1)
    assert 0.09 < reader.seconds_waited < 20
    arrival = threading.Timer(0.2, build.deliver, range(len(built.sources)))
    arrival.start()
    before = reader.seconds_waited
    assert_equal(reader.next_step(), read(finished, 1)[0])
    assert 0.15 < reader.seconds_waited - before < 20
    arrival.join()
    reader.close()


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("until", [6, 10_000])
def test_a_step_of_a_ramp_waits_for_its_own_samples_alone(make: Callable[..., Built], tmp_path: Path, until: int) -> None:
    """In the ramp's steps of 2 and behind it, where steps have 6."""
    built = make()
    build = Build(built, tmp_path / "arriving")
    ramp = [{"until_tokens": until * T // 2, "global_batch_samples": 2}]
    finished, config = (config_of(folder, training__batch_ramp=ramp) for folder in (built.folder, build.folder))
    build.deliver(*range(len(built.sources) - 3))
    steps, (source,) = config.training.steps, open_corpus(config).sources
    num_steps = steps.step_of(source.num_samples)
    assert steps.batch_at(source.num_samples) == (6 if until == 6 else 2) and num_steps > 3
    expected = read(finished, num_steps + 3)
    reader = open_batches(config)
    for step in range(num_steps):
        assert reader.is_ready(20)
        assert_equal(reader.next_step(), expected[step])
    for _ in range(5):
        assert not reader.is_ready(0.02)
    assert reader.order.missing(steps.samples_before(num_steps)) is None
    assert reader.order.missing(steps.samples_before(num_steps + 1)) == reader.awaited_source == "sums"
    build.deliver(*range(len(built.sources) - 3, len(built.sources)))
    for step in range(num_steps, num_steps + 3):
        assert_equal(reader.next_step(), expected[step])
    reader.close()


@pytest.mark.usefixtures("_quick")
def test_a_run_that_resumes_waits_at_the_same_place(make: Callable[..., Built], tmp_path: Path) -> None:
    """From any step on, with everything opened anew, also while what was seen is not all there."""
    built = make()
    build = Build(built, tmp_path / "arriving")
    expected = read(config_of(built.folder), 12)
    build.deliver(0, 1)
    (source,) = open_corpus(config_of(build.folder)).sources
    steps_there = source.num_samples // GLOBAL
    assert 0 < steps_there < 12
    for start in (steps_there, steps_there - 1, 9):
        reader = open_batches(config_of(build.folder), start=start * GLOBAL)
        for step in range(start, steps_there):
            assert_equal(reader.next_step(), expected[step])
        assert not reader.is_ready(0.05)
        reader.close()
    reader = open_batches(config_of(build.folder), start=9 * GLOBAL)
    assert not reader.is_ready(0.05)
    build.deliver(*range(2, len(built.sources)))
    for step in range(9, 12):
        assert_equal(reader.next_step(), expected[step])
    reader.close()


@pytest.mark.usefixtures("_quick")
def test_units_that_are_away_for_a_moment_are_waited_for(make: Callable[..., Built], tmp_path: Path) -> None:
    """As when a build starts again and announces in another order what it will make."""
    built = make()
    build = Build(built, tmp_path / "arriving")
    build.deliver(0, 1)
    reader = open_batches(config_of(build.folder))
    expected = read(config_of(built.folder), 6)
    num_steps = open_corpus(config_of(build.folder)).sources[0].num_samples // GLOBAL
    for step in range(num_steps):
        assert_equal(reader.next_step(), expected[step])
    content = unseal(built.announced)
    others = seal({**content, "units": [{**unit, "fingerprint": "0" * 64} for unit in content["units"]]})
    write_file(build.folder / ARRIVING, others)  # in one piece, as builds do: the thread looks at any moment
    assert not reader.is_ready(0.1)
    write_file(build.folder / ARRIVING, built.announced)
    build.deliver(*range(2, len(built.sources)))
    for step in range(num_steps, 6):
        assert_equal(reader.next_step(), expected[step])
    reader.close()


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("number", [1, 7])
def test_what_is_built_anew_while_a_run_waits_is_refused_if_it_was_seen(make: Callable[..., Built], tmp_path: Path, number: int) -> None:
    """Else the run would go on, and save what no dataset could give again."""
    built = make()
    build = Build(built, tmp_path / "arriving")
    config = config_of(build.folder)
    build.deliver(0, 1)
    reader = open_batches(config)
    num_steps = open_corpus(config).sources[0].num_samples // GLOBAL
    for _ in range(num_steps):
        reader.next_step()
    assert not reader.is_ready(0.05)
    other = change(tmp_path, number)
    if number == 1:
        shutil.rmtree(build.folder / "units" / "00001")  # as a build does before it announces
        build.there.remove(1)
    write_file(build.folder / ARRIVING, other.announced)
    build.built = other
    build.deliver(*(unit for unit in range(len(other.sources)) if unit not in build.there))
    if number == 1:
        with pytest.raises(UserError, match=r"built anew with other content while it waited for more: source sums differ"):
            reader.next_step()
    else:
        expected = read(config_of(other.folder), num_steps + 3)
        for step in range(num_steps, num_steps + 3):
            assert_equal(reader.next_step(), expected[step])
    reader.close()


def change(tmp_path: Path, number: int) -> Built:
    """The same text built again but for one word of a unit of the first source."""
    copy = tmp_path / f"changed-{number}"
    shutil.copytree(tmp_path / "text", copy)
    (path,) = (copy / "sums").glob(f"{number:02d}-*.jsonl")
    path.write_text(path.read_text().replace("plus", "less"))
    return build(section_of(copy), tmp_path / f"built-{number}")


class Said:
    """Stands in for a journal."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.usefixtures("_quick")
def test_the_loop_waits_says_so_and_hears_a_stop(make: Callable[..., Built], tmp_path: Path) -> None:
    """Once a minute; and it says nothing where a step is read slowly, but is built."""
    built = make()
    build = Build(built, tmp_path / "arriving")
    config, said, alone = config_of(build.folder), Said(), SimpleNamespace(sum_over_data_ranks=float, data_size=1)
    reader = open_batches(config)

    def waits(stop: Any) -> bool:
        return loop.data_is_there(config, reader, alone, stop, said, UNHEARD)  # type: ignore[arg-type]

    class StopSoon:
        """Asked for at the second look."""

        num_looks = 0

        @property
        def asked(self) -> bool:
            self.num_looks += 1
            return self.num_looks == 2

    assert waits(StopSoon()) is False
    assert said.lines == [
        f"waiting for the next units of sums in {build.folder}; training goes on when they are built",
    ]
    threading.Timer(0.3, build.deliver, range(len(built.sources))).start()
    assert waits(SimpleNamespace(asked=False)) is True and len(said.lines) == 1
    reader.close()
    said.lines.clear()
    answers = [False, False, True]
    slow = SimpleNamespace(is_ready=lambda timeout_seconds: answers.pop(0), awaited_source=None)
    assert loop.data_is_there(config, slow, alone, SimpleNamespace(asked=False), said, UNHEARD) is True  # type: ignore[arg-type]
    assert said.lines == [] and answers == []
    plain = config.model_copy(update={"data": config.data.model_copy(update={"train_while_building": False})})
    assert loop.data_is_there(plain, None, None, None, said, UNHEARD) is True  # type: ignore[arg-type]


def test_the_command_waits_for_the_first_unit_of_each_source(
    make: Callable[..., Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a run folder is made or a rank is started; what is held out is fast then."""
    built = make(TWO)
    build = Build(built, tmp_path / "arriving")
    run_file = tmp_path / "mine.yaml"
    config = config_of(build.folder, TWO, run__root=str(tmp_path / "runs"), mixture__max_epochs=1.0)
    run_file.write_text(dump_config(config))
    started: list[set[int]] = []
    to_come = [1, 3, 0, 2, len(KINDS["sums"]) + 1, len(KINDS["sums"]), 4]

    def wait(seconds: float) -> None:
        assert not (tmp_path / "runs").exists()
        build.deliver(to_come.pop(0))

    def supervise(config: RunConfig, dataset: Path, say: Callable[[str], None], is_committed: Any, newest_step: Any, *_: object) -> int:
        started.append(set(build.there))
        return 0

    monkeypatch.setattr(cli.time, "sleep", wait)
    monkeypatch.setattr(supervisor, "supervise", supervise)
    done = CliRunner().invoke(cli.app, ["train", str(run_file)], prog_name="pretrain")
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert to_come == [4] and started == [build.there], "as soon as they are there, and not before"
    # Nobody knows how often the sources will be seen: nothing is said of that, and nothing refused.
    awaited = [line.removeprefix("waiting for the first unit of ").split(" in ") for line in done.stderr.splitlines()]
    assert [names for names, _ in awaited] == [*["sums, more"] * 3, *["more"] * 3] and {folder for _, folder in awaited} == {
        str(build.folder)
    }


# --- identity ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["chop", "best_fit"])
def test_the_identity_of_what_was_seen_does_not_depend_on_when_it_came(make: Callable[..., Built], tmp_path: Path, packing: str) -> None:
    """Of every number of samples, with just so many units there, with more, with all, and when the build has ended."""
    built = make(TWO)
    finished = order_of(config_of(built.folder, TWO, packing))
    build = Build(built, tmp_path / "arriving")
    config = config_of(build.folder, TWO, packing)
    numbers = sorted(range(len(built.sources)), key=lambda number: (number - built.sources.index(built.sources[number]), number))
    num_compared = 0
    for number in numbers:
        build.deliver(number)
        order = order_of(config)
        for seen in range(3 * finished.sources[0].num_samples):
            is_there = build.holds(finished.mixture.cursors(seen), packing)
            assert is_there == (order.missing(seen) is None)
            assert not is_there or order.identity(seen) == finished.identity(seen)
            num_compared += is_there
    build.end()
    ended = order_of(config)
    for seen in range(3 * finished.sources[0].num_samples):
        assert ended.missing(seen) is None and ended.identity(seen) == finished.identity(seen)
    assert num_compared > 100
    # Seen in another way, it is another thing.
    plain = config_of(built.folder, TWO, packing, data__train_while_building=False)
    assert order_of(plain).identity(1)["source sums"] != finished.identity(1)["source sums"]


@pytest.mark.parametrize("packing", ["chop", "best_fit"])
@pytest.mark.parametrize("number", [1, 6, 8])
def test_a_unit_that_was_passed_may_not_change_and_one_to_come_may(
    make: Callable[..., Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, packing: str
) -> None:
    """A run that was saved while data arrived is resumed on the finished dataset, of which a unit was built anew with other words."""
    built = make()
    build = Build(built, tmp_path / "arriving")
    begun, changed = config_of(build.folder, packing=packing), config_of(change(tmp_path, number).folder, packing=packing)
    restored: list[object] = []
    monkeypatch.setattr(beginning, "read_fragments", lambda engine, index, with_moments: restored.append(index))
    monkeypatch.setattr(beginning, "FragmentIndex", lambda commit: nullcontext(commit))
    monkeypatch.setattr(beginning, "prepare_weights", lambda engine: None)
    monkeypatch.setattr(beginning, "refresh_weights", lambda engine: None)
    monkeypatch.setattr(beginning, "torch_optimizer", lambda engine: engine.optimizer)

    def resume(config: RunConfig, step: int, identity: dict[str, str]) -> TrainState:
        state = TrainState(step, step * GLOBAL, step * GLOBAL * T, 0, ())
        commit = Commit(tmp_path / "step", state, {}, identity, {}, 1, 1, 2.5, 0)
        monkeypatch.setattr(beginning, "newest_that_loads", lambda places, load, say: (load(commit), commit)[1])
        layout = SimpleNamespace(rank=1, world_size=2)
        run = RunFolder(tmp_path / "run")
        tokenizer = {"tokenizer": open_corpus(config).tokenizer_sha256}
        engine = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[]))
        return beginning.resume(engine, config, run, [], order_of(config), tokenizer, {}, layout)  # type: ignore[arg-type]

    before = [shard for unit in built.shards("sums")[:number] for shard in unit]
    samples_before = {
        "chop": sum(shard.num_tokens for shard in before) // T,
        "best_fit": sum(shard.packings[str(T)].num_packs for shard in before),
    }
    num_refused = num_resumed = 0
    total = open_corpus(config_of(built.folder, packing=packing)).sources[0].num_samples
    there = 0
    for step in range(1, total // GLOBAL + 3):
        while order_of(begun).missing(step * GLOBAL) is not None:
            build.deliver(there)
            there += 1
        identity = order_of(begun).identity(step * GLOBAL) | {"tokenizer": open_corpus(begun).tokenizer_sha256}
        assert resume(begun, step, identity).step == step
        assert resume(config_of(built.folder, packing=packing), step, identity).step == step
        if step * GLOBAL > samples_before[packing]:
            with pytest.raises(UserError, match=r"has seen \d+ samples, .* would have made them others: what differs: source sums"):
                resume(changed, step, identity)
            num_refused += 1
        else:
            assert resume(changed, step, identity).step == step
            num_resumed += 1
    assert num_refused > 0 and (num_resumed > 0) == (number > 1)
    assert len(restored) == 2 * (num_refused + num_resumed) + num_resumed


# --- what nobody can know yet -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stages", [[{}], [{"weights": WEIGHTS}, {"from_tokens": 50 * T * GLOBAL}], [{"epochs": {"sums": 1.0, "more": 2.0}}]]
)
def test_mixtures_by_size_are_refused_before_and_after_the_build_has_ended(
    make: Callable[..., Built], tmp_path: Path, stages: list[dict[str, Any]]
) -> None:
    """What could not have been begun while data arrived is not another run because it arrived in time."""
    built = make(TWO)
    build = Build(built, tmp_path / "arriving")
    build.deliver(*range(len(built.sources) - 2))
    wanted = (
        rf"mixture.stages\[{len(stages) - 1}\] goes by the sources' sizes, which nobody knows while data is still arriving "
        r"\(data.train_while_building\); give weights for sums, more\."
    )
    for folder in (build.folder, built.folder):
        with pytest.raises(UserError, match=wanted):
            order_of(config_of(folder, TWO, mixture__stages=stages))
    assert order_of(config_of(built.folder, TWO, mixture__stages=stages, data__train_while_building=False)).sources[0].num_samples > 0


def test_epochs_of_a_single_source_are_refused_too(make: Callable[..., Built]) -> None:
    stages = [{"epochs": {"sums": 2.0}}]
    with pytest.raises(UserError, match=r"mixture.stages\[0\] goes by the sources' sizes.* give weights for sums\."):
        order_of(config_of(make().folder, mixture__stages=stages))


def test_repeats_are_not_judged_before_all_is_there(make: Callable[..., Built], tmp_path: Path) -> None:
    """What a tenth of a source would be seen, the source is not."""
    built = make()
    build = Build(built, tmp_path / "arriving")
    build.deliver(0, 1)
    total = 2 * open_corpus(config_of(built.folder)).sources[0].num_samples * T
    for limit in (3.0, None):
        assert check_repeats(config_of(build.folder, training__total_tokens=total, mixture__max_epochs=limit)) == []
    build.deliver(*range(2, len(built.sources)))
    assert check_repeats(config_of(build.folder, training__total_tokens=total, mixture__max_epochs=3.0)) == []
    with pytest.raises(UserError, match=r"mixture.max_epochs is 1\.5, and this run would see sums 2\.\d\d times"):
        check_repeats(config_of(build.folder, training__total_tokens=total, mixture__max_epochs=1.5))


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("weights", [{"sums": 1.0, "more": 1.0}, {"sums": 1.0}])
def test_a_source_that_turns_out_to_have_no_sample_is_refused_as_if_it_was_known_before(
    make: Callable[..., Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: dict[str, float]
) -> None:
    """While it may still come it is waited for; one that rests is let be."""
    monkeypatch.setitem(KINDS, "more", ("short", "held_out", "short"))
    built = make(TWO)
    build = Build(built, tmp_path / "arriving")
    settings: dict[str, Any] = {"mixture__stages": [{"weights": weights}]}
    build.deliver(*range(len(built.sources) - 1))
    reader = open_batches(config_of(build.folder, TWO, **settings))
    refusal = r"mixture.stages\[0\].weights.more 1.0: this source has less text than one sample"
    if "more" not in weights:
        expected = read(config_of(built.folder, TWO, **settings), 3)
        for step in range(3):
            assert_equal(reader.next_step(), expected[step])
    else:
        assert not reader.is_ready(0.05)
        build.deliver(len(built.sources) - 1)
        with pytest.raises(UserError, match=refusal):
            reader.next_step()
        for folder in (build.folder, built.folder):
            with pytest.raises(UserError, match=refusal):
                order_of(config_of(folder, TWO, **settings))
    reader.close()


@pytest.mark.usefixtures("_quick")
def test_a_dataset_without_a_sample_is_refused_once_that_is_known(
    make: Callable[..., Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS, "sums", ("short", "empty", "short"))
    built = make()
    build = Build(built, tmp_path / "arriving")
    build.deliver(0)
    reader = open_batches(config_of(build.folder))
    assert not reader.is_ready(0.05)
    build.deliver(1, 2)
    with pytest.raises(UserError, match=r"tokens to learn from in 1 sources and one sample needs 32 of one; add text, or lower"):
        reader.next_step()
    reader.close()
    for folder in (build.folder, built.folder):
        with pytest.raises(UserError, match="one sample needs 32 of one"):
            open_corpus(config_of(folder))


# --- held out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [ONE, TWO], ids=["one source", "two sources"])
def test_held_out_is_the_text_of_the_first_unit_of_each_source_in_every_state(
    make: Callable[..., Built], tmp_path: Path, seed: int, names: Sequence[str]
) -> None:
    """The first that has text: what is held out there, be it nothing, and never more when more has come."""
    built = make(names)
    expected, num_bytes = [built.manifest.end_of_text_id], 0
    for source in names:
        train, held_out = built.shards(source), built.shards(source, "held_out")
        first = next(number for number in range(len(train)) if train[number] or held_out[number])
        for shard in held_out[first]:
            expected += np.fromfile(built.folder / f"{shard.name}.bin", "uint16").tolist()
            num_bytes += shard.num_bytes
    assert num_bytes > 0, "of the first source something is"
    build = Build(built, tmp_path / "arriving")
    to_come = random.Random(seed).sample(range(len(built.sources)), len(built.sources))
    print(to_come)
    num_states = 0
    for number in (*to_come, None):
        if number is None:
            build.end()
        else:
            build.deliver(number)
        corpus = open_corpus(config_of(build.folder, names))
        assert corpus.has_begun == build.has_begun()
        if corpus.has_begun:
            assert corpus.held_out.read(0, len(corpus.held_out)).tolist() == expected
            assert corpus.held_out_bytes == num_bytes
            num_states += 1
    assert num_states > 1
    whole = open_corpus(config_of(built.folder, names, data__train_while_building=False))
    assert len(whole.held_out) == built.manifest.total("held_out").num_tokens > len(expected) - 1


# --- the commands -----------------------------------------------------------------------------------------------

RULE = '''
import time
from pathlib import Path


def hold_back(document, *, gates):
    """A document passes when its file's gate is open."""
    while not (Path(gates) / document.file).exists():
        time.sleep(0.02)
    return document
'''
RUN_FILE = """
data:
  root: {place}/shards
  sources: [{{name: sums, path: {place}/text, format: jsonl}}]
  clean: [{{rule: "holding_rules:hold_back", settings: {{gates: {place}/gates}}}}]
  tokenizer: {{path: {place}/tokenizer.json}}
  held_out_fraction: 0.1
  work_unit_bytes: 5000
  workers: 1
  train_while_building: true
model: {{vocabulary_size: 320, num_layers: 2, width: 32, num_heads: 4, feed_forward_width: 64, largest_context: 64, dropout: 0.1}}
training: {{sequence_length: 32, global_batch_samples: 8, micro_batch_samples: 2, total_tokens: {total}}}
optimizer: {{peak_lr: 5e-3}}
precision: fp32
run: {{root: {place}/runs, deterministic: true}}
parallel: {{cpu_processes: 2}}
checkpoint: {{every_steps: null}}
evaluate: {{every_steps: null}}
watch: {{log_every_steps: 1, wandb: disabled}}
"""
NUM_FILES, OPEN_AT_FIRST, LIMIT_SECONDS = 5, 2, 120


class Command:
    """`pretrain ...` beside this process, and what it says."""

    def __init__(self, place: Path, *arguments: str) -> None:
        self._log = place / f"{'-'.join(arguments[:1])}-{time.monotonic_ns()}.log"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(place), str(Path(__file__).parents[3])])}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pretrain.cli", *arguments],
                cwd=place,
                env=environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def await_word(self, is_said: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not is_said():
            assert self.process.poll() is None and time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def end(self, status: int) -> str:
        try:
            self.process.wait(LIMIT_SECONDS)
        finally:
            if self.process.poll() is None:
                self.process.terminate()
                self.process.wait(30)
        assert self.process.returncode == status, self.said()
        assert "Traceback" not in self.said()
        return self.said()


def losses_of(run: Path) -> list[tuple[int, str]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], float(row["loss"]).hex()) for row in rows if "loss" in row]


@pytest.mark.long
def test_training_beside_a_build_ends_with_the_bits_of_training_behind_it(tmp_path: Path, seed: int) -> None:
    """Two ranks, a real build that is slow. The run says that it waits, having learnt all it could; a stop then is saved; started
    again, it waits there, goes on when the build does, into a second epoch; and a run on the finished dataset ends with its weights."""
    (tmp_path / "text").mkdir()
    (tmp_path / "gates").mkdir()
    for number in range(NUM_FILES):
        rows = [json.dumps({"text": text}) + "\n" for text in tiny_texts(40, seed + number)]
        content = ""
        while len(content) + len(rows[0]) < 4800:
            content += rows.pop(0)
        (tmp_path / "text" / f"{number}.jsonl").write_text(content)
    train_tokenizer(tiny_texts(50, 1), 300, END_OF_TEXT).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "holding_rules.py").write_text(RULE)
    run_file = tmp_path / "mine.yaml"
    total_steps = 42
    run_file.write_text(RUN_FILE.format(place=tmp_path, total=total_steps * 8 * 32))
    shards, runs = tmp_path / "shards", tmp_path / "runs"

    def open_gates(first: int, end: int) -> None:
        for number in range(first, end):
            (tmp_path / "gates" / f"{number}.jsonl").touch()

    open_gates(0, OPEN_AT_FIRST)
    build = Command(tmp_path, "data", "build", str(run_file))
    commands = [build]
    try:
        build.await_word(lambda: (shards / "units" / f"{OPEN_AT_FIRST - 1:05d}").exists())
        commands.append(Command(tmp_path, "train", str(run_file), "run.name=beside"))
        commands[-1].await_word(lambda: "waiting for the next units of sums" in commands[-1].said())
        commands[-1].process.send_signal(signal.SIGTERM)
        said = commands[-1].end(75)
        assert build.process.poll() is None and len(list((shards / "units").glob("[0-9]*"))) == OPEN_AT_FIRST
        (saved,) = (runs / "beside" / "checkpoints").glob("step-*")
        num_learnt = int(saved.name.removeprefix("step-"))
        assert f"stopped and saved at step {num_learnt} of {total_steps}" in said

        commands.append(Command(tmp_path, "train", str(run_file), "run.name=beside"))
        commands[-1].await_word(lambda: "waiting for the next units of sums" in commands[-1].said())
        assert f"resumed from {saved.name}" in commands[-1].said() and build.process.poll() is None
        open_gates(OPEN_AT_FIRST, NUM_FILES)
        build.end(0)
        said = commands[-1].end(0)
        assert f"done: {total_steps} steps" in said
        commands.append(Command(tmp_path, "train", str(run_file), "run.name=behind"))
        assert "waiting" not in commands[-1].end(0)
    finally:
        for command in commands:
            if command.process.poll() is None:
                command.process.terminate()
                command.process.wait(30)

    manifest = load_manifest(shards)
    assert not (shards / ARRIVING).exists()
    units = [sum(one.num_tokens for one in manifest.shards("train") if f"units/{number:05d}/" in one.name) for number in range(NUM_FILES)]
    assert num_learnt == sum(units[:OPEN_AT_FIRST]) // 32 // 8 > 0, "all was learnt that was there"
    assert total_steps * 8 > sum(units) // 32 > (num_learnt + 4) * 8, "the run goes into a second epoch"
    hashes = {name: state_hash(read_commit(runs / name / "checkpoints" / f"step-{total_steps:08d}")) for name in ("beside", "behind")}
    assert hashes["beside"] == hashes["behind"]
    assert losses_of(runs / "beside") == losses_of(runs / "behind") and len(losses_of(runs / "behind")) == total_steps
    assert {split: bool(manifest.shards(split)) for split in SPLITS} == {"train": True, "held_out": True}

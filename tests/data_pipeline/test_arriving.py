"""What is announced of a build while it runs: there before the first unit is, gone behind the manifest, whatever kills the build."""

import contextlib
import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from configs.data_section import DeduplicationSection, RuleSection
from configs.errors import UserError
from configs.sealed import seal, unseal
from data_pipeline import build as conductor
from data_pipeline.arriving import ARRIVING, Arriving, UnitToCome, load_arrived, load_arriving, write_arriving
from data_pipeline.build import build_dataset
from data_pipeline.execution import open_here
from data_pipeline.manifest import FORMAT_VERSION, SPLITS, Manifest, load_manifest
from data_pipeline.units import write_unit
from tests.faults.builds import build_here, count_committed

pytestmark = pytest.mark.usefixtures("without_waiting_for_the_disk")


def look(root: Path):
    """What anybody sees of a dataset at one moment: what is announced, how many units are there, whether it is finished."""
    path = root / ARRIVING
    return path.read_bytes() if path.exists() else None, count_committed(root), (root / "manifest.json").exists()


def units_of(manifest: Manifest):
    """The shards of each unit, by its number and by split."""
    units: dict = {}
    for split in SPLITS:
        for shard in manifest.shards(split):
            units.setdefault(int(shard.name.split("/")[1]), {}).setdefault(split, []).append(shard)
    return {number: {split: tuple(shards) for split, shards in unit.items()} for number, unit in units.items()}


def announced(data, monkeypatch):
    """A finished dataset from which what announced it has not been tidied away, and what that said."""
    with monkeypatch.context() as patch:
        patch.setattr(conductor, "_tidy", lambda root: None)
        root = build_dataset(data, lambda progress: None, open_here).folder
    return root, load_arriving(root)


# --- when ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deduplicated", [False, True])
def test_it_is_there_before_the_first_unit_and_goes_behind_the_manifest(two_sources, monkeypatch, deduplicated):
    """Seen before every unit and around the manifest; it says what the finished units and the manifest say."""
    data = two_sources.model_copy(update={"deduplicate": DeduplicationSection()}) if deduplicated else two_sources
    root = Path(data.folder())
    seen = []

    @contextlib.contextmanager
    def watching(workers, scratch):
        with open_here(workers, scratch) as run:

            def run_and_look(function, tasks):
                for task in tasks:
                    seen.append((function is write_unit, *look(root)))
                    yield from run(function, [task])

            yield run_and_look

    def look_around(root, manifest, write=conductor.write_manifest):
        around.append(look(root))
        write(root, manifest)
        around.append(look(root))

    around: list = []
    monkeypatch.setattr(conductor, "write_manifest", look_around)
    result = build_dataset(data, lambda progress: None, watching)
    before, units = ([row[1:] for row in seen if row[0] == makes_units] for makes_units in (False, True))
    assert set(before) == {(None, 0, False)}
    content = units[0][0]
    assert units == [(content, number, False) for number in range(result.num_units)] and result.num_units > 3
    assert around == [(content, result.num_units, False), (content, result.num_units, True)]
    assert look(root) == (None, result.num_units, True)

    (root / ARRIVING).write_bytes(content)
    arriving, manifest = load_arriving(root), result.manifest
    records = [unseal((root / f"units/{number:05d}/unit.json").read_bytes()) for number in range(result.num_units)]
    assert arriving.model_dump() == {
        "format_version": FORMAT_VERSION,
        **{key: getattr(manifest, key) for key in ("tokenizer_sha256", "vocabulary_size", "end_of_text_id", "dtype")},
        "units": tuple({"source": one["source"], "fingerprint": one["fingerprint"]} for one in records),
    }
    assert [unit.source for unit in arriving.units] == ["texts"] * (result.num_units - 1) + ["rows"]


KILLED = {
    "before it is written": ("write_arriving", 0, False, (False, 0, False)),
    "when it is written": ("write_arriving", 0, True, (True, 0, False)),
    "behind the first unit": ("write_unit", 0, True, (True, 1, False)),
    "behind the third unit": ("write_unit", 2, True, (True, 3, False)),
    "before the manifest": ("write_manifest", 0, False, (True, 6, False)),
    "behind the manifest": ("write_manifest", 0, True, (True, 6, True)),
}


@pytest.mark.parametrize("name", KILLED)
def test_a_build_that_is_killed_leaves_what_the_next_start_brings_to_its_end(corpus, data_for, build, hashes, monkeypatch, name):
    """By SIGKILL, around everything that training looks at; those who look in between see the units that are there, as they stay."""
    function, number, behind, (is_announced, num_units, is_finished) = KILLED[name]
    reference = build(data_for(corpus, root="reference"))
    data = data_for(corpus)
    root = Path(data.folder())
    calls = []

    def kill_there():
        plain = getattr(conductor, function)

        def killed(*arguments):
            calls.append(arguments)
            done = plain(*arguments) if behind or len(calls) <= number else None
            if len(calls) > number:
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        setattr(conductor, function, killed)  # in the child

    assert reference.num_units == 6
    assert build_here(data, before=kill_there).status == -signal.SIGKILL
    left, *others = look(root)
    assert (left is not None, *others) == (is_announced, num_units, is_finished)
    if is_announced:
        arriving = load_arriving(root)
        found = [load_arrived(root, arriving, unit) for unit in range(6)]
        assert found == [units_of(reference.manifest)[unit] for unit in range(num_units)] + [None] * (6 - num_units)
    result = build(data)
    assert (result.outcome, result.num_units_kept) == (("unchanged", 6) if is_finished else ("built", num_units))
    assert hashes(root) == hashes(reference.folder) and load_arriving(root) is None


def test_a_start_that_makes_other_units_announces_them_before_the_first(corpus, data_for, monkeypatch):
    """What an earlier build announced is not believed of them."""
    data = data_for(corpus)
    root, before = announced(data, monkeypatch)
    changed = corpus / "even" / "text-00.txt"
    changed.write_text(changed.read_text() + " more")
    seen = []

    def watch(function, tasks):
        for task in tasks:
            seen.append((task.unit.index, load_arriving(root), [load_arrived(root, before, unit.index) for unit in [task.unit]]))
            yield task, function(task)

    # Of the first unit's documents nothing is as it was; the tokenizer would be trained anew.
    same = data.model_copy(update={"clean": (RuleSection(rule="length", settings={"min_characters": 1}),)})
    build_dataset(same, lambda progress: None, lambda workers, scratch: contextlib.nullcontext(watch), rebuild=True)
    num_units = len(before.units)
    made = seen[-num_units:]
    assert [index for index, *_ in made] == list(range(num_units))
    now = made[0][1]
    assert {unit.fingerprint for unit in now.units}.isdisjoint(unit.fingerprint for unit in before.units)
    assert [arriving for _, arriving, _ in made] == [now] * num_units
    assert load_arriving(root) is None
    assert [load_arrived(root, now, number) for number in range(num_units)] == list(units_of(load_manifest(root)).values())


# --- what ---------------------------------------------------------------------------------------------------


def make_arriving(**changes) -> Arriving:
    units = tuple(UnitToCome(source="web" if number < 3 else "code", fingerprint=f"{number:064x}") for number in range(5))
    given = {
        "format_version": FORMAT_VERSION,
        "tokenizer_sha256": "7" * 64,
        "vocabulary_size": 300,
        "end_of_text_id": 299,
        "dtype": "uint16",
    }
    return Arriving(**{**given, "units": units, **changes})


def test_it_comes_back_as_it_was_written_and_none_is_none(tmp_path):
    assert load_arriving(tmp_path) is None and load_arriving(tmp_path / "nowhere") is None
    write_arriving(tmp_path, make_arriving())
    assert load_arriving(tmp_path) == make_arriving()
    assert [path.name for path in tmp_path.iterdir()] == [ARRIVING]
    assert load_arriving(tmp_path / ARRIVING) is None  # a file, where a folder would be


def test_a_damaged_one_is_refused_and_never_read_as_another(tmp_path, seed):
    """Every cut and many flipped bits: a sentence that names the file and says what to do."""
    path = tmp_path / ARRIVING
    write_arriving(tmp_path, make_arriving())
    whole = path.read_bytes()
    chosen = random.Random(seed)
    damaged = [whole[:size] for size in (0, 1, len(whole) // 2, len(whole) - 1)] + [whole + b"\n"]
    for place in chosen.sample(range(len(whole)), 300):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << chosen.randrange(8)
        damaged.append(bytes(flipped))
    without = {key: value for key, value in make_arriving().model_dump(mode="json").items() if key != "units"}
    damaged += [seal(without), seal({**without, "units": [], "more": 1}), seal({**without, "units": [{"source": "web", "fingerprint": 5}]})]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"^{path}: (cannot be read|format version \d+, this program reads)") as caught:
            load_arriving(tmp_path)
        assert "build" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("version", [FORMAT_VERSION - 1, FORMAT_VERSION + 1, 1000])
def test_another_version_is_named_whatever_else_it_holds(tmp_path, version):
    for more in ({}, {"dtype": "uint24", "of_the_future": [1]}):
        (tmp_path / ARRIVING).write_bytes(seal({**make_arriving(format_version=version).model_dump(mode="json"), **more}))
        with pytest.raises(UserError, match=rf"arriving.json: format version {version}, this program reads {FORMAT_VERSION}; train with"):
            load_arriving(tmp_path)


def test_only_whole_units_of_just_this_build_have_arrived(two_sources, monkeypatch, tmp_path, seed):
    """Not one that is missing, has another name, is of something else, or of which the record is damaged."""
    root, arriving = announced(two_sources, monkeypatch)
    expected = units_of(load_manifest(root))
    chosen = random.Random(seed)
    for number in chosen.sample(range(len(arriving.units)), len(arriving.units)):
        folder = tmp_path / f"copy-{number}"
        place = folder / "units" / f"{number:05d}"
        assert load_arrived(folder, arriving, number) is None
        shutil.copytree(root / "units" / f"{number:05d}", place.with_name(f".tmp-{place.name}-0123abcd"))
        assert load_arrived(folder, arriving, number) is None
        place.with_name(f".tmp-{place.name}-0123abcd").rename(place)
        record = place / "unit.json"
        whole = record.read_bytes()
        for place_of_bit in chosen.sample(range(len(whole)), 20):
            flipped = bytearray(whole)
            flipped[place_of_bit] ^= 1 << chosen.randrange(8)
            record.write_bytes(flipped)
            assert load_arrived(folder, arriving, number) is None
        record.write_bytes(whole[:-1])
        assert load_arrived(folder, arriving, number) is None
        record.write_bytes(whole)
        for unit in {0, 1, number} - {number}:  # of another one's content
            assert load_arrived(folder, arriving, unit) is None
        others = tuple(one.model_copy(update={"fingerprint": f"{place_of_bit:064x}"}) for one in arriving.units)
        assert load_arrived(folder, arriving.model_copy(update={"units": others}), number) is None
        assert load_arrived(folder, arriving, number) == expected[number]
        assert all((folder / name).is_file() for shards in expected[number].values() for shard in shards for name in shard.files)


def test_a_unit_without_text_has_arrived_with_nothing(tmp_path, data_for, monkeypatch):
    """That it is known to hold nothing is another thing than not to be there."""
    rows = tmp_path / "rows"
    rows.mkdir()
    for number in range(3):
        texts = ["" if number == 1 else f"document {number} {place}" for place in range(20)]
        (rows / f"{number}.jsonl").write_text("".join(json.dumps({"text": text, "pad": "x" * 20}) + "\n" for text in texts))
    root, arriving = announced(data_for(rows, work_unit_bytes=1500), monkeypatch)
    assert [load_arrived(root, arriving, number) for number in range(3)] == [
        units_of(load_manifest(root)).get(number, {}) for number in range(3)
    ]
    assert load_arrived(root, arriving, 1) == {}

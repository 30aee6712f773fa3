"""Inputs that change between two starts: refused with a line that names the change, and with `rebuild` made anew as far as needed.

In: a case: one change, on a finished dataset or an unfinished one, with or without deduplication. Out: whether it was refused in
the right words and nothing touched, whether the rebuilt dataset is that of a fresh build, and whether all units were kept that
do not depend on the change.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.data_section import DataSection, RuleSection, SourceSection, TokenizerSection
from tests.faults.builds import build_here, differences, reference_of, snapshot
from tests.faults.campaign import Case, Outcome
from tests.faults.corpora import NEAR, RULES, describe_build, write_corpora
from tests.faults.points import stop_before_rename

BLOCK_LIST = "blocked.txt"  # relative, as a case has its inputs in another folder
OWN_RULE = "def keep(document):\n    return document\n"


@dataclass(frozen=True)
class Inputs:
    """What a build reads, in a folder of its own."""

    folder: Path
    min_characters: int = 40

    @property
    def corpora(self) -> Path:
        """The sources' folders."""
        return self.folder / "corpora"

    def describe(self, root: Path, near: bool) -> DataSection:
        """The build of these inputs."""
        sources = tuple(SourceSection(name=name, path=str(self.corpora / name)) for name in ("texts", "table"))
        lines = SourceSection(name="lines", path=str(self.corpora / "lines"), metadata_fields=("url",))
        rules = (
            RuleSection(rule="length", settings={"min_characters": self.min_characters}),
            RuleSection(rule="blocked_urls", settings={"paths": [BLOCK_LIST]}),
            RuleSection(rule="faults_own_rule:keep"),
        )
        return describe_build(
            self.corpora,
            root,
            sources=(lines, *sources),
            clean=rules,
            tokenizer=TokenizerSection(path=str(self.folder / "tokenizer.json")),
            deduplicate=NEAR if near else None,
            workers=1,
        )


@dataclass(frozen=True)
class Change:
    """What a change did."""

    inputs: Inputs
    refusal: str
    """A part of the line that names it."""
    file: str = ""
    """The file that it was done to, with its source; nothing where every unit depends on it."""
    bytes_stay: bool = False
    """Whether only a time has changed: to a finished dataset that is nothing."""


@dataclass(frozen=True)
class Prepared:
    """Inputs and what was built of them: finished and unfinished, without and with deduplication."""

    inputs: Inputs
    datasets: dict[tuple[bool, bool], Path]
    """By (finished, near)."""


def prepare(folder: Path, chosen: random.Random) -> Prepared:
    """Write the inputs, and build each of the four datasets."""
    inputs = Inputs(folder / "inputs")
    write_corpora(inputs.corpora, chosen)
    reference_of(describe_build(inputs.corpora, folder / "trained", clean=RULES[:1]))
    shutil.copy2(folder / "trained" / "tokenizer.json", inputs.folder / "tokenizer.json")
    (inputs.folder / BLOCK_LIST).write_text("example.org/1\nexample.org/20\n")
    (inputs.folder / "faults_own_rule.py").write_text(OWN_RULE)
    datasets = {(finished, near): folder / f"dataset-{finished}-{near}" for finished in (True, False) for near in (True, False)}
    for (finished, near), root in datasets.items():
        ended = build_here(
            inputs.describe(root, near),
            before=lambda finished=finished: _enter(inputs, lambda: None if finished else stop_before_rename("/manifest.json")),
        )
        assert ended.status == (0 if finished else -9), f"the undisturbed build failed: {ended}"
        for path in root.glob(".*.tmp"):
            path.unlink()
    return Prepared(inputs, datasets)


def check_change(case: Case) -> Outcome:
    """Do one of the changes."""
    make = CHANGES[case.number % len(CHANGES)]
    finished, near = ((False, False), (True, False), (False, True), (True, True))[case.number // len(CHANGES) % 4]
    inputs = Inputs(case.folder / "inputs")
    shutil.copytree(case.prepared.inputs.folder, inputs.folder, ignore=shutil.ignore_patterns("__pycache__"))  # with times
    root = case.folder / "d"
    shutil.copytree(case.prepared.datasets[finished, near], root)
    units_before, before = _units(root), snapshot(root)
    change = make(inputs, case.chosen)
    data = change.inputs.describe(root, near)
    problems: list[str] = []

    ended = build_here(data, before=lambda: _enter(inputs))
    if change.bytes_stay and finished:
        if ended.result.get("outcome") != "unchanged":
            problems.append(f"without --rebuild: {ended}")
        return _tell(make, finished, near, [*problems, *differences(snapshot(root), before)])
    if ended.status != 2 or change.refusal not in ended.refusal or "--rebuild" not in ended.refusal:
        problems.append(f"without --rebuild, wanted {change.refusal!r}: {ended}")
    problems += [f"a refused build changed something: {one}" for one in differences(snapshot(root), before)]

    ended = build_here(data, rebuild=True, before=lambda: _enter(inputs))
    fresh = build_here(change.inputs.describe(case.folder / "fresh", near), before=lambda: _enter(inputs))
    if ended.status != 0 or fresh.status != 0:
        return _tell(make, finished, near, [*problems, f"with --rebuild: {ended}; fresh: {fresh}"])
    problems += [f"not as a fresh build: {one}" for one in differences(snapshot(root), snapshot(case.folder / "fresh"))]
    wanted = sum(unit in units_before and _is_independent(unit, change.file) for unit in _units(case.folder / "fresh"))
    if ended.result["kept"] != wanted:
        problems.append(f"{ended.result['kept']} units were kept, wanted {wanted} of {len(units_before)}")
    return _tell(make, finished, near, problems)


def edit_byte(inputs: Inputs, chosen: random.Random) -> Change:
    """One byte, and the size stays."""
    path, name = _choose(inputs, chosen)
    content = bytearray(path.read_bytes())
    place = chosen.randrange(len(content))
    content[place] ^= 1 << chosen.randrange(8)
    path.write_bytes(content)
    return Change(inputs, f"{name}: ", name)


def append(inputs: Inputs, chosen: random.Random) -> Change:
    """A few more bytes."""
    path, name = _choose(inputs, chosen)
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b'{"text": "one line more, which is long enough to be kept"}\n')
    return Change(inputs, f"{name}: had {size} bytes, has {path.stat().st_size}", name)


def remove(inputs: Inputs, chosen: random.Random) -> Change:
    """A file less."""
    path, name = _choose(inputs, chosen)
    path.unlink()
    return Change(inputs, f"{name}: was there, is gone", name)


def add(inputs: Inputs, chosen: random.Random) -> Change:
    """A file more, somewhere between the others."""
    path, _ = _choose(inputs, chosen)
    new = path.with_name(f"{path.name.partition('.')[0]}-new.txt")
    new.write_text("one text more, which is long enough to be kept by the rule")
    name = f"{_name_of(inputs, new)}"
    return Change(inputs, f"{name}: was not there", name)


def touch(inputs: Inputs, chosen: random.Random) -> Change:
    """Only its time."""
    path, name = _choose(inputs, chosen)
    os.utime(path, ns=(1, chosen.randrange(10**18)))
    return Change(inputs, f"{name}: was changed, or touched", name, bytes_stay=True)


def swap_vocabulary(inputs: Inputs, chosen: random.Random) -> Change:
    """Two entries of the tokenizer's vocabulary exchange their ids."""
    path = inputs.folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = chosen.sample(sorted(vocabulary.keys() - {"<|endoftext|>"}), 2)
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(tokenizer))
    return Change(inputs, f"data.tokenizer.path: {path} is not the tokenizer that was used")


def change_setting(inputs: Inputs, chosen: random.Random) -> Change:
    """A setting of a rule."""
    changed = Inputs(inputs.folder, min_characters=chosen.randrange(41, 90))
    return Change(changed, f"data.clean.0.settings.min_characters: was 40, is {changed.min_characters}")


def change_list(inputs: Inputs, chosen: random.Random) -> Change:
    """The content of a list that a rule reads."""
    path = inputs.folder / BLOCK_LIST
    path.write_text(path.read_text() + f"example.org/{chosen.randrange(2, 19)}\n")
    return Change(inputs, f"a file that blocked_urls reads has changed ({BLOCK_LIST})")


def change_rule(inputs: Inputs, chosen: random.Random) -> Change:
    """The source of the user's own rule."""
    (inputs.folder / "faults_own_rule.py").write_text(f"{OWN_RULE}# {chosen.random()}\n")
    return Change(inputs, "the source of faults_own_rule:keep has changed")


CHANGES: tuple[Callable[[Inputs, random.Random], Change], ...] = (
    edit_byte, append, remove, add, touch, swap_vocabulary, change_setting, change_list, change_rule,
)  # fmt: skip


def _enter(inputs: Inputs, more: Callable[[], None] = lambda: None) -> None:
    """Go where modules and lists of these inputs are found; to be called in a child."""
    os.chdir(inputs.folder)
    more()


def _choose(inputs: Inputs, chosen: random.Random) -> tuple[Path, str]:
    path = chosen.choice(sorted(path for name in ("lines", "texts") for path in (inputs.corpora / name).rglob("*") if path.is_file()))
    return path, _name_of(inputs, path)


def _name_of(inputs: Inputs, path: Path) -> str:
    source, _, name = path.relative_to(inputs.corpora).as_posix().partition("/")
    return f"{source}:{name}"


def _units(root: Path) -> list[dict[str, Any]]:
    """What each unit was made of and what it holds, its number left out."""
    records = [json.loads((folder / "unit.json").read_bytes()) for folder in sorted((root / "units").iterdir())]
    return [{key: record[key] for key in ("source", "inputs", "files", "documents")} for record in records]


def _is_independent(unit: dict[str, Any], file: str) -> bool:
    """Whether a file (source:name; nothing: anything that all units depend on) is none of a unit's inputs."""
    return bool(file) and file not in [f"{one['source']}:{one['file']}" for one in unit["inputs"]]


def _tell(make: Callable[[Inputs, random.Random], Change], finished: bool, near: bool, problems: list[str]) -> Outcome:
    where = f"{make.__name__}, {'finished' if finished else 'unfinished'}, {'with' if near else 'without'} deduplication"
    return Outcome(1, [f"{where}: {problem}" for problem in problems])

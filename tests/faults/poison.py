"""A rule of the user's own that one document is poison to: it kills its process, or it raises.

In: a case. Out: whether the document's unit alone was given up, after as many tries as promised, and named; whether all
others were made and kept; and whether the dataset is right once the document is no poison any more.
"""

import random
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from configs.data_section import DataSection, RuleSection, TokenizerSection
from tests.faults.builds import Ended, differences, reference_of, snapshot, start_driver
from tests.faults.campaign import Case, Outcome
from tests.faults.corpora import NEAR, RULES, describe_build, write_corpora

NUM_CASES = 5
MODULE = "faults_poison"
RULE = '''"""A rule that some documents are poison to, as long as the environment says so."""

import os


def swallow(document):
    how = os.environ.get("FAULTS_POISON")
    if how and "POISON" in document.text:
        with open(os.environ["FAULTS_TRIES"], "a") as file:
            file.write("x")
        if how == "kill":
            os.kill(os.getpid(), 9)
        raise RuntimeError("this document is poison")
    return document
'''
TRIES = {"kill": 4, "raise": 1}
WORDS = {
    "kill": "its worker died 4 times",
    "raise": "the rule faults_poison:swallow failed on the document at position 0 of {file} (source texts)",
}
LONGEST_REFUSAL = 1500  # a page at most: it is for people


@dataclass(frozen=True)
class Prepared:
    """Corpora, a folder with the rule, and a tokenizer: to train one, the rules run in a worker of the engine."""

    corpora: Path
    modules: Path
    tokenizer: Path


def prepare(folder: Path, chosen: random.Random) -> Prepared:
    """Write the corpora and the rule, and train the tokenizer."""
    corpora = write_corpora(folder / "corpora", chosen)
    reference_of(describe_build(corpora, folder / "trained", clean=RULES[:1]))
    modules = folder / "modules"
    modules.mkdir()
    (modules / f"{MODULE}.py").write_text(RULE)
    return Prepared(corpora, modules, folder / "trained" / "tokenizer.json")


def check_poison(case: Case) -> Outcome:
    """Poison one text; build, and build again without. In the last case a tokenizer is trained, on the poisoned text too."""
    if case.number == NUM_CASES - 1:
        return _check_sampling(case)
    how = ("kill", "raise")[case.number % 2]
    near = case.number // 2 % 2
    poisoned = case.chosen.choice(sorted((case.prepared.corpora / "texts").rglob("*.txt")))
    with _poisoned(poisoned):
        return Outcome(1, [f"{how}, {poisoned.name}: {one}" for one in _check(case, how, near, poisoned)])


def _check_sampling(case: Case) -> Outcome:
    """The rule raises while texts for the tokenizer are read: there too it is the user's to mend."""
    poisoned = case.prepared.corpora / "texts" / "0" / "000.txt"  # the first of its unit, so it is in the sample
    data = _describe(case.prepared, case.folder / "d", 0).model_copy(update={"tokenizer": TokenizerSection(vocabulary_size=400)})
    environment = {
        "PYTHONPATH": str(case.prepared.modules),
        "FAULTS_TRIES": str(case.folder / "tries"),
        "FAULTS_POISON": "raise",
    }
    with _poisoned(poisoned), start_driver(data, case.folder, "here", environment) as driver:
        ended = driver.wait()
    wanted = WORDS["raise"].format(file="0/000.txt")
    is_told = ended.status == 2 and wanted in ended.refusal
    return Outcome(1, [] if is_told else [f"raise while a tokenizer is trained: wanted exit status 2 and {wanted!r}: {ended}"])


@contextmanager
def _poisoned(path: Path) -> Generator[None, None, None]:
    whole = path.read_bytes()
    path.write_bytes(b"This text is POISON to the rule, and long enough to be kept.")
    try:
        yield
    finally:
        path.write_bytes(whole)


def _check(case: Case, how: str, near: int, poisoned: Path) -> list[str]:
    data = _describe(case.prepared, case.folder / "d", near)
    root = Path(data.folder())
    tries = case.folder / "tries"
    environment = {"PYTHONPATH": str(case.prepared.modules), "FAULTS_TRIES": str(tries)}
    with start_driver(data, case.folder, environment={**environment, "FAULTS_POISON": how}) as driver:
        ended = driver.wait()
    problems = _check_refusal(ended, how, poisoned.relative_to(case.prepared.corpora / "texts").as_posix())
    num_tries = len(tries.read_text()) if tries.exists() else 0
    if num_tries != TRIES[how]:
        problems.append(f"the document was tried {num_tries} times, wanted {TRIES[how]}")
    below = "survey" if near else "units"
    committed = {path.name for path in (root / below).glob("[0-9]*")}
    with start_driver(data, case.folder, environment=environment) as driver:
        ended = driver.wait()
    if ended.status != 0:
        return [*problems, f"without the poison: {ended}"]
    missing = {f"{number:05d}" for number in range(ended.result["num_units"])} - committed
    if len(missing) != 1:
        problems.append(f"the units {sorted(missing)} were not there, wanted one")
    kept = ended.result["kept_by_stage"]["survey" if near else "tokens"]
    if kept != len(committed):
        problems.append(f"{len(committed)} units were finished, {kept} were kept")
    with start_driver(_describe(case.prepared, case.folder / "fresh", near), case.folder, "here", environment) as driver:
        driver.wait()
    return problems + differences(snapshot(root), snapshot(case.folder / "fresh"))


def _check_refusal(ended: Ended, how: str, file: str) -> list[str]:
    problems: list[str] = []
    said = ended.refusal
    if ended.status != 2 or WORDS[how].format(file=file) not in said or not re.search(r"1 of \d+ work units could not be made", said):
        problems.append(f"wanted exit status 2 and {WORDS[how].format(file=file)!r}: {ended}")
    if len(said) > LONGEST_REFUSAL:
        problems.append(f"the refusal has {len(said)} characters; it starts with {said[:300]!r}")
    return problems


def _describe(prepared: Prepared, root: Path, near: int) -> DataSection:
    return describe_build(
        prepared.corpora,
        root,
        clean=(*RULES[:1], RuleSection(rule=f"{MODULE}:swallow")),
        tokenizer=TokenizerSection(path=str(prepared.tokenizer)),
        deduplicate=NEAR if near else None,
    )

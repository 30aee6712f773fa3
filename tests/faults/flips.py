"""Single bits that change: in a finished dataset, and in what an unfinished one has committed.

In: a case. Out: whether each was found, and the file named. A finished dataset is asked through `verify_dataset`; a committed
folder through `load_folder`, which every start asks before it keeps one; and some unfinished datasets are built to their end.
"""

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from configs.data_section import DataSection
from configs.errors import UserError
from configs.sealed import unseal
from data_pipeline.committed import CommittedRecord, load_folder
from data_pipeline.survey import SurveyRecord
from data_pipeline.units import UnitRecord
from data_pipeline.verify import verify_dataset
from tests.faults.builds import build_here, count_committed, differences, reference_of, snapshot
from tests.faults.campaign import Case, Outcome
from tests.faults.corpora import NEAR, describe_build, write_corpora
from tests.faults.points import stop_before_rename

FLIPS_PER_CASE = 100
CONTINUED_PER_CASE = 2
FINISHED = ("tokenizer.json", "units/*/*.bin", "units/*/*.idx", "units/*/*.documents.parquet", "manifest.json")
COMMITTED: dict[str, tuple[str, type[CommittedRecord]]] = {"survey": ("survey.json", SurveyRecord), "units": ("unit.json", UnitRecord)}
CONTINUED = ("survey/*/*", "units/*/*", "duplicates/*", "tokenizer.json", "tokenizer.origin.json")


@dataclass(frozen=True)
class Prepared:
    """A finished dataset, and the same one just before its manifest was written."""

    corpora: Path
    finished: Path
    unfinished: Path
    reference: dict[str, str]


def prepare(folder: Path, chosen: random.Random) -> Prepared:
    """Build both."""
    corpora = write_corpora(folder / "corpora", chosen)
    reference = reference_of(_describe(corpora, folder / "finished"))
    build_here(_describe(corpora, folder / "unfinished"), before=lambda: stop_before_rename("/manifest.json"))
    for path in (folder / "unfinished").glob(".*.tmp"):  # what a kill leaves of a file is tried out elsewhere
        path.unlink()
    return Prepared(corpora, folder / "finished", folder / "unfinished", reference)


def flip_bits(case: Case) -> Outcome:
    """Flip a hundred bits, one after the other, each in a file of another sort."""
    problems: list[str] = []
    sorts = [*FINISHED, *(f"{below}/*/{name}" for below, (record, _) in COMMITTED.items() for name in (record, "*"))]
    for number in range(FLIPS_PER_CASE - CONTINUED_PER_CASE):
        sort = sorts[number % len(sorts)]
        root = case.prepared.finished if sort in FINISHED else case.prepared.unfinished
        path, place = choose_bit(root, sort, case.chosen)
        content = path.read_bytes()
        path.write_bytes(flip(content, place))
        try:
            found = _verify(root, path) if sort in FINISHED else _load(path, content)
        finally:
            path.write_bytes(content)
        problems += [f"bit {place} of {path.relative_to(root)}: {found}"] if found else []
    for number in range(CONTINUED_PER_CASE):
        problems += _continue_flipped(case, case.folder / f"d{number}")
    return Outcome(FLIPS_PER_CASE, problems, passed=FLIPS_PER_CASE - len(problems))


def choose_bit(root: Path, pattern: str, chosen: random.Random) -> tuple[Path, int]:
    """A bit of a file that matches and is not empty: the file, and the bit's number."""
    path = chosen.choice(sorted(path for path in root.glob(pattern) if path.is_file() and path.stat().st_size))
    return path, chosen.randrange(8 * path.stat().st_size)


def flip(content: bytes, place: int) -> bytes:
    """The content with one bit changed."""
    changed = bytearray(content)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def _verify(root: Path, path: Path) -> str:
    """What is wrong with what is said of a finished dataset whose file was flipped; nothing where the file is named."""
    try:
        found = verify_dataset(root)
    except UserError as error:
        found = [str(error)]
    if not found:
        return "not found"
    return "" if any(path.relative_to(root).as_posix() in problem for problem in found) else f"not named, but said: {found[:2]}"


def _load(path: Path, content: bytes) -> str:
    """What is wrong with what becomes of a committed folder, one file of which was flipped; nothing where it is not kept."""
    name, kind = COMMITTED[path.parent.parent.name]
    record = path.parent / name
    before = kind.model_validate_json(json.dumps(unseal(content if path == record else record.read_bytes())), strict=True)
    after = load_folder(path.parent, name, kind, before.fingerprint)
    return "" if after is None else "kept as it is" if after == before else "kept, and believed"


def _continue_flipped(case: Case, root: Path) -> list[str]:
    """Flip a bit of an unfinished dataset, and let the build end."""
    shutil.copytree(case.prepared.unfinished, root)
    path, place = choose_bit(root, case.chosen.choice(CONTINUED), case.chosen)
    path.write_bytes(flip(path.read_bytes(), place))
    num_units = count_committed(root)
    ended = build_here(_describe(case.prepared.corpora, root))
    where = f"bit {place} of {path.relative_to(root)}, build continued:"
    if ended.status != 0:
        return [f"{where} {ended}"]
    problems = [f"{where} {one}" for one in differences(snapshot(root), case.prepared.reference)]
    if path.parent.parent == root / "units" and not problems and ended.result["kept"] != num_units - 1:
        problems.append(f"{where} {ended.result['kept']} of {num_units} units were kept, wanted all but this one")
    return problems


def _describe(corpora: Path, root: Path) -> DataSection:
    return describe_build(corpora, root, deduplicate=NEAR, workers=1)

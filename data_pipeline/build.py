"""The conductor: sources to a finished dataset, with all that was finished before kept.

In: the `data` section of a run file. Out: `<root>/tokenizer.json`, `<root>/units/00000 ...`, and last of all
`<root>/manifest.json`. Killed at any moment and started again, it ends with the same bytes.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from configs.data_section import DataSection
from configs.durable import remove_folders, sha256_of_file, write_file
from configs.errors import UserError
from configs.sealed import seal, unseal
from data_pipeline.arriving import ARRIVING, UNIT, Arriving, UnitToCome, place_shard, write_arriving
from data_pipeline.changes import check_sizes, describe_configuration, describe_plan, find_changes, write_plan
from data_pipeline.cleaning import identify_rules
from data_pipeline.committed import TEMPORARY_PREFIX, settle_folders
from data_pipeline.dedup import find_duplicates, load_duplicates
from data_pipeline.disk import check_room, explain_file_errors
from data_pipeline.documents import place_document
from data_pipeline.encoding import open_encoder
from data_pipeline.execution import Engine, Failed, Run, open_ray
from data_pipeline.manifest import FORMAT_VERSION, MANIFEST, SPLITS, TOKENIZER, UNITS, Manifest, load_manifest, write_manifest
from data_pipeline.ownership import OWNER, own_folder, scratch_folder
from data_pipeline.recipe import Recipe, cleaning_facts, hash_facts, library_versions
from data_pipeline.records import DocumentCounts, ShardRecord
from data_pipeline.report import StageReport, describe_build, write_report
from data_pipeline.sampling import SAMPLED_UNITS, Sample, SampleTask, sample_texts, take_sample
from data_pipeline.shards import token_dtype
from data_pipeline.sources import Plan, WorkUnit, plan_units
from data_pipeline.stages import Progress, Report, run_stage
from data_pipeline.survey import RECORD, SURVEY, SurveyTask, write_survey
from data_pipeline.survivors import Survivors
from data_pipeline.tally import QUARANTINE
from data_pipeline.tokenizer import end_of_text_id, load_tokenizer, tokenizer_hash, train_tokenizer, vocabulary_size
from data_pipeline.units import Surveyed, UnitRecord, UnitTask, hash_duplicates, write_unit

TOKENIZER_ORIGIN = "tokenizer.origin.json"
DUPLICATES = "duplicates"
DUPLICATES_FOUND = "found.json"
SHOWN_CHANGES = 5
Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class BuildResult:
    """What a build did."""

    outcome: Literal["built", "unchanged"]
    folder: Path
    manifest: Manifest
    num_units: int
    num_units_kept: int
    """Units that an earlier build of the same input had finished."""
    skipped: dict[str, int]
    """Files that were passed over, by suffix; 'symlink' for links."""
    report: dict[str, Any] = field(default_factory=dict)
    """What `report.json` holds; empty where nothing was done."""


def build_dataset(data: DataSection, report: Report, engine: Engine = open_ray, rebuild: bool = False) -> BuildResult:
    """Build the dataset that `data` describes, continue it, or find that it is there already.

    `engine` says where units are made (`execution.py`); with `rebuild`, what lies there of other inputs, tokenizer or rules
    is built anew as far as it differs. Raises UserError for whatever the user can mend: unusable sources, a dataset that was
    built from something else, another build in the folder, too much in quarantine, a full disk, units that could not be
    made. Committed units stay in all these cases.
    """
    root = Path(data.folder()).absolute()
    with explain_file_errors(root):
        rules, libraries = identify_rules(data.clean), library_versions()
        plan = plan_units(data)
        report(Progress("plan", len(plan.files), len(plan.files), f"{len(plan.files)} files in {len(plan.units)} work units"))
        described = describe_plan(data, plan, rules, libraries)
        if (root / MANIFEST).exists() and not rebuild:
            return _keep_finished(root, described, plan)
        (root / UNITS).mkdir(parents=True, exist_ok=True)
        with own_folder(root) as token:
            if (root / MANIFEST).exists():
                if not rebuild:  # another build ended between the look and the lock
                    return _keep_finished(root, described, plan, token)
                (root / MANIFEST).unlink()  # from here on nobody trains on what is about to change
            elif not rebuild and _is_begun(root):
                _refuse_changes(root, find_changes(root, described, plan, None))
            check_room(root, plan.files)
            write_plan(root, described)
            recipe = Recipe(root, token, data, rules, libraries, root / TOKENIZER)
            with scratch_folder(root, token) as scratch, engine(data.workers, scratch) as run:
                return _build(recipe, plan, report, run)


def _is_begun(root: Path) -> bool:
    """Whether an unfinished build has finished anything that another configuration would throw away."""
    return any(next((root / below).glob("[0-9]*"), None) for below in (UNITS, SURVEY))


def _leftovers(root: Path) -> list[Path]:
    """What only a build needs, and what killed workers and drivers left."""
    return [
        *(path for path in (root / SURVEY, root / DUPLICATES) if path.exists()),
        *root.glob(".*.tmp"),
        *root.glob(ARRIVING),
        *(root / UNITS).glob(f"{TEMPORARY_PREFIX}*"),
    ]


def _tidy(root: Path) -> None:
    """Remove the leftovers; whoever does holds the folder."""
    for path in _leftovers(root):
        if path.is_dir():
            remove_folders([path])
        else:
            path.unlink(missing_ok=True)


def _keep_finished(root: Path, described: dict[str, Any], plan: Plan, held: str | None = None) -> BuildResult:
    manifest = load_manifest(root)
    _refuse_changes(root, find_changes(root, described, plan, manifest))
    check_sizes(root, manifest)
    if held is None and (_leftovers(root) or (root / OWNER).exists()):  # a kill came between the manifest and the tidying
        with suppress(UserError, OSError), own_folder(root):
            _tidy(root)
    return BuildResult("unchanged", root, manifest, len(plan.units), len(plan.units), plan.skipped)


def _refuse_changes(root: Path, changes: list[str]) -> None:
    if not changes:
        return
    shown = "\n  ".join(changes[:SHOWN_CHANGES])
    more = f"\n  ... and {len(changes) - SHOWN_CHANGES} more" if len(changes) > SHOWN_CHANGES else ""
    raise UserError(
        f"{root} was built from something else; choose another data.root, or say --rebuild to make anew what differs. "
        f"What differs:\n  {shown}{more}"
    )


def _build(recipe: Recipe, plan: Plan, report: Report, run: Run) -> BuildResult:
    root, data = recipe.root, recipe.data
    _prepare_tokenizer(recipe, plan, report, run)
    recipe = replace(recipe, tokenizer_sha256=tokenizer_hash(root / TOKENIZER))
    encoder = open_encoder(root / TOKENIZER, recipe.tokenizer_sha256, data.tokenizer.end_of_text, data.tokenizer.engine)
    if encoder.fallback:
        report(Progress("tokenizer", 1, 1, encoder.fallback))
    stages: list[StageReport] = []
    tasks, facts = _deduplicate(recipe, plan, report, run, stages) if data.deduplicate else ([UnitTask(recipe, u) for u in plan.units], {})
    settle_folders(root / UNITS, UNIT, [task.fingerprint() for task in tasks])
    write_arriving(root, _announce(recipe, tasks))
    records = _make_units(tasks, report, run, stages)
    _check_quarantine(root, data, {index: record.documents for index, record in records.items()}, UNITS)
    if moved := _choose_moved(data, records):
        tasks = [replace(task, moved=moved.get(task.unit.index, ())) for task in tasks]
        write_arriving(root, _announce(recipe, tasks))  # or who trains beside this build would wait for what never comes
        records |= _make_units([task for task in tasks if task.moved], report, run, stages)
    report(Progress("manifest", 0, 1, "writing the manifest"))
    manifest = _describe(recipe, [records[task.unit.index] for task in tasks])
    described = describe_build(manifest, stages, {**facts, "workers": data.workers})
    write_report(root, described, len(plan.units), Survivors(tasks).name)
    write_manifest(root, manifest)
    _tidy(root)
    report(Progress("manifest", 1, 1, f"{manifest.total('train').num_tokens} tokens to train on"))
    num_kept = next(stage.num_units_kept for stage in stages if stage.stage == "tokens")
    return BuildResult("built", root, manifest, len(plan.units), num_kept, plan.skipped, described)


def _prepare_tokenizer(recipe: Recipe, plan: Plan, report: Report, run: Run) -> None:
    """Put `tokenizer.json` into the dataset: the given one, the one that an earlier start trained, or a new one."""
    path, origin = recipe.root / TOKENIZER, recipe.root / TOKENIZER_ORIGIN
    settings = recipe.data.tokenizer
    if settings.path is not None:
        load_tokenizer(Path(settings.path), settings.end_of_text)
        write_file(path, Path(settings.path).read_bytes())
        return
    files = [file for unit in plan.units for file in unit.files]
    trained_on = [settings.vocabulary_size, settings.training_bytes, settings.end_of_text, [len(unit.files) for unit in plan.units]]
    trained_on += [settings.added_tokens] if settings.added_tokens else []
    fingerprint = hash_facts([cleaning_facts(recipe, files), trained_on])
    with suppress(OSError, ValueError):
        if unseal(origin.read_bytes()) == {"made_of": fingerprint, "tokenizer_sha256": tokenizer_hash(path)}:
            return
    total = min(len(plan.units), SAMPLED_UNITS)
    report(Progress("tokenizer", 0, total, "starting the workers"))

    def take(unit: WorkUnit, share_bytes: int) -> Sample:
        [(_, sample)] = _run_all(run, take_sample, [SampleTask(recipe, unit, share_bytes)])
        if sample.failure:
            failures.append(sample.failure)
        return sample

    def tell(done: int, num_bytes: int) -> None:
        nonlocal sampled
        sampled = num_bytes
        report(Progress("tokenizer", min(done, total - 1), total, f"{num_bytes / 1e6:.1f} MB sampled", num_bytes=num_bytes))

    sampled = 0
    failures: list[str] = []
    texts = sample_texts(plan.units, settings.training_bytes, take, tell)
    tokenizer = train_tokenizer(texts, settings.vocabulary_size, settings.end_of_text, settings.added_tokens)
    if not sampled and failures:
        raise UserError(f"no document passes data.clean: {failures[0]}; mend that rule or its settings.")
    if not sampled:
        raise UserError(
            f"{len(plan.files)} files of data.sources hold no usable text (all empty, not readable as text, or dropped by "
            "data.clean); check their paths and the rules."
        )
    write_file(path, tokenizer.to_str().encode("utf-8"))
    # Behind the tokenizer: where both agree, a start that continues need not train again.
    write_file(origin, seal({"made_of": fingerprint, "tokenizer_sha256": tokenizer_hash(path)}))
    report(Progress("tokenizer", total, total, f"{vocabulary_size(tokenizer)} entries from {sampled / 1e6:.1f} MB", num_bytes=sampled))


def _deduplicate(recipe: Recipe, plan: Plan, report: Report, run: Run, stages: list[StageReport]) -> tuple[list[UnitTask], dict[str, Any]]:
    """Survey every unit, find what is there twice, and give the tasks that leave it out; with counts for the report."""
    tasks = [SurveyTask(recipe, unit) for unit in plan.units if unit.files[0].kind != "megatron"]
    settle_folders(recipe.root / SURVEY, RECORD, [task.fingerprint() for task in tasks])
    surveys = {index: done.record for index, done in run_stage("survey", write_survey, tasks, report, run, stages).items()}
    _check_quarantine(recipe.root, recipe.data, {index: record.documents for index, record in surveys.items()}, SURVEY)
    began = time.monotonic()
    counts = _find_duplicates(recipe, tasks, report, run)
    seconds = time.monotonic() - began
    stages.append(StageReport("duplicates", len(tasks), num_documents=counts["num_documents"], seconds=seconds, start_seconds=seconds))
    work = recipe.root / DUPLICATES
    unit_tasks = {unit.index: UnitTask(recipe, unit) for unit in plan.units}
    for place, task in enumerate(tasks):
        digest = hash_duplicates(load_duplicates(work, place))
        unit_tasks[task.unit.index] = UnitTask(recipe, task.unit, surveyed=Surveyed(task.fingerprint(), work, place, digest))
    return list(unit_tasks.values()), {"deduplication": counts}


def _find_duplicates(recipe: Recipe, tasks: list[SurveyTask], report: Report, run: Run) -> dict[str, int]:
    """Leave the lists of duplicates in the dataset's folder, or find them there; counts for the report."""
    work, settings = recipe.root / DUPLICATES, recipe.data.deduplicate
    assert settings is not None, "there is nothing to deduplicate by"
    fingerprint = hash_facts([task.fingerprint() for task in tasks])
    with suppress(OSError, ValueError):
        found = unseal((work / DUPLICATES_FOUND).read_bytes())
        if found["made_of"] == fingerprint and found["files"] == _hash_files(work):
            return found["counts"]

    folders = [task.folder for task in tasks]
    duplicates = find_duplicates(
        folders, settings, work, partial(_run_all, run), lambda step, done, total: report(Progress("duplicates", done, total, step))
    )
    counts = asdict(duplicates.counts)
    write_file(work / DUPLICATES_FOUND, seal({"made_of": fingerprint, "counts": counts, "files": _hash_files(work)}))
    return counts


def _run_all(run: Run, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[tuple[Task, Result]]:
    """As `run` does, but every task is needed: raises UserError naming the first that could not be done."""
    with closing(run(function, tasks)) as done:
        for task, result in done:
            if isinstance(result, Failed):
                raise UserError(f"{task} could not be done: {result.reason}. Mend that, then start the same command again.")
            yield task, result


def _hash_files(work: Path) -> dict[str, str]:
    return {path.name: sha256_of_file(path) for path in sorted(work.glob("*.npy"))}


def _make_units(tasks: Sequence[UnitTask], report: Report, run: Run, stages: list[StageReport]) -> dict[int, UnitRecord]:
    return {index: done.record for index, done in run_stage("tokens", write_unit, tasks, report, run, stages).items()}


def _check_quarantine(root: Path, data: DataSection, by_unit: dict[int, DocumentCounts], below: str) -> None:
    """Refuse a corpus of which too much cannot be read. Empty documents are counted, but nothing of them is lost."""
    documents = sum(by_unit.values(), DocumentCounts())
    unreadable = {index: _num_unreadable(counts) for index, counts in by_unit.items()}
    num_unreadable = sum(unreadable.values())
    if num_unreadable > data.quarantine_limit * documents.read:
        worst = max(sorted(unreadable), key=lambda index: unreadable[index])
        reasons = _spell_counts({reason: count for reason, count in documents.quarantined.items() if reason != "empty"})
        raise UserError(
            f"{num_unreadable} of {documents.read} documents cannot be used ({reasons}), more than data.quarantine_limit "
            f"{data.quarantine_limit} allows; each is named in {root / below}/*/{QUARANTINE}, most of them in "
            f"{root / below / f'{worst:05d}' / QUARANTINE}. Mend them or raise the limit; the finished units are kept."
        )
    if by_unit and not documents.kept:
        reasons = _spell_counts({**documents.quarantined, **documents.dropped})
        raise UserError(f"the data sources hold no usable text: {documents.read} documents were read, none was kept ({reasons or 'none'}).")


def _spell_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())


def _num_unreadable(documents: DocumentCounts) -> int:
    return sum(count for reason, count in documents.quarantined.items() if reason != "empty")


def _choose_moved(data: DataSection, records: dict[int, UnitRecord]) -> dict[int, tuple[str, ...]]:
    """Which document changes its split, where chance left a split empty: by unit, its id.

    The document with the lowest place is held out if none is, and the one with the highest is trained on if none is;
    a document that is alone is trained on.
    """
    shards = [(split, shard) for record in records.values() for split, shards in record.shards.items() for shard in shards]
    num_documents = {split: sum(shard.num_documents for one, shard in shards if one == split) for split in SPLITS}
    if num_documents["train"] == 0:
        candidates = [(_place(record.highest), index, record.highest) for index, record in records.items() if record.highest]
        _, index, moved = max(candidates)
        return {index: moved}
    if num_documents["held_out"] == 0 and data.held_out_fraction > 0 and num_documents["train"] > 1:
        candidates = [(_place(record.lowest), index, record.lowest) for index, record in records.items() if record.lowest]
        _, index, moved = min(candidates)
        return {index: moved}
    return {}


def _place(identity: tuple[str, ...]) -> float:
    return place_document(identity[0])


def _announce(recipe: Recipe, tasks: Sequence[UnitTask]) -> Arriving:
    tokenizer = load_tokenizer(recipe.root / TOKENIZER, recipe.data.tokenizer.end_of_text)
    size = vocabulary_size(tokenizer)
    return Arriving(
        format_version=FORMAT_VERSION,
        tokenizer_sha256=recipe.tokenizer_sha256,
        vocabulary_size=size,
        end_of_text_id=end_of_text_id(tokenizer, recipe.data.tokenizer.end_of_text),
        dtype=str(token_dtype(size)),
        units=tuple(UnitToCome(source=task.unit.files[0].source, fingerprint=task.fingerprint()) for task in tasks),
    )


def _describe(recipe: Recipe, records: list[UnitRecord]) -> Manifest:
    root, data = recipe.root, recipe.data
    tokenizer = load_tokenizer(root / TOKENIZER, data.tokenizer.end_of_text)
    size = vocabulary_size(tokenizer)
    sources: dict[str, DocumentCounts] = {source.name: DocumentCounts() for source in data.sources}
    for record in records:
        sources[record.source] += record.documents
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        tokenizer_sha256=recipe.tokenizer_sha256,
        vocabulary_size=size,
        end_of_text=data.tokenizer.end_of_text,
        end_of_text_id=end_of_text_id(tokenizer, data.tokenizer.end_of_text),
        dtype=str(token_dtype(size)),
        configuration=describe_configuration(data),
        rules=tuple(json.loads(json.dumps([asdict(rule) for rule in recipe.rules]))),
        libraries=dict(recipe.libraries),
        sources=sources,
        inputs=tuple(entry for record in records for entry in record.inputs),
        splits={split: tuple(_place_shards(split, records)) for split in SPLITS},
    )
    for name, documents in sources.items():
        assert documents.adds_up, f"documents of {name} were lost or counted twice: {documents}"
    stored = sum(manifest.total(split).num_documents for split in SPLITS)
    assert stored == manifest.documents.kept, f"{manifest.documents.kept} documents were kept, {stored} are in shards"
    return manifest


def _place_shards(split: Any, records: list[UnitRecord]) -> Iterator[ShardRecord]:
    """The units' shards in their order, named from the dataset's folder."""
    for number, record in enumerate(records):
        yield from (place_shard(number, shard) for shard in record.shards.get(split, ()))

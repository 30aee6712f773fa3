"""What the page of a run tells, gathered from its folder.

In: a run folder, of any age: killed at its first step, without a commit, of an older version. Out: `RunFacts`, in which every part that
could not be had is a sentence. Nothing of the run is changed, no token is read, no torch is loaded.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from configs.errors import UserError
from pretrain.run.folder import RunFolder
from pretrain.watch.ledger import read_ledger
from pretrain.watch.metrics import METRICS_FILE, read_rows, read_run
from pretrain.watch.report import Profile, RunFacts, flatten
from pretrain.watch.timeline import TIMELINE_FILE

MOST_CHARACTERS = 40_000
"""Of a text that is shown as it is."""
MOST_PROFILES, MOST_RANKS = 10, 4
"""The newest traces, and the ranks of each whose tables are shown; all are linked."""
SAMPLES_FILE = "samples.jsonl"
T = TypeVar("T")


def gather(folders: Sequence[RunFolder], page_folder: Path | None) -> list[RunFacts]:
    """What is known of each run. page_folder: where the page will lie, from which it links to files; None: it does not."""
    found = [gather_one(folder, page_folder, with_details=len(folders) == 1) for folder in folders]
    names = Counter(run.name for run in found)
    clear = [run.name if names[run.name] == 1 else "/".join(Path(run.folder).parts[-2:]) for run in found]
    paths = len(set(clear)) < len(clear)  # equal to the parent's name: only the whole path tells them apart
    return [replace(run, name=run.folder if paths else name) for run, name in zip(found, clear, strict=True)]


def gather_one(folder: RunFolder, page_folder: Path | None, with_details: bool = True) -> RunFacts:
    """What is known of a run. with_details: also what a comparison does not show."""
    from pretrain.checkpoint_view import list_checkpoints
    from pretrain.verbs.standing import describe

    missing: list[str] = []

    def read(what: str, reading: Callable[[], T], instead: T) -> T:
        try:
            return reading()
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError) as error:
            said = f"there is no {error}" if isinstance(error, KeyError) else getattr(error, "strerror", None) or str(error)
            reason = said.strip().split("\n")[0] or type(error).__name__
            missing.append(f"{what} cannot be read: {reason}")
            return instead

    def note(is_there: bool, sentence: str) -> None:
        if not is_there:
            missing.append(sentence)

    nothing: dict[str, Any] = {}
    status = read("How the run stands", lambda: describe(folder), nothing)
    metrics = read(METRICS_FILE, lambda: read_run(folder.path), None)
    metrics = None if metrics is None or not metrics.num_rows else metrics
    note(metrics is not None, f"{METRICS_FILE} has no row: no step was logged, so there are no curves.")
    ledger = read("The ledger", lambda: read_ledger(folder.path), None)
    note((folder.path / TIMELINE_FILE).is_file(), f"There is no {TIMELINE_FILE}: where the time went within an attempt is not known.")
    configuration = read("The configuration", lambda: flatten(folder.load_config().model_dump(mode="json")), nothing)
    attempts = read("attempts.jsonl", lambda: read_rows(folder.attempts_file), [])
    facts = RunFacts(folder.path.name, str(folder.path), status, metrics, ledger, attempts, configuration, missing=missing)
    if not with_details:
        return facts
    checkpoints = read("The checkpoints", lambda: list_checkpoints(folder), [])
    mixture = read("The data", lambda: _mixture(folder, status), None)
    environment = read(folder.environment_file.name, lambda: _read_json(folder.environment_file), nothing)
    samples = read_rows(folder.path / SAMPLES_FILE)
    profiles = read("A profile", lambda: _profiles(folder.path, page_folder), [])
    note(bool(attempts), "No attempt has ended: attempts.jsonl has no row.")
    note(bool(checkpoints), "There is no checkpoint.")
    note(bool(samples), "Nothing was written along the way: evaluate.prompts says what the model shall continue.")
    note(bool(profiles), "There is no profile: profile.steps=[10,13] makes one.")
    return replace(
        facts,
        configuration_text=read(folder.config_file.name, lambda: folder.config_file.read_text(errors="replace")[:MOST_CHARACTERS], ""),
        environment=environment,
        mixture=mixture,
        checkpoints=checkpoints,
        samples=samples,
        profiles=profiles,
    )


def _mixture(folder: RunFolder, status: dict[str, Any]) -> dict[str, Any]:
    """What the run sees of each source, and has seen by now."""
    from pretrain.mixture_view import describe_mixture

    config = folder.load_config()
    return describe_mixture(config, min(status.get("step") or 0, config.training.total_steps))


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def _profiles(run: Path, page_folder: Path | None) -> list[Profile]:
    """Traces, the newest first: their tables as text, and all their files."""
    folders = sorted((path for path in run.glob("profile/*/*") if path.is_dir()), key=lambda path: path.stat().st_mtime, reverse=True)
    found: list[Profile] = []
    for folder in folders[:MOST_PROFILES]:
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
        tables = [path.read_text(errors="replace")[:MOST_CHARACTERS] for path in files if path.suffix == ".md"][:MOST_RANKS]
        links = [(path.name, None if page_folder is None else quote(os.path.relpath(path, page_folder))) for path in files]
        found.append(Profile("/".join(folder.relative_to(run).parts), "\n\n".join(tables), links))
    return found

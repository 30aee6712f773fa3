"""The commit of another run that a run begins with, and what a run knows of those that began with it. No torch.

In: a configuration with `start_from`, before anything of it runs. Out: the same with the commit named in full, or a refusal. A parent
keeps `forks.jsonl`: one line for each child, so that its retention leaves the beginning of a child where it is.
"""

import json
import os
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from configs.changes import changes_between
from configs.errors import UserError
from configs.loader import load_config
from configs.schema import RunConfig
from configs.start_section import Start, parse_start
from pretrain.checkpoint.verify import Commit, commit_folder_of, list_commits, read_whole_commit

FORKS_FILE = "forks.jsonl"
"""Its name in the parent's run folder."""
MUST_AGREE = (
    "model.",
    "optimizer.kind",
    "optimizer.settings",
    "training.sequence_length",
    "training.global_batch_samples",
    "training.batch_ramp",
)
"""Keys, or beginnings of keys, that say what moments and counts of steps mean: a branch has its parent's."""


def pin_parent(config: RunConfig, own: Path, tokenizer_sha256: str, say: Callable[[str], object]) -> RunConfig:
    """The configuration with `start_from` as FOLDER@STEP, and checked; unchanged where it names nothing.

    own: the run folder, which may be there already: what it began with is then not looked at again. tokenizer_sha256: of the run's data.
    Raises UserError for a parent or a step that is not there, for the run itself, and for one that does not fit.
    """
    if config.start_from is None:
        return config
    asked = parse_start(config.start_from)
    places = [place.resolve() for place in (asked.path, Path(config.run.root) / asked.path)]
    if own in places:
        raise UserError(
            f"start_from={config.start_from} is this run itself; name another one, or give this one a new name with run.name=NAME."
        )
    if (begun := _recorded(own)) is not None and begun.path in places and asked.step in (None, begun.step):
        return config.model_copy(update={"start_from": str(begun)})
    folder = next((place for place in places if (place / "run.yaml").is_file()), None)
    if folder is None:
        near = sorted({path.parent.name for place in places for path in place.parent.glob("*/run.yaml")})
        raise UserError(
            f"start_from={config.start_from}: {asked.path} holds no run (no run.yaml)."
            + (f" Runs there: {', '.join(near[:8])}." if near else "")
        )
    commit = _choose(folder, asked, config)
    _check(config, load_config(folder / "run.yaml"), commit, tokenizer_sha256, say)
    return config.model_copy(update={"start_from": str(Start(folder, commit.state.step))})


def _recorded(own: Path) -> Start | None:
    """What a run folder says that it began with."""
    if not (own / "run.yaml").is_file():
        return None
    text = load_config(own / "run.yaml").start_from
    return parse_start(text) if text is not None else None


def _choose(folder: Path, asked: Start, config: RunConfig) -> Commit:
    checkpoints = folder / "checkpoints"
    there = list_commits(checkpoints)
    if not there:
        raise UserError(f"start_from={config.start_from}: {checkpoints} holds no checkpoint yet.")
    wanted = there[0] if asked.step is None else commit_folder_of(checkpoints, asked.step)
    steps = ", ".join(str(int(path.name.removeprefix("step-"))) for path in there[:8])
    if wanted not in there:
        raise UserError(f"start_from={config.start_from}: {folder} has no checkpoint of step {asked.step}; it has {steps}.")
    commit = read_whole_commit(wanted)
    if commit is None:
        raise UserError(
            f"start_from={config.start_from}: {wanted} is damaged or cannot be read (`pretrain checkpoints verify {folder}` says where). "
            f"It stays as it is, being another run's; take another step of {steps}."
        )
    return commit


def _check(config: RunConfig, parent: RunConfig, commit: Commit, tokenizer_sha256: str, say: Callable[[str], object]) -> None:
    """What a branch has to have in common with its parent. The shapes of weights are compared when they are read."""
    place = f"start_from={config.start_from}"
    other_tokenizer = commit.identity.get("tokenizer") != tokenizer_sha256
    if config.start_with == "weights":
        if other_tokenizer:
            say(f"WARNING: {place}: its tokenizer is another one; every row of its token table stands for another text here.")
        return
    if other_tokenizer:
        raise UserError(f"{place} start_with=everything: its tokenizer is another one than the data's; take start_with=weights.")
    different = [change for change in changes_between(parent, config) if change.key.startswith(MUST_AGREE)]
    if different:
        rows = "\n".join(f"  {change.key}: it has {change.old!r}, asked for {change.new!r}" for change in different)
        raise UserError(
            f"{place} start_with=everything goes on with another model, optimizer or step:\n{rows}\nTake its values, or start_with=weights."
        )
    if commit.state.step >= config.training.total_steps:
        raise UserError(
            f"{place} start_with=everything begins at step {commit.state.step}, and training.total_tokens={config.training.total_tokens} "
            f"ends at step {config.training.total_steps}: it counts the parent's tokens ({commit.state.tokens_seen}) too; raise it."
        )


def parent_commit(config: RunConfig) -> Commit:
    """The commit that a pinned `start_from` names. Raises UserError where it is not there any more, or damaged."""
    start = parse_start(config.start_from or "")
    commit = read_whole_commit(commit_folder_of(start.path / "checkpoints", start.step or 0))
    if commit is None:
        raise UserError(f"start_from={start}: the checkpoint is damaged or not there any more; name another one.")
    return commit


def record_child(config: RunConfig, child: Path) -> None:
    """Tell the parent of a pinned `start_from` about its child, synced; once for each child. Raises OSError."""
    start = parse_start(config.start_from or "")
    if str(child) in children_of(start.path).get(start.step or 0, ()):
        return
    path = start.path / FORKS_FILE
    row = {
        "child": str(child),
        "step": start.step,
        "with": config.start_with,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    torn = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("a") as file:
        file.write(("\n" if torn else "") + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def children_of(run: Path) -> dict[int, list[str]]:
    """The folders of the runs that began with a run's commits, by step. A torn last line is left out: its child has not begun."""
    found: dict[int, list[str]] = {}
    path = run / FORKS_FILE
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
            found.setdefault(int(row["step"]), []).append(str(row["child"]))
        except (ValueError, KeyError, TypeError):
            continue
    return found

"""The campaign of changed configurations: every key of the schema is changed at a resume, one by one.

    python -m tests.faults.keys [--sample SHARE] [--seed N] [--json] [--kind KIND ...] [--case NUMBER ...]

`changed_keys`: the run is refused with the difference and nothing is touched, or the change is said and recorded, or taken: as the key's
class says, none silently applied or ignored. `free_keys`: a resumed run with another value ends with the same bits. `applied_keys`: with
another value it does not. The cases come from the schema, so a new key is a new case. Out: a line (or an object of JSON) for each kind.
"""

import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from configs.changes import Key, all_keys
from configs.errors import EXIT_DONE, UserError
from configs.schema import RunConfig
from pretrain.run import supervisor
from pretrain.run.folder import RunFolder
from pretrain.run.outcome import Outcome as RankOutcome
from pretrain.run.outcome import Verdict
from tests.configs.keys import LEAVES, another, value_at, with_value
from tests.faults.campaign import Case, Kind, Outcome, run_campaign
from tests.tiny import write_tiny_dataset

KEYS = all_keys()
ANOTHER_PLACE = ("run.name", "run.root", "checkpoint.fast_folder", "checkpoint.fast_every_steps")
FREE = [key for key in KEYS if key.at_resume == "free" and key.name not in ANOTHER_PLACE]
"""Those that do not say where the run's commits are."""
STEP_TOKENS = 8 * 32
STOPPED_AT = 5
EFFECTIVE = {
    "optimizer.peak_lr": 0.005,
    "optimizer.beta1": 0.8,
    "optimizer.beta2": 0.9,
    "optimizer.epsilon": 0.01,
    "optimizer.weight_decay": 0.5,
    "optimizer.clip_norm": 0.001,
    "schedule.kind": "cosine",
    "schedule.warmup_tokens": 6 * STEP_TOKENS,
    "schedule.decay_tokens": 5 * STEP_TOKENS,
    "schedule.final_ratio": 0.5,
    "training.total_tokens": 12 * STEP_TOKENS,
}
"""Of what is applied to the weights themselves: a value that makes a difference behind step 5 of 10."""
ELSEWHERE = {"optimizer.muon_peak_lr", "optimizer.muon_momentum", "optimizer.offload"}
"""Of the keys `optimizer` and `schedule` those that AdamW on a CPU has no use for."""


# --- the class of every key, as the supervisor holds it -----------------------------------------------------


def prepare_nothing(folder: Path, chosen: random.Random) -> None:
    """Each case has a run folder of its own."""


def change_key(case: Case) -> Outcome:
    """Start a run folder that has begun with one key changed; the ranks are left out."""
    key = KEYS[case.number]
    together = {"fast_folder": "fast", "fast_every_steps": 100}  # one of them alone is no run file
    before = RunConfig.model_validate({"run": {"root": str(case.folder), "name": "mine"}, "checkpoint": together})
    run = RunFolder.of(before)
    run.prepare(before)
    run.write_description(before, case.folder)
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n')
    run.record_attempt({"attempt": 1})
    now = changed(before, key, case.chosen)
    if now is None:
        return Outcome(1, [f"{key.name}: no other value of it was found"])
    old, new = value_at(before, key.name), value_at(now, key.name)
    if key.name in ("run.name", "run.root"):
        moved = RunFolder.of(now).path
        return Outcome(1, [] if moved != run.path else [f"{key.name}: {old!r} and {new!r} are the same folder"])
    files, said = contents(run.path), list[str]()
    try:
        status = start(now, said.append)
    except UserError as error:
        told = f"  {key.name}: the folder has " in str(error)
        problems = [] if key.at_resume == "refused" else [f"{key.name} is {key.at_resume} and was refused: {error}"]
        problems += [] if told else [f"{key.name}: the refusal does not name it: {error}"]
        problems += [] if contents(run.path) == files else [f"{key.name}: the refusal has changed the folder"]
        return Outcome(1, problems)
    lines = [line for line in said if line.startswith(f"{key.name}: ") and " -> " in line]
    recorded = [row["changed"] for row in run.changes()]
    problems: list[str] = []
    if key.at_resume == "refused":
        problems.append(f"{key.name} is refused and was taken")
    if status != EXIT_DONE or run.load_config() != now:
        problems.append(f"{key.name}: run.yaml does not have the new value (status {status})")
    if len(lines) != (key.at_resume == "applied"):
        problems.append(f"{key.name} is {key.at_resume}, and {len(lines)} lines were said of it")
    if [list(row) for row in recorded] != ([[key.name]] if key.at_resume == "applied" else []):
        problems.append(f"{key.name} is {key.at_resume}, and attempts.jsonl has {recorded}")
    return Outcome(1, problems)


def start(config: RunConfig, say: Callable[[str], None]) -> int:
    """What the command does, but for the ranks."""

    def run_team(*_: object) -> tuple[Verdict, dict[int, RankOutcome]]:
        return Verdict(EXIT_DONE, "done", is_fault=False), {}

    before, mask = (supervisor.run_team, supervisor.check_processes), os.umask(0o077)
    supervisor.run_team, supervisor.check_processes = run_team, lambda *_: 1
    try:
        return supervisor.supervise(config, Path("nowhere"), say, lambda *_: False, lambda _: 0)
    finally:
        supervisor.run_team, supervisor.check_processes = before
        os.umask(mask)


def changed(config: RunConfig, key: Key, chosen: random.Random) -> RunConfig | None:
    """The configuration with another value of the key; one that a run file may have, unless the key is refused in any case."""
    values = list(other_values(value_at(config, key.name), key.name))
    chosen.shuffle(values)
    for value in values:
        now = with_value(config, key.name, value)
        try:
            valid = RunConfig.model_validate(now.model_dump(warnings=False))
        except ValidationError:
            continue
        if valid != config:
            return valid
    return with_value(config, key.name, values[0]) if key.at_resume == "refused" and values else None


SECTIONS: dict[str, Any] = {
    "data.sources": ({"name": "one", "path": "text"},),
    "data.clean": ({"rule": "some_rules:one"},),
    "data.deduplicate": {"exact": False},
    "mixture.stages": ({}, {"from_tokens": 524_288_000, "weights": {"one": 1.0}}),
    "data.packed_lengths": (2048,),
    "profile.steps": (7, 8),
    "profile.ranks": (1,),
    "training.batch_ramp": ({"until_tokens": 524_288, "global_batch_samples": 64},),
}


def other_values(value: Any, name: str) -> Iterator[Any]:
    """Values of a key that are not `value`; not all of them fit everywhere."""
    if name in SECTIONS:
        yield SECTIONS[name]
        return
    if isinstance(value, float):
        yield from (value / 2, value * 0.9, 0.25)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield from (value * 2, max(1, value // 2), value + 1)
    elif value is None:
        choices = [get_args(kind) for kind in get_args(LEAVES[name].annotation) if get_origin(kind) is Literal]
        yield from (1, 0.5, True, "some:text", *(choice for one in choices for choice in one))
    else:
        yield another(value, LEAVES[name].annotation)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- what the classes promise, in real training --------------------------------------------------------------


def prepare_run(folder: Path, chosen: random.Random) -> dict[str, Any]:
    """A dataset, a run on it that was stopped half way, and the weights it ends with when it goes on undisturbed."""
    import torch.distributed as distributed

    if not distributed.is_initialized():
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu", "WANDB_MODE": "disabled"}
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    write_tiny_dataset(folder / "data")
    train(folder, folder / "stopped", {}, stop_at=STOPPED_AT)
    shutil.copytree(folder / "stopped", folder / "whole")
    return {"folder": folder, "weights": train(folder, folder / "whole", {})}


def train(folder: Path, runs: Path, overrides: dict[str, str], stop_at: int | None = None) -> str:
    """Train the tiny run below `runs`, or go on with it, in this process; a hash of its newest weights."""
    from tests.training import train_runs

    attempt = 1 if stop_at else 2
    train_runs(str(folder / "data"), str(runs), {"mine": overrides}, stop_at=stop_at, attempt=attempt)
    return weights_of(runs / "mine")


def weights_of(run: Path) -> str:
    """SHA-256 over a run's newest weights, by name."""
    import hashlib

    from pretrain.checkpoint.index import FragmentIndex
    from pretrain.checkpoint.verify import list_commits, read_commit

    digest = hashlib.sha256()
    with FragmentIndex(read_commit(list_commits(run / "checkpoints")[0])) as index:
        for name, value in sorted(index.weights().items()):
            digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def resumed_with(case: Case, name: str, value: Any) -> str:
    runs = case.folder / "runs"
    shutil.copytree(case.prepared["folder"] / "stopped", runs)
    return train(case.prepared["folder"], runs, {name.replace(".", "__"): json.dumps(value)})


def change_free_key(case: Case) -> Outcome:
    """The bits do not depend on it."""
    from tests.training import tiny_config

    key = FREE[case.number]
    tiny = tiny_config(case.prepared["folder"] / "data", case.folder)
    now = changed(tiny, key, case.chosen)
    if now is None:
        return Outcome(1, [f"{key.name}: no other value of it was found"])
    value = value_at(now, key.name)
    if key.name in ("data.cache", "performance.compile_cache"):
        value = str(case.folder / "cache")
    same = resumed_with(case, key.name, value) == case.prepared["weights"]
    return Outcome(1, [] if same else [f"{key.name} is free, and with {value!r} the run ends with other weights"])


def change_applied_key(case: Case) -> Outcome:
    """The weights depend on it from the resume on."""
    name, value = list(EFFECTIVE.items())[case.number]
    same = resumed_with(case, name, value) == case.prepared["weights"]
    return Outcome(1, [f"{name} is applied, and {value!r} changes nothing"] if same else [])


KINDS = {
    kind.name: kind
    for kind in (
        Kind("changed_keys", len(KEYS), 1, prepare_nothing, change_key),
        Kind("free_keys", len(FREE), 1, prepare_run, change_free_key),
        Kind("applied_keys", len(EFFECTIVE), 1, prepare_run, change_applied_key),
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the kinds that are asked for; the exit status."""
    return run_campaign("keys", __doc__, KINDS, arguments)


if __name__ == "__main__":
    sys.exit(main())

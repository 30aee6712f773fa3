"""The folder of a launch: what was asked for, as it was when it was asked for, so that an edit while a job waits changes nothing.

In: a plan, the files that its kind renders, the values of what is passed. Out: the folder, whole under its final name or not there, open
to its owner alone: copies of the code, `run.yaml`, `plan.json`, scripts, and the environment, the one file that may hold secrets.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from configs.durable import new_folder, sha256_of_file
from configs.errors import UserError
from configs.loader import dump_config
from configs.schema import RunConfig
from configs.section import FUNCTION_PATTERN
from launch.plan import (
    CLUSTER_FILE,
    ENVIRONMENT_FILE,
    NODE_SCRIPT,
    PLAN_FILE,
    RUN_FILE,
    Code,
    LaunchPlan,
    as_json,
    node_environment,
    render_environment,
    render_node_script,
)

PACKAGES = ("configs", "data_pipeline", "pretrain", "launch")
BY_NODE_SCRIPT = ("local", "slurm", "hostfile")
"""Kinds whose nodes are started by the node script; elsewhere a pod or a worker is told its environment in another way."""
GIT_SECONDS = 30


def describe_code(folder: Path, config: RunConfig, working_folder: Path) -> Code:
    """The packages of `folder` as they lie there, and the user's own modules that the run file names and working_folder holds."""
    commit = _git(folder, "rev-parse", "HEAD") if (folder / ".git").exists() else None
    modules = [str(path) for path in _own_modules(config, working_folder) if path.parent != folder]
    return Code(str(folder), commit.decode().strip() if commit else None, _hash_changes(folder) if commit else None, modules=tuple(modules))


def as_copy(code: Code, folder: str) -> Code:
    """The same code, copied into the launch's folder when that is written."""
    return replace(code, source=f"{folder}/code", copied_from=code.source)


def in_place(code: Code) -> Code:
    """The same code, run where it lies. Raises UserError where the run file names modules that lie elsewhere."""
    if code.modules:
        raise UserError(f"{code.modules[0]} is named in the run file and does not lie in {code.source}; leave out --code here, or move it.")
    return code


def own_files(plan: LaunchPlan, values: Mapping[str, str]) -> dict[str, str]:
    """What stands in the folder of a launch of any kind: name -> content. values: of the variables that are passed."""
    files = {RUN_FILE: plan.configuration, PLAN_FILE: json.dumps(as_json(plan), indent=1) + "\n"}
    if plan.kind in BY_NODE_SCRIPT and not plan.builds_data:
        files[NODE_SCRIPT] = render_node_script(plan)
    if plan.kind != "kubernetes":
        files[CLUSTER_FILE] = dump_config(plan.cluster)
        files[ENVIRONMENT_FILE] = render_environment(
            node_environment(plan) | {name: values[name] for name in plan.passed if name in values}
        )
    return files


def write_launch(plan: LaunchPlan, files: Mapping[str, str]) -> None:
    """Make the folder of a launch, with its files and its copy of the code. Raises UserError where it is there, OSError for a full disk."""
    folder = Path(plan.folder)
    for path in (folder.parent.parent, folder.parent):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    with new_folder(folder) as temporary:
        temporary.chmod(0o700)
        for name, content in files.items():
            _write_private(temporary / name, content)
        if plan.code.copied_from is not None:
            sources = [Path(plan.code.copied_from) / package for package in PACKAGES] + [Path(module) for module in plan.code.modules]
            _copy_code(sources, temporary / "code")


def _write_private(path: Path, content: str) -> None:
    """Never, not even while it is written, can others read it. A variable's value may hold bytes that are no UTF-8."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content.encode("utf-8", "surrogateescape"))


def _copy_code(sources: Sequence[Path], into: Path) -> None:
    into.mkdir()
    for source in sources:
        if source.is_dir():
            shutil.copytree(source, into / source.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copy2(source, into / source.name)


def _own_modules(config: RunConfig, folder: Path) -> list[Path]:
    """Files and folders of `folder` that hold the modules of `package.module:name` in a configuration."""
    texts = _texts(config.model_dump(mode="json"))
    names = sorted({text.partition(":")[0].partition(".")[0] for text in texts if FUNCTION_PATTERN.fullmatch(text)} - set(PACKAGES))
    places = [place for name in names for place in (folder / name, folder / f"{name}.py")]
    return [place for place in places if place.is_file() or (place.suffix != ".py" and place.is_dir())]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in cast("dict[str, Any]", value).values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in cast("list[Any]", value):
            yield from _texts(inner)


def _hash_changes(folder: Path) -> str | None:
    """SHA-256 of what the packages have beside the commit; None where they are the commit's."""
    differing = _git(folder, "diff", "--no-ext-diff", "--no-textconv", "HEAD", "--", *PACKAGES) or b""
    unknown = _git(folder, "ls-files", "-z", "--others", "--exclude-standard", "--", *PACKAGES) or b""
    names = sorted(filter(None, os.fsdecode(unknown).split("\0")))
    if not differing and not names:
        return None
    digest = sha256(differing)
    for name in names:
        digest.update(f"\0{name}\0{sha256_of_file(folder / name)}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _git(folder: Path, *arguments: str) -> bytes | None:
    """What git says; None where there is none, or it refuses (a checkout of another user's)."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, timeout=GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None

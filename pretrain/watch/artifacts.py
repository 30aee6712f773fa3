"""What a run was made of and what it made, as W&B artifacts: by reference, with our own hashes.

In: an open W&B run, the run folder. Out: an artifact `description-ID` (run.yaml, environment.json, plans of launches; git commit and a hash
of what differs from it), `data-ID` (the data's manifest), `checkpoint-ID` (a version for each commit). References only: nothing is sent of
a file but where it lies, its size and its hash; with `watch.wandb_artifacts: files` the small files too, but never a checkpoint.
"""

import hashlib
import json
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import wandb

from configs.redaction import redact
from configs.schema import RunConfig
from pretrain.watch.wandb_run import run_id, without_secrets

CHECKPOINTS = "checkpoints"
STORE_FILE = "checkpoints-url"
"""In the run folder: where the commits lie, if that is an object store."""
GIT_SECONDS = 10


def log_description(run: "wandb.Run", config: RunConfig, folder: Path) -> None:
    """Log configuration, environment, code and data. The same content again is no new version."""
    if config.watch.wandb_artifacts == "off":
        return
    description = wandb.Artifact(f"description-{run_id(folder)}", "description", metadata=_describe_code(folder))
    for path in (folder / "run.yaml", folder / "environment.json", *sorted(folder.glob("launches/*/plan.json"))):
        if path.is_file():
            _add(description, path, str(path.relative_to(folder)), config)
    run.log_artifact(description)
    manifest = Path(config.data.folder()) / "manifest.json"
    if not config.data.is_remote and manifest.is_file():
        sums = {"manifest_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest()}
        data = wandb.Artifact(f"data-{run_id(folder)}", "dataset", metadata=sums)
        _add(data, manifest.resolve(), "manifest.json", config)
        run.log_artifact(data)


def log_checkpoints(run: "wandb.Run", config: RunConfig, folder: Path, known: set[str]) -> None:
    """Log each commit that is not in `known`, which they are added to. One that is removed meanwhile stays a reference to nothing."""
    if config.watch.wandb_artifacts == "off":
        return
    for commit in sorted((folder / CHECKPOINTS).glob("step-*")):
        manifest = commit / "MANIFEST.json"
        if commit.name in known or not manifest.is_file():
            continue
        known.add(commit.name)
        about = json.loads(manifest.read_text())
        metadata = {"step": int(commit.name[5:]), "attempt": about.get("attempt"), "manifest_sha256": about.get("manifest_sha256")}
        artifact = wandb.Artifact(f"checkpoint-{run_id(folder)}", "model", metadata={**metadata, "place": commit.as_uri()})
        artifact.add_reference(commit.as_uri(), checksum=False)
        run.log_artifact(artifact, aliases=["latest", commit.name])
    if (folder / STORE_FILE).is_file():
        _log_store(run, folder, known)


def _log_store(run: "wandb.Run", folder: Path, known: set[str]) -> None:
    """Log where in an object store the commits lie. Its client may be missing here: then the address stands in the metadata alone."""
    place = redact((folder / STORE_FILE).read_text().strip())
    if place in known:
        return
    known.add(place)
    artifact = wandb.Artifact(f"checkpoint-{run_id(folder)}", "model", metadata={"place": place})
    with suppress(Exception):
        artifact.add_reference(place, name="checkpoints", checksum=False)
    run.log_artifact(artifact)


def _add(artifact: "wandb.Artifact", path: Path, name: str, config: RunConfig) -> None:
    """A small file: itself where files are asked for and no secret is in it, else where it lies."""
    text = path.read_text(errors="replace")
    if config.watch.wandb_artifacts == "files" and redact(text) == text:
        artifact.add_file(str(path), name=name, skip_cache=True)
    else:
        artifact.add_reference(path.as_uri(), name=name)


def _describe_code(folder: Path) -> dict[str, Any]:
    """The commit that the code was checked out from, and a hash of what differs from it."""
    found: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        environment = json.loads((folder / "environment.json").read_text())
        found = {"git_commit": environment.get("git_commit"), "git_changes": environment.get("git_changes")}
    source = Path(__file__).parent.parent.parent
    if found.get("git_changes") and (source / ".git").exists():
        with suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(["git", "diff", "HEAD"], cwd=source, capture_output=True, timeout=GIT_SECONDS, check=False)
            found["git_diff_sha256"] = hashlib.sha256(done.stdout).hexdigest()
    return without_secrets(found)

"""What a run was made with: versions, code and hardware, for `environment.json`."""

import importlib.metadata
import os
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any

import psutil


def describe_environment() -> dict[str, Any]:
    """Versions, code and hardware, for `environment.json`."""
    versions = {}
    for package in ("torch", "deepspeed", "ray", "datasets", "tokenizers", "wandb", "numpy", "safetensors"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    source = Path(__file__).parent.parent.parent
    return {
        "python": platform.python_version(),
        "versions": versions,
        "git_commit": _git(source, "rev-parse", "HEAD"),
        "git_changes": bool(_git(source, "status", "--porcelain")),
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def _git(folder: Path, *arguments: str) -> str | None:
    if not (folder / ".git").exists():  # an installed copy inside somebody else's repository is not that repository's code
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

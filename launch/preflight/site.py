"""Where a run is going to be, as one node sees it, and what this node shows to the others.

In: a run's and a cluster's configuration, as the verb has them. Out: a `Site`, the facts that have to be the same on all nodes, and
marks: files by which nodes find out whether a folder is shared.
"""

import hashlib
import os
import socket
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from configs.cluster import HardwareSection, JobSection
from configs.durable import sha256_of_file
from launch.preflight.limited import within

MINE = ".doctor-"
"""How the names of the doctor's own files begin."""
REMOVE_SECONDS = 5.0


@dataclass(frozen=True)
class Site:
    """Where a run is going to be, as one node sees it."""

    num_nodes: int = 1
    node: int = 0
    host: str = "127.0.0.1"
    """Of node 0, as the others reach it."""
    port: int | None = None
    """Of the training's rendezvous; null: one node, which needs none."""
    launch: str = "alone"
    """Which launch this is: nodes of another one are not listened to."""
    processes: int | None = None
    """On this node; null: one for each GPU, or `cpu_processes`."""
    cpu_processes: int = 2
    run_folder: Path = Path("runs")
    data: Path | None = None
    """The dataset's folder; null: none, or it lies in an object store."""
    wandb: str | None = None
    """URL of the server that a key is configured for; null: none is."""
    hardware: HardwareSection = field(default_factory=HardwareSection)
    job: JobSection = field(default_factory=JobSection)
    facts: Mapping[str, str] = field(default_factory=dict)
    """Versions, code and configuration: what has to be the same on all nodes."""
    token: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    """Of this node's own files."""

    @property
    def existing_run_folder(self) -> Path:
        """The folder that stands for the run's: a launch has made `launches` in it, and before that there is one above it."""
        wanted = (self.run_folder / "launches").absolute()
        return next(path for path in (wanted, *wanted.parents) if path.is_dir())

    @property
    def marks(self) -> list[Path]:
        """Files that this node makes where all nodes should see them."""
        folders = dict.fromkeys([self.existing_run_folder, *map(Path, self.job.shared_folders)])
        return [folder / f"{MINE}{self.token}" for folder in folders]


def look_for(marks: Mapping[str, str], seconds: float) -> list[str]:
    """Paths at which the mark of another node does not show within so many seconds. marks: path -> what stands in it.

    The names are new, so no cache of a network file system knows them as missing.
    """
    deadline, missing = time.monotonic() + seconds, dict(marks)
    while missing:
        for path, content in list(missing.items()):
            try:
                if Path(path).read_text() == content:
                    del missing[path]
            except OSError:
                continue
        if time.monotonic() > deadline:
            break
        if missing:
            time.sleep(0.2)
    return list(missing)


def remove_marks(site: Site) -> None:
    """Take this node's own away, within a limit of time."""
    within({"marks": lambda: remove_files(site.marks)}, REMOVE_SECONDS)


def remove_files(paths: Iterable[Path]) -> None:
    """Those that are there."""
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError:  # it could not be made either
            continue


def hash_code(root: Path, packages: Iterable[str] = ("configs", "data_pipeline", "pretrain", "launch")) -> str:
    """The first 12 digits of one SHA-256 over names and contents of all sources: a commit, and whatever was changed since."""
    digest = hashlib.sha256()
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0{sha256_of_file(path)}\n".encode())
    return digest.hexdigest()[:12]


def name_of_node() -> str:
    """What the others, and Slurm where it began this process, call this node: what is to be excluded is told to Slurm by Slurm's name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def facts_of_node() -> dict[str, str]:
    """The driver, and variables that decide how nodes talk to each other."""
    driver = Path("/sys/module/nvidia/version")
    names = sorted(name for name in os.environ if name.startswith(("NCCL_", "GLOO_", "TORCH_NCCL_", "CUDA_DEVICE_ORDER")))
    return {"driver": driver.read_text().strip() if driver.is_file() else "none"} | {f"variable {name}": os.environ[name] for name in names}

"""A plan for tests of the launchers, of a tiny run, with paths that are the same everywhere."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.cluster import ClusterConfig
from configs.loader import load_config
from configs.schema import RunConfig
from launch.plan import Code, LaunchPlan, launch_folder, plan_launch, resolve_run

LAUNCH_ID = "20260102-030405-abcd"
CODE = Code("/shared/pretrain", "0123456789abcdef0123456789abcdef01234567", None)


def a_run(folder: Path, *overrides: str) -> RunConfig:
    """The run file of the demo, in folder, with overrides."""
    file = folder / "mine.yaml"
    file.write_text("include: [runs/demo.yaml]\n")
    given = ["run.root=/shared/runs", "data.root=/shared/datasets/demo", "training.global_batch_samples=8", *overrides]
    return load_config(file, given)


def a_plan(folder: Path, kind: Any = "slurm", shell: dict[str, str] | None = None, **sections: Any) -> LaunchPlan:
    """Two nodes of two processes; sections: of the cluster file."""
    cluster = ClusterConfig.model_validate({"name": "here", "nodes": 2, **sections})
    config = resolve_run(a_run(folder), cluster, "/home/me")
    files = launch_folder(config, LAUNCH_ID)
    return plan_launch(kind, config, cluster, CODE, launch_id=LAUNCH_ID, folder=files, shell_environment=shell or {})


def moved(plan: LaunchPlan, folder: Path) -> LaunchPlan:
    """The same plan, with all its files below a folder that can be written."""
    run = folder / "runs" / plan.run_name
    return replace(plan, run_folder=str(run), folder=str(run / "launches" / plan.launch_id))

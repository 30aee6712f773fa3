"""What one rank does in the tests of object stores: called in a world of one, or as a parent of ranks that are killed (rows of JSON)."""

import json
import os
import sys
from pathlib import Path, PurePath

import torch.distributed as distributed

from pretrain.checkpoint.blocks import in_blocks, write_blocks
from pretrain.checkpoint.verify import list_commits, verify_commit
from tests.pretrain.checkpoint.on_ranks import Files, _fork, content_of, newest_verified_commit, save

KILL_POINTS = {
    # where it is killed -> whether step 20 is then committed
    "before put attempt-2/rank_00000.safetensors": False,
    "after put attempt-2/rank_00000.safetensors": False,
    "after put attempt-2/rank_00000.json": False,
    "before put attempt-2/MANIFEST.json": False,
    "after put attempt-2/MANIFEST.json": False,
    "before put step-00000020/MANIFEST.json": False,
    "after put step-00000020/MANIFEST.json": True,
}


def put_files(folder: PurePath, step: int, rank: int) -> Files:
    """Write a rank's two files, as its writer does."""
    names = {f"rank_{rank:05d}.{suffix}": content_of(step, rank, suffix) for suffix in ("safetensors", "json")}
    return {name: write_blocks(folder / name, in_blocks(content)) for name, content in names.items()}


def put_both(folder: PurePath, step: int) -> Files:
    """Those of two ranks."""
    return put_files(folder, step, 0) | put_files(folder, step, 1)


def save_alone(checkpoints: Path, step: int, attempt: int) -> int:
    """Commit a step in a world of one rank."""
    return 0 if save(checkpoints, step, lambda folder: put_files(folder, step, distributed.get_rank()), attempt=attempt) is None else 1


def save_killed(checkpoints: Path, point: str) -> int:
    """Killed on the way."""
    os.environ["PLAYED_KILL"] = point
    return save_alone(checkpoints, 20, attempt=2)


def go_on(checkpoints: Path) -> int:
    """As the next attempt would: exit code = the step that was found; then step 30 is committed."""
    found = newest_verified_commit(checkpoints, lambda text: sys.exit(f"nothing is damaged: {text}"))
    assert found is not None
    assert save_alone(checkpoints, 30, attempt=3) == 0
    return found.state.step


if __name__ == "__main__":
    runs, objects = Path(sys.argv[1]), Path(os.environ["PLAYED_STORE"])
    for number, point in enumerate(KILL_POINTS):
        run = runs / f"run-{number}"
        run.mkdir(parents=True)
        (run / "checkpoints-url").write_text(f"played://runs/{number}")
        checkpoints = run / "checkpoints"
        assert _fork(lambda checkpoints=checkpoints: save_alone(checkpoints, 10, 1)) == 0
        status = _fork(lambda checkpoints=checkpoints, point=point: save_killed(checkpoints, point))
        row = {"point": point, "status": status, "left": [path.name for path in list_commits(checkpoints)]}
        row["problems"] = [problem for path in list_commits(checkpoints) for problem in verify_commit(path)]
        row["resumed"] = _fork(lambda checkpoints=checkpoints: go_on(checkpoints))
        row["after"] = sorted(str(path.relative_to(objects / "runs" / str(number))) for path in objects.glob(f"runs/{number}/*/*"))
        print(json.dumps(row), flush=True)

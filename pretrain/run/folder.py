"""The run folder: what it is called, whose run it holds, what is written in it.

In: a resolved configuration. Out: a folder that is this run's alone, or a refusal that lists what differs.

    runs/NAME/  run.yaml  environment.json  metrics.jsonl  attempts.jsonl  lease.json  checkpoints/  wandb/
"""

import json
import os
from pathlib import Path
from typing import Any

from configs.durable import write_file
from configs.errors import UserError
from configs.loader import dump_config, load_config
from configs.schema import RunConfig, differing_keys
from pretrain.run.environment import describe_environment

# What an attempt that was killed at once may have left before `run.yaml`.
LEFT_BY_A_START = {"lease.json", "attempts.jsonl"}


class RunFolder:
    """Paths of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "run.yaml"
        self.checkpoints = path / "checkpoints"
        self.attempts_file = path / "attempts.jsonl"
        self.lease_file = path / "lease.json"
        self.tokenizer_file = path / "tokenizer.json"
        self.environment_file = path / "environment.json"

    @staticmethod
    def of(config: RunConfig) -> "RunFolder":
        """The folder a configuration names: `run.root` / `run.name`."""
        return RunFolder((Path(config.run.root) / (config.run.name or "run")).resolve())

    @staticmethod
    def existing(path: Path) -> "RunFolder":
        """A folder that holds a run. Raises UserError when it does not."""
        folder = RunFolder(path.resolve())
        if not folder.config_file.is_file():
            near = [p.parent.name for p in path.parent.glob("*/run.yaml")] if path.parent.is_dir() else []
            raise UserError(f"{path} holds no run (no run.yaml)." + (f" Runs beside it: {', '.join(sorted(near)[:8])}." if near else ""))
        return folder

    def load_config(self) -> RunConfig:
        """The configuration the run was started with."""
        return load_config(self.config_file)

    def prepare(self, config: RunConfig) -> bool:
        """Make the folder, or check that it holds this run. Returns whether it existed.

        Raises UserError, listing the keys that differ, when it belongs to another configuration. A changed key
        that may change (see `schema.py`) is written to `run.yaml`.
        """
        mode = 0o750 if config.run.readable_by == "group" else 0o700
        existed = self.config_file.is_file()
        if existed:
            different = differing_keys(self.load_config(), config)
            if different:
                rows = "\n".join(f"  {key}: the folder has {old!r}, asked for {new!r}" for key, (old, new) in different.items())
                raise UserError(
                    f"{self.path} belongs to another configuration:\n{rows}\n"
                    "Continue it with its own values, or start another run with run.name=NAME."
                )
        elif self.path.is_dir() and {path.name for path in self.path.iterdir() if not path.name.startswith(".lease.")} - LEFT_BY_A_START:
            raise UserError(f"{self.path} exists and holds no run; choose another name with run.name=NAME, or empty it.")
        self.path.mkdir(parents=True, exist_ok=True)
        self.path.chmod(mode)
        return existed

    def write_description(self, config: RunConfig, dataset: Path) -> None:
        """Write `run.yaml`, the dataset's `tokenizer.json` and `environment.json` (call it with the lease held)."""
        write_file(self.config_file, dump_config(config).encode())
        tokenizer = dataset / "tokenizer.json"
        if tokenizer.is_file():  # so that the run can write text wherever its folder is taken
            write_file(self.tokenizer_file, tokenizer.read_bytes())
        write_file(self.environment_file, (json.dumps(describe_environment(), indent=1) + "\n").encode())

    def attempts(self) -> list[dict[str, Any]]:
        """Finished attempts, oldest first; a torn last line is left out."""
        rows = []
        if self.attempts_file.is_file():
            for line in self.attempts_file.read_text().splitlines():
                try:
                    rows.append(json.loads(line))
                except ValueError:
                    continue
        return rows

    def record_attempt(self, row: dict[str, Any]) -> None:
        """Append one line to `attempts.jsonl`, synced."""
        torn = self.attempts_file.is_file() and self.attempts_file.read_bytes()[-1:] not in (b"", b"\n")
        with self.attempts_file.open("a") as file:
            file.write(("\n" if torn else "") + json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

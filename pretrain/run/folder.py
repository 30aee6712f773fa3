"""The run folder: what it is called, whose run it holds, what is written in it.

In: a resolved configuration. Out: a folder that is this run's alone, or a refusal that lists what differs. What may differ is taken,
and what of it changes a number is said and recorded (`configs/changes.py` has the classes).

    runs/NAME/  run.yaml  environment.json  metrics.jsonl  attempts.jsonl  lease.json  checkpoints/  wandb/
"""

import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from configs.changes import changes_between, differing_keys
from configs.durable import sync_path, write_file
from configs.errors import UserError
from configs.loader import dump_config, load_config
from configs.schema import RunConfig
from pretrain.run.environment import describe_environment

# What a launch, or an attempt that was killed at once, may have left before `run.yaml`.
LEFT_BY_A_START = {"lease.json", "attempts.jsonl", "launches"}
SHOWN_CHARACTERS = 80
"""Of a value, in a line; `attempts.jsonl` has it whole."""


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
        self.stop_file = path / "STOP"
        """Made by anybody (`touch`), it stops the run politely, as a signal does; the next start removes it."""

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

    def prepare(self, config: RunConfig, newest_step: int = 0) -> bool:
        """Make the folder, or check that it holds this run. Returns whether it existed. Raises UserError as `check` does."""
        existed = self.check(config, newest_step)
        self.path.mkdir(parents=True, exist_ok=True)
        self.path.chmod(0o750 if config.run.readable_by == "group" else 0o700)
        return existed

    def check(self, config: RunConfig, newest_step: int = 0) -> bool:
        """Whether the folder is there and holds this run. Nothing is changed.

        newest_step: of its commits; 0 for none. Raises UserError when it has begun and a key differs that may not, listing those, when
        the run would end before the step it has come to, and when it has had a commit and there is none any more.
        """
        existed = self.config_file.is_file()
        if existed:
            different = differing_keys(self.load_config(), config)
            if different and self.has_begun():
                rows = "\n".join(f"  {key}: the folder has {old!r}, asked for {new!r}" for key, (old, new) in different.items())
                raise UserError(
                    f"{self.path} belongs to another configuration:\n{rows}\n"
                    "Continue it with its own values, or start another run with run.name=NAME."
                )
            existed = not different
            self._check_progress(config, newest_step)
        elif self.path.is_dir() and {path.name for path in self.path.iterdir() if not path.name.startswith(".lease.")} - LEFT_BY_A_START:
            raise UserError(f"{self.path} exists and holds no run; choose another name with run.name=NAME, or empty it.")
        return existed

    def _check_progress(self, config: RunConfig, newest_step: int) -> None:
        total_steps = config.training.total_steps
        if newest_step > total_steps:
            raise UserError(
                f"{self.path} has come to step {newest_step}, and training.total_tokens={config.training.total_tokens} ends it at step "
                f"{total_steps}; raise it, or start another run from an earlier checkpoint with run.name=NAME start_from={self.path}@STEP."
            )
        committed = max((row.get("committed") or 0 for row in self.attempts()), default=0)
        # Damaged ones lie in a folder of their own, and so do those that the run went back behind, perhaps to its beginning.
        there = (path for pattern in ("step-*", "rejected/*", "rolled-back/*") for path in self.checkpoints.glob(pattern))
        if committed and not newest_step and not any(there):
            raise UserError(
                f"{self.path} has had a checkpoint of step {committed}, and {self.checkpoints} holds none now. Bring them back, or begin "
                "from nothing with --fresh, which moves what is there aside."
            )

    def take_changes(self, config: RunConfig, newest_step: int) -> list[str]:
        """Record what a run that goes on takes over from `config`, before `run.yaml` is written. Returns a line for each key.

        Nothing for a folder that is new or has not begun. Keys that are free are taken without a word.
        """
        if not self.config_file.is_file() or not self.has_begun():
            return []
        applied = [change for change in changes_between(self.load_config(), config) if change.at_resume == "applied"]
        if applied:
            changed = {change.key: [change.old, change.new] for change in applied}
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            self.record_attempt({"changed": changed, "from_step": newest_step, "time": now})
        return [
            f"{change.key}: {_shortened(change.old)} -> {_shortened(change.new)}, {change.when.format(step=newest_step)}"
            for change in applied
        ]

    def set_aside(self) -> Path | None:
        """Rename a folder that holds a run to NAME.before-N, whole: nothing is deleted. Returns where it is now; None: there was no run.

        Call it with the lease in hand. Raises OSError where it cannot be renamed.
        """
        if not self.config_file.is_file() and not self.checkpoints.is_dir():
            return None
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.before-{number}")).exists():
            number += 1
        self.path.rename(aside)
        sync_path(aside.parent)
        (aside / self.lease_file.name).unlink(missing_ok=True)
        return aside

    def has_begun(self) -> bool:
        """Whether a step was logged or committed: a start that failed before, by a wrong value, leaves nothing that could be lost."""
        metrics = self.path / "metrics.jsonl"
        is_saved = (self.checkpoints.is_dir() and any(self.checkpoints.iterdir())) or any(row.get("committed") for row in self.attempts())
        return (metrics.is_file() and metrics.stat().st_size > 0) or is_saved

    def write_description(self, config: RunConfig, dataset: Path) -> None:
        """Write `run.yaml`, the dataset's `tokenizer.json` and `environment.json` (call it with the lease held)."""
        write_file(self.config_file, dump_config(config).encode())
        tokenizer = dataset / "tokenizer.json"
        if tokenizer.is_file():  # so that the run can write text wherever its folder is taken
            write_file(self.tokenizer_file, tokenizer.read_bytes())
        write_file(self.environment_file, (json.dumps(describe_environment(), indent=1) + "\n").encode())

    def attempts(self) -> list[dict[str, Any]]:
        """Finished attempts, oldest first; a torn last line is left out, and so is what was changed between them."""
        return [row for row in self._history() if "attempt" in row]

    def changes(self) -> list[dict[str, Any]]:
        """What was changed when the run went on, oldest first: `changed` (key -> [old, new]), `from_step`, `time`."""
        return [row for row in self._history() if "changed" in row]

    def _history(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
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


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."

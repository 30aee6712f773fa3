"""How a run folder becomes a run in Weights & Biases: online or offline, under which id, with which axes.

In: a configuration, the run folder. Out: an open `wandb.Run`; a file in the folder that names its id, and one that says at which of W&B's
own steps each attempt began (`wandb/run-id`, `wandb/segments.jsonl`). Never a prompt.

W&B's own step only ever grows, while ours goes back when a run resumes behind a step that it has shown. So W&B counts what it is sent, and
`step` and `tokens_seen` are axes of ours. A row carries `attempt`, and `row`, its number in `metrics.jsonl`; an attempt begins with a row
that has `segment/from_step`: what earlier attempts showed beyond that step counts no more (`newest_rows` reads it so).
"""

import json
import logging
import netrc
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import wandb

from configs.durable import write_file
from configs.redaction import redact
from configs.schema import RunConfig

INIT_TIMEOUT_SECONDS = 30
FINISH_TIMEOUT_SECONDS = 45
"""Until the client gives up sending what it has."""
SEGMENTS = Path("wandb") / "segments.jsonl"
Mode = Literal["online", "offline"]


def has_api_key() -> bool:
    """Whether a key is configured, in the environment or by `wandb login` (a netrc entry)."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0].split(":")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def choose_mode(config: RunConfig) -> Literal["online", "offline", "disabled"]:
    """`WANDB_MODE` decides, then the run file, then whether there is a key."""
    named = os.environ.get("WANDB_MODE") or config.watch.wandb
    if named in ("offline", "disabled"):
        return "offline" if named == "offline" else "disabled"
    return "online" if has_api_key() else "offline"


def run_id(folder: Path) -> str:
    """The W&B id of a run folder, made once and kept in `wandb/run-id`."""
    path = folder / "wandb" / "run-id"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        write_file(path, secrets.token_hex(4).encode())
    return path.read_text().strip()


def without_secrets(value: Any) -> Any:
    """The same value, with no secret in any text of it."""
    if isinstance(value, dict):
        return {key: without_secrets(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(one) for one in value]
    return redact(value) if isinstance(value, str) else value


def open_run(
    config: RunConfig, folder: Path, mode: Mode, rewind_to: int | None = None, finish_seconds: int = FINISH_TIMEOUT_SECONDS
) -> "wandb.Run":
    """Start or continue the W&B run of this folder. Raises what `wandb.init` raises; then its service is gone too.

    rewind_to: the last of W&B's own steps that is kept; the server forgets those behind it. Not every server can. finish_seconds: until
    `finish` gives up sending what the client has.
    """
    logging.getLogger("wandb").setLevel(logging.ERROR)
    settings = wandb.Settings(
        silent=True,
        console="off",
        init_timeout=INIT_TIMEOUT_SECONDS,
        finish_timeout=finish_seconds,
        disable_git=True,
        save_code=False,
        quiet=True,
        x_disable_meta=False,
        x_transaction_log_flush_interval=2.0,  # its default, 15 s, is what a kill costs its own file
    )
    identity: dict[str, Any] = {"id": run_id(folder)}
    if rewind_to is not None:
        identity = {"resume_from": f"{identity['id']}?_step={rewind_to}"}
    elif mode == "online":
        identity |= {"resume": "allow"}
    try:
        set_up(settings)
        run = wandb.init(
            project=config.watch.wandb_project,
            entity=config.watch.wandb_entity,
            group=config.watch.wandb_group,
            tags=list(config.watch.wandb_tags) or None,
            name=config.run.name,
            dir=str(folder),
            mode=mode,
            config=without_secrets(config.model_dump(mode="json")),
            settings=settings,
            **identity,
        )
    except BaseException:
        wandb.teardown()  # its service still holds the run's id
        raise
    run.define_metric("step")
    run.define_metric("tokens_seen")
    run.define_metric("*", step_metric="step")
    return run


def set_up(settings: wandb.Settings) -> None:
    """Start the client's service. One that an outer program began (it tells its children by a variable) is left alone: it outlives a rank
    that is killed, and goes on holding the run's id."""
    os.environ.pop("WANDB_SERVICE", None)
    wandb.setup(settings)


def read_segments(folder: Path) -> list[dict[str, Any]]:
    """What was written by `add_segment`, oldest first; a torn line is left out."""
    path, rows = folder / SEGMENTS, list[Any]()
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict)]


def add_segment(folder: Path, attempt: int, from_row: int, wandb_step: int, mode: Mode) -> None:
    """Write down that an attempt's row `from_row` of `metrics.jsonl` is W&B's step `wandb_step`, and so on. Raises OSError."""
    row = {"attempt": attempt, "from_row": from_row, "wandb_step": wandb_step, "mode": mode}
    with (folder / SEGMENTS).open("a") as file:
        file.write(json.dumps(row) + "\n")


def wandb_step_of(segments: Iterable[dict[str, Any]], attempt: int, row: int) -> int | None:
    """W&B's own step of a row that an attempt showed online, or None where it did not."""
    for segment in segments:
        if segment.get("attempt") == attempt and segment.get("mode") == "online" and row >= segment["from_row"]:
            return segment["wandb_step"] + row - segment["from_row"]
    return None


def newest_rows(history: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of all rows that W&B has, those that count, in the order of `metrics.jsonl`: what no later attempt began again."""
    history = list(history)
    begins = {row["segment/attempt"]: row["segment/from_step"] for row in history if "segment/attempt" in row}
    counting = {
        row["row"]: row
        for row in sorted((row for row in history if "row" in row), key=lambda row: row["attempt"])
        if not any(attempt > row["attempt"] and from_step < row["step"] for attempt, from_step in begins.items())
    }
    return [row for _, row in sorted(counting.items())]

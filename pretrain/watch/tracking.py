"""Weights & Biases as a view of `metrics.jsonl`.

Offline unless an API key is configured, never a prompt, never a hang: the run goes on whatever happens here. One run id
per run folder, so that a resumed attempt continues the same curves, over axes of our own (`step`, `tokens_seen`).
"""

import logging
import netrc
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import wandb

from configs.durable import write_file
from configs.schema import RunConfig
from pretrain.watch.stop_tag import watch_stop_tag

INIT_TIMEOUT_SECONDS = 20
# What could not be uploaded by then stays in the run folder for `wandb sync`.
FINISH_TIMEOUT_SECONDS = 60


def has_api_key() -> bool:
    """Whether a key is configured, in the environment or by `wandb login` (a netrc entry)."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0].split(":")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def run_id(folder: Path) -> str:
    """The W&B id of a run folder, made once and kept in `wandb/run-id`."""
    path = folder / "wandb" / "run-id"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        write_file(path, secrets.token_hex(4).encode())
    return path.read_text().strip()


def choose_mode(config: RunConfig) -> Literal["online", "offline", "disabled"]:
    """`WANDB_MODE` decides, then the run file, then whether there is a key."""
    named = os.environ.get("WANDB_MODE") or config.watch.wandb
    if named in ("offline", "disabled"):
        return "offline" if named == "offline" else "disabled"
    return "online" if has_api_key() else "offline"


def start_tracking(config: RunConfig, folder: Path, say: Callable[[str], None]) -> "wandb.Run | None":
    """The W&B run of this folder, or None when it is disabled or could not be started (which is said)."""
    mode = choose_mode(config)
    if mode == "disabled":
        return None
    if mode == "online":
        say("contacting Weights & Biases")
    elif config.watch.wandb == "online":
        say("watch.wandb is online, but no API key is configured or WANDB_MODE differs: recorded offline, for `wandb sync`.")
    logging.getLogger("wandb").setLevel(logging.ERROR)
    settings = wandb.Settings(
        silent=True,
        console="off",
        init_timeout=INIT_TIMEOUT_SECONDS,
        finish_timeout=FINISH_TIMEOUT_SECONDS,
        disable_git=True,
        save_code=False,
        quiet=True,
        x_disable_meta=False,
    )

    def start(how: Literal["online", "offline"]) -> "wandb.Run":
        run = wandb.init(
            project=config.watch.wandb_project,
            entity=config.watch.wandb_entity,
            name=config.run.name,
            id=run_id(folder),
            resume="allow" if how == "online" else None,
            dir=str(folder),
            mode=how,
            config=config.model_dump(mode="json"),
            settings=settings,
        )
        run.define_metric("step")
        run.define_metric("tokens_seen")
        run.define_metric("*", step_metric="step")
        if how == "online":
            watch_stop_tag(run, folder, say)
        return run

    try:
        return start(mode)
    except Exception as error:
        if mode == "offline":
            say(f"Weights & Biases could not be started ({error}); metrics.jsonl holds every value.")
            return None
        say(f"Weights & Biases could not be reached ({error}); this attempt is recorded offline.")
        wandb.teardown()  # its service still holds the run's id
    try:
        return start("offline")
    except Exception as error:
        say(f"Weights & Biases could not be started offline either ({error}); metrics.jsonl holds every value.")
        return None


def track(run: "wandb.Run | None", row: dict[str, Any]) -> None:
    """Show a row of `metrics.jsonl`; an error here is not the run's."""
    if run is not None:
        try:
            # W&B's own counter would restart at 0 with each attempt, and it drops steps that go backwards.
            run.log(row, step=row["step"])
        except Exception:
            logging.getLogger(__name__).warning("Weights & Biases refused a row", exc_info=True)


def end_tracking(run: "wandb.Run | None", failed: bool) -> None:
    """Close the run; an error here is not the run's."""
    if run is not None:
        try:
            run.finish(exit_code=1 if failed else 0)
        except Exception:
            logging.getLogger(__name__).warning("Weights & Biases could not be closed", exc_info=True)

"""The tag `stop`, put on a run in the W&B web interface, stops it politely.

In: an online W&B run, and the run folder. Out: the file `STOP` in it, which rank 0 looks at and all ranks agree on; the tag is asked
for in a thread of its own, at most once a minute, so that an answer that is late, wrong or never comes is not the run's. A tag that is
there when an attempt begins is removed: this start is asked for.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import wandb

TAG = "stop"
STOP_FILE = "STOP"
"""In the run folder; see `RunFolder.stop_file`."""
LOOK_SECONDS = 60.0
TIMEOUT_SECONDS = 20
"""Of one request."""


def watch_stop_tag(
    tracked: "wandb.Run",
    folder: Path,
    say: Callable[[str], None],
    open_api: Callable[[], Any] = lambda: wandb.Api(timeout=TIMEOUT_SECONDS),
    look_seconds: float = LOOK_SECONDS,
) -> threading.Thread:
    """Begin to look for the tag; never blocks, never raises. The thread ends with the process, or when it has seen the tag.

    tracked: the run as this process writes it; open_api: W&B's public API, which reads what others wrote.
    """
    thread = threading.Thread(target=_watch, args=(tracked, folder, say, open_api, look_seconds), name="stop tag", daemon=True)
    thread.start()
    return thread


def _watch(tracked: "wandb.Run", folder: Path, say: Callable[[str], None], open_api: Callable[[], Any], look_seconds: float) -> None:
    api = None
    is_old = True
    while True:
        with suppress(Exception):
            api = api or open_api()
            api.flush()  # it keeps what it has read
            tags = api.run(tracked.path).tags
            if TAG in tags and not is_old:
                (folder / STOP_FILE).write_text(f"the tag {TAG} of the W&B run\n")
                say(f"the run has the tag {TAG} in W&B: stopping after the step that is running, then saving")
                return
            if TAG in tags:
                _remove(tracked, api)
            is_old = False
        time.sleep(look_seconds)


def _remove(tracked: "wandb.Run", api: Any) -> None:
    """Take the tag away from the server's run, and from what this process sends of it: it would bring the tag back."""
    tracked.tags = tuple(tag for tag in tracked.tags or () if tag != TAG)
    run = api.run(tracked.path)
    run.tags = [tag for tag in run.tags if tag != TAG]
    run.update()

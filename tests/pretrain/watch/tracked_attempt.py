"""One attempt of a run that only writes rows, with the genuine W&B client, in a process that ends as a rank does.

    python -m tests.pretrain.watch.tracked_attempt FOLDER JSON

In: `attempt`, `first` and `last` step, what `config` differs in, `limits` (constants of the tracking to shorten), `pause_at`: a step behind
which it makes the file `paused` and waits until it is gone; `killed`: whether it ends by SIGKILL, behind its last step. Out: the rows, as
training would write them; a line of JSON with the seconds that calls took: `start`, `end`, of rows the `longest` and the sum of `cpu`.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from configs.loader import load_config
from pretrain.watch import tracking, wandb_run
from pretrain.watch.metrics import METRICS_FILE, MetricsLog, cut_back

ATTEMPT_SECONDS = 120
"""Longer than any test waits."""


def main() -> None:
    signal.alarm(ATTEMPT_SECONDS)
    folder, asked = Path(sys.argv[1]), json.loads(sys.argv[2])
    for name, value in asked.get("limits", {}).items():
        setattr(tracking if hasattr(tracking, name) else wandb_run, name, value)
    config, first, last = load_config(folder / "run.yaml"), asked["first"], asked["last"]
    # The client shows a program's arguments, so a secret is named there only.
    more = {key: os.path.expandvars(value) for key, value in asked.get("row", {}).items()}
    said: list[str] = []
    cut_back(folder / METRICS_FILE, first - 1)
    log = MetricsLog(folder / METRICS_FILE)
    began = time.perf_counter()
    tracker = tracking.start_tracking(config, folder, asked["attempt"], first - 1, said.append)
    seconds = {"start": time.perf_counter() - began, "longest": 0.0, "cpu": 0.0}
    for step in range(first, last + 1):
        row = {"step": step, "tokens_seen": 10 * step, "attempt": asked["attempt"], "loss": 1 / step, **more}
        log.write(row)
        began, began_cpu = time.perf_counter(), time.thread_time()
        tracking.track(tracker, row)
        seconds["cpu"] += time.thread_time() - began_cpu
        seconds["longest"] = max(seconds["longest"], time.perf_counter() - began)
        if step == asked.get("pause_at"):
            (folder / "paused").touch()
            while (folder / "paused").exists():
                time.sleep(0.02)
        time.sleep(asked.get("step_seconds", 0.0))
    if asked.get("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.perf_counter()
    tracking.end_tracking(tracker, failed=False)
    print(json.dumps({**seconds, "end": time.perf_counter() - began, "said": said}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()

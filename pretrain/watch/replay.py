"""`metrics.jsonl`, shown to Weights & Biases after the fact: what an outage, a full queue or an air-gapped cluster kept from it.

In: a run folder that nobody writes to. Out: the run of its id on the server, with every row that it lacked; or one fresh offline folder
with each row once. Rows have a name (`attempt`, `row`: their number in the file), so what the server has is not sent again, and a call
that was interrupted is finished by the next one.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import wandb

from configs.errors import UserError
from configs.redaction import redact
from configs.schema import RunConfig
from pretrain.watch.artifacts import log_checkpoints, log_description
from pretrain.watch.metrics import METRICS_FILE, read_rows
from pretrain.watch.wandb_run import has_api_key, open_run, run_id, set_up, without_secrets

PAGE_STEPS = 1000
REQUEST_SECONDS = 60.0
ASK_SECONDS, ASK_AGAIN = 20.0, 2
"""Of a server that does not answer a person's `sync`."""
INSPECT_SECONDS = 300
SYNC_SECONDS = 3600
"""Until the client gives up sending; Ctrl-C is earlier."""
SAY_ROWS = 10_000
HISTORY = """
query RunHistoryPage($entity: String, $project: String!, $run: String!, $minStep: Int64!, $maxStep: Int64!, $pageSize: Int!) {
  project(name: $project, entityName: $entity) {
    run(name: $run) {
      historyKeys
      history(minStep: $minStep, maxStep: $maxStep, samples: $pageSize)
    }
  }
}
"""
"""A page as long as the range of its steps is never a sample. (The client's `scan_history` reads the server's export, and fails where that
has not been made yet.)"""


class Replayed(NamedTuple):
    """What a call did."""

    num_rows: int
    """Of `metrics.jsonl`."""
    num_sent: int
    num_missing: int
    """What the server does not show even so."""
    place: str
    """Its address, or the offline folder."""


def sync_online(config: RunConfig, folder: Path, say: Callable[[str], None]) -> Replayed:
    """Send the rows that the server lacks. Raises UserError where it cannot be asked."""
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if not has_api_key():
        raise UserError(f"no API key for {server} is configured: `wandb login`, or set WANDB_API_KEY, or write --offline for later.")
    rows = read_rows(folder / METRICS_FILE)
    set_up(wandb.Settings(silent=True, x_graphql_retry_max=ASK_AGAIN, x_graphql_timeout_seconds=ASK_SECONDS))  # a person waits
    try:
        history = list(read_history(config, folder))
        missing = missing_rows(rows, history)
        place = server
        if missing:
            place = _send(config, folder, "online", missing, say)
            say("asking the server what it has now")
            history = list(read_history(config, folder))
        left = len(missing_rows(rows, history))
    except UserError:
        raise
    except Exception as error:  # the client's own classes, by kind of trouble
        raise UserError(f"{server}: {_line(error)}. What is there stays; the same command goes on.") from None
    return Replayed(len(rows), sum("row" in row for row in missing), left, place)


def write_offline(config: RunConfig, folder: Path, say: Callable[[str], None]) -> Replayed:
    """Write one fresh offline folder with each row once. Raises UserError where it cannot be written."""
    rows = read_rows(folder / METRICS_FILE)
    try:
        place = _send(config, folder, "offline", missing_rows(rows, []), say)
    except Exception as error:
        raise UserError(f"{folder / 'wandb'}: {_line(error)}.") from None
    return Replayed(len(rows), len(rows), 0, place)


def missing_rows(rows: list[dict[str, Any]], history: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is to be sent, in order: rows that `history` lacks, and in front of an attempt's first one where it began.

    rows: of `metrics.jsonl`, where each number counts once; history: what the server has.
    """
    there: set[tuple[int, int]] = set()
    begun: set[int] = set()
    for row in history:
        if "row" in row:
            there.add((row["attempt"], row["row"]))
        elif "segment/attempt" in row:
            begun.add(row["segment/attempt"])
    missing: list[dict[str, Any]] = []
    last_step = 0
    for number, row in enumerate(rows):
        attempt = row["attempt"]
        if attempt not in begun:  # no row between that step and this one is older: it would have been kept
            begun.add(attempt)
            missing.append({"step": last_step, "attempt": attempt, "segment/attempt": attempt, "segment/from_step": last_step})
        if (attempt, number) not in there:
            missing.append({**row, "row": number})
        last_step = row["step"]
    return missing


def read_history(config: RunConfig, folder: Path) -> Iterator[dict[str, Any]]:
    """All rows that the server has of this run, by W&B's own step; none where it does not know the run."""
    api = wandb.Api(timeout=int(REQUEST_SECONDS))
    asked = {"entity": config.watch.wandb_entity or api.default_entity, "project": config.watch.wandb_project, "run": run_id(folder)}
    first, last = 0, 0
    while first <= last:
        page = {"minStep": first, "maxStep": first + PAGE_STEPS, "pageSize": PAGE_STEPS}
        # The class that has carried every request of the client's since 0.2x; it has no public name.
        answer = api._service_api.execute_graphql(HISTORY, asked | page, timeout=REQUEST_SECONDS)  # pyright: ignore[reportPrivateUsage]
        run = (answer.get("project") or {}).get("run")
        if run is None:
            return
        last = (run.get("historyKeys") or {}).get("lastStep", -1)
        yield from map(json.loads, run["history"])
        first += PAGE_STEPS


def read_offline(folder: Path) -> Iterator[dict[str, Any]]:
    """All rows that the client has written into its own files in the run folder, read with its own tool."""
    for place in sorted([*(folder / "wandb").glob("run-*-*"), *(folder / "wandb").glob("offline-run-*")]):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSPECT_SECONDS, check=False)
        for line in done.stdout.splitlines():
            if '"type":"history"' in line:
                yield json.loads(line)["history"]["item"]


def _send(config: RunConfig, folder: Path, mode: Any, rows: list[dict[str, Any]], say: Callable[[str], None]) -> str:
    """Returns where it is now."""
    run = open_run(config, folder, mode, finish_seconds=SYNC_SECONDS)
    try:
        for number, row in enumerate(rows, start=1):
            run.log(without_secrets(row))
            if number % SAY_ROWS == 0:
                say(f"{number:,} of {len(rows):,} rows are handed to the client")
        log_description(run, config, folder)
        log_checkpoints(run, config, folder, set())
        place = (run.url or "") if mode == "online" else str(Path(run.dir).parent)
        if mode == "online":
            say(f"sending {len(rows):,} rows to {place}; Ctrl-C leaves what is there, the same command goes on")
        run.finish()
    except BaseException:
        wandb.teardown(1)
        raise
    return place


def _line(error: Exception) -> str:
    return redact((str(error).strip().splitlines() or [type(error).__name__])[0]).rstrip(".")

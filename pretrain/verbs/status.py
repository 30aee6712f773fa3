"""The verbs `status` and `stop`: how runs stand, wherever they run, and their polite end.

In: run folders. Out: a line for each run, once or again and again, or as JSON; a run that was told to stop, and has. How a run stands is
found out in `standing.py`; nothing of it is changed by looking.
"""

import contextlib
import json
import os
import select
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch import kubernetes, queue
from pretrain.verbs.arguments import AsJson, RunArgument, find_run, say
from pretrain.verbs.standing import RUNNING, Memory, ask_jobs, configuration_of, describe, describe_all, launches_of

if TYPE_CHECKING:
    from rich.text import Text

    from pretrain.page import Page
    from pretrain.run.folder import RunFolder

RUNS = Path("runs")
LOOK_SECONDS, SAY_SECONDS = 1.0, 10.0
WATCH_SECONDS, JOBS_SECONDS = 2.0, 10.0
"""Between two looks at runs that are watched, and between two questions to Slurm."""
COLUMNS = ("run", "state", "step", "tokens", "loss", "tok/s", "left", "commit", "tries", "goodput", "why")
GAP = "  "
WHY_COLUMNS = 24
"""Where there is less room for the last column, it stands below."""
STYLES = {"done": "green", "failed": "red", "vanished": "red", "unreadable": "red", "stalled": "yellow", "preempted": "yellow"}

Runs = Annotated[
    list[str] | None, typer.Argument(metavar="[RUN]...", help="Run folders, names below runs/, or run files; else all below runs/.")
]


def status(
    runs: Runs = None,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every 2 s, until q or Ctrl-C.")] = False,
) -> None:
    """Print how runs stand: state, step, tokens, loss, speed, time left, last commit and its age, attempts, goodput, jobs.

    A state is running, saving, evaluating, stalled (nothing has changed for a minute and three steps), queued, stopped, preempted, done,
    failed, vanished or not begun. Goodput is the share of the time since the beginning that steps took which were not lost.

    Example: pretrain status runs/demo --json

    All runs, again and again: pretrain status --watch
    """
    from pretrain.page import open_page

    def find_them() -> list["RunFolder"]:
        return [find(text) for text in runs] if runs else find_all(RUNS)

    if watch:
        with contextlib.suppress(KeyboardInterrupt):  # that is how it ends
            _watch(find_them, _print_lines if as_json else None)
        return
    rows = describe_all(find_them())
    if as_json:
        typer.echo(json.dumps(rows))
    elif rows:
        _print_table(rows, open_page())
    else:
        say(f"{RUNS}/ holds no run.")


def stop(
    run: RunArgument,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Until it has stopped; else only tell it to.")] = True,
) -> None:
    """End a run politely, wherever it runs: the step that is running ends, the state is saved, and no job goes on with it.

    A job that waits in Slurm's queue is cancelled, and so is the rest of a chain; what Kubernetes would make pods of again is deleted,
    by kubectl. To go on, start the run again.

    Example: pretrain stop runs/demo
    """
    folder = find(run)
    row = describe(folder)
    waiting = [job["number"] for job in row["jobs"] if job["waits"]]
    deleted = _delete_pods(folder) if row["state"] != "done" else None
    if deleted is not None:
        say(deleted or "Kubernetes has nothing of this launch.")
    elif row["state"] in RUNNING:
        folder.stop_file.touch()  # first: a job that ends now does not go back into the queue
        say(f"{folder.stop_file} is made; the run stops after the step that is running, and is saved.")
    if waiting:
        queue.cancel(waiting)
        say(f"job {', '.join(waiting)} had not begun and is cancelled.")
    if row["state"] not in RUNNING:
        say(f"{folder.path} is not running ({_state_of(row)})." + ("" if waiting else " There is nothing to stop."))
    elif wait:
        row = _wait_for_the_end(folder, by_file=deleted is None)
        say(f"{folder.path}: {_state_of(row)}; step {row['committed']:,} of {row['total_steps']:,} is committed.")


def _delete_pods(folder: "RunFolder") -> str | None:
    """What Kubernetes says of the newest launch's end, or None where the run is not there."""
    launches = launches_of(folder)
    return kubernetes.delete(launches[-1].parent) if launches else None


def _wait_for_the_end(folder: "RunFolder", by_file: bool) -> dict[str, Any]:
    """Until nothing of the run is running. Returns how it stands then. by_file: it was told by the file STOP."""
    began = told = time.monotonic()
    while (row := describe(folder))["state"] in RUNNING:
        if by_file and not folder.stop_file.exists():  # a start removes one that is there, and this one had just begun
            folder.stop_file.touch()
        if time.monotonic() - told > SAY_SECONDS:
            told = time.monotonic()
            say(f"still running, at step {row['step']:,} ({told - began:.0f} s); Ctrl-C ends the waiting only")
        time.sleep(LOOK_SECONDS)
    return row


def find(text: str) -> "RunFolder":
    """A run that has begun, or that was launched and is still to begin. Raises UserError."""
    from configs.loader import load_config
    from pretrain.run.folder import RunFolder

    path = Path(text)
    if path.suffix in (".yaml", ".yml"):
        folder = RunFolder.of(load_config(path))
    else:
        folder = RunFolder((path if path.exists() or len(path.parts) > 1 else RUNS / text).resolve())
    return folder if configuration_of(folder) is not None else find_run(text)


def find_all(root: Path) -> list["RunFolder"]:
    """All runs below a folder, by their names."""
    from pretrain.run.folder import RunFolder

    folders = [RunFolder(path.resolve()) for path in sorted(root.glob("*")) if path.is_dir()]
    return [folder for folder in folders if configuration_of(folder) is not None]


# --- the table ---------------------------------------------------------------------------------------------


def _print_table(rows: Sequence[dict[str, Any]], page: "Page") -> None:
    if page.is_plain:
        for line in tabulate(rows):
            page.say(line.plain)
    else:
        for line in tabulate(rows, page.console.width):
            page.console.print(line)


def tabulate(rows: Sequence[dict[str, Any]], width: int | None = None) -> list["Text"]:
    """A line for each row, below one of headers. width: columns that there are; None: as many as are needed.

    Columns without any value are left out. Why a run stands as it does stands in its line, or below the table where it is too narrow.
    """
    from rich.text import Text

    cells = [_cells(row) for row in rows]
    used = [column for column in range(len(COLUMNS)) if column < 2 or any(line[column] for line in cells)]
    table = [[line[column] for column in used] for line in (COLUMNS, *cells)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    is_number = [all(line[column][:1] in "0123456789<" for line in table[1:]) for column in range(len(used))]
    has_why = used[-1] == len(COLUMNS) - 1
    is_below = has_why and width is not None and width - sum(widths[:-1]) - len(GAP) * len(widths[:-1]) < min(WHY_COLUMNS, widths[-1])
    lines: list[Text] = []
    for number, line in enumerate(table):
        shown = [cell.rjust(size) if right else cell.ljust(size) for cell, size, right in zip(line, widths, is_number, strict=True)]
        text = Text(GAP.join(shown[:-1] if is_below else shown).rstrip(), no_wrap=True, overflow="ellipsis")
        start = widths[0] + len(GAP)
        text.stylize(
            "bold" if number == 0 else STYLES.get(line[1].split()[0], ""), *((0, None) if number == 0 else (start, start + widths[1]))
        )
        lines.append(text)
    if is_below:
        lines += [Text(f"{line[0]}: {line[-1]}", overflow="fold") for line in table[1:] if line[-1]]
    if width is not None:
        for text in lines[: len(table)]:
            text.truncate(width, overflow="ellipsis")
    return lines


def _cells(row: dict[str, Any]) -> list[str]:
    """A line of the table."""
    from pretrain.page import make_visible
    from pretrain.watch.spelling import spell_count, spell_span

    def cell(key: str, spell: Callable[[Any], str]) -> str:
        return "" if row[key] is None else spell(row[key])

    total = f"/{spell_count(row['total_tokens'])}" if row["total_tokens"] else ""
    ago = cell("committed_seconds_ago", lambda seconds: f" ({spell_span(seconds)})")
    jobs = [f"job {job['number']} {job['state'].lower()}" for job in row["jobs"] if job["number"] not in (row["why"] or "")]
    return [
        make_visible(Path(row["run"]).name),
        row["state"] + cell("stalled_seconds", lambda seconds: f" {spell_span(seconds)}"),
        cell("step", "{:,}".format),
        cell("tokens", lambda tokens: spell_count(tokens) + total),
        cell("loss", "{:.3f}".format),
        cell("tokens_per_second", spell_count) if row["state"] in RUNNING else "",
        cell("seconds_left", spell_span),
        cell("committed", lambda step: f"{step:,}{ago}"),
        cell("attempts", str),
        cell("goodput", lambda share: f"{100 * share:.0f} %"),
        make_visible(", ".join(filter(None, [row["why"], *jobs]))),
    ]


def _state_of(row: dict[str, Any]) -> str:
    return row["state"] + (f": {row['why']}" if row["why"] else "")


# --- again and again ---------------------------------------------------------------------------------------


def _print_lines(rows: Sequence[dict[str, Any]]) -> None:
    """An object a line, of a run at a time."""
    for row in rows:
        typer.echo(json.dumps({"time": time.time(), **row}))


def _watch(find_them: Callable[[], list["RunFolder"]], tell: Callable[[Sequence[dict[str, Any]]], None] | None) -> None:
    """Look every `WATCH_SECONDS`, until q is pressed. tell: what is done with the rows; None: they are drawn, in place in a terminal."""
    from rich.live import Live

    from pretrain.page import open_page

    page, memory = open_page(), Memory()
    jobs, asked = dict[str, queue.Job](), float("-inf")
    with contextlib.ExitStack() as stack:
        if tell is None and page.is_plain:
            tell = lambda rows: _print_table(rows, page)  # noqa: E731
        live = None if tell else stack.enter_context(Live(console=page.console, screen=True, auto_refresh=False))
        is_q_pressed = stack.enter_context(_read_keys())
        while True:
            folders = find_them()
            if time.monotonic() - asked >= JOBS_SECONDS:
                jobs, asked = ask_jobs(folders), time.monotonic()
            rows = describe_all(folders, jobs, memory)
            if live is not None:
                live.update(_picture(rows, page.console.width), refresh=True)
            elif tell is not None:
                tell(rows)
            if is_q_pressed(WATCH_SECONDS) or (live is not None and not sys.stdout.isatty()):  # which was there, and is closed
                return


def _picture(rows: Sequence[dict[str, Any]], width: int) -> Any:
    from rich.console import Group
    from rich.text import Text

    lines = tabulate(rows, width) if rows else [Text(f"{RUNS}/ holds no run.")]
    return Group(*lines, Text(f"\n{time.strftime('%H:%M:%S')}   q ends this", style="dim"))


@contextlib.contextmanager
def _read_keys() -> Generator[Callable[[float], bool], None, None]:
    """A function that waits so many seconds, or until q is pressed, and says which; keys are read one by one meanwhile."""
    import termios
    import tty

    try:
        keyboard = sys.stdin.fileno()
        is_ours = sys.stdin.isatty() and sys.stdout.isatty() and os.tcgetpgrp(keyboard) == os.getpgrp()
    except (OSError, ValueError, AttributeError):  # closed, or no file
        keyboard, is_ours = -1, False
    if not is_ours:
        yield lambda seconds: time.sleep(seconds) is not None
        return
    before = termios.tcgetattr(keyboard)

    def is_q_pressed(seconds: float) -> bool:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if select.select([keyboard], [], [], left)[0]:
                keys = os.read(keyboard, 64)
                if not keys or b"q" in keys.lower():
                    return True
        return False

    try:
        tty.setcbreak(keyboard)
        yield is_q_pressed
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)

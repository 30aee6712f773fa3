"""`pretrain data build` as a person sees it: a bar while Ray works, then what came out.

In: the `data` section of a run file. Out: the dataset it describes, and a few lines in the terminal.
"""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from configs.schema import DataSection
from data_pipeline import build


def build_with_progress(data: DataSection, say: Callable[[str], Any]) -> None:
    """Build a dataset with a bar in a terminal, and say what came out."""
    began = time.monotonic()
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"), TimeElapsedColumn()
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    with bar:
        tasks: dict[str, Any] = {}

        def report(progress: build.Progress) -> None:
            if progress.stage not in tasks:
                tasks[progress.stage] = bar.add_task(progress.stage, total=progress.total)
                if not console.is_terminal:
                    say(f"{progress.stage} ...")
            bar.update(tasks[progress.stage], completed=progress.done, total=progress.total)

        result = build.build_dataset(data, report)
    manifest = result.manifest
    total = manifest.total("train") + manifest.total("held_out")
    if result.outcome == "unchanged":
        say(f"{data.folder()} is built from this input already: nothing to do.")
    elif result.num_units_kept:
        say(f"{result.num_units_kept} of {result.num_units} work units were there from an earlier start.")
    if quarantined := manifest.documents.quarantined:
        reasons = ", ".join(f"{count} {reason}" for reason, count in quarantined.items())
        say(
            f"{sum(quarantined.values())} of {manifest.documents.read} documents were left out ({reasons}); "
            "units/*/quarantine.jsonl names each."
        )
    if result.skipped:
        say(
            "files passed over, by suffix: "
            + ", ".join(f"{count} {suffix or '(none)'}" for suffix, count in sorted(result.skipped.items())[:12])
        )
    say(
        f"{data.folder()}: {total.num_documents:,} documents, {total.num_bytes:,} bytes, {total.num_tokens:,} tokens "
        f"({total.num_bytes / max(1, total.num_tokens):.2f} bytes per token), {time.monotonic() - began:.0f} s"
    )

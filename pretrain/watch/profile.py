"""A trace of some steps of the loop, and where their time and memory went.

In: the section `profile` of a run file, and from the loop where each step begins and ends. Out, of each rank that was chosen, in
`RUN/profile/attempt-N/steps-A-B/`: `rank-R.json.gz` (a Chrome trace), `rank-R.md` and `rank-R.json` (where a step goes, see
`breakdown.py`), and on a GPU `rank-R-memory.pickle` (a snapshot of its memory, with what was taken and given back in these steps).

Outside its steps there is no profiler; what a profiler cannot do is a warning, never the end of the run.
"""

import gzip
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

import torch

from configs.watch_section import ProfileSection
from pretrain.engine.parallel import Layout
from pretrain.watch.breakdown import STEP_SPAN, break_down, read_events, summarize, to_markdown

PROFILE_FOLDER = "profile"
"""Its name in the run folder."""


class Profile:
    """Traces the steps that were chosen, on the ranks that were chosen. Use as a context manager around the loop: an attempt that ends
    before its last traced step leaves what there is of them."""

    def __init__(self, section: ProfileSection, run: Path, attempt: int, layout: Layout, say: Callable[[str], None]) -> None:
        """run: the run folder. say: what rank 0 says goes there."""
        self._section, self._layout, self._say = section, layout, say
        self._attempt_folder = run / PROFILE_FOLDER / f"attempt-{attempt}"
        self._steps = None if section.steps is None else range(section.steps[0], section.steps[1] + 1)
        self._profiler: torch.profiler.profile | None = None
        self._span: ExitStack | None = None
        self._traced: list[int] = []

    def begin(self, step: int) -> None:
        """A step begins. The one before the first that is traced, where there is one, warms the profiler up."""
        if self._steps is None or not self._steps.start - 1 <= step < self._steps.stop:
            return
        if self._layout.rank not in self._section.ranks:
            return
        with self._only_warning():
            if self._profiler is None:
                self._prepare()
            if step in self._steps:
                if not self._traced:
                    self._start()
                self._span = ExitStack()
                self._span.enter_context(torch.profiler.record_function(STEP_SPAN.format(step)))
                self._traced.append(step)

    def end(self, step: int) -> None:
        """A step has ended; behind the last one all is written, for which training waits."""
        if self._steps is None or step != self._steps[-1]:
            self._end_span()
        else:
            self._finish()
            if self._layout.rank == 0 and self._layout.rank not in self._section.ranks:
                self._say(self._tell_of_others())

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._finish()

    def _prepare(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it tells the terminal when it starts and when it stops
        with_memory = self._section.memory
        # Not `acc_events`: it would make Python objects of all events at once, which takes a minute for some hundred thousand.
        self._profiler = torch.profiler.profile(record_shapes=with_memory, profile_memory=with_memory)
        self._profiler.prepare_trace()

    def _start(self) -> None:
        assert self._profiler is not None
        if self._layout.device.type == "cuda":
            torch.cuda.synchronize(self._layout.device)  # what was started before these steps is none of theirs
            if self._section.memory:
                torch.cuda.memory._record_memory_history(stacks="python")  # pyright: ignore[reportPrivateUsage]
        self._profiler.start_trace()

    def _end_span(self) -> None:
        if self._span is not None:
            self._span.close()
            self._span = None

    def _finish(self) -> None:
        """Stop, and write what there is."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        with self._only_warning():
            if self._traced and self._layout.device.type == "cuda":
                torch.cuda.synchronize(self._layout.device)
            self._end_span()
            if not self._traced:  # there is no other end of a warm-up
                profiler.start_trace()
            profiler.stop_trace()
            if self._traced:
                self._write(profiler, self._traced)
        if self._layout.device.type == "cuda":
            with suppress(Exception):
                torch.cuda.memory._record_memory_history(enabled=None)  # pyright: ignore[reportPrivateUsage]

    def _write(self, profiler: torch.profiler.profile, traced: list[int]) -> None:
        """All files of this rank, or none."""
        first, last, rank = traced[0], traced[-1], self._layout.rank
        folder = self._attempt_folder / f"steps-{first}-{last}"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".rank-{rank}-", dir=folder) as temporary:
            unfinished = Path(temporary)
            if self._layout.device.type == "cuda" and self._section.memory:
                torch.cuda.memory._dump_snapshot(str(unfinished / f"rank-{rank}-memory.pickle"))  # pyright: ignore[reportPrivateUsage]
            plain = unfinished / "trace.json"
            profiler.export_chrome_trace(str(plain))
            found = break_down(read_events(plain))  # a disk that is full raises nothing before: the trace is not whole
            with plain.open("rb") as trace, gzip.open(unfinished / f"rank-{rank}.json.gz", "wb", compresslevel=5) as packed:
                shutil.copyfileobj(trace, packed)
            plain.unlink()
            (unfinished / f"rank-{rank}.json").write_text(json.dumps(found.to_json(), indent=1))
            (unfinished / f"rank-{rank}.md").write_text(to_markdown(found, f"Steps {first} to {last} on rank {rank}"))
            for path in unfinished.iterdir():
                path.replace(folder / path.name)
        if rank == 0:
            self._say(f"steps {first} to {last}: {summarize(found)}; {folder / f'rank-{rank}.md'}")

    def _tell_of_others(self) -> str:
        size = self._layout.world_size
        ranks = ", ".join(str(rank) for rank in self._section.ranks if rank < size)
        if not ranks:
            return f"WARNING: nothing was traced: profile.ranks is {list(self._section.ranks)}, and there are {size} (0 to {size - 1})."
        return f"steps {self._steps[0]} to {self._steps[-1]} were traced on rank {ranks}; {self._attempt_folder}" if self._steps else ""

    @contextmanager
    def _only_warning(self) -> Generator[None]:
        """What goes wrong in here ends the tracing, not the run."""
        try:
            yield
        except Exception as error:  # of CUPTI, of the disk, of a trace that is not whole
            self._steps = self._profiler = self._span = None
            warning = f"WARNING: the profile of rank {self._layout.rank} could not be made ({error}). Training goes on."
            if self._layout.rank == 0:
                self._say(warning)
                return
            with suppress(OSError):
                print(warning, file=sys.stderr, flush=True)

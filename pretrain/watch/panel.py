"""How a training looks in a terminal: a panel with its progress, loss, speed, memory, last checkpoint and state.

In: what is known of it at this moment. Out: what rich draws, in as many lines as the width asks for. Nothing is printed here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pretrain.watch.spelling import draw_trend, spell_bytes, spell_count, spell_span

WIDEST = 100
"""Columns of the panel at most."""
TREND_VALUES = 24
"""Losses in the trend."""
GAP = "   "
STATES = {
    "start": "starting",
    "first_step": "first step",
    "step": "training",
    "evaluate": "evaluating",
    "score": "evaluating",
    "save": "saving",
    "end": "ending",
}
"""What a phase of the loop is called."""


@dataclass(frozen=True)
class Standing:
    """What is known of a training at one moment. None: not known, and not shown."""

    name: str
    attempt: int
    phase: str
    step: int
    total_steps: int
    tokens: int
    total_tokens: int
    losses: tuple[float, ...] = ()
    """Logged ones, the newest last, in nats per token."""
    seconds_left: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    """A share of the devices' peak."""
    memory_bytes: float | None = None
    """Of rank 0's device; without one, of its process."""
    saved_step: int | None = None
    saved_seconds_ago: float | None = None
    """None: it was there before this attempt began."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it, `WIDEST` columns wide or as wide as there is room."""
        width = min(WIDEST, options.max_width)
        room = width - 4  # the border, and a blank on each side
        rows = Table.grid()
        for line in (*self._progress(room), *_flow(self._facts(can_draw=not options.ascii_only), room)):
            rows.add_row(line)
        title = Text(f"{self.name} · attempt {self.attempt} · {STATES.get(self.phase, self.phase)}", no_wrap=True, overflow="ellipsis")
        yield Panel(rows, title=title, title_align="left", width=width)

    def _progress(self, room: int) -> Iterator[ProgressBar | Text]:
        yield ProgressBar(total=max(1, self.total_tokens), completed=self.tokens, width=room)
        share = f"{100 * self.tokens / max(1, self.total_tokens):.1f} %"
        left = f"{spell_span(self.seconds_left)} left" if self.seconds_left is not None else ""
        yield from _flow([share, f"{spell_count(self.tokens)} of {spell_count(self.total_tokens)} tokens", left], room)

    def _facts(self, can_draw: bool) -> list[str]:
        trend = draw_trend(self.losses[-TREND_VALUES:]) if can_draw and len(self.losses) > 1 else ""
        ago = f", {spell_span(self.saved_seconds_ago)} ago" if self.saved_seconds_ago is not None else ""
        return [
            f"step {self.step:,}/{self.total_steps:,}",
            f"loss {self.losses[-1]:.3f}" + (f" {trend}" if trend else "") if self.losses else "",
            f"{spell_count(self.tokens_per_second)} tokens/s" if self.tokens_per_second is not None else "",
            f"MFU {100 * self.mfu:.1f} %" if self.mfu is not None else "",
            f"memory {spell_bytes(self.memory_bytes)}" if self.memory_bytes is not None else "",
            f"checkpoint {self.saved_step:,}{ago}" if self.saved_step is not None else "no checkpoint yet",
        ]


def _flow(facts: Sequence[str], room: int) -> list[Text]:
    """The facts that there are, side by side in as many lines as they need; none is broken, one that is wider than the room is cut."""
    lines: list[str] = []
    for fact in filter(None, facts):
        if lines and cell_len(lines[-1] + GAP + fact) <= room:
            lines[-1] += GAP + fact
        else:
            lines.append(fact)
    return [Text(line, no_wrap=True, overflow="ellipsis") for line in lines]

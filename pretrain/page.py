"""Where the text of a verb goes, and how words and numbers are written there.

In: text, rows, numbers. Out: tables and colours in a terminal, plain lines elsewhere; text that obeys no control character.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unicodedata import category

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

LINE_SECONDS = 30  # between two lines of a stage, where there is no terminal


@dataclass(frozen=True)
class Page:
    """Where text goes: tables and colours to `console` if that is a terminal, plain lines to `say` if not."""

    console: Console
    say: Callable[[str], Any]

    @property
    def is_plain(self) -> bool:
        """Whether nobody sees bars and colours."""
        return not self.console.is_terminal or self.console.is_dumb_terminal

    @property
    def has_colours(self) -> bool:
        """Whether backgrounds can be told apart."""
        return not self.is_plain and self.console.color_system is not None and not self.console.no_color

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Rows of text under headers; columns of numbers are aligned to the right."""
        numeric = [all(row[column][:1] in "0123456789<-" for row in rows) for column in range(len(headers))]
        if self.is_plain:
            widths = [max(map(len, cells)) for cells in zip(headers, *rows, strict=True)]
            for row in (headers, *rows):
                cells = zip(row, widths, numeric, strict=True)
                self.say("  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells).rstrip())
            return
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for header, right in zip(headers, numeric, strict=True):
            table.add_column(Text(header), justify="right" if right else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        self.console.print(table)


def open_page() -> Page:
    """Standard output, as a page."""
    return Page(Console(), print)


# --- words and numbers --------------------------------------------------------------------------------------


def make_visible(text: str) -> str:
    """Text with every control character shown instead of obeyed: ␊ for a new line, ␛ for an escape, \\u202e, ..."""
    return "".join(_show_letter(letter) if category(letter)[0] == "C" or category(letter) in ("Zl", "Zp") else letter for letter in text)


def _show_letter(letter: str) -> str:
    if ord(letter) < 0x20:
        return chr(0x2400 + ord(letter))
    return letter.encode("unicode_escape").decode("ascii")


def spell_megabytes(num_bytes: int) -> str:
    """Without the unit."""
    return f"{num_bytes / 1e6:,.1f}" if num_bytes >= 1e7 else f"{num_bytes / 1e6:.3f}"


def spell_rate(value: float) -> str:
    """A number per second, without the unit."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 else "<0.001"


def spell_duration(seconds: float) -> str:
    """With the unit that says enough."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours} h {rest} min"

"""What a page is made of, and how it becomes HTML: one file, no network, no script.

In: sections of figures, tables and texts, as plain values. Out: HTML, by the template `report.html` and the style `report.css`. Text is
never markup: all of it passes `show_text`, which hides secrets and makes control characters visible, and is escaped by the template.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from configs.redaction import SHORTEST_SECRET, redact
from pretrain.page import make_visible

GENERATOR = "pretrain report"
"""By which a file is known to be one of these pages."""


class Figure(NamedTuple):
    """A picture with its legend, and its numbers as a table."""

    title: str
    unit: str
    svg: Any
    legend: Sequence[tuple[str, str]] = ()
    """Names and colours."""
    note: str = ""
    headers: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    is_bar: bool = False


class Table(NamedTuple):
    """Rows of text under headers."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


class Text(NamedTuple):
    """Text as it is, which is opened to be read."""

    title: str
    text: str
    links: Sequence[tuple[str, str | None]] = ()


class Written(NamedTuple):
    """What a model made of a prompt, the newest text first."""

    prompt: str
    texts: Sequence[tuple[str, str]]
    """When, and what it wrote."""


class Section(NamedTuple):
    """A part of the page."""

    key: str
    title: str
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    texts: Sequence[Text] = ()
    written: Sequence[Written] = ()
    note: str = ""
    lines: Sequence[str] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.figures or self.tables or self.texts or self.written or self.lines)


class Page(NamedTuple):
    """All that the template is given."""

    title: str
    subtitle: str
    state: str
    tiles: Sequence[tuple[str, str, str]]
    """What, its value, and what more is to be said of it."""
    sections: Sequence[Section]
    refresh_seconds: int | None
    generator: str = GENERATOR


def render(page: Page) -> str:
    """Fill the template; every text in it is shown as it is, and escaped."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    here = Path(__file__).parent
    environment = Environment(autoescape=True, finalize=_show, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((here / "report.html").read_text(encoding="utf-8"))
    style = Markup((here / "report.css").read_text(encoding="utf-8"))  # ours, no text of a run
    filled = page._replace(sections=[section for section in page.sections if not section.is_empty])
    return redact(template.render(page=filled, style=style))


def _show(value: Any) -> Any:
    return value if hasattr(value, "__html__") else show_text("" if value is None else str(value))


def show_text(text: str) -> str:
    """Text as it stands in the page: without secrets, every control character but the line's end visible."""
    return "\n".join(map(make_visible, (redact(text) if len(text) >= SHORTEST_SECRET else text).split("\n")))

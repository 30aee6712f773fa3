"""Pictures of a run for its page: curves and stacked bars, as SVG that takes its colours from the page.

In: numbers, as curves by tokens. Out: SVG to stand inside HTML, and the same numbers as rows of a table. matplotlib draws them, because
what it makes needs no script: the page opens anywhere, prints, and changes colours by CSS. (bokeh, plotly and Vega bring 1 to 5 MB of
script for zooming; here values show where the pointer rests, and stand in a table below each plot.)
"""

import io
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import numpy as np
import numpy.typing as npt

from pretrain.watch.report_page import show_text
from pretrain.watch.spelling import spell_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FloatArray = npt.NDArray[np.float64]

MOST_POINTS = 2000
"""Of a curve, drawn: more than a screen has pixels across."""
TREND_POINTS, TREND_STEPS = 100, 10
"""Of the line through a noisy curve: at most so many, each the median of so many points or more."""
TABLE_ROWS = 40
"""Of the table behind a plot."""
BANDS = 80
"""Places across a plot where the pointer finds values."""
NUM_COLOURS = 8
"""The page has so many (`--colour-1` and on); a ninth curve has the first's, dashed."""
BAR_NAME_LETTERS = 16
WIDTH, HEIGHT, BAR_HEIGHT = 560, 300, 34
"""Of a plot and of a bar, in units of its own; the page stretches them to its columns."""
LETTERS = 18
"""The size of letters, in those units, as a phone shows them; on wider columns the page makes them smaller."""
LETTER_WIDTH = 0.57
"""Of a digit, as a share of its size; those of most sans-serif letters are as wide or less."""
SIZES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))

# matplotlib wants colours as it draws and writes them as they were given; the page's variables take their place afterwards.
_TEXT, _RULE, _MARK = "#a1f001", "#a1f002", "#a1f003"
_VARIABLES = {_TEXT: "--soft", _RULE: "--rule", _MARK: "--mark"} | {f"#a1c0{n:02x}": f"--colour-{n}" for n in range(1, 20)}


class Curve(NamedTuple):
    """Values by tokens."""

    name: str
    x: FloatArray
    """Ascending."""
    y: FloatArray
    is_sparse: bool = False
    """Whether its points are few enough to be marked each (evaluations)."""
    trend: tuple[FloatArray, FloatArray] | None = None
    """Of a noisy curve, the line through it."""


class Plot(NamedTuple):
    """A picture, and what has to be said of it."""

    title: str
    unit: str
    curves: Sequence[Curve]
    form: str = ".4g"
    """How a value is written, as in `format`."""
    marks: Sequence[tuple[float, str]] = ()
    """Where something began: tokens, and what it was."""
    steps: tuple[FloatArray, FloatArray] | None = None
    """Tokens and the step at each, where all curves are of one run."""
    note: str = ""
    is_log: bool = False


class Bar(NamedTuple):
    """A bar of parts, which are drawn one after the other in the order of `names` of the picture."""

    name: str
    parts: Sequence[float]


def make_curve(name: str, x: FloatArray, y: FloatArray, is_sparse: bool = False, is_noisy: bool = False) -> Curve | None:
    """A curve of the points that are finite, thinned; None: there are none. is_noisy: with the line through it, of medians."""
    there = np.isfinite(x) & np.isfinite(y)
    x, y = x[there], y[there]
    if not len(x):
        return None
    count, trend = min(TREND_POINTS, len(x) // TREND_STEPS), None
    if is_noisy and count > 5:
        middle_x, middle_y = (np.array([np.median(part) for part in np.array_split(values, count)]) for values in (x, y))
        trend = (middle_x, middle_y)
    return Curve(name, *thin(x, y), is_sparse and len(x) <= BANDS, trend)


def thin(x: FloatArray, y: FloatArray, most: int = MOST_POINTS) -> tuple[FloatArray, FloatArray]:
    """At most `most` points (4 or more): of equal buckets the lowest and the highest, so that a spike of one point stays; and the ends."""
    if len(x) <= most:
        return x, y
    edges = np.linspace(0, len(x), (most - 2) // 2 + 1).astype(np.int64)
    chosen = {0, len(x) - 1}
    for start, end in pairwise(edges):
        chosen |= {int(start + y[start:end].argmin()), int(start + y[start:end].argmax())}
    kept = np.array(sorted(chosen))
    return x[kept], y[kept]


def read_off(plot: Plot, most: int = TABLE_ROWS) -> list[tuple[float, list[float | None]]]:
    """At most `most` places, evenly among the points, with each curve's value there: that of its nearest point, None where none is near."""
    places = np.unique(np.concatenate([curve.x for curve in plot.curves]))
    if len(places) > most:
        places = places[np.linspace(0, len(places) - 1, most).round().astype(np.int64)]
    reach = (places[-1] - places[0]) / max(1, len(places) - 1) / 2
    return [(float(place), [_nearest(curve, float(place), float(reach)) for curve in plot.curves]) for place in places]


def _nearest(curve: Curve, place: float, reach: float) -> float | None:
    right = int(np.searchsorted(curve.x, place))
    near = min((i for i in (right - 1, right) if 0 <= i < len(curve.x)), key=lambda i: abs(curve.x[i] - place))
    return float(curve.y[near]) if abs(curve.x[near] - place) <= reach else None


def spell_value(value: float | None, form: str) -> str:
    """As `form` says; `k`: in few letters, as `spell_count`; nothing for None."""
    if value is None:
        return ""
    return spell_count(value) if form == "k" else format(value, form)


# --- drawing ------------------------------------------------------------------------------------------------


def draw_curves(plot: Plot, key: str) -> str:
    """SVG of a plot. key: of letters, another for every picture of a page."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    with _canvas(HEIGHT) as (figure, axes):
        for number, curve in enumerate(plot.curves):
            style: dict[str, Any] = {"marker": "o", "markersize": 4} if curve.is_sparse or len(curve.x) == 1 else {}
            if curve.trend is not None:
                axes.plot(curve.x, curve.y, color=_colour(number), linewidth=0.8, alpha=0.35)
            x, y = curve.trend or (curve.x, curve.y)
            axes.plot(x, y, color=_colour(number), linewidth=1.6, linestyle=_DASHES[number // NUM_COLOURS % len(_DASHES)], **style)
        for place, _ in plot.marks:
            axes.axvline(place, color=_MARK, linewidth=1, linestyle=(0, (2, 2)), zorder=0)
        low, high = min(curve.y.min() for curve in plot.curves), max(curve.y.max() for curve in plot.curves)
        if plot.is_log and low > 0 and high > 10 * low:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if high < 1000 * low else (1,), numticks=6))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _spell_tick(value, plot.form)))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _spell_tick(value)))
        axes.grid(axis="y", color=_RULE, linewidth=0.7)
        axes.spines[["top", "right", "left"]].set_visible(False)
        return _finish(figure, axes, key, f"{plot.title}, {plot.unit}, by tokens", _bands(plot, axes))


def draw_bars(title: str, names: Sequence[str], bars: Sequence[Bar], key: str) -> str:
    """SVG of bars as long as each other, one below the other, divided into parts. names: of the parts. Colours are those of `names`."""
    height = BAR_HEIGHT * len(bars) + 6
    with _canvas(height) as (figure, axes):
        rectangles: list[tuple[float, float, float, float, str]] = []
        for row, bar in enumerate(bars):
            whole, left = sum(bar.parts) or 1.0, 0.0
            for number, (name, part) in enumerate(zip(names, bar.parts, strict=True)):
                axes.barh(row, part / whole, left=left, height=0.8, color=_colour(number, len(_VARIABLES)), linewidth=0)
                if part > 0:
                    rectangles.append((left, left + part / whole, row - 0.4, row + 0.4, f"{bar.name}: {name} {part / whole:.1%}"))
                left += part / whole
        axes.set(xlim=(0, 1), ylim=(len(bars) - 0.5, -0.5), xticks=[])
        axes.spines[:].set_visible(False)
        axes.set_yticks(range(len(bars)), [_shorten(bar.name) for bar in bars] if len(bars) > 1 else [""])
        return _finish(figure, axes, key, title, rectangles)


def colour_of(number: int, is_bar: bool = False) -> str:
    """The page's colour of the curve, or of the bar's part, with this number from 0 on."""
    return f"var({_VARIABLES[_colour(number, len(_VARIABLES) if is_bar else NUM_COLOURS)]})"


def _shorten(name: str) -> str:
    shown = show_text(name)
    return shown if len(shown) <= BAR_NAME_LETTERS else f"{shown[: BAR_NAME_LETTERS - 1]}…"


def _colour(number: int, count: int = NUM_COLOURS) -> str:
    return f"#a1c0{number % count + 1:02x}"


def _spell_tick(value: float, form: str = "k") -> str:
    if form.endswith("%"):
        return f"{100 * value:.6g} %"
    size, letter = next(((size, letter) for size, letter in SIZES if abs(value) >= max(size, 1e4)), (1.0, ""))  # 9000, 10k
    return f"{value / size:.6g}{letter}"


@contextmanager
def _canvas(height: int) -> Generator[tuple["Figure", "Axes"]]:
    """A figure whose unit is that of the SVG, in the page's colours; no text in it is read as a formula."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    colours = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), _TEXT) | {"axes.edgecolor": _RULE}
    no_ticks = dict.fromkeys(("xtick.major.size", "ytick.major.size", "xtick.minor.size", "ytick.minor.size"), 0)
    settings = {"svg.fonttype": "none", "svg.hashsalt": "page", "text.parse_math": False, "font.size": LETTERS, **colours, **no_ticks}
    with rc_context(settings):  # type: ignore[arg-type]
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
        figure.patch.set_alpha(0)
        axes = figure.add_axes((0, 0, 1, 1))  # `_finish` makes room for labels
        axes.patch.set_alpha(0)
        yield figure, axes


def _bands(plot: Plot, axes: "Axes") -> list[tuple[float, float, float, float, str]]:
    """Upright rectangles that cover a plot, in its own numbers, each with the values that stand in it."""
    rows = read_off(plot, BANDS)
    places = np.array([place for place, _ in rows])
    (left, right), (low, high) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
    borders = [left, *((places[1:] + places[:-1]) / 2), right]
    found: list[tuple[float, float, float, float, str]] = []
    for number, (place, values) in enumerate(rows):
        start, end = float(borders[number]), float(borders[number + 1])
        lines = [f"{spell_count(place)} tokens" + (f", step {_step_at(plot, place):,}" if plot.steps is not None else "")]
        lines += [
            f"{curve.name}: {spell_value(value, plot.form)}" for curve, value in zip(plot.curves, values, strict=True) if value is not None
        ]
        lines += [text for mark, text in plot.marks if start <= mark < end]
        found.append((start, end, low, high, "\n".join(lines)))
    return found


def _step_at(plot: Plot, place: float) -> int:
    assert plot.steps is not None
    return round(float(np.interp(place, *plot.steps)))


def number_rows(plot: Plot) -> Iterator[list[str]]:
    """The table behind a plot: tokens, the step where it is known, a value for each curve."""
    for place, values in read_off(plot):
        step = [f"{_step_at(plot, place):,}"] if plot.steps is not None else []
        yield [f"{place:,.0f}", *step, *(spell_value(value, plot.form) for value in values)]


def _finish(figure: "Figure", axes: "Axes", key: str, label: str, rectangles: Iterable[tuple[float, float, float, float, str]]) -> str:
    """The figure as SVG: the page's colours and letters, names of its own for what it refers to, and words where the pointer rests."""
    _make_room(figure, axes)
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(file.getvalue())  # our own, a moment old
    for parent in list(root.iter()):
        for child in [one for one in parent if one.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style")]:
            parent.remove(child)
    for element in root.iter():
        for name, value in element.attrib.items():
            element.set(name, _rewrite(name, value, key))
    _, _, width, height = root.attrib["viewBox"].split()
    root.attrib.clear()
    root.attrib.update({"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": show_text(label)})
    text = ElementTree.tostring(root, encoding="unicode")
    return text.removesuffix("</svg>") + _words(axes, float(height), rectangles) + "</svg>"


def _make_room(figure: "Figure", axes: "Axes") -> None:
    """Margins as wide as the labels are (matplotlib's own layouts draw everything twice to find out)."""
    bottom, top = sorted(axes.get_ylim())
    places = [place for place in axes.yaxis.get_major_locator()() if bottom <= place <= top]
    letters = max((len(label) for label in axes.yaxis.get_major_formatter().format_ticks(places)), default=0)
    left = (LETTER_WIDTH * letters + 0.4) * LETTERS if letters else 2
    below = 1.4 * LETTERS if len(axes.get_xticks()) else 2
    height = 72 * figure.get_figheight()
    axes.set_position((left / WIDTH, below / height, 1 - (left + LETTERS) / WIDTH, 1 - (below + 4) / height))


def _rewrite(name: str, value: str, key: str) -> str:
    """An attribute, as it may stand in a page with others."""
    if name == "id":
        return f"{key}-{value}"
    value = re.sub(r"#(?!a1)(?=[A-Za-z])", f"#{key}-", value) if "url(#" in value or name.endswith("href") else value
    if name == "style":
        value = re.sub(r"font(-\w+)?:[^;]*;? ?", "", value)  # the page's
        value = re.sub(r"#a1[0-9a-f]{4}", lambda found: f"var({_VARIABLES[found[0]]})", value)
    # A hundredth of a unit is less than a screen can show.
    return re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), value) if name != "id" else value


def _words(axes: "Axes", height: float, rectangles: Iterable[tuple[float, float, float, float, str]]) -> str:
    """Rectangles that are not seen and that say something (`title`) where the pointer rests."""
    shapes: list[str] = []
    for left, right, low, high, text in rectangles:
        (x1, y1), (x2, y2) = axes.transData.transform([(left, low), (right, high)])
        title = escape(show_text(text))
        place = f'x="{x1:.1f}" y="{height - max(y1, y2):.1f}" width="{x2 - x1:.1f}" height="{abs(y2 - y1):.1f}"'
        shapes.append(f"<rect {place}><title>{title}</title></rect>")
    return f'<g class="words">{"".join(shapes)}</g>'

"""The picture of where each head reads: for every layer a row of maps, one for each head.

In: what `inspect_text.read_text` found, plain values. Out: a file. matplotlib is loaded when it is drawn.
"""

import io
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.durable import write_file
from configs.errors import UserError
from configs.model_section import ModelSection

SHOWN_HEADS = 8
"""Of layers, and of heads, that are drawn unless others are chosen; of more, so many evenly spread."""
LARGEST_PICTURE = 64
"""Maps of one picture: as many as can be drawn in a single column of long texts."""
DRAWN_TOKENS = 64
"""Of a longer text the first ones are drawn."""
DRAWN_LETTERS = 14
"""Of a token, beside the picture."""
LARGEST_AT_ONCE = 16
"""Inches of maps that are looked at as a whole."""
PICTURE_KINDS = (".png", ".pdf", ".svg")


def check_picture(path: Path) -> None:
    """Raises UserError for a name that cannot become a picture; before anything is computed."""
    if path.suffix.lower() not in PICTURE_KINDS:
        raise UserError(f"--picture {path}: wanted a name that ends with {', '.join(PICTURE_KINDS[:-1])} or {PICTURE_KINDS[-1]}.")
    if not path.parent.is_dir():
        raise UserError(f"--picture {path}: there is no folder {path.parent}; make it first.")


def choose_maps(section: ModelSection, layers: str | None, heads: str | None) -> tuple[list[int], list[int]]:
    """The layers and the heads that are drawn. Raises UserError for ones that are not there, and for too many."""
    chosen_layers = _choose(layers, section.num_layers, "layers")
    chosen_heads = _choose(heads, section.num_heads, "heads")
    if (count := len(chosen_layers) * len(chosen_heads)) > LARGEST_PICTURE:
        raise UserError(f"--layers and --heads choose {count} maps; a picture holds {LARGEST_PICTURE} at most: choose fewer.")
    return chosen_layers, chosen_heads


def _choose(wanted: str | None, available: int, what: str) -> list[int]:
    """`0,5` or `2-4,7` as numbers; None: all, or SHOWN_HEADS of them, evenly spread from the first to the last. Raises UserError."""
    if wanted is None:
        shown = min(available, SHOWN_HEADS)
        return [round(number * (available - 1) / max(1, shown - 1)) for number in range(shown)]
    chosen: set[int] = set()
    for part in wanted.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else True)):
            raise UserError(f"--{what} {wanted!r}: found {part!r}; wanted numbers from 0 on, such as 0,5 or 2-4.")
        if int(last or first) >= available:
            raise UserError(f"--{what} {wanted!r}: the model has the {what} 0 to {available - 1}, found {last or first}.")
        chosen |= set(range(int(first), int(last or first) + 1))
    if not chosen:
        raise UserError(f"--{what} {wanted!r} chooses none; the smaller number stands first.")
    return sorted(chosen)


def draw_attention(found: dict[str, Any], path: Path) -> str:
    """Draw where the heads of `read_text` read, a row of maps for each layer. Returns what is to be said of the picture."""
    if not found["attention"]:
        return "no picture: the model is your own and does not call the attention it was given."
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    maps = {(one["layer"], one["head"]): np.array(one["weights"]) for one in found["attention"]}
    layers, heads = sorted({layer for layer, _ in maps}), sorted({head for _, head in maps})
    labels = _labels([one["piece"] for one in found["places"][:DRAWN_TOKENS]])
    # In inches: a map's side, what its labels take, and the room for titles and the bar of colours.
    side, edge = max(1.5, 0.115 * len(labels)), 0.1 + 0.065 * max(map(len, labels))
    # What is seen at once has labels at the left and below only; of what is larger each map has its own.
    is_large = side * max(len(heads), len(layers)) > LARGEST_AT_ONCE
    between = (edge + 0.15, edge + 0.4) if is_large else (0.15, 0.3)
    letters = min(24.0, 11 * max(1, side * len(heads) / 10))
    left, right, top, bottom = edge + letters / 28, 1.1, 0.35 + letters / 32, edge + letters / 32
    inside = [side * count + gap * (count - 1) for count, gap in zip((len(heads), len(layers)), between, strict=True)]
    width, height = left + inside[0] + right, top + inside[1] + bottom
    figure = Figure(figsize=(width, height), dpi=110)
    grid = figure.add_gridspec(
        len(layers),
        len(heads),
        left=left / width,
        right=1 - right / width,
        top=1 - top / height,
        bottom=bottom / height,
        wspace=between[0] / side,
        hspace=between[1] / side,
    )
    # The square root of the share: a tenth, which is much among many tokens, is seen beside a whole.
    shades, colours = PowerNorm(0.5, 0, 1), colormaps["YlGnBu"].with_extremes(bad="#e4e4e4")
    for (down, layer), (across, head) in product(enumerate(layers), enumerate(heads)):
        place = figure.add_subplot(grid[down, across])
        place.imshow(_hide(maps[layer, head], found["window"], found["num_prefix"]), cmap=colours, norm=shades, interpolation="nearest")
        place.set_title(f"layer {layer}, head {head}", fontsize=max(9, 2 * side), pad=3)
        below = labels if is_large or down == len(layers) - 1 else []
        beside = labels if is_large or across == 0 else []
        place.set_xticks(range(len(below)), below, rotation=90, fontsize=7, parse_math=False)
        place.set_yticks(range(len(beside)), beside, fontsize=7, parse_math=False)
        place.tick_params(length=0, pad=2)
    middle = ((left + inside[0] / 2) / width, (bottom + inside[1] / 2) / height)
    name = f"{found['name']}, {found['checkpoint']}: what each head reads"
    figure.text(0.12 / width, 1 - 0.12 / height, name, fontsize=letters, va="top", parse_math=False)
    figure.text(0.12 / width, middle[1], "the token that reads (query)", rotation=90, fontsize=0.8 * letters, va="center")
    figure.text(middle[0], 0.1 / height, "the token that is read (key)", fontsize=0.8 * letters, ha="center")
    long = min(inside[1], 5.0)
    bar = figure.colorbar(
        ScalarMappable(shades, colours),
        cax=figure.add_axes((1 - (right - 0.15) / width, 1 - (top + long) / height, 0.15 / width, long / height)),
        ticks=[0, 0.05, 0.2, 0.5, 1],
    )
    bar.ax.tick_params(labelsize=7)
    bar.set_label("share of what is read (grey: hidden)", fontsize=7)
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.lower()[1:])
    write_file(path, content.getvalue())
    return _say_picture(found, layers, heads, path)


def _say_picture(found: dict[str, Any], layers: Sequence[int], heads: Sequence[int], path: Path) -> str:
    said = f"the picture is {path}: {len(layers)} of {found['num_layers']} layers, {len(heads)} of {found['num_heads']} heads"
    if len(layers) < found["num_layers"] or len(heads) < found["num_heads"]:
        said += " (--layers and --heads choose others)"
    if len(found["places"]) > DRAWN_TOKENS:
        said += f"; of the {len(found['places']):,} tokens the first {DRAWN_TOKENS}"
    if found["calls_per_layer"] != 1:
        said += "; your own layers do not attend once each, so that a map's layer is the number of its call"
    return said


def _hide(weights_TT: npt.NDArray[np.float64], window: int | None, num_prefix: int) -> npt.NDArray[np.float64]:
    """What no place can read, for it comes later or is out of the window, as NaN; in a prefix all is read."""
    places_T = np.arange(len(weights_TT))
    back_TT = np.subtract.outer(places_T, places_T)
    hidden_TT = (back_TT < 0) | (back_TT >= (window or len(weights_TT)))
    return np.where(hidden_TT & ~np.logical_and.outer(places_T < num_prefix, places_T < num_prefix), np.nan, weights_TT)


def _labels(pieces: Sequence[str]) -> list[str]:
    """Tokens as the picture's font can show them: what it has no letter for is escaped, long ones are cut."""
    from matplotlib.font_manager import findfont, get_font

    letters = get_font(findfont("DejaVu Sans")).get_charmap()

    def show(letter: str) -> str:
        if letter == " ":
            return "␣"
        return letter if ord(letter) in letters and letter.isprintable() else letter.encode("unicode_escape").decode("ascii")

    shown = ["".join(map(show, piece)) for piece in pieces]
    return [text if len(text) <= DRAWN_LETTERS else f"{text[: DRAWN_LETTERS - 1]}…" for text in shown]

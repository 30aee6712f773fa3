"""Numbers in a few letters, for a panel and a table that have little room: 1.23B tokens, 4.5 h, 61.2 GB, ▇▅▃▂."""

from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"


def spell_count(value: float) -> str:
    """A number to three digits: 987, 12.3k, 1.23B."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * unit:
            return f"{_three_digits(value / unit)}{letter}"
    return f"{value:.0f}" if value >= 100 or value == int(value) else _three_digits(value)


def spell_bytes(num_bytes: float) -> str:
    """Bytes to three digits, in decimal units."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if num_bytes >= 0.9995 * unit:
            return f"{_three_digits(num_bytes / unit)} {name}"
    return f"{num_bytes / 1e3:.0f} kB"


def spell_span(seconds: float) -> str:
    """A time in one unit: 45 s, 12 min, 4.5 h, 12 d."""
    for unit, name in ((86400, "d"), (3600, "h")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.1f} {name}" if seconds < 9.95 * unit else f"{seconds / unit:.0f} {name}"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(0.0, seconds):.0f} s"


def draw_trend(values: Sequence[float]) -> str:
    """A block for each value, the lowest and the highest of them as the smallest and the largest block; all in the middle where all are
    equal."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    if low == high:
        return BLOCKS[3] * len(values)
    return "".join(BLOCKS[round((value - low) / (high - low) * (len(BLOCKS) - 1))] for value in values)


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"

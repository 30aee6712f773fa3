"""The verb `checkpoints matrix`, as a person sees it.

In: what happens for every pair of layouts (`pretrain/checkpoint/layouts.py`). Out: tables of the pairs that go, and the reasons of the
others. No torch.
"""

from collections import Counter
from typing import Any

from pretrain.page import Page


def tell_matrix(rows: list[dict[str, Any]], page: Page) -> None:
    """A row for each layout that a checkpoint may be written under, a column for each that goes on with it."""
    refused = Counter[str](row["reason"] for row in rows if row["outcome"] == "refused")
    tolerances: dict[str, float] = {}
    for optimizer in dict.fromkeys(row["from"]["optimizer"] for row in rows):
        here = [row for row in rows if row["from"]["optimizer"] == row["to"]["optimizer"] == optimizer and row["outcome"] != "refused"]
        names = list(dict.fromkeys(_name(row["from"]) for row in here))
        cells = {(_name(row["from"]), _name(row["to"])): _cell(row) for row in here}
        tolerances |= {f"{row['outcome']} to {row['to']['precision']}": row["tolerance"] for row in here if row["tolerance"]}
        page.say(f"{optimizer}: written under (left), goes on under (top, by number)")
        heads = {name: str(number) for number, name in enumerate(names, 1)}
        page.table(("", "", *heads.values()), [(heads[one], one, *(cells.get((one, other), "-") for other in names)) for one in names])
        page.say("")
    page.say("= exact, and the losses that follow are the same bits    e exact: the losses are summed in another order")
    page.say("c converted: weights, moments and steps are the same bits, and the model goes on in another precision")
    page.say("losses then stay within, relative: " + ", ".join(f"{name} {tolerance:g}" for name, tolerance in tolerances.items()))
    page.say("With dropout, other ranks or micro-batches draw other masks. The order of samples is always the same.")
    page.say("refused:")
    for reason, count in refused.most_common():
        page.say(f"  {count} pairs: {reason}")


def _name(layout: dict[str, Any]) -> str:
    ranks = "1 rank" if layout["num_ranks"] == 1 else f"{layout['num_ranks']} ranks"
    return f"{layout['precision']} stage {layout['zero_stage']} {ranks}"


def _cell(row: dict[str, Any]) -> str:
    return "c" if row["outcome"] == "converted" else "e" if row["tolerance"] else "="

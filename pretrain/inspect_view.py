"""The verb `inspect` as a person sees it: the model as a table.

In: a run file or a run folder. Out: plain values, ready for JSON, and the same as tables. No torch is loaded, but for a model of the
user's own.
"""

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.loader import load_config
from configs.schema import RunConfig, TrainingSection
from pretrain.model.operations import ModelTable, Operation, tabulate_model
from pretrain.page import Page, make_visible

LEGEND = {
    "B": "samples of a micro-batch (training.micro_batch_samples)",
    "T": "tokens of a sample (training.sequence_length)",
    "D": "features of a token (model.width)",
    "N": "heads that ask (model.num_heads)",
    "K": "heads that are asked: keys and values (model.num_kv_heads)",
    "H": "features of a head (model.head_width)",
    "F": "features inside feed-forward (model.feed_forward_width)",
    "V": "tokens there are (model.vocabulary_size)",
    "P": "places there can be (model.largest_context)",
}
CONVENTIONS = (
    "FLOPs: of the forward pass, 2 for each multiply-add of a matrix product; in attention for the pairs of places that are seen. Norms, "
    "rotations and sums are not counted: they wait for memory, not for computing.",
    "Output: bytes of activations in {precision}; -: it never lies in memory as a whole (attention is one fused kernel, logits come in "
    "chunks of 1,024 tokens). Kept: what waits for the backward pass, each tensor counted once, where it was made, with fp32 statistics.",
)


def load_described(path: Path, overrides: Sequence[str]) -> tuple[RunConfig, str | None]:
    """A run file's configuration, and what was assumed of a file that describes a model only, with which other defaults may not go.

    There a sequence is no longer than the model's context, a tokenizer no larger than its table. Raises UserError as `load_config` does.
    """
    try:
        return load_config(path, list(overrides)), None
    except UserError as error:
        mistake = error
    with tempfile.TemporaryDirectory() as folder:
        beneath, above = Path(folder) / "beneath.yaml", Path(folder) / path.name
        above.write_text(f"include: [{beneath.name}, {json.dumps(str(path.resolve()))}]\n")

        def load_over(sequence_length: int) -> RunConfig:
            beneath.write_text(f"{{training: {{sequence_length: {sequence_length}}}, data: {{tokenizer: {{vocabulary_size: 257}}}}}}\n")
            return load_config(above, list(overrides))

        try:
            config = load_over(min(load_over(1).model.largest_context, TrainingSection().sequence_length))
        except UserError:
            raise mistake from None
    length = config.training.sequence_length
    return config, f"{path} says nothing of training that fits its model; taken: training.sequence_length={length}."


def describe_model(config: RunConfig) -> dict[str, Any]:
    """The model of a configuration, for one micro-batch of one rank. Raises UserError for an import path that leads nowhere."""
    section, training = config.model, config.training
    batch_size, num_tokens = training.micro_batch_samples, training.sequence_length
    found: dict[str, Any] = {
        "own": section.implementation or section.block,
        "batch_size": batch_size,
        "num_tokens": num_tokens,
        "precision": config.precision,
    }
    if found["own"] is not None:
        from pretrain.model.inspection import list_modules

        return found | asdict(list_modules(section, config.objective, batch_size, num_tokens))
    table = tabulate_model(
        section, batch_size, num_tokens, 4 if config.precision == "fp32" else 2, config.performance.activation_checkpointing
    )
    notes = list(table.notes)
    if config.objective.loss is not None:
        notes.append(f"The loss is {config.objective.loss}: what it costs and keeps is not known here.")
    return found | {
        "sizes": {**table.sizes, "L": table.num_layers},
        "operations": [_describe_operation(table, row) for row in table.operations],
        "parameters": table.parameters,
        "matrix_parameters": table.matrix_parameters,
        "forward_flops": table.forward_flops,
        "forward_flops_per_token": table.forward_flops / (batch_size * num_tokens),
        "training_flops_per_token": table.training_flops_per_token(),
        "kept_bytes": table.kept_bytes,
        "notes": notes,
    }


def _describe_operation(table: ModelTable, row: Operation) -> dict[str, Any]:
    shapes = {"takes_shapes": [table.shape(axes) for axes in row.takes], "gives_shape": table.shape(row.gives)}
    return asdict(row) | shapes | {"times": table.times(row)}


def tell_model(found: dict[str, Any], page: Page) -> None:
    """What `describe_model` found."""
    if found["own"] is not None:
        _tell_modules(found, page)
        return
    sizes, rows = found["sizes"], found["operations"]
    layer = [number for number, row in enumerate(rows, 1) if row["in_layer"]]
    page.say(
        f"The way of a micro-batch: {sizes['B']:,} samples of {sizes['T']:,} tokens, row by row. Rows {layer[0]} to {layer[-1]} are one "
        f"layer; there are {sizes['L']}, one after the other: blocks.0 to blocks.{sizes['L'] - 1}.\n"
    )
    what = [
        (f"{number}", row["name"], _spell_shapes(row["takes_shapes"]), _spell_shapes([row["gives_shape"]]), _spell_axes(row), row["does"])
        for number, row in enumerate(rows, 1)
    ]
    page.table(("row", "operation", "in", "out", "out, in letters", "what it does"), what)
    page.say(f"\nWhat each row costs; a layer's rows cost it {sizes['L']} times.\n")
    costs = [
        (
            f"{number}",
            row["name"],
            row["module"] or "-",
            f"{row['times']}",
            f"{row['parameters']:,}" if row["parameters"] else "-",
            _spell(row["flops"], "FLOPs") if row["flops"] else "-",
            "-" if row["output_bytes"] is None else _spell(row["output_bytes"], "B"),
            _spell(row["kept_bytes"], "B") if row["kept_bytes"] else "-",
        )
        for number, row in enumerate(rows, 1)
    ]
    page.table(("row", "operation", "module", "times", "parameters", "forward", "output", "kept"), costs)
    page.say("")
    _tell_totals(found, page)
    page.say("\nThe letters\n")
    page.table(("letter", "here", "what it counts"), [(letter, f"{sizes[letter]:,}", text) for letter, text in LEGEND.items()])
    page.say("")
    for note in (*found["notes"], *(text.format(precision=found["precision"]) for text in CONVENTIONS)):
        page.say(note)


def _tell_totals(found: dict[str, Any], page: Page) -> None:
    training = found["training_flops_per_token"]
    page.say("All rows together\n")
    rows = [
        ("parameters", f"{found['parameters']:,}", "numbers that are learnt"),
        ("of these in products", f"{found['matrix_parameters']:,}", "each token is multiplied with them; a tied head is one of them"),
        ("forward", _spell(found["forward_flops"], "FLOPs"), "a micro-batch"),
        ("forward", _spell(found["forward_flops_per_token"], "FLOPs"), "a token"),
        ("training, causal", _spell(training["causal"], "FLOPs"), "a token: 3 x forward; of attention's square the half that is seen"),
        ("training, PaLM", _spell(training["palm"], "FLOPs"), "a token: 6 x the parameters in products + 12 L N H T, the whole square"),
        ("activations", _spell(found["kept_bytes"], "B"), "a micro-batch keeps them for its backward pass"),
    ]
    page.table(("what", "how much", "of"), rows)


def _tell_modules(found: dict[str, Any], page: Page) -> None:
    page.say(
        f"{found['own']} is code of your own: what it does is not known here. These are the model's modules, as a forward pass on "
        f"{found['batch_size']:,} samples of {found['num_tokens']:,} tokens calls them; N counts layers.\n"
    )
    rows = [
        (
            row["name"] or "(the model)",
            row["kind"],
            f"{row['times']}",
            _spell_shapes(row["takes"]),
            _spell_shapes(row["gives"]),
            f"{row['parameters']:,}" if row["parameters"] else "-",
        )
        for row in found["rows"]
    ]
    page.table(("module", "class", "times", "in", "out", "parameters"), rows)
    page.say(f"\nparameters: {found['parameters']:,}")
    if found["forward_flops"] is not None:
        per_token = found["forward_flops"] / (found["batch_size"] * found["num_tokens"])
        page.say(
            f"forward: {_spell(found['forward_flops'], 'FLOPs')} a micro-batch, {_spell(per_token, 'FLOPs')} a token: matrix products and "
            "attention (its whole square), as PyTorch counts them"
        )
    if found["problem"] is not None:
        page.say(f"Shapes and FLOPs are not known: {make_visible(found['problem'])}")


def _spell_shapes(shapes: Sequence[Sequence[int]]) -> str:
    spelled = [" x ".join(map(str, shape)) or "1" for shape in shapes]
    if len(spelled) > 1 and len(set(spelled)) == 1:
        return f"{len(spelled)} of {spelled[0]}"
    return ", ".join(spelled) or "-"


def _spell_axes(row: dict[str, Any]) -> str:
    """`B T NH` as B x T x N·H."""
    return " x ".join("·".join(axis) for axis in row["gives"].split()) or "1"


def _spell(number: float, unit: str) -> str:
    """With four digits: 104.9 MFLOPs."""
    for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.{max(0, 3 - int(math.log10(number / 10**power)))}f} {letter}{unit}"
    return f"{number:.4g} {unit}"

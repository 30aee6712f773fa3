"""What a trained model does with a text: what it expects behind each token, and where its heads read.

In: a run folder, a text. Out: plain values, ready for JSON and for `attention_picture`, and the same as a table.
"""

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch

from configs.changes import differing_keys
from configs.errors import UserError
from configs.schema import RunConfig
from data_pipeline.show import split_pieces
from data_pipeline.tokenizer import vocabulary_size
from pretrain.attention_picture import DRAWN_TOKENS, choose_maps
from pretrain.data.prompts import Prompt, PromptForm
from pretrain.model.inspection import AttentionRecorder, Prediction, predict
from pretrain.page import Page, make_visible
from pretrain.run.folder import RunFolder
from pretrain.write import load_form, load_model, newest_intact_commit


def read_text(
    run: RunFolder, config: RunConfig, text: str, *, say: Callable[[str], object], top: int, layers: str | None, heads: str | None
) -> dict[str, Any]:
    """What the model of a run's newest intact checkpoint does with a text behind an end of text.

    config: what was asked for; the model is that of the run folder. Raises UserError where these differ, where there is no checkpoint,
    for a text that is too long, and for layers and heads that are not there.
    """
    own = run.load_config()
    if different := [key for key in differing_keys(own, config) if key.startswith("model.")]:
        raise UserError(f"{run.path} was trained with another model ({', '.join(different)} differ); with --text leave its shape as it is.")
    chosen_layers, chosen_heads = choose_maps(own.model, layers, heads)
    commit = newest_intact_commit(run, say)
    form = load_form(run, own)
    prompt = _encode(form, text, own.model.largest_context)
    recorder = AttentionRecorder(chosen_layers, chosen_heads)
    model = load_model(own, commit, recorder)
    predictions = predict(model, prompt.tokens, top=top, num_tokens=vocabulary_size(form.tokenizer), num_prefix=prompt.num_prefix)
    # Of a longer text its beginning is enough: no place sees what comes later, but in a prefix.
    maps = recorder.record(model, prompt.tokens[: max(DRAWN_TOKENS, prompt.num_prefix)], prompt.num_prefix)
    return {
        "run": str(run.path),
        "name": own.run.name or run.path.name,
        "checkpoint": commit.folder.name,
        "tokens_seen": commit.state.tokens_seen,
        "text": text,
        "places": [_describe_place(one, form) for one in predictions],
        **_sum_up(predictions, prompt.num_prefix),
        "num_layers": own.model.num_layers,
        "num_heads": own.model.num_heads,
        "window": own.model.sliding_window,
        "num_prefix": prompt.num_prefix,
        "layers": chosen_layers,
        "heads": chosen_heads,
        "attention": [_describe_map(layer, head, weights_TT) for (layer, head), weights_TT in maps.items()],
        "calls_per_layer": recorder.num_calls / own.model.num_layers,
    }


def _encode(form: PromptForm, text: str, context: int) -> Prompt:
    """The text behind an end of text. Raises UserError for one that is no text, or too long."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("the text is not valid UTF-8.") from None
    prompt = form.encode(text)
    if (count := len(prompt.tokens)) > context:
        raise UserError(f"the text has {count:,} tokens, wanted 1 to {context:,} (model.largest_context); give a shorter one.")
    return prompt


def _describe_place(one: Prediction, form: PromptForm) -> dict[str, Any]:
    def show(token: int) -> str:
        return split_pieces(form.tokenizer, [token])[0]

    return {
        "token": one.token,
        "piece": show(one.token),
        "next_token": one.next_token,
        "next_piece": None if one.next_token is None else show(one.next_token),
        "probability": one.probability,
        "rank": one.rank,
        "right": None if one.rank is None else one.rank == 1,
        "loss": one.loss,
        "entropy": one.entropy,
        "likeliest": [{"token": token, "piece": show(token), "probability": share} for token, share in one.likeliest],
    }


def _describe_map(layer: int, head: int, weights_TT: torch.Tensor) -> dict[str, Any]:
    drawn_TT = weights_TT[:DRAWN_TOKENS, :DRAWN_TOKENS].tolist()
    return {"layer": layer, "head": head, "weights": [[round(share, 6) for share in row] for row in drawn_TT]}


def _sum_up(predictions: Sequence[Prediction], num_prefix: int) -> dict[str, Any]:
    """Over the places that another token follows, but not inside a prefix, where nothing was learnt; the entropy over all."""
    judged = [one for one in predictions[max(0, num_prefix - 1) :] if one.loss is not None]
    losses = [one.loss for one in judged if one.loss is not None]
    return {
        "num_judged": len(judged),
        "num_right": sum(one.rank == 1 for one in judged),
        "mean_loss": fmean(losses) if losses else None,
        "mean_entropy": fmean(one.entropy for one in predictions),
    }


def tell_text(found: dict[str, Any], page: Page) -> None:
    """What `read_text` found."""
    places = found["places"]
    page.say(f"{found['name']}, {found['checkpoint']}: {found['tokens_seen']:,} tokens seen in training")
    page.say(f"{len(places):,} tokens, the first of them an end of text: {'|'.join(_visible(one['piece']) for one in places)}")
    if found["num_prefix"]:
        page.say(
            f"The first {found['num_prefix']:,} are a prefix, which was not learnt from: its places see each other in both directions."
        )
    page.say("")
    rows = [
        (
            f"{number}",
            _visible(one["piece"]),
            f"{one['token']}",
            "-" if one["next_piece"] is None else _visible(one["next_piece"]),
            "-" if one["rank"] is None else f"{one['rank']:,}",
            {None: "", True: "right", False: ""}[one["right"]],
            "-" if one["probability"] is None else _spell_share(one["probability"]),
            "-" if one["loss"] is None else f"{one['loss']:.2f}",
            f"{one['entropy']:.2f}",
            "  ".join(f"{_visible(guess['piece'])} {_spell_share(guess['probability'])}" for guess in one["likeliest"]),
        )
        for number, one in enumerate(places)
    ]
    page.table(("place", "token", "id", "next", "rank", "", "% given", "loss", "entropy", "likeliest next tokens, %"), rows)
    if found["num_judged"]:
        page.say(
            f"\n{found['num_right']} of {found['num_judged']} next tokens were the likeliest. Mean loss {found['mean_loss']:.3f} nats a "
            f"token (perplexity {math.exp(found['mean_loss']):,.1f})."
        )
    page.say(
        "% given: the probability of the token that really follows; rank 1: none was likelier. Loss: -ln of that probability, in nats. "
        "Entropy: the loss that the model itself expects there. ␣ is a space, ␊ the end of a line, \\xNN a byte of a character that "
        "several tokens share."
    )


def _visible(piece: str) -> str:
    return make_visible(piece).replace(" ", "␣")


def _spell_share(share: float) -> str:
    return f"{100 * share:.1f}" if share >= 0.001 else "<0.1"

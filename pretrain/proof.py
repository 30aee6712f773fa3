"""Whether a folder in Hugging Face's form is the same model as ours: every weight, the logits, a continuation, the token ids.

In: the folder, our parameters by ranges, our section. Out: how far the two are apart, or a UserError that says where they differ.
A model that does not fit into the memory allowed is computed module by module: theirs is left on the disk by accelerate, ours is read
when a module is entered and let go when it is left.

Shapes: T tokens, V vocabulary.
"""

import contextlib
import importlib
import logging
import tempfile
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from torch import nn

from configs.errors import UserError
from configs.model_section import ModelSection
from pretrain.model.attention import KeyValueCache
from pretrain.model.decoder import Decoder
from pretrain.model.exchange import ReadWeight, parameter_shapes, section_of, what_is_computed
from pretrain.model.weights_file import ranges

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOLERANCE = 1e-4
"""Of the largest logit (or of 1): two programs that add up fp32 numbers in another order stay well below it."""
LENGTHS = (1, 13, 128)
"""Tokens of the random texts whose logits are compared."""
NUM_NEW_TOKENS = 8
TEXTS = (
    "Once upon a time, there was a model that could be read by everybody.",
    "def read(path):\n    return [line.strip() for line in path.open()]  # 1,234.5 €\n",
    "  two spaces before, three behind   ",
    "\tTabs\tand\r\nline ends\n\n\n",
    "Ünïcödé, Ελληνικά, русский, العربية, हिन्दी, 中文字, 日本語, 한국어, 🙂👩‍👩‍👧",
    "aAbBcC0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
)
"""What both tokenizers encode and decode."""


@dataclass(frozen=True)
class Proof:
    """How far the two are apart."""

    transformers_version: str
    num_parameters: int
    largest_difference: float
    """Of a logit."""
    largest_logit: float


def prove_equal(
    folder: Path,
    section: ModelSection,
    *,
    ours: ReadWeight,
    theirs: ReadWeight,
    tokenizer: "Tokenizer | None",
    end_of_text: int | None,
    scratch: Path,
    memory_bytes: int | None = None,
) -> Proof:
    """Compare the model in `folder`, as transformers reads it, with our Decoder; both compute in fp32 on the CPU.

    ours, theirs: our parameters as training has them, and as the folder's files hold them; tokenizer: None leaves it out.
    memory_bytes: for the weights of one of the two models; None: half of what is free. scratch: a folder where transformers may put
    what does not fit, at most the model in fp32, for as long as this takes. Raises UserError, with the largest difference.
    """
    transformers = import_transformers()
    memory = psutil.virtual_memory().available // 2 if memory_bytes is None else memory_bytes
    described = section_of(transformers.AutoConfig.from_pretrained(folder, **LOCAL).to_dict())
    found, wanted = what_is_computed(described), what_is_computed(section)
    if different := [f"model.{key} is {wanted[key]}, there {found.get(key)}" for key in wanted if found.get(key) != wanted[key]]:
        raise UserError(f"{folder / 'config.json'} describes another model: {'; '.join(different)}.")
    shapes = parameter_shapes(section)
    compare_weights(folder, shapes, ours, theirs)
    if tokenizer is not None:
        _compare_token_ids(folder, tokenizer)

    generator = np.random.default_rng(0)
    texts = [generator.integers(section.vocabulary_size, size=min(length, section.largest_context)).tolist() for length in LENGTHS]
    if tokenizer is not None:
        texts.append(tokenizer.encode(TEXTS[0], add_special_tokens=False).ids[: section.largest_context - NUM_NEW_TOKENS] or [0])
    prompt = texts[-1][: max(1, section.largest_context - NUM_NEW_TOKENS)]
    num_new = min(NUM_NEW_TOKENS, section.largest_context - len(prompt))
    with torch.no_grad():
        model = our_model(section, shapes, ours, memory)
        our_logits = [model(torch.tensor([text]))[0] for text in texts]
        our_tokens, our_choices = _continue(model, prompt, num_new, end_of_text)
        del model
        with their_model(folder, scratch, memory) as model:
            their_logits = [model(torch.tensor([text])).logits[0] for text in texts]
            their_tokens = _their_continuation(model, prompt, num_new, end_of_text)

    largest = max(float(logits_TV.abs().max()) for logits_TV in our_logits)
    limit = TOLERANCE * max(1.0, largest)
    # NaN compares as false with everything: written so that it is never taken for equal.
    gaps = [float((mine_TV - other_TV).abs().max()) for mine_TV, other_TV in zip(our_logits, their_logits, strict=True)]
    if not all(gap <= limit for gap in gaps):
        raise UserError(
            f"{folder}: the logits differ by up to {max(gaps):.3g}, allowed are {limit:.3g} (logits reach {largest:.3g}); "
            f"by number of tokens: {', '.join(f'{len(text)}: {gap:.3g}' for text, gap in zip(texts, gaps, strict=True))}."
        )
    for place, (mine, other) in enumerate(zip(our_tokens, their_tokens, strict=False)):
        if mine != other:
            choice_V = our_choices[place]
            if float(choice_V[mine] - choice_V[other]) > 2 * limit:
                raise UserError(f"{folder}: the greedy continuations differ at token {place + 1}: {mine} here, {other} there.")
            break  # as likely as each other: what follows says nothing
    else:
        if len(our_tokens) != len(their_tokens):
            raise UserError(f"{folder}: the greedy continuation has {len(our_tokens)} tokens here, {len(their_tokens)} there.")
    num_parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    return Proof(transformers.__version__, num_parameters, max(gaps), largest)


LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""For every call of transformers: nothing is fetched, and no code of a model folder is run."""


def import_transformers() -> Any:
    """The library, which only this proof and an import's configuration need. Raises UserError where it is missing."""
    try:
        transformers = importlib.import_module("transformers")
        importlib.import_module("accelerate")
    except ImportError as error:
        raise UserError(f"this needs transformers and accelerate ({error}); install them: pip install 'pretrain[huggingface]'.") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def compare_weights(folder: Path, shapes: Mapping[str, tuple[int, ...]], ours: ReadWeight, theirs: ReadWeight) -> None:
    """Every number of every parameter, equal to the bit. Raises UserError that names the first parameter that differs."""
    for name, shape in shapes.items():
        for start, count in ranges(torch.Size(shape).numel()):
            mine, other = ours(name, start, count).float(), theirs(name, start, count).float()
            if not torch.equal(mine.view(torch.int32), other.view(torch.int32)):
                gap = float((mine - other).abs().nan_to_num(torch.inf).max())
                raise UserError(f"{folder}: {name} is not what it should be: the largest difference of a weight is {gap:.3g}.")


def our_model(section: ModelSection, shapes: Mapping[str, tuple[int, ...]], read: ReadWeight, memory_bytes: int) -> Decoder:
    """The Decoder in fp32: with its weights, or, where these are more than `memory_bytes`, reading them whenever they are used."""

    def whole(name: str) -> torch.Tensor:
        parts = [read(name, start, count).float() for start, count in ranges(torch.Size(shapes[name]).numel())]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(shapes[name])

    with torch.device("meta"):
        model = Decoder(section).eval()
    if 4 * sum(torch.Size(shape).numel() for shape in shapes.values()) <= memory_bytes:
        model.load_state_dict({name: whole(name) for name in shapes}, assign=True)
        return model
    for prefix, module in model.named_modules():
        empty = dict(module.named_parameters(recurse=False))
        if not empty:
            continue

        def fill(module: nn.Module, _: object, prefix: str = prefix, empty: dict[str, nn.Parameter] = empty) -> None:
            for name in empty:
                module.register_parameter(name, nn.Parameter(whole(f"{prefix}.{name}"), requires_grad=False))

        def let_go(module: nn.Module, _: object, __: object, empty: dict[str, nn.Parameter] = empty) -> None:
            for name, parameter in empty.items():
                module.register_parameter(name, parameter)

        module.register_forward_pre_hook(fill)
        module.register_forward_hook(let_go)
    return model


@contextlib.contextmanager
def their_model(folder: Path, scratch: Path, memory_bytes: int) -> Generator[Any]:
    """The folder's model as transformers loads it, fp32, on the CPU; what is more than `memory_bytes` stays on the disk."""
    transformers = import_transformers()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it says that weights are on the disk
    with tempfile.TemporaryDirectory(prefix="offloaded-", dir=scratch) as offloaded:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            device_map="auto",
            max_memory={"cpu": memory_bytes},
            offload_folder=offloaded,
            use_safetensors=True,
            **LOCAL,
        )
        yield model.eval()


def _continue(model: Decoder, prompt: Sequence[int], num_new: int, end_of_text: int | None) -> tuple[list[int], list[torch.Tensor]]:
    """The likeliest tokens, with the end of text where it comes, and the logits (V,) that each was chosen from."""
    tokens: list[int] = []
    choices: list[torch.Tensor] = []
    cache = KeyValueCache(model.section.num_layers, len(prompt) + num_new)
    unread = list(prompt)
    while len(tokens) < num_new and end_of_text not in tokens:
        choices.append(model(torch.tensor([unread]), cache=cache, last_only=True)[0, -1])
        unread = [int(choices[-1].argmax())]
        tokens += unread
    return tokens, choices


def _their_continuation(model: Any, prompt: Sequence[int], num_new: int, end_of_text: int | None) -> list[int]:
    """The same by `generate`, which stops at the end of text because the folder's own files say so."""
    if num_new == 0:
        return []
    prompt_1T = torch.tensor([prompt])
    endless = {"eos_token_id": None} if end_of_text is None else {}
    settings = {"max_new_tokens": num_new, "do_sample": False, "pad_token_id": 0, **endless}
    return model.generate(prompt_1T, attention_mask=torch.ones_like(prompt_1T), **settings)[0, len(prompt) :].tolist()


def _compare_token_ids(folder: Path, tokenizer: "Tokenizer") -> None:
    """Texts, and every entry of the tokenizer as a text: the same ids, with nothing added, and decoded the same. Raises UserError."""
    other = import_transformers().AutoTokenizer.from_pretrained(folder, **LOCAL)
    entries = [text for number in sorted(tokenizer.get_vocab().values()) if (text := tokenizer.decode([number]))]
    for texts in (TEXTS, *(entries[start : start + 10_000] for start in range(0, len(entries), 10_000))):
        ours = [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        for text, mine, theirs in zip(texts, ours, other(list(texts))["input_ids"], strict=True):
            if mine != theirs:
                raise UserError(f"{folder}: the tokenizers differ on {text!r}: {mine[:12]} here, {theirs[:12]} there.")
            decoded, decoded_there = tokenizer.decode(mine), other.decode(theirs, clean_up_tokenization_spaces=False)
            if decoded != decoded_there:
                raise UserError(f"{folder}: the ids of {text!r} are {decoded!r} here, {decoded_there!r} there.")

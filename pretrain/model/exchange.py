"""Our decoder in Hugging Face's terms: which architecture it is there, its config.json, and which tensor is which. And back.

In: a `ModelSection`, or the content of a config.json. Out: the other one, and the correspondence of parameter names. No files, no
weights: see weights_file.py for shards, and the conductor pretrain/hugging_face.py for what is made of it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from configs.errors import UserError
from configs.model_section import ModelSection, RopeScalingSection
from pretrain.model.decoder import Decoder

ReadWeight = Callable[[str, int, int], torch.Tensor]
"""`read(name, start, count)`: elements [start, start + count) of the flattened parameter of ours called `name`, shape [count]."""
ReadRows = Callable[[str, int, int], torch.Tensor]
"""`read(name, first, end)`: rows [first, end) of the tensor of theirs called `name`."""

_LLAMA: dict[str, Any] = {
    "implementation": None,
    "block": None,
    "feed_forward": "swiglu",
    "norm": "rmsnorm",
    "norm_placement": "before",
    "positions": "rope",
    "sliding_window": None,
    "attention_softcap": None,
    "logit_softcap": None,
    "qk_norm": None,
}
_GPT2 = {"feed_forward": "gelu", "norm": "layernorm", "positions": "learned", "rope_scaling": None, "biases": True}
_ANY_WINDOW = {key: value for key, value in _LLAMA.items() if key != "sliding_window"}
FORMS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _ANY_WINDOW | {"biases": False},
    "qwen3": _ANY_WINDOW | {"biases": False, "qk_norm": "head"},
    "olmo2": _LLAMA | {"biases": False, "qk_norm": "full", "norm_placement": "after"},
    "gpt2": _LLAMA | _GPT2,
}
"""Architecture (`model_type` in a config.json) -> what it wants of a `ModelSection`. The first that fits is taken."""
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}

_OF_TRAINING = ("initial_weights", "initial_deviation", "depth_scaled_initialization", "dropout", "settings")
"""Keys of a `ModelSection` that change nothing of what a given set of weights computes."""


# Ours -> theirs ------------------------------------------------------------------------------------------------


def choose_architecture(section: ModelSection) -> str:
    """The `model_type` that computes what this model computes. Raises UserError, naming the keys that do not fit the nearest one."""
    unfit = {name: _misfits(section, name) for name in FORMS}
    name = min(unfit, key=lambda one: len(unfit[one]))
    if unfit[name]:
        raise UserError(
            f"no architecture of transformers that is known here ({', '.join(FORMS)}) computes what this model does. "
            f"The nearest is {name}, but {'; '.join(unfit[name])}."
        )
    return name


def _misfits(section: ModelSection, name: str) -> list[str]:
    found = [
        f"model.{key} is {_shown(getattr(section, key))}, wanted {_shown(wanted)}"
        for key, wanted in FORMS[name].items()
        if getattr(section, key) != wanted
    ]
    heads_width = section.num_heads * section.features_per_head
    if name == "gpt2" and section.kv_heads != section.num_heads:
        found.append(f"model.num_kv_heads is {section.kv_heads}, wanted {section.num_heads}")
    if name in ("gpt2", "olmo2") and heads_width != section.width:
        found.append(f"model.head_width is {section.head_width}, wanted width / num_heads")
    if name == "llama" and section.width % section.num_heads:  # its configuration refuses that, though its code would not
        found.append(f"model.width is {section.width}, wanted a multiple of num_heads {section.num_heads}")
    return found


def _shown(value: object) -> str:
    return json.dumps(value, default=str)


def config_of(section: ModelSection, end_of_text: int, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json, in the form that transformers 4 and 5 and its imitators read. Raises UserError as `choose_architecture`.

    end_of_text: its id; it is both what a text begins after and what ends it.
    """
    name = choose_architecture(section)
    general = {
        "architectures": [CLASSES[name]],
        "model_type": name,
        "vocab_size": section.vocabulary_size,
        "tie_word_embeddings": section.tied_head,
        "initializer_range": section.initial_deviation,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if name == "gpt2":
        return general | {
            "n_positions": section.largest_context,
            "n_embd": section.width,
            "n_layer": section.num_layers,
            "n_head": section.num_heads,
            "n_inner": section.feed_forward_width,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": section.norm_epsilon,
            "embd_pdrop": section.dropout,
            "attn_pdrop": section.dropout,
            "resid_pdrop": section.dropout,
        }
    config = general | {
        "hidden_size": section.width,
        "intermediate_size": section.feed_forward_width,
        "num_hidden_layers": section.num_layers,
        "num_attention_heads": section.num_heads,
        "num_key_value_heads": section.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": section.largest_context,
        "rms_norm_eps": section.norm_epsilon,
        "rope_theta": section.rope_theta,
        "rope_scaling": None if section.rope_scaling is None else _scaling_of(section.rope_scaling),
        "attention_bias": section.biases,
        "attention_dropout": section.dropout,
        "pad_token_id": None,
    }
    if name != "olmo2":
        config["head_dim"] = section.features_per_head
    if name == "llama":
        config["mlp_bias"] = section.biases
    if name == "mistral":
        config["sliding_window"] = section.sliding_window
    if name == "qwen3":
        config |= {
            "use_sliding_window": section.sliding_window is not None,
            "sliding_window": section.sliding_window,
            "max_window_layers": 0,
        }
    return config


def _scaling_of(scaling: RopeScalingSection) -> dict[str, Any]:
    theirs: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        theirs |= {"low_freq_factor": scaling.low_frequency_factor, "high_freq_factor": scaling.high_frequency_factor}
    if scaling.kind == "yarn":
        theirs |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.attention_factor is not None:
            theirs["attention_factor"] = scaling.attention_factor
    if scaling.kind != "linear":
        theirs["original_max_position_embeddings"] = scaling.original_context
    return theirs


# Theirs -> ours ------------------------------------------------------------------------------------------------


def section_of(config: Mapping[str, Any]) -> ModelSection:
    """The model that a config.json describes. Raises UserError with key, found and wanted for what our decoder does not compute.

    config: with all defaults, as `transformers.AutoConfig.from_pretrained(...).to_dict()` gives it.
    """
    name = config.get("model_type")
    if name not in FORMS:
        raise UserError(f"config.json: model_type: found {name}, wanted one of {', '.join(FORMS)}.")
    _refuse(config, "quantization_config", (None,))
    form = {key: value for key, value in FORMS[name].items() if value is not None}
    if name == "gpt2":
        _refuse(config, "activation_function", ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"))
        _refuse(config, "scale_attn_weights", (True,))
        _refuse(config, "scale_attn_by_inverse_layer_idx", (False,))
        _refuse(config, "add_cross_attention", (False,))
        return ModelSection(
            **form,
            vocabulary_size=config["vocab_size"],
            num_layers=config["n_layer"],
            width=config["n_embd"],
            num_heads=config["n_head"],
            feed_forward_width=config["n_inner"] or 4 * config["n_embd"],
            norm_epsilon=config["layer_norm_epsilon"],
            largest_context=config["n_positions"],
            tied_head=config["tie_word_embeddings"],
        )
    _refuse(config, "hidden_act", ("silu", "swish"))
    biases = False
    if name == "llama":
        biases = bool(config.get("attention_bias"))
        _refuse(config, "mlp_bias", (biases,), " as attention_bias is")
    else:
        _refuse(config, "attention_bias", (False,))
    width, num_heads = config["hidden_size"], config["num_attention_heads"]
    head_width = config.get("head_dim")
    return ModelSection(
        **form | {"biases": biases},
        vocabulary_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        width=width,
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads"),
        head_width=None if head_width is None or head_width * num_heads == width else head_width,
        feed_forward_width=config["intermediate_size"],
        norm_epsilon=config["rms_norm_eps"],
        largest_context=config["max_position_embeddings"],
        sliding_window=_window_of(config, name),
        tied_head=config["tie_word_embeddings"],
        **_positions_of(config),
    )


def _refuse(config: Mapping[str, Any], key: str, wanted: tuple[Any, ...], remark: str = "", prefix: str = "") -> None:
    """Raise UserError unless `config[key]` is one of the wanted values; a key that is not there is as the first of them."""
    if (found := config.get(key, wanted[0])) not in wanted:
        shown = " or ".join(_shown(one) for one in wanted)
        raise UserError(f"config.json: {prefix}{key}: found {_shown(found)}, wanted {shown}{remark}; our decoder computes nothing else.")


def _window_of(config: Mapping[str, Any], name: str) -> int | None:
    if name == "mistral":
        return config["sliding_window"]
    if name != "qwen3":
        return None
    num_full = config["max_window_layers"] if config["use_sliding_window"] else config["num_hidden_layers"]
    by_default = ["full_attention" if index < num_full else "sliding_attention" for index in range(config["num_hidden_layers"])]
    kinds: set[str] = set(config.get("layer_types") or by_default)
    if len(kinds) > 1:
        raise UserError("config.json: layer_types: found windows in some layers only, wanted the same kind of attention in every layer.")
    return config["sliding_window"] if "sliding_attention" in kinds else None


def _positions_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling: since transformers 5 one mapping, before two keys."""
    theirs: dict[str, Any] = {"rope_theta": config.get("rope_theta", 10_000.0), **(config.get("rope_scaling") or {})}
    theirs |= config.get("rope_parameters") or {}
    kind = theirs.pop("rope_type", theirs.pop("type", "default"))
    theirs.pop("type", None)
    theta = float(theirs.pop("rope_theta"))
    prefix = "rope_scaling."
    _refuse({"rope_type": kind}, "rope_type", ("default", "linear", "llama3", "yarn"), prefix=prefix)
    _refuse(theirs, "partial_rotary_factor", (1.0, None), prefix=prefix)
    theirs.pop("partial_rotary_factor", None)
    if kind == "default":
        return {"rope_theta": theta}
    _refuse(theirs, "truncate", (True,), prefix=prefix)
    theirs.pop("truncate", None)
    names = {
        "factor": "factor",
        "original_max_position_embeddings": "original_context",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    }
    if unknown := sorted(key for key in theirs.keys() - names.keys() if theirs[key] is not None):
        raise UserError(
            f"config.json: {prefix}{unknown[0]}: found {theirs[unknown[0]]}, wanted none; our decoder computes nothing with it."
        )
    ours: dict[str, Any] = {names[key]: float(value) for key, value in theirs.items() if value is not None}
    # Linear stretching does not look at it.
    ours["original_context"] = int(ours.get("original_context", config["max_position_embeddings"]))
    return {"rope_theta": theta, "rope_scaling": RopeScalingSection(kind=kind, **ours)}


def what_is_computed(section: ModelSection) -> dict[str, Any]:
    """The keys that decide what given weights compute, resolved: equal for two sections that compute the same."""
    keys: dict[str, Any] = section.model_dump(exclude=set(_OF_TRAINING)) | {
        "num_kv_heads": section.kv_heads,
        "head_width": section.features_per_head,
    }
    if section.positions != "rope":
        del keys["rope_theta"]
    if section.rope_scaling is not None and section.rope_scaling.kind == "linear":
        keys["rope_scaling"] = {"kind": "linear", "factor": section.rope_scaling.factor}
    return keys


# Names ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Correspondence:
    """A tensor of theirs is these parameters of ours, one below the other (along dimension 0), then transposed if so."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False


_LAYER = {
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.output",
    "self_attn.q_norm": "attention.query_norm",
    "self_attn.k_norm": "attention.key_norm",
    "mlp.gate_proj": "feed_forward.gate",
    "mlp.up_proj": "feed_forward.up",
    "mlp.down_proj": "feed_forward.down",
}
_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "feed_forward_norm"}
_NORMS_AFTER = {"post_attention_layernorm": "attention_norm", "post_feedforward_layernorm": "feed_forward_norm"}


def parameter_shapes(section: ModelSection) -> dict[str, tuple[int, ...]]:
    """Our parameters and their shapes, in the order of the model; takes no memory."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Decoder(section).named_parameters()}


def correspondences(section: ModelSection, architecture: str) -> list[Correspondence]:
    """Every parameter of ours, exactly once, and the tensor of theirs that holds it.

    Theirs are the names of the whole model (with `model.` or `transformer.`), and GPT-2's matrices are (in, out) there.
    """
    shapes = parameter_shapes(section)
    modules: list[tuple[str, tuple[str, ...], bool]]
    layers = range(section.num_layers)
    if architecture == "gpt2":
        modules = [("transformer.wte", ("token_table",), False), ("transformer.wpe", ("position_table",), False)]
        for index in layers:
            there, here = f"transformer.h.{index}.", f"blocks.{index}."
            attention = tuple(f"{here}attention.{part}" for part in ("query", "key", "value"))
            modules += [
                (f"{there}ln_1", (f"{here}attention_norm",), False),
                (f"{there}attn.c_attn", attention, True),
                (f"{there}attn.c_proj", (f"{here}attention.output",), True),
                (f"{there}ln_2", (f"{here}feed_forward_norm",), False),
                (f"{there}mlp.c_fc", (f"{here}feed_forward.up",), True),
                (f"{there}mlp.c_proj", (f"{here}feed_forward.down",), True),
            ]
        modules.append(("transformer.ln_f", ("final_norm",), False))
    else:
        parts = _LAYER | (_NORMS if section.norm_placement == "before" else _NORMS_AFTER)
        modules = [("model.embed_tokens", ("token_table",), False)]
        modules += [
            (f"model.layers.{index}.{there}", (f"blocks.{index}.{here}",), False) for index in layers for there, here in parts.items()
        ]
        modules.append(("model.norm", ("final_norm",), False))
    modules.append(("lm_head", ("head",), False))
    found = [
        Correspondence(f"{there}.{kind}", tuple(f"{name}.{kind}" for name in here), turned and kind == "weight")
        for there, here, turned in modules
        for kind in ("weight", "bias")
        if f"{here[0]}.{kind}" in shapes
    ]
    named = [name for one in found for name in one.ours]
    if sorted(named) != sorted(shapes):
        raise ValueError(f"{architecture} names {len(named)} parameters, the model has {len(shapes)}: {set(named) ^ set(shapes)}")
    return found


def reading_theirs(section: ModelSection, architecture: str, read_rows: ReadRows) -> ReadWeight:
    """Their tensors, read as parameters of ours."""
    shapes, places = parameter_shapes(section), dict[str, tuple[Correspondence, int]]()
    for one in correspondences(section, architecture):
        row = 0
        for name in one.ours:
            places[name] = one, row
            row += shapes[name][0]

    def read(name: str, start: int, count: int) -> torch.Tensor:
        (one, first), shape = places[name], shapes[name]
        row_size = torch.Size(shape[1:]).numel()
        low, high = start // row_size, -(-(start + count) // row_size)
        if one.transposed:
            rows = read_rows(one.theirs, 0, shape[1]).T[first + low : first + high]
        else:
            rows = read_rows(one.theirs, first + low, first + high)
        return rows.reshape(-1)[start - low * row_size :][:count]

    return read


def their_shape(one: Correspondence, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of a tensor of theirs, from those of our parameters."""
    rows = sum(shapes[name][0] for name in one.ours)
    shape = (rows, *shapes[one.ours[0]][1:])
    return shape[::-1] if one.transposed else shape

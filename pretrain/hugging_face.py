"""Hugging Face out and in: a run's newest checkpoint as a folder that transformers loads, and such a folder as initial weights.

In: a run folder, or a local model folder (config.json, safetensors, tokenizer.json). Out: the other one, written beside its final name
and renamed only when it has been proved to be the same model (proof.py). No process group, no GPU, no network, no pickle, no code of
a model folder.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from tokenizers import Tokenizer

from configs.durable import new_folder, write_file
from configs.errors import UserError
from configs.model_section import ModelSection
from data_pipeline.tokenizer import end_of_text_id, load_tokenizer
from pretrain.checkpoint.index import WEIGHT, FragmentIndex
from pretrain.model.exchange import (
    FORMS,
    ReadWeight,
    choose_architecture,
    config_of,
    correspondences,
    parameter_shapes,
    reading_theirs,
    section_of,
    their_shape,
)
from pretrain.model.weights_file import IMPORTED, SHARD_BYTES, NamedTensor, Shards, described, ranges, write_shards
from pretrain.proof import LOCAL, TEXTS, Proof, import_transformers, prove_equal
from pretrain.run.folder import RunFolder
from pretrain.write import newest_intact_commit

WEIGHTS = "model"
"""Name of weight files, as transformers looks for it: model.safetensors, or model-00001-of-0000N.safetensors."""


# Out -----------------------------------------------------------------------------------------------------------


def export_run(
    run: RunFolder,
    out: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    say: Callable[[str], None],
    shard_bytes: int = SHARD_BYTES,
    memory_bytes: int | None = None,
) -> Proof:
    """Write the newest intact checkpoint to `out` for transformers. Its weights are read by ranges, at any ZeRO stage and world size.

    dtype: the weights are rounded to it. memory_bytes: see `proof.prove_equal`. Raises UserError for a model that no architecture
    expresses, an `out` that is there already, and a folder that would not be the same model; `out` is then not there.
    """
    config = run.load_config()
    section = config.model
    architecture = choose_architecture(section)
    if config.objective.kind == "prefix":
        raise UserError(
            "objective.kind is prefix, wanted next_token or continuation: no architecture of transformers that is known here sees the "
            "given part of a document in both directions."
        )
    import_transformers()
    with new_folder(out) as folder:
        commit = newest_intact_commit(run, say)
        index = FragmentIndex(commit)
        if index.shapes != parameter_shapes(section):
            raise UserError(f"{commit.folder} holds other parameters than {run.config_file} describes: that file was changed.")

        def read(name: str, start: int, count: int) -> torch.Tensor:
            return index.read(WEIGHT, name, start, count).to(dtype)

        tokenizer = load_tokenizer(run.tokenizer_file, config.data.tokenizer.end_of_text)
        end_of_text = end_of_text_id(tokenizer, config.data.tokenizer.end_of_text)
        _write_json(folder / "config.json", config_of(section, end_of_text, dtype))
        _write_json(folder / "generation_config.json", {"bos_token_id": end_of_text, "eos_token_id": end_of_text})
        _write_tokenizer(folder, run.tokenizer_file, tokenizer, config.data.tokenizer.end_of_text, section.largest_context)
        files = write_shards(folder, WEIGHTS, their_tensors(section, architecture, read, dtype), shard_bytes)
        say(f"{commit.folder.name} is written as {architecture}; it is now compared with what transformers reads")
        theirs = reading_theirs(section, architecture, Shards(_shard_files(folder)).rows)
        proof = prove_equal(
            folder,
            section,
            ours=read,
            theirs=theirs,
            tokenizer=tokenizer,
            end_of_text=end_of_text,
            scratch=folder,
            memory_bytes=memory_bytes,
        )
    size, stored = sum(known["bytes"] for known in files.values()), str(dtype).removeprefix("torch.")
    say(f"{out}: {architecture}, {proof.num_parameters:,} parameters in {stored}, {size / 1e6:,.1f} MB; {_told(proof)}")
    return proof


def their_tensors(section: ModelSection, architecture: str, read: ReadWeight, dtype: torch.dtype) -> list[NamedTensor]:
    """Every tensor of theirs, made of our parameters, a piece at a time where it is not transposed."""
    shapes = parameter_shapes(section)

    def tensor(one: Any) -> NamedTensor:
        def pieces() -> Iterator[torch.Tensor]:
            sizes = {name: torch.Size(shapes[name]).numel() for name in one.ours}
            if one.transposed:
                whole = torch.cat([read(name, 0, sizes[name]).view(shapes[name]) for name in one.ours])
                yield whole.T.reshape(-1)
                return
            for name in one.ours:
                for start, count in ranges(sizes[name]):
                    yield read(name, start, count)

        return NamedTensor(one.theirs, their_shape(one, shapes), dtype, pieces)

    return [tensor(one) for one in correspondences(section, architecture)]


def _write_tokenizer(folder: Path, source: Path, tokenizer: Tokenizer, end_of_text: str, context: int) -> None:
    """The run's tokenizer.json, which adds nothing to a text because nothing was added while training, and its configuration."""
    content = json.loads(source.read_text(encoding="utf-8"))
    if any(tokenizer.encode(text).ids != tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS):
        content["post_processor"] = None
    write_file(folder / "tokenizer.json", json.dumps(content, ensure_ascii=False).encode("utf-8"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # any other rebuilds the tokenizer from its vocabulary
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", settings)


# In ------------------------------------------------------------------------------------------------------------


def import_model(
    source: Path, out: Path, *, say: Callable[[str], None], shard_bytes: int = SHARD_BYTES, memory_bytes: int | None = None
) -> Proof:
    """Write the local model folder `source` to `out` as initial weights: our names, the stored dtypes, model.yaml to include.

    memory_bytes: see `proof.prove_equal`. Raises UserError for a model that our decoder does not compute (key, found, wanted), a
    folder without safetensors, an `out` that is there already, and weights that would not compute the same; `out` is then not there.
    """
    section, architecture = read_architecture(source)
    shards = open_model(source, section, architecture)
    with new_folder(out) as folder:
        shapes = parameter_shapes(section)
        theirs = reading_theirs(section, architecture, shards.rows)
        dtypes = {name: shards.dtypes[one.theirs] for one in correspondences(section, architecture) for name in one.ours}

        def tensor(name: str) -> NamedTensor:
            size = torch.Size(shapes[name]).numel()
            return NamedTensor(name, shapes[name], dtypes[name], lambda: (theirs(name, *part) for part in ranges(size)))

        files = write_shards(folder, WEIGHTS, [tensor(name) for name in shapes], shard_bytes)
        files |= _take_over_tokenizer(source, folder, out, say)
        sections = {"model": section.model_dump(mode="json", exclude_defaults=True) | {"initial_weights": str(out.resolve())}}
        if "tokenizer.json" in files and (end_of_text := _end_of_text(source)) is not None:
            sections["data"] = {"tokenizer": {"path": str(out.resolve() / "tokenizer.json"), "end_of_text": end_of_text}}
        lines = [f"# {architecture}, imported from {source}. Include it in a run file; training then starts from its weights."]
        for name, keys in sections.items():  # JSON is YAML in which a path is never taken for a number
            lines += [f"{name}:", *(f"  {key}: {json.dumps(value)}" for key, value in keys.items())]
        write_file(folder / "model.yaml", ("\n".join(lines) + "\n").encode())

        ours = Shards(_shard_files(folder)).read
        say(f"{source} is read as {architecture}; the decoder is now compared with transformers")
        proof = prove_equal(
            source, section, ours=ours, theirs=theirs, tokenizer=None, end_of_text=None, scratch=folder, memory_bytes=memory_bytes
        )
        files["model.yaml"] = described(folder / "model.yaml")
        _write_json(folder / IMPORTED, {"format": 1, "files": files})
    say(f"{out}: {proof.num_parameters:,} parameters; {_told(proof)} Train from it: include: [{out / 'model.yaml'}]")
    return proof


def read_architecture(source: Path) -> tuple[ModelSection, str]:
    """What a model folder's config.json describes. Raises UserError for what our decoder does not compute."""
    path = source / "config.json"
    if not path.is_file():
        found = "holds no config.json" if source.is_dir() else "is a file" if source.exists() else "is not there"
        raise UserError(f"{source} {found}; wanted a local folder as `save_pretrained` writes it.")
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from None
    except (KeyError, TypeError):
        raise UserError(f"{path} has no model_type; wanted the configuration of a model, as `save_pretrained` writes it.") from None
    if name not in FORMS:
        raise UserError(f"{path}: model_type: found {name}, wanted one of {', '.join(FORMS)}.")
    transformers = import_transformers()
    try:  # AutoConfig fills in what the file leaves to the architecture's defaults
        return section_of(transformers.AutoConfig.from_pretrained(source, **LOCAL).to_dict()), name
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'together'}: {one['msg']}" for one in error.errors())
        raise UserError(f"{path}: our model cannot have its sizes: {problems}.") from None
    except Exception as error:  # the library checks values with errors of several kinds
        raise UserError(f"{path}: not a configuration of {name} that can be used: {error}") from None


def open_model(source: Path, section: ModelSection, architecture: str) -> Shards:
    """The folder's weights by the whole model's names. Raises UserError: pickled, missing, left over or of another shape."""
    files = _shard_files(source)
    if not files:
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in source.glob(pattern))
        raise UserError(
            f"{source} holds no {WEIGHTS}.safetensors"
            + (
                f", only {', '.join(pickled[:3])}, which may run any code when it is opened. Convert it where you trust it: load the "
                "model with transformers and call save_pretrained."
                if pickled
                else f" and no {WEIGHTS}.safetensors.index.json; wanted a local folder as `save_pretrained` writes it."
            )
        )
    shards = Shards(files)
    shapes = parameter_shapes(section)
    wanted = {one.theirs: their_shape(one, shapes) for one in correspondences(section, architecture)}
    base = "transformer." if architecture == "gpt2" else "model."
    for name in list(shards.shapes):  # a model saved without its head (GPT-2's first files) leaves the prefix out
        if name not in wanted and f"{base}{name}" in wanted:
            shards.rename(name, f"{base}{name}")
    derived = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # masks and angles, which older versions stored
    extra = sorted(name for name in shards.shapes.keys() - wanted.keys() if not name.endswith(derived))
    if section.tied_head and extra == ["lm_head.weight"]:
        extra = []  # stored though it is tied; transformers takes the table, and so do we
    missing = sorted(wanted.keys() - shards.shapes.keys())
    if missing or extra:
        raise UserError(
            f"{source}: the weights are not those of its config.json: missing {missing[:3] or 'none'} ({len(missing)}), "
            f"left over {extra[:3] or 'none'} ({len(extra)})."
        )
    for name, shape in wanted.items():
        if shards.shapes[name] != shape:
            raise UserError(f"{source}: {name}: found shape {shards.shapes[name]}, wanted {shape} by its config.json.")
        if shards.dtypes[name] == torch.uint8:
            raise UserError(f"{source}: {name}: found numbers of another kind, wanted F32, BF16 or F16.")
    return shards


def _shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder; those of its index where it has one, as transformers has it."""
    single, index = folder / f"{WEIGHTS}.safetensors", folder / f"{WEIGHTS}.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index} cannot be read as the index of a model's shards.") from None
    if strange := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise UserError(f"{index}: found the file name {strange[0]!r}, wanted a file beside the index.")
    return [folder / name for name in names]


def _take_over_tokenizer(source: Path, folder: Path, out: Path, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    path = source / "tokenizer.json"
    if not path.is_file():
        say(
            f"WARNING: {source} has no tokenizer.json, so {out} has none; give the model's own in data.tokenizer.path, and its size in "
            "data.tokenizer.vocabulary_size."
        )
        return {}
    write_file(folder / path.name, path.read_bytes())
    return {path.name: described(folder / path.name)}


def _end_of_text(source: Path) -> str | None:
    """The text of the token that ends a document: the tokenizer's own word, else the model's id."""
    path = source / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no type of its own
        raise UserError(f"{path} cannot be read as a tokenizer: {error}.") from None

    def read(name: str, key: str) -> Any:
        try:
            return json.loads((source / name).read_text(encoding="utf-8")).get(key)
        except (OSError, ValueError, AttributeError):
            return None

    token = read("tokenizer_config.json", "eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str) and tokenizer.token_to_id(token) is not None:
        return token
    number = read("config.json", "eos_token_id")
    number = number[0] if isinstance(number, list) and number else number
    return tokenizer.id_to_token(number) if isinstance(number, int) else None


# Both ----------------------------------------------------------------------------------------------------------


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_file(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))


def _told(proof: Proof) -> str:
    return (
        f"transformers {proof.transformers_version} computes the same: every weight is equal, logits differ by at most "
        f"{proof.largest_difference:.1e} (they reach {proof.largest_logit:.3g})."
    )

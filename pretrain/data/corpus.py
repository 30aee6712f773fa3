"""A built dataset, opened for training: the two token streams and what the run must know about them.

In: the run configuration. Out: a `Corpus`, or a `UserError` when the data is unfinished, changed, or does not fit.
"""

from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from configs.schema import RunConfig
from data_pipeline.manifest import Manifest, Split, load_manifest, manifest_hash
from data_pipeline.shards import Shard
from pretrain.data.batches import TokenStream


@dataclass(frozen=True)
class Corpus:
    """Memory-mapped tokens of both splits; nothing is loaded."""

    train: TokenStream
    held_out: TokenStream
    held_out_bytes: int
    """Bytes of the held-out text, in UTF-8."""
    end_of_text: int
    identity: dict[str, str]
    """SHA-256 of the manifest and of the tokenizer: a run goes on only with the same."""


def open_corpus(config: RunConfig) -> Corpus:
    """Open the dataset that `config.data` names. Raises UserError."""
    folder = Path(config.data.folder())
    manifest = load_manifest(folder)
    if manifest.vocabulary_size > config.model.vocabulary_size:
        raise UserError(
            f"{folder} has token ids up to {manifest.vocabulary_size - 1} and model.vocabulary_size is "
            f"{config.model.vocabulary_size}; it must be at least {manifest.vocabulary_size}."
        )
    train = _open_split(folder, manifest, "train")
    if len(train) <= config.training.sequence_length:
        raise UserError(
            f"{folder} has {len(train)} tokens to learn from and one sample needs {config.training.sequence_length + 1}; "
            "add text, or lower training.sequence_length."
        )
    return Corpus(
        train,
        _open_split(folder, manifest, "held_out"),
        sum(shard.num_bytes for shard in manifest.shards("held_out")),
        manifest.end_of_text_id,
        {"data": manifest_hash(folder), "tokenizer": manifest.tokenizer_sha256},
    )


def _open_split(folder: Path, manifest: Manifest, split: Split) -> TokenStream:
    return TokenStream([Shard(folder / shard.name) for shard in manifest.shards(split)])

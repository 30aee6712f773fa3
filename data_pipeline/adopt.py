"""Documents that were tokenised elsewhere: checked against the tokenizer, measured, ended as ours are.

In: a `TokenDocument` and the tokenizer's facts. Out: ids in the shards' type with an end of text, and the bytes of their text.
"""

from typing import Any

import numpy as np
from tokenizers import Tokenizer

from configs.errors import UserError
from data_pipeline.documents import TokenDocument
from data_pipeline.tokenizer import vocabulary_size

IdBytes = np.ndarray[Any, np.dtype[np.int64]]


def measure_ids(tokenizer: Tokenizer) -> IdBytes:
    """Bytes of text that each id stands for, (V,); 0 for added tokens. Exact for byte-level tokenizers, whose pieces spell one
    character for each byte; for others, those of the piece decoded alone."""
    added = tokenizer.get_added_tokens_decoder()
    byte_level = type(tokenizer.decoder).__name__ == "ByteLevel"
    sizes = np.zeros(vocabulary_size(tokenizer), dtype=np.int64)
    for piece, number in tokenizer.get_vocab(with_added_tokens=True).items():
        if number in added:
            continue
        sizes[number] = len(piece) if byte_level else len(tokenizer.decode([number]).encode("utf-8"))
    return sizes


def adopt_ids(document: TokenDocument, id_bytes: IdBytes, end: int, dtype: np.dtype[Any]) -> tuple[np.ndarray[Any, Any], int]:
    """A document's ids with one end of text behind them, and the bytes of its text. Raises UserError: an id that the
    tokenizer does not have."""
    tokens = document.tokens
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < id_bytes.size:
        raise UserError(
            f"document {document.position} of {document.file} (source {document.source}) has the token id {int(tokens.max())}, the "
            f"tokenizer ids 0 to {id_bytes.size - 1}; set data.tokenizer.path to the tokenizer that the shard was made with."
        )
    if not tokens.size or int(tokens[-1]) != end:
        tokens = np.append(tokens, np.array([end], dtype=tokens.dtype if tokens.size else dtype))
    return tokens.astype(dtype), int(id_bytes[tokens].sum())

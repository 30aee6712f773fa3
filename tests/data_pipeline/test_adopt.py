"""Token documents made elsewhere: measured as their text would be, ended once, refused where an id is foreign."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from configs.errors import UserError
from data_pipeline.adopt import adopt_ids, measure_ids
from data_pipeline.documents import TokenDocument
from data_pipeline.tokenizer import train_tokenizer

END = "<|endoftext|>"


def document(tokens, dtype=np.int32) -> TokenDocument:
    return TokenDocument("made", "corpus.bin", 4, np.array(tokens, dtype=dtype))


def test_bytes_are_those_of_the_text():
    tokenizer = train_tokenizer(["the quick brown fox naïve 東京 🦊 " * 20], 400, END)
    end = tokenizer.token_to_id(END)
    sizes = measure_ids(tokenizer)
    for text in ("the quick fox", "東京 🦊 naïve\n\x00", "\u0300x", "entirely new words"):
        ids = tokenizer.encode(text).ids
        for given in (ids, [*ids, end]):
            tokens, num_bytes = adopt_ids(document(given), sizes, end, np.dtype(np.uint16))
            assert tokens.tolist() == [*ids, end] and tokens.dtype == np.uint16
            assert num_bytes == len(text.encode())


def test_pieces_of_other_tokenizers_are_measured_decoded():
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "word": 1, "longer": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([END])
    assert measure_ids(tokenizer).tolist() == [5, 4, 6, 0]


@pytest.mark.parametrize("tokens", [[1, 2, 400], [-1, 2]])
def test_foreign_ids_are_refused(tokens):
    tokenizer = train_tokenizer(["text"], 300, END)
    with pytest.raises(UserError, match=r"document 4 of corpus.bin \(source made\) has the token id .*; set data.tokenizer.path"):
        adopt_ids(document(tokens), measure_ids(tokenizer), 0, np.dtype(np.uint16))


def test_an_empty_document_is_an_end():
    tokenizer = train_tokenizer(["text"], 300, END)
    tokens, num_bytes = adopt_ids(document([], np.uint16), measure_ids(tokenizer), 0, np.dtype(np.uint16))
    assert (tokens.tolist(), num_bytes) == ([0], 0)

"""The tokenizer: a byte-level BPE, trained here or loaded from a `tokenizer.json`.

In: texts, or a file. Out: a `tokenizers.Tokenizer` that turns any text into ids and back without loss, and that reads
a special token's spelling inside a document as ordinary text: only the pipeline itself may place the end of a text. Added
tokens that are not special (separators, marks of one's own) are the opposite: their spelling in a text is the token.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from configs.durable import sha256_of_file
from configs.errors import UserError


def train_tokenizer(texts: Iterable[str], vocabulary_size: int, end_of_text: str, added_tokens: Sequence[str] = ()) -> Tokenizer:
    """Train a byte-level BPE (GPT-2's form): no normaliser, all 256 bytes in it, so nothing is ever unknown.

    `vocabulary_size` includes `end_of_text`, which becomes id 0, and the `added_tokens`, which get the highest ids: each is one
    token wherever it stands in a text, and what is trained on is the text between them. A small corpus may give fewer entries. The
    same texts give the same tokenizer. Raises ValueError below 257 entries besides the added tokens.
    """
    if vocabulary_size - len(added_tokens) < 257:
        also = f" besides {len(added_tokens)} added tokens" if added_tokens else ""
        raise ValueError(f"a vocabulary of {vocabulary_size} entries cannot hold the 256 bytes and the end of a text{also}")
    if added_tokens:
        between = re.compile("|".join(re.escape(token) for token in sorted(added_tokens, key=len, reverse=True)))
        texts = (part for text in texts for part in between.split(text))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - len(added_tokens),
        special_tokens=[end_of_text],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added_tokens])
    return _for_documents(tokenizer, end_of_text)


def load_tokenizer(path: Path, end_of_text: str) -> Tokenizer:
    """Load a `tokenizer.json`. Raises UserError when it is missing, not valid, or has no `end_of_text` token."""
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such tokenizer file; give the path of a tokenizer.json, or leave data.tokenizer.path out.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a tokenizer.json: {error}.") from None
    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # the library raises no narrower type
        raise UserError(f"{path}: not a tokenizer.json of Hugging Face tokenizers ({error}).") from None
    if tokenizer.token_to_id(end_of_text) is None:
        near = sorted(token.content for token in tokenizer.get_added_tokens_decoder().values())[:8]
        raise UserError(
            f"{path}: has no token {end_of_text!r}; set data.tokenizer.end_of_text to one it has"
            + (f" (its added tokens: {', '.join(near)})." if near else ".")
        )
    return _for_documents(tokenizer, end_of_text)


def tokenizer_hash(path: Path) -> str:
    """SHA-256 of the tokenizer's file, in hexadecimal: another file may give the same ids another meaning."""
    return sha256_of_file(path)


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """The highest id + 1, added tokens included: the rows an embedding table needs."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def end_of_text_id(tokenizer: Tokenizer, end_of_text: str) -> int:
    """The id placed after each document. Raises UserError when the tokenizer lacks the token."""
    number = tokenizer.token_to_id(end_of_text)
    if number is None:
        raise UserError(f"the tokenizer has no token {end_of_text!r}; set data.tokenizer.end_of_text to one it has.")
    return number


def entry_id(tokenizer: Tokenizer, entry: str, key: str) -> int:
    """The id of an entry that a `key` of the run file names. Raises UserError when the tokenizer lacks it."""
    number = tokenizer.token_to_id(entry)
    if number is None:
        known = sorted(token.content for token in tokenizer.get_added_tokens_decoder().values())[:8]
        raise UserError(
            f"{key}: the dataset's tokenizer has no entry {entry!r}"
            + (f" (its added tokens: {', '.join(known)})" if known else "")
            + "; add it to data.tokenizer.added_tokens and build the data again, or name an entry that it has."
        )
    return number


def _for_documents(tokenizer: Tokenizer, end_of_text: str) -> Tokenizer:
    """Settings under which every text is encoded whole and as text; `tokenizer.json` does not keep the last of them."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Also where a file lists it as an ordinary added token: the next line reaches only special ones.
    tokenizer.add_special_tokens([AddedToken(end_of_text, special=True, normalized=False)])
    tokenizer.encode_special_tokens = True
    return tokenizer

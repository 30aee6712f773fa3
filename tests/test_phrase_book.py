"""The packaged phrase book: a prefix that sees both ways is learnt from, and each phrase is answered to its end of text."""

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from tokenizers import Tokenizer

from configs.loader import PACKAGED, load_config
from configs.schema import RunConfig
from data_pipeline.build import build_dataset
from data_pipeline.execution import open_here
from data_pipeline.tokenizer import load_tokenizer
from pretrain.data.batches import Batches, MicroBatch
from pretrain.data.corpus import Corpus, open_corpus
from pretrain.data.objective import open_objective
from pretrain.data.order import DataOrder
from pretrain.model.attention import KeyValueCache
from pretrain.model.build import build_model
from pretrain.model.decoder import Decoder
from pretrain.model.weights import initialize_weights

RUN_FILE = PACKAGED / "runs" / "phrase-book.yaml"
BOOK = PACKAGED / "data" / "phrase-book.jsonl"
SEPARATOR = "<|sep|>"
NUM_PHRASES, NUM_STEPS = 20, 150


def read_pairs() -> list[tuple[str, str]]:
    texts = [json.loads(line)["text"] for line in BOOK.read_text(encoding="utf-8").splitlines()]
    return [(given, answer) for given, _, answer in (text.partition(SEPARATOR) for text in texts)]


def test_the_book_is_what_it_says() -> None:
    pairs = read_pairs()
    assert 150 <= len(pairs) <= 300
    assert len({given for given, _ in pairs}) == len(pairs), "a phrase has one answer"
    assert dict(pairs)["let's go"] == "vamos"
    for given, answer in pairs:
        assert given.isascii() and given == given.strip() and answer == answer.strip() and given and answer
        assert SEPARATOR not in answer and unicodedata.is_normalized("NFC", answer)


def test_the_packaged_run_is_one_of_prefixes() -> None:
    config = load_config(RUN_FILE)
    assert (config.objective.kind, config.objective.separator) == ("prefix", SEPARATOR)
    assert config.data.tokenizer.added_tokens == (SEPARATOR,) and config.training.packing == "best_fit"
    assert config.run.deterministic and config.precision == "fp32" and config.data.held_out_fraction == 0
    assert (PACKAGED.parent / config.data.sources[0].path).samefile(BOOK)


# --- a smaller cut ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """Twenty phrases, built, and a small model."""

    config: RunConfig
    corpus: Corpus
    tokenizer: Tokenizer
    pairs: list[tuple[str, str]]

    def batches(self) -> Batches:
        config = self.config
        order = DataOrder(self.corpus.sources, config.mixture, config.training, config.run.seed)
        return Batches(self.corpus, order, config.training, 0, 1, torch.device("cpu"), objective=open_objective(config))

    def model(self) -> Decoder:
        model = build_model(self.config.model, self.config.objective)
        initialize_weights(model, self.config.model, self.config.run.seed)
        return model

    def prompt(self, given: str) -> list[int]:
        separator = self.tokenizer.token_to_id(SEPARATOR)
        return [self.corpus.end_of_text, *self.tokenizer.encode(given, add_special_tokens=False).ids, separator]


@pytest.fixture(scope="module", name="cut")
def _cut(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cut]:
    place = tmp_path_factory.mktemp("phrase-book")
    pairs = read_pairs()[:NUM_PHRASES]
    rows = [json.dumps({"text": f"{given}{SEPARATOR}{answer}"}) for given, answer in pairs]
    (place / "book.jsonl").write_text("\n".join(rows))
    config = load_config(
        RUN_FILE,
        [
            f"data.root={place / 'dataset'}",
            f"data.sources=[{{name: book, path: {place / 'book.jsonl'}}}]",
            "model.width=64",
            "model.feed_forward_width=128",
            "training.global_batch_samples=3",
            "training.micro_batch_samples=3",
        ],
    )
    build_dataset(config.data, lambda progress: None, open_here, False)
    corpus = open_corpus(config)
    yield Cut(config, corpus, load_tokenizer(place / "dataset" / "tokenizer.json", "<|endoftext|>"), pairs)
    corpus.streams[0].files.close()


def feed(model: Decoder, batch: MicroBatch, labels_BT: torch.Tensor | None) -> torch.Tensor:
    return model(batch.tokens_BT, labels_BT, documents_BT=batch.documents_BT, positions_BT=batch.positions_BT, prefix_BT=batch.prefix_BT)


@torch.no_grad()
def answer(model: Decoder, prompt: list[int], end_of_text: int, max_new_tokens: int) -> list[int]:
    """The most likely tokens behind a prompt whose places see each other, up to the end of text, which is the last of them."""
    cache = KeyValueCache(model.section.num_layers, len(prompt) + max_new_tokens)
    tokens_BT = torch.tensor([prompt])
    prefix_BT: torch.Tensor | None = torch.ones_like(tokens_BT, dtype=torch.bool)
    found: list[int] = []
    while len(found) < max_new_tokens and end_of_text not in found:
        logits_BTV = model(tokens_BT, prefix_BT=prefix_BT, cache=cache, last_only=True)
        found.append(int(logits_BTV[0, -1].argmax()))
        tokens_BT, prefix_BT = torch.tensor([found[-1:]]), None
    return found


def test_what_is_learnt_are_the_answers_and_each_is_given(cut: Cut) -> None:
    """A plain loop over the same batches: every phrase is answered exactly, and the answer ends."""
    model, batches = cut.model(), cut.batches()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    targets = {(*cut.tokenizer.encode(text, add_special_tokens=False).ids, cut.corpus.end_of_text) for _, text in cut.pairs}
    seen: set[tuple[int, ...]] = set()
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1.0, (step + 1) / 20, (NUM_STEPS - step) / 50)
        (batch,) = batches.next_step()
        seen |= set(split_targets(batch))
        loss = feed(model, batch, batch.labels_BT) / batch.num_valid
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    batches.close()
    assert seen == targets, "what is learnt are the answers with their end of text, and nothing else"
    model.eval()
    end = cut.corpus.end_of_text
    for given, text in cut.pairs:
        found = answer(model, cut.prompt(given), end, 30)
        assert found[-1] == end and cut.tokenizer.decode(found[:-1], skip_special_tokens=False) == text, given


def split_targets(batch: MicroBatch) -> Iterator[tuple[int, ...]]:
    """The targets of each document of a micro-batch that something is learnt from."""
    assert batch.documents_BT is not None
    valid_BT = batch.labels_BT != -100
    for number in batch.documents_BT[valid_BT].unique().tolist():
        yield tuple(batch.labels_BT[valid_BT & (batch.documents_BT == number)].tolist())


@torch.no_grad()
def test_a_prefix_sees_itself_both_ways_and_never_its_continuation(cut: Cut) -> None:
    """One token is changed at a time: who notices is who sees it. Two layers, so also what is seen through others."""
    batches, model = cut.batches(), cut.model().eval()
    (batch,) = batches.next_step()
    batches.close()
    assert batch.prefix_BT is not None and batch.documents_BT is not None
    before = feed(model, batch, None)
    assert batch.prefix_BT[0].any() and not batch.prefix_BT[0].all()
    for place in range(64):
        changed = batch.map(torch.clone)
        changed.tokens_BT[0, place] = (int(batch.tokens_BT[0, place]) + 7) % 250 + 1
        noticed = (feed(model, changed, None) != before).any(-1)
        assert not noticed[1:].any()
        same_document = batch.documents_BT[0] == batch.documents_BT[0, place]
        later = torch.arange(64) >= place
        expected = same_document & (batch.prefix_BT[0] | later if batch.prefix_BT[0, place] else later)
        assert torch.equal(noticed[0], expected), place

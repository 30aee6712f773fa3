"""Languages are told apart, the answer stands in the metadata, and what is missing is named."""

import random
import sys

import pytest

from configs.errors import UserError
from data_pipeline import language as module
from data_pipeline.documents import Document
from data_pipeline.language import language

ENGLISH = "The quick brown fox jumps over the lazy dog while the children are watching from the old stone bridge. " * 3
GERMAN = "Der schnelle braune Fuchs springt über den faulen Hund, während die Kinder von der alten Brücke aus zusehen. " * 3

NO_FASTTEXT = "needs fastText, which pretrain[language] brings to Python below 3.13"
NO_PY3LANGID = "needs py3langid, which pretrain[language] brings"
# fastText sets a tenth of its starting weights per thread, and the rest is whatever the memory held: with one thread now and then
# a NaN (its issue 1061). Twelve, its default, set them all.
NUM_THREADS = 12


def document_of(text: str) -> Document:
    return Document("web", "file", 0, text, metadata={"url": "https://example.org"})


@pytest.fixture(scope="session")
def fasttext_model(tmp_path_factory):
    fasttext = pytest.importorskip("fasttext", reason=NO_FASTTEXT)
    folder = tmp_path_factory.mktemp("fasttext")
    chosen = random.Random(1)
    texts = [(code, text.split()) for code, text in (("en", ENGLISH), ("de", GERMAN))]
    lines = [f"__label__{code} {' '.join(chosen.choices(words, k=12))}" for _ in range(1000) for code, words in texts]
    (folder / "training.txt").write_text("\n".join(lines), encoding="utf-8")
    settings = {"thread": NUM_THREADS, "seed": 1, "dim": 16, "minn": 1, "maxn": 2, "bucket": 2000, "verbose": 0}
    fasttext.train_supervised(str(folder / "training.txt"), **settings).save_model(str(folder / "tiny.bin"))
    return str(folder / "tiny.bin")


@pytest.mark.parametrize(("text", "code"), [(ENGLISH, "en"), (GERMAN, "de")])
def test_own_model_tells_languages_apart(text, code):
    pytest.importorskip("py3langid", reason=NO_PY3LANGID)
    kept = language(document_of(text), keep=(code,))
    assert isinstance(kept, Document) and kept.text == text
    assert kept.metadata["language"] == code and kept.metadata["language_score"] >= 0.65
    assert kept.metadata["url"] == "https://example.org"
    assert language(document_of(text), keep=("fr",)) == "language"
    assert language(document_of(text), keep=(code,)) == kept


def test_fasttext_model_is_used(fasttext_model):
    kept = language(document_of(f"{GERMAN}\n{GERMAN}"), keep=("de",), path=fasttext_model)
    assert isinstance(kept, Document) and kept.metadata["language"] == "de" and 0.65 <= kept.metadata["language_score"] <= 1
    assert language(document_of(GERMAN), keep=("en",), path=fasttext_model) == "language"


@pytest.mark.parametrize(("score", "stays"), [(0.65, True), (0.6499, False)])
def test_minimum_itself_stays(monkeypatch, score, stays):
    monkeypatch.setattr(module, "_load_detector", lambda path: (lambda text: ("en", score), frozenset(["en"])))
    assert isinstance(language(document_of(ENGLISH), keep=("en",)), Document) == stays


def test_unknown_language_is_refused():
    pytest.importorskip("py3langid", reason=NO_PY3LANGID)
    with pytest.raises(UserError, match="does not know english"):
        language(document_of(ENGLISH), keep=("english",))


def test_missing_library_and_model_are_named(monkeypatch, tmp_path):
    pytest.importorskip("fasttext", reason=NO_FASTTEXT)
    with pytest.raises(UserError, match=r"absent\.bin"):
        language(document_of(ENGLISH), keep=("en",), path=str(tmp_path / "absent.bin"))
    monkeypatch.setitem(sys.modules, "fasttext", None)
    with pytest.raises(UserError, match=r"pretrain\[language\]"):
        language(document_of(ENGLISH), keep=("en",), path=str(tmp_path / "other.bin"))
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    module._load_detector.cache_clear()
    with pytest.raises(UserError, match="py3langid"):
        language(document_of(ENGLISH), keep=("en",))

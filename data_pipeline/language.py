"""The rule that keeps the documents of some languages.

In: a `Document`. Out: the document with `language` (a code, as the model names it) and `language_score` (0 to 1) in its
metadata, or the reason language. The same text gives the same answer in every run.

With `path` a fastText model decides, such as lid.176.bin, with which CCNet and FineWeb were made (minimum 0.65); it is
fetched by the user, as its licence asks for attribution. Without, py3langid decides: a Bayesian model of 5 MB for some 140
languages that comes with the library, where lingua is 96 MB. Its scores are less graded, near 1 mostly.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Annotated, Any

from pydantic import Field

from configs.errors import UserError
from configs.section import Fraction
from data_pipeline.documents import Document

JUDGED_CHARACTERS = 10_000  # the rest of a long document would cost time and change nothing


def language(
    document: Document, *, keep: Annotated[Sequence[str], Field(min_length=1)], minimum: Fraction = 0.65, path: str | None = None
) -> Document | str:
    """Drop a document that is in none of the languages to keep, or not surely so (CCNet, arXiv 1911.00359; FineWeb: 0.65).

    keep: codes of languages, as the model names them (en, de, ...). minimum: the least probability, 0 to 1. path: a fastText
    model; without one, py3langid's own decides. Reason: language. Raises UserError if a library or the model is missing, or
    the model knows no such language.
    """
    detect, known = _load_detector(path)
    if unknown := sorted(set(keep) - known):
        raise UserError(
            f"rule language: the model does not know {', '.join(unknown)}; it knows {', '.join(sorted(known))}. Mend the setting keep."
        )
    found, score = detect(document.text[:JUDGED_CHARACTERS])
    if found not in keep or score < minimum:
        return "language"
    return replace(document, metadata={**document.metadata, "language": found, "language_score": score})


@lru_cache(maxsize=2)
def _load_detector(path: str | None) -> tuple[Callable[[str], tuple[str, float]], frozenset[str]]:
    """What finds a text's language and its probability, and the languages that it can find."""
    return _load_py3langid() if path is None else _load_fasttext(path)


def _load_py3langid() -> tuple[Callable[[str], tuple[str, float]], frozenset[str]]:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise _missing("py3langid") from None
    identifier: Any = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def detect(text: str) -> tuple[str, float]:
        found, score = identifier.classify(text)
        return str(found), float(score)

    return detect, frozenset(identifier.labels)


def _load_fasttext(path: str) -> tuple[Callable[[str], tuple[str, float]], frozenset[str]]:
    try:
        import fasttext
    except ImportError:
        raise _missing("fasttext-numpy2-wheel") from None
    try:
        model: Any = fasttext.load_model(path)
    except ValueError as error:
        raise UserError(f"{path}: not a fastText model that can be read ({error}); wanted one such as lid.176.bin.") from None

    def detect(text: str) -> tuple[str, float]:
        labels, scores = model.predict(text.replace("\n", " "))  # fastText reads one line
        if not labels:
            return "", 0.0
        return labels[0].removeprefix("__label__"), min(float(scores[0]), 1.0)  # rounding may exceed 1

    return detect, frozenset(label.removeprefix("__label__") for label in model.labels)


def _missing(package: str) -> UserError:
    return UserError(
        f"the rule language needs the library {package}, which is not installed; install it with "
        "pip install 'pretrain[language]', or take the rule out of data.clean."
    )


RULES: dict[str, Callable[..., Document | str]] = {"language": language}

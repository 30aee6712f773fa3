"""Every threshold at it and beyond it, and the verdicts, reasons and texts of datatrove, or of the definitions written out.

Where datatrove is installed the seeded documents are judged by it; elsewhere by `plain_*` below, which follow the papers
line by line and take every word from spaCy itself.
"""

import gzip
import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from configs.errors import UserError
from data_pipeline.documents import Document
from data_pipeline.filters import (
    RULES,
    bad_words,
    blocked_urls,
    c4_paragraphs,
    c4_quality,
    fineweb_quality,
    gopher_quality,
    gopher_repetition,
    length,
)
from data_pipeline.words import SYMBOLS, TERMINAL_PUNCTUATION

spacy = pytest.importorskip("spacy", reason="needs spaCy, which pretrain[filters] brings")

# datatrove's reason -> ours, where it is not the same word.
REASONS = {
    "dup_para_frac": "duplicate_paragraphs",
    "dup_para_char_frac": "duplicate_paragraph_characters",
    "dup_line_frac": "duplicate_lines",
    "dup_line_char_frac": "duplicate_line_characters",
    **{f"duplicated_{n}_n_grams": f"duplicate_{n}_grams" for n in range(5, 11)},
    "gopher_short_doc": "too_few_words",
    "gopher_long_doc": "too_many_words",
    "gopher_below_avg_threshold": "short_words",
    "gopher_above_avg_threshold": "long_words",
    "gopher_too_many_hashes": "number_signs",
    "gopher_too_many_ellipsis": "ellipses",
    "gopher_too_many_bullets": "bullet_lines",
    "gopher_too_many_end_ellipsis": "ellipsis_lines",
    "gopher_below_alpha_threshold": "few_letters",
    "gopher_enough_stop_words": "few_stop_words",
    "< 3 paragraphs": "too_few_paragraphs",
    "line_punct_ratio": "few_lines_with_end",
    "short_line_ratio": "short_lines",
    "char_dup_ratio": "duplicate_lines",
    "list_ratio": "many_newlines",
}


def document_of(text: str, **metadata) -> Document:
    return Document("web", "file", 0, text, metadata=metadata)


def judge(rule, text, **settings):
    """The reason, or the text that stays."""
    outcome = rule(document_of(text), **settings)
    return outcome if isinstance(outcome, str) else ("stays", outcome.text)


def is_kept(rule, text, **settings):
    return isinstance(rule(document_of(text), **settings), Document)


def distinct_words(count: int, first: int = 0) -> list[str]:
    """Different words of five letters."""
    return ["".join(chr(97 + (number // 26**place) % 26) for place in range(5)) for number in range(first, first + count)]


# Gopher's repetition


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" ", None),
        (" \n ", "duplicate_lines"),
        ("\n\n".join(["a", "b", "c", "d", "e", "f", "g", "a", "a", "a"]), None),  # 3 of 10 paragraphs, but also lines
        ("\n\n".join(["a", "b", "c", "d", "e", "f", "a", "a", "a", "a"]), "duplicate_paragraphs"),
        ("\n\n".join([*"abcdefgh", "x" * 20, "x" * 20]), "duplicate_paragraph_characters"),
        ("\n".join(["a", "b", "c", "d", "e", "f", "a", "a", "a", "a"]), "duplicate_lines"),
        ("\n".join([*"abcdefgh", "x" * 20, "x" * 20]), "duplicate_line_characters"),
    ],
)
def test_repeated_lines_and_paragraphs(text, reason):
    off = {"max_top_ngram_characters": (), "max_duplicate_ngram_characters": ()}
    assert gopher_repetition(document_of(text), **off) == (reason or document_of(text))


@pytest.mark.parametrize(
    ("text", "settings", "reason"),
    [
        ("aa bb aa bb cc", {"max_top_ngram_characters": ((2, 10 / 14),)}, None),
        ("aa bb aa bb cc", {"max_top_ngram_characters": ((2, 10 / 14 - 1e-9),)}, "top_2_gram"),
        ("aa bb aa bb cc", {"max_top_ngram_characters": ((1, 4 / 14 - 1e-9),)}, "top_1_gram"),
        # of several that are the most frequent, the first counts
        ("a b a b cccc dddd cccc dddd", {"max_top_ngram_characters": ((2, 6 / 27),)}, None),
        ("cccc dddd cccc dddd a b a b", {"max_top_ngram_characters": ((2, 6 / 27),)}, "top_2_gram"),
        ("one", {"max_top_ngram_characters": ((2, 0.0),)}, None),
        # one that overlaps what was counted is not counted
        ("a b a b a b", {"max_duplicate_ngram_characters": ((2, 4 / 11),)}, None),
        ("a b a b a b", {"max_duplicate_ngram_characters": ((2, 4 / 11 - 1e-9),)}, "duplicate_2_grams"),
        ("a a a a", {"max_duplicate_ngram_characters": ((2, 2 / 7),)}, None),
        ("a a a a", {"max_duplicate_ngram_characters": ((2, 2 / 7 - 1e-9),)}, "duplicate_2_grams"),
        # equal letters are equal, wherever the spaces are
        ("ab c x a bc", {"max_duplicate_ngram_characters": ((2, 3 / 11),)}, None),
        ("ab c x a bc", {"max_duplicate_ngram_characters": ((2, 3 / 11 - 1e-9),)}, "duplicate_2_grams"),
        ("ab c x a bd", {"max_duplicate_ngram_characters": ((2, 0.0),)}, None),
        ("a b", {"max_duplicate_ngram_characters": ((3, 0.0),)}, None),
    ],
)
def test_repeated_words(text, settings, reason):
    settings = {"max_top_ngram_characters": (), "max_duplicate_ngram_characters": (), **settings}
    assert gopher_repetition(document_of(text), **settings) == (reason or document_of(text))


def test_repetition_turned_off():
    settings = dict.fromkeys(
        (
            "max_duplicate_lines",
            "max_duplicate_line_characters",
            "max_duplicate_paragraphs",
            "max_duplicate_paragraph_characters",
        )
    )
    text = "same\n\nsame\n\nsame"
    assert gopher_repetition(document_of(text)) == "duplicate_paragraphs"
    assert is_kept(gopher_repetition, text, **settings, max_top_ngram_characters=(), max_duplicate_ngram_characters=[])


def test_long_documents():
    """More letters than the tables for hashes hold at first."""
    words = distinct_words(30_000)
    assert is_kept(gopher_repetition, " ".join(words))
    assert judge(gopher_repetition, " ".join(words + words[:8000])).startswith("duplicate_")


# Gopher's quality

OFF = {
    "min_words": None,
    "max_words": None,
    "min_average_word_length": None,
    "max_average_word_length": None,
    "max_symbols_per_word": None,
    "max_bullet_lines": None,
    "max_ellipsis_lines": None,
    "min_words_with_letter": None,
    "min_stop_words": None,
}


@pytest.mark.parametrize(
    ("setting", "limit", "at", "beyond", "reason"),
    [
        ("min_words", 3, "one two three !", "one two ! !", "too_few_words"),
        ("max_words", 3, "one two three !", "one two three four", "too_many_words"),
        ("min_average_word_length", 3, "one two !", "one no !", "short_words"),
        ("max_average_word_length", 4, "four five !", "four fives !", "long_words"),
        ("max_symbols_per_word", 0.25, "a b c #", "a b # #", "number_signs"),
        ("max_symbols_per_word", 0.25, "a b c ...", "a b … ...", "ellipses"),
        ("max_bullet_lines", 0.5, " - a\nb", "- a\n• b\nc", "bullet_lines"),
        ("max_ellipsis_lines", 0.5, "a... \nb", "a...\nb…\nc", "ellipsis_lines"),
        ("min_words_with_letter", 0.5, "a 1", "a 1 2", "few_letters"),
        ("min_stop_words", 2, "the man of", "the man The", "few_stop_words"),
    ],
)
def test_gopher_thresholds(setting, limit, at, beyond, reason):
    assert is_kept(gopher_quality, at, **{**OFF, setting: limit})
    assert judge(gopher_quality, beyond, **{**OFF, setting: limit}) == reason
    assert is_kept(gopher_quality, beyond, **OFF)


def test_gopher_published_values():
    prose = " ".join(["the", "of", *distinct_words(48)])
    assert is_kept(gopher_quality, prose)
    assert judge(gopher_quality, prose.removesuffix(prose.split()[-1])) == "too_few_words"
    assert is_kept(gopher_quality, " ".join(["the", "of", *distinct_words(99_998)]))
    assert judge(gopher_quality, " ".join(["the", "of", *distinct_words(99_999)])) == "too_many_words"


def test_where_datatrove_divides_by_zero():
    assert judge(gopher_quality, "", **{**OFF, "max_symbols_per_word": 0.1}) == "no_words"
    assert judge(gopher_quality, " \n", min_words=None) == "no_words"
    assert judge(gopher_quality, "") == "too_few_words"  # as theirs
    assert is_kept(gopher_quality, "! !", **{**OFF, "min_average_word_length": 3})  # theirs: the mean is nan


def test_own_stop_words():
    assert is_kept(gopher_quality, "der Mann und", **{**OFF, "min_stop_words": 2}, stop_words=["der", "und"])


# C4


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("one two three.", "one two three."),
        ("  one two three.  \r\n\none two.", "one two three."),
        ("one two three\nfour five six!", "four five six!"),
        ("one two three...", ""),
        ('he said "go there"', 'he said "go there"'),
        ("one two three[12].[edit] [citation needed] four[]?", "one two three.  four?"),
        ("one two three. [1]", ""),  # what is left ends in a space, as in datatrove
        ("we use Javascript here.\none two three.", "one two three."),
        ("all jAVa[3]script is out.", ""),
        ("our Privacy Policy is here.", ""),
        ("a page of terms of use.", ""),
        (f"one two {'x' * 1000}.", ""),
        (f"one two {'x' * 999}.", f"one two {'x' * 999}."),
        ("one two {x}", ""),  # the line goes before the bracket is looked at
    ],
)
def test_c4_lines(text, wanted):
    assert judge(c4_quality, text, min_sentences=None) == ("stays", wanted.strip())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("The words Lorem Ipsum stand here.", "lorem_ipsum"),
        ("the Lorem[1] ipsum is out.", "lorem_ipsum"),
        ("here is {one}.", "curly_bracket"),
        ("lorem ipsum", None),  # too short a line is looked at no further
        ("javascript is {one}.", None),
    ],
)
def test_c4_documents(text, reason):
    outcome = judge(c4_quality, text, min_sentences=None)
    assert outcome == (reason or ("stays", ""))


def test_c4_sentences():
    four = "One is here. Two is here! Three is here?\nFour is here."
    assert judge(c4_quality, four) == "too_few_sentences"
    assert judge(c4_quality, f"{four} Five.") == ("stays", f"{four} Five.")
    assert judge(c4_quality, four, min_sentences=4) == ("stays", four)


def test_c4_settings():
    text = "no end here[1] lorem ipsum {} javascript cookie policy"
    off = dict.fromkeys(("remove_citations", "drop_javascript", "drop_policies", "drop_lorem_ipsum", "drop_curly_bracket"), False)
    assert judge(c4_quality, text, **off, terminal_punctuation=False, min_sentences=1) == ("stays", text)
    assert judge(c4_quality, "ab", terminal_punctuation=False, min_sentences=None, min_words_per_line=1) == ("stays", "ab")
    assert judge(c4_quality, "ab abc", terminal_punctuation=False, min_sentences=None, min_words_per_line=1, max_word_length=2) == (
        "stays",
        "",
    )


def test_c4_leaves_what_it_does_not_change():
    document = document_of("This is a line. " * 4 + "And one more.")
    assert c4_quality(document) is document


@pytest.mark.parametrize(
    ("lengths", "stays"), [((200, 200, 200), True), ((200, 200, 199), False), ((500, 500), False), ((1, 300, 2, 300, 300), True)]
)
def test_c4_paragraphs(lengths, stays):
    assert is_kept(c4_paragraphs, "\n".join("x" * count for count in lengths)) == stays


# FineWeb

FINEWEB_OFF = {
    "min_lines_with_end": None,
    "max_short_lines": None,
    "max_duplicate_line_characters": None,
    "max_newlines_per_word": None,
}


@pytest.mark.parametrize(
    ("setting", "limit", "at", "beyond", "reason"),
    [
        ("min_lines_with_end", 0.5, "a.\n\n \nb", "a.\nb\nc", "few_lines_with_end"),
        ("min_lines_with_end", 1.0, "a。\nb؟", "a。\nb,", "few_lines_with_end"),
        ("max_short_lines", 0.5, "x" * 30 + "\n" + "x" * 31, "x" * 30 + "\nx\n" + "x" * 31, "short_lines"),
        ("max_duplicate_line_characters", 0.25, "ab\nab\nabcd", "ab\nab\nabc", "duplicate_lines"),
        ("max_newlines_per_word", 0.5, "a\nb", "a\n\nb", "many_newlines"),
    ],
)
def test_fineweb_thresholds(setting, limit, at, beyond, reason):
    assert is_kept(fineweb_quality, at, **{**FINEWEB_OFF, setting: limit})
    assert judge(fineweb_quality, beyond, **{**FINEWEB_OFF, setting: limit}) == reason
    assert is_kept(fineweb_quality, beyond, **FINEWEB_OFF)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_fineweb_empty(text):
    assert judge(fineweb_quality, text) == "empty"


# Lists


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ("a Rude word", True),
        ("rude", True),
        ("rude\n", True),
        ("crude", False),
        ("rudeness", False),
        ("very_rude", False),
        ("two bad words", True),
        ("two bad  words", False),
        ("b!d", True),
        ("ab!d", False),
        ("(ÄRGER)", True),
        ("", False),
    ],
)
def test_bad_words(tmp_path, text, is_found):
    path = tmp_path / "list.txt"
    path.write_text("rude\n\n Bad Words \nb!d\närger\n", encoding="utf-8")
    assert is_kept(bad_words, text, paths=[str(path)]) == (not is_found)
    # C4's own pattern
    pattern = re.compile(r"(?:\W|^)(rude|bad words|b!d|ärger)(?:\W|$)")
    assert bool(pattern.search(text.lower())) == is_found


def test_bad_words_without_spaces(tmp_path):
    path = tmp_path / "list.txt.gz"
    path.write_bytes(gzip.compress("悪い\n🖕\n".encode()))
    assert judge(bad_words, "とても悪いこと", paths=str(path), whole_words=False) == "bad_word"
    assert is_kept(bad_words, "とても悪いこと", paths=str(path))
    assert judge(bad_words, "well 🖕!", paths=str(path)) == "bad_word"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://bad.example/page", "blocked_domain"),
        ("http://user@www.Deep.BAD.example.:8080/", "blocked_domain"),
        ("bad.example", "blocked_domain"),
        ("https://notbad.example/", None),
        ("https://example/bad.example", None),
        ("https://site.example/adult/", "blocked_url"),
        ("site.example/adult#top", "blocked_url"),
        ("https://site.example/adult/more", None),
        ("https://site.example/list?x=1", "blocked_url"),
        ("https://site.example/list", None),
        ("https://münchen.example/", "blocked_domain"),
        ("https://10.1.2.3/x", "blocked_domain"),
        ("https://[broken/", None),
        ("", None),
        (None, None),
    ],
)
def test_blocked_urls(tmp_path, url, reason):
    domains, urls = tmp_path / "domains", tmp_path / "urls.gz"
    domains.write_text("# a comment\nbad.example\nxn--mnchen-3ya.example\n10.1.2.3\n", encoding="utf-8")
    urls.write_bytes(gzip.compress(b"site.example/adult\nhttp://site.example/list?x=1\n"))
    document = document_of("text", link=url)
    assert blocked_urls(document, paths=(str(domains), str(urls)), field="link") == (reason or document)
    assert blocked_urls(document, paths=[str(domains), str(urls)]) is document


@pytest.mark.parametrize("rule", [bad_words, blocked_urls])
@pytest.mark.parametrize(
    ("name", "content", "found"), [("a", b"", "empty"), ("b.gz", b"x", "cannot be read"), ("c", b"\xff", "cannot be read")]
)
def test_bad_lists_are_named(tmp_path, rule, name, content, found):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=found):
        rule(document_of("x", url="http://a.example"), paths=(str(tmp_path / name),))
    with pytest.raises(UserError, match="absent"):
        rule(document_of("x", url="http://a.example"), paths=(str(tmp_path / "absent"),))


def test_length():
    assert is_kept(length, "abc", min_characters=3, max_characters=3)
    assert judge(length, "ab", min_characters=3) == "too_short"
    assert judge(length, "abcd", max_characters=3) == "too_long"


def test_every_rule_has_a_sentence():
    for name, rule in RULES.items():
        assert rule.__name__ == name and (rule.__doc__ or "").split("\n")[0].rstrip(".") != ""


# The same as datatrove, or as the definitions


@pytest.fixture(scope="module")
def words_of():
    """spaCy's words of a text, and the number of its sentences."""
    language = spacy.blank("en")
    language.add_pipe("sentencizer")

    def split(text):
        document = language(text)
        return [token.text for token in document if token.text.strip()], max(1, len(list(document.sents)))

    return split


def plain_repetition(text, words_of):
    if not text:
        return "empty"
    for name, parts in (("paragraph", re.split(r"\n{2,}", text.strip())), ("line", re.split(r"\n+", text))):
        again = [part for place, part in enumerate(parts) if part in parts[:place]]
        if len(again) / len(parts) > 0.3:
            return f"duplicate_{name}s"
        if sum(map(len, again)) / len(text) > 0.2:
            return f"duplicate_{name}_characters"
    words = words_of(text)[0]
    for n, most in ((2, 0.2), (3, 0.18), (4, 0.16)):
        counts = Counter(" ".join(words[start : start + n]) for start in range(len(words) - n + 1))
        if counts:
            top = max(counts, key=lambda ngram: counts[ngram])
            if len(top) * counts[top] / len(text) > most:
                return f"top_{n}_gram"
    for n, most in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10)):
        seen, repeated, place = set(), 0, 0
        while place + n <= len(words):
            ngram = "".join(words[place : place + n])
            if ngram in seen:
                repeated += len(ngram)
                place += n
            else:
                seen.add(ngram)
                place += 1
        if repeated / len(text) > most:
            return f"duplicate_{n}_grams"
    return ("stays", text)


def plain_quality(text, words_of):
    words = words_of(text)[0]
    lengths = [len(word) for word in words if not all(character in SYMBOLS for character in word)]
    if len(lengths) < 50:
        return "too_few_words"
    if len(lengths) > 100_000:
        return "too_many_words"
    if sum(lengths) / len(lengths) < 3:
        return "short_words"
    if sum(lengths) / len(lengths) > 10:
        return "long_words"
    if text.count("#") / len(words) > 0.1:
        return "number_signs"
    if (text.count("...") + text.count("…")) / len(words) > 0.1:
        return "ellipses"
    lines = [line.strip() for line in text.splitlines()]
    if len([line for line in lines if line[:1] in ("-", "•")]) / len(lines) > 0.9:
        return "bullet_lines"
    if len([line for line in lines if line[-1:] == "…" or line[-3:] == "..."]) / len(lines) > 0.3:
        return "ellipsis_lines"
    if len([word for word in words if any(map(str.isalpha, word))]) / len(words) < 0.8:
        return "few_letters"
    if len({"the", "be", "to", "of", "and", "that", "have", "with"} & set(words)) < 2:
        return "few_stop_words"
    return ("stays", text)


def plain_c4(text, words_of):
    kept, sentences = [], 0
    for line in map(str.strip, text.splitlines()):
        words = line.split()
        line = re.sub(r"\[\d*\]|\[edit\]|\[citation needed\]", "", line)
        if any(len(word) > 1000 for word in words) or len(words) < 3:
            continue
        if "lorem ipsum" in line.lower():
            return "lorem_ipsum"
        if "javascript" in line.lower():
            continue
        if "{" in line:
            return "curly_bracket"
        if re.search("terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies", line.lower()):
            continue
        sentences += words_of(line)[1]
        kept.append(line)
    return "too_few_sentences" if sentences < 5 else ("stays", "\n".join(kept).strip())


def plain_paragraphs(text, words_of):
    return ("stays", text) if len([line for line in text.split("\n") if len(line) >= 200]) >= 3 else "too_few_paragraphs"


def plain_fineweb(text, words_of):
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return "empty"
    if len([line for line in lines if line[-1] in TERMINAL_PUNCTUATION]) / len(lines) < 0.12:
        return "few_lines_with_end"
    if len([line for line in lines if len(line) <= 30]) / len(lines) > 0.67:
        return "short_lines"
    if sum(len(line) for place, line in enumerate(lines) if line in lines[:place]) / len(text.replace("\n", "")) > 0.01:
        return "duplicate_lines"
    return "many_newlines" if text.count("\n") / len(words_of(text)[0]) > 0.3 else ("stays", text)


PLAIN = {
    "gopher_repetition": plain_repetition,
    "gopher_quality": plain_quality,
    "c4_quality": plain_c4,
    "c4_paragraphs": plain_paragraphs,
    "fineweb_quality": plain_fineweb,
}


@pytest.fixture(scope="module")
def other_side(words_of):
    """(rule, text) -> the verdict of datatrove, where it is installed, or of the definitions."""
    try:
        import datatrove.pipeline.filters as peers
        from datatrove.data import Document as PeerDocument
    except ImportError:
        return lambda rule, text: PLAIN[rule](text, words_of)
    filters = {
        "gopher_repetition": peers.GopherRepetitionFilter(),
        "gopher_quality": peers.GopherQualityFilter(),
        "c4_quality": peers.C4QualityFilter(filter_no_terminal_punct=False),
        "c4_paragraphs": peers.C4ParagraphFilter(),
        "fineweb_quality": peers.FineWebQualityFilter(),
    }

    def judge_by_peer(rule, text):
        document = PeerDocument(text=text, id="0")
        outcome = filters[rule].filter(document)
        return ("stays", document.text) if outcome is True else REASONS.get(outcome[1], outcome[1])

    return judge_by_peer


HARD_WORDS = """the of and that have with be to Dr. e.g. isn't can't well-known 3.5 #1 ... … - • “quoted” (so) [1] [edit] https://a.example/x
it. is? a! long sentence goes here where nobody reads. words are many, some of them repeat; others never do: 東京。 naïve ﬁne café 42
{ JavaScript lorem ipsum cookie policy use cookies"""
STOCK = HARD_WORDS.split()
EASY_WORDS = "the of and that have with be to river stone window garden morning letter quiet evening bridge winter harbour candle"
PLAIN_WORDS = EASY_WORDS.split()


def make_document(chosen: random.Random) -> str:
    """Prose, lists, repetition, symbols, blank lines: each document has its own habits."""
    stock = chosen.choice(
        [PLAIN_WORDS, PLAIN_WORDS + distinct_words(400), distinct_words(3000) + PLAIN_WORDS * 40, STOCK, PLAIN_WORDS * 9 + STOCK]
    )
    ends = chosen.choice([["."], [".", "!", "?"], ["", "."], ["...", "…", "."], ["", ",", ":"], ["。", "؟"]])
    starts = chosen.choice([[""], [""], ["", "- "], ["- ", "• "], ["  ", "\t"]])
    breaks = chosen.choice([["\n"], ["\n\n"], ["\n", "\n\n", "\n \n"], ["\r\n"], [" "], ["\u2028", "\n"]])
    longest = chosen.choice([3, 8, 25, 60])
    repeat = chosen.choice([0, 0, 0.05, 0.3])
    lines: list[str] = []
    for _ in range(chosen.choice([0, 1, 5, 20, 40])):
        if lines and chosen.random() < repeat:
            lines.append(chosen.choice(lines))
        else:
            words = chosen.choices(stock, k=chosen.randint(1, longest))
            lines.append(chosen.choice(starts) + " ".join(words) + chosen.choice(ends))
    return "".join(line + chosen.choice(breaks) for line in lines)


@pytest.mark.parametrize("rule", list(PLAIN))
def test_verdicts_of_seeded_documents(rule, other_side, words_of, seed):
    chosen = random.Random(seed)
    settings = {"terminal_punctuation": False} if rule == "c4_quality" else {}
    outcomes = Counter()
    for _ in range(600):
        text = make_document(chosen)
        ours = judge(RULES[rule], text, **settings)
        assert ours == other_side(rule, text) == PLAIN[rule](text, words_of), repr(text)
        outcomes[ours if isinstance(ours, str) else "stays"] += 1
    assert len(outcomes) > 1 and outcomes["stays"], outcomes


def test_rules_leave_the_document_alone(seed):
    """Equal documents give equal verdicts, in any order, and the one that came in is as it was."""
    chosen = random.Random(seed)
    documents = [document_of(make_document(chosen)) for _ in range(60)]
    copies = [replace(document) for document in documents]
    rules = [rule for name, rule in RULES.items() if name in PLAIN]
    before = [[rule(document) for rule in rules] for document in documents]
    after = [[rule(document) for rule in reversed(rules)][::-1] for document in reversed(documents)][::-1]
    assert before == after and documents == copies

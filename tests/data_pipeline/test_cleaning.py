"""Rules found by name or import path, bound to settings, refused where they cannot be, and named where they fail."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from configs.data_section import DataSection, RuleSection, SourceSection
from configs.errors import UserError
from data_pipeline.cleaning import RULES, apply_rules, bind_rules, describe_rules, identify_rules
from data_pipeline.documents import Document, Dropped

DOCUMENT = Document("web", "a.jsonl", 17, "some  text", metadata={"url": "https://example.org/x"})

OWN = """
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nowhere import Document, Unknown

def shout(document, *, times=1):
    return replace(document, text=document.text.upper() * times)

def keep_long(document, *, minimum):
    return document if len(document.text) >= minimum else "too_short"

def break_down(document):
    raise KeyError("nothing")

def forget(document):
    return None

def refuse(document):
    from configs.errors import UserError
    raise UserError("mend this")

def note(document: "Document", *, anything=None, count: int = 0, names: tuple[str, ...] = (), listed: list[str] = [],
         some: Sequence[str] = (), unknown: "Unknown" = None, place: Path | None = None, share: "float" = 0.5,
         words: Iterable[str] = (), **more: float):
    settings = dict(anything=anything, count=count, names=names, listed=listed, some=some, unknown=unknown, place=place, share=share)
    return replace(document, metadata=settings | {"words": list(words)} | more)

def look_up(document, *, path=None, paths=()):
    return document

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_rules.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "own_rules.py"
    sys.modules.pop("own_rules", None)


def rules(*sections) -> tuple[RuleSection, ...]:
    return tuple(RuleSection.model_validate(section) for section in sections)


def test_rules_act_in_order_and_the_first_reason_counts(own):
    long = {"rule": "own_rules:keep_long", "settings": {"minimum": 15}}
    twice = {"rule": "own_rules:shout", "settings": {"times": 2}}
    assert apply_rules(bind_rules(rules(twice, long), "web"), DOCUMENT) == replace(DOCUMENT, text="SOME  TEXTSOME  TEXT")
    assert apply_rules(bind_rules(rules(long, twice), "web"), DOCUMENT) == Dropped(DOCUMENT, "too_short")
    assert apply_rules([], DOCUMENT) is DOCUMENT
    nothing = {"rule": "own_rules:shout", "settings": {"times": 0}}
    emptied = apply_rules(bind_rules(rules(nothing), "web"), DOCUMENT)
    assert isinstance(emptied, Dropped) and emptied.reason == "nothing_left"


def test_a_rule_may_be_for_some_sources(own):
    some = rules({"rule": "own_rules:shout", "sources": ("books", "notes")}, "normalize_unicode")
    assert [name for name, _ in bind_rules(some, "web")] == ["normalize_unicode"]
    assert [name for name, _ in bind_rules(some, "notes")] == ["own_rules:shout", "normalize_unicode"]
    assert identify_rules(some) != identify_rules(rules("own_rules:shout", "normalize_unicode"))
    with pytest.raises(ValidationError, match=r"clean speaks of sources that there are not: \['books', 'notes'\]; there are \['web'\]"):
        DataSection(clean=some, sources=(SourceSection(name="web", path="x"),))


def test_what_identifies_a_rule(own, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("example.com\n")
    sections = rules({"rule": "blocked_urls", "settings": {"paths": [str(path)]}}, "own_rules:shout", "normalize_unicode")
    before = identify_rules(sections)
    assert before == identify_rules(sections)
    assert before[0].files[0][0] == str(path) and len(before[0].files[0][1]) == 64
    assert len(before[1].source_sha256) == 64 and before[2].source_sha256 == ""
    path.write_text("example.net\n")
    assert identify_rules(sections)[0] != before[0]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("gopher_qualty", r"no rule 'gopher_qualty'; did you mean 'gopher_quality'"),
        (
            {"rule": "gopher_quality", "settings": {"min_word": 3}},
            r"data.clean\[0\] \(gopher_quality\): no setting 'min_word'; did you mean",
        ),
        ("nowhere_at_all:rule", r"the module 'nowhere_at_all' cannot be imported \(ModuleNotFoundError"),
        ("own_rules:shot", r"own_rules has no function 'shot'; it has: .*shout"),
        ("own_rules:number", r"has no function 'number'"),
        ("own_rules:keep_long", r"needs settings: \{minimum: ...\}"),
        ({"rule": "blocked_urls", "settings": {"paths": ["/nowhere/list"]}}, r"/nowhere/list cannot be read \(No such file"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_starts(own, section, message):
    with pytest.raises(UserError, match=message):
        identify_rules(rules(section))


NO_JSON = "numbers, texts, true, false, null, or lists and sections of them."
SHARE = ("gopher_quality", "max_bullet_lines")
COUNT = ("gopher_quality", "min_words")
PAIRS = ("gopher_repetition", "max_top_ngram_characters")


@pytest.mark.parametrize(
    ("rule", "setting", "value", "found", "wanted"),
    [
        (*COUNT, "many", '"many"', "a valid integer"),
        (*COUNT, "3", '"3"', "a valid integer"),
        (*COUNT, 3.5, "3.5", "a valid integer"),
        (*COUNT, True, "true", "a valid integer"),
        (*COUNT, (3,), "[3]", "a valid integer"),
        (*COUNT, -1, "-1", "greater than or equal to 0"),
        (*SHARE, (1,), "[1]", "a valid number"),
        (*SHARE, 1.5, "1.5", "less than or equal to 1"),
        (*SHARE, -0.1, "-0.1", "greater than or equal to 0"),
        (*SHARE, float("nan"), "NaN", "a finite number"),
        (*PAIRS, 0.2, "0.2", "a valid array"),
        (*PAIRS, ((2, 0.2), (3, 20)), "[[2, 0.2], [3, 20]]", "less than or equal to 1 at [1][1]"),
        (*PAIRS, ((0, 0.2),), "[[0, 0.2]]", "greater than 0 at [0][0]"),
        ("c4_quality", "drop_policies", 1, "1", "a valid boolean"),
        ("c4_quality", "min_words_per_line", None, "null", "a valid integer"),
        ("normalize_unicode", "form", "NFX", '"NFX"', "'NFC', 'NFKC', 'NFD' or 'NFKD'"),
        ("normalize_whitespace", "max_blank_lines", -1, "-1", "greater than or equal to 0"),
        ("language", "keep", "en", '"en"', "a valid array"),
        ("language", "minimum", 65, "65", "less than or equal to 1"),
        ("bad_words", "paths", (), "[]", "a valid string or at least 1 item after validation, not 0"),
        ("decontaminate", "paths", {"a": 1}, '{"a": 1}', "a valid string or a valid array"),
        ("decontaminate", "minimum_overlap", 0, "0", "greater than 0"),
        ("own_rules:note", "count", "é" * 100, '"' + "é" * 79 + "...", "a valid integer"),
        ("own_rules:note", "share", "half", '"half"', "a valid number"),
        ("own_rules:note", "names", ("a", 3), '["a", 3]', "a valid string at [1]"),
        ("own_rules:note", "words", ("a", 3), '["a", 3]', "a valid string at [1]"),
        ("own_rules:note", "more", "x", '"x"', "a valid number"),
        ("own_rules:note", "anything", {3}, "{3}", NO_JSON),
        ("own_rules:note", "unknown", b"3", "b'3'", NO_JSON),
    ],
)
def test_a_setting_of_the_wrong_type_or_out_of_range_is_refused_before_anything_starts(own, rule, setting, value, found, wanted):
    sections = rules("normalize_unicode", {"rule": rule, "settings": {setting: value}})
    for check in (identify_rules, lambda sections: bind_rules(sections, "web")):
        with pytest.raises(UserError) as caught:
            check(sections)
        assert str(caught.value).startswith(f"data.clean[1] ({rule}): setting {setting!r}: found {found}, wanted {wanted}")
        assert wanted == NO_JSON or str(caught.value).endswith("; correct it.")


def test_a_file_setting_has_to_name_files_also_where_the_function_does_not_say_so(own):
    for setting in ("path", "paths"):
        with pytest.raises(UserError, match=rf"setting '{setting}': found 3, wanted a valid string or a valid array; correct it"):
            identify_rules(rules({"rule": "own_rules:look_up", "settings": {setting: 3}}))


def test_settings_reach_a_rule_as_its_annotations_say(own):
    """And that of every document the same: also what can be read only once."""
    given = {"anything": {"a": (1,)}, "count": 3, "names": ("a", "b"), "some": ("a",), "unknown": "as it is", "share": 1}
    section = {"rule": "own_rules:note", "settings": {**given, "listed": ("a",), "place": "x/y", "words": ("c", "d"), "extra": 2}}
    [(_, rule)] = bind_rules(rules(section), "web")
    wanted = {**given, "listed": ["a"], "place": Path("x/y"), "words": ["c", "d"], "extra": 2.0}
    for _ in range(2):
        noted = apply_rules([("note", rule)], DOCUMENT)
        assert isinstance(noted, Document) and noted.metadata == wanted
        assert type(noted.metadata["share"]) is float and type(noted.metadata["names"]) is tuple


@pytest.mark.parametrize("name", sorted(RULES))
def test_our_defaults_pass_our_checks_and_are_described(name, tmp_path):
    path = tmp_path / "file.txt"
    path.touch()
    needed = {"paths": str(path), "keep": ("en",)}
    described = describe_rules()[name]
    settings = {key: one.get("default", needed.get(key)) for key, one in described["settings"].items()}
    section = {"rule": name, "settings": settings}
    [(_, bound)] = bind_rules(rules(section), "web")
    assert json.loads(json.dumps(bound.keywords)) == json.loads(json.dumps(settings))
    assert [rule.rule for rule in identify_rules(rules(section))] == [name]
    assert described["summary"].endswith(".") and json.loads(json.dumps(described))["settings"].keys() == settings.keys()
    assert all(one["type"] for one in described["settings"].values())


def test_a_rule_that_fails_is_named_with_the_document(own):
    with pytest.raises(
        RuntimeError, match=r"own_rules:break_down failed on the document at position 17 of a.jsonl \(source web\): KeyError"
    ):
        apply_rules(bind_rules(rules("own_rules:break_down"), "web"), DOCUMENT)
    with pytest.raises(RuntimeError, match=r"own_rules:forget gave a NoneType for the document at position 17 of a.jsonl"):
        apply_rules(bind_rules(rules("own_rules:forget"), "web"), DOCUMENT)
    with pytest.raises(UserError, match="^mend this$"):
        apply_rules(bind_rules(rules("own_rules:refuse"), "web"), DOCUMENT)

"""Rules found by name or import path, bound to settings, refused where they cannot be, and named where they fail."""

import sys
from dataclasses import replace

import pytest
from pydantic import ValidationError

from configs.errors import UserError
from configs.schema import DataSection, RuleSection, SourceSection
from data_pipeline.cleaning import RULES, apply_rules, bind_rules, describe_rules, identify_rules
from data_pipeline.documents import Document, Dropped

DOCUMENT = Document("web", "a.jsonl", 17, "some  text", metadata={"url": "https://example.org/x"})

OWN = """
from dataclasses import replace

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


def test_a_rule_that_fails_is_named_with_the_document(own):
    with pytest.raises(RuntimeError, match=r"own_rules:break_down failed on document 17 of a.jsonl \(source web\): KeyError"):
        apply_rules(bind_rules(rules("own_rules:break_down"), "web"), DOCUMENT)
    with pytest.raises(RuntimeError, match=r"own_rules:forget gave a NoneType for document 17"):
        apply_rules(bind_rules(rules("own_rules:forget"), "web"), DOCUMENT)
    with pytest.raises(UserError, match="^mend this$"):
        apply_rules(bind_rules(rules("own_rules:refuse"), "web"), DOCUMENT)


def test_every_rule_of_ours_says_what_it_does():
    described = describe_rules()
    assert len(described) == len(RULES) > 5
    assert all(text.endswith(".") for text in described.values()), described

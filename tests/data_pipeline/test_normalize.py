"""What each rule mends, that a second time changes nothing, and that addresses are found where datatrove finds them."""

import random
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from configs.errors import UserError
from data_pipeline.documents import Document
from data_pipeline.normalize import (
    EMAIL_PLACEHOLDERS,
    IP_PLACEHOLDERS,
    RULES,
    normalize_unicode,
    normalize_whitespace,
    redact_emails,
    redact_ip_addresses,
    repair_encoding,
)


def apply(rule, text, **settings):
    """The text that a rule leaves, or its reason in angle brackets."""
    outcome = rule(Document("web", "file", 0, text), **settings)
    return f"<{outcome}>" if isinstance(outcome, str) else outcome.text


@pytest.mark.parametrize(
    ("text", "wanted", "settings"),
    [
        ("a\r\nb\rc\x0bd\x0ce\x85f\u2028g\u2029h", "a\nb\nc\nd\ne\nf\ng\nh", {}),
        ("a \t\u00a0\nb  ", "a\nb", {}),
        ("  a\tb", "  a\tb", {}),
        ("\n\n a\n\n", " a", {}),
        ("a\n\nb", "a\n\nb", {}),
        ("a\n \n\t\nb", "a\n\nb", {}),
        ("a\n\nb", "a\nb", {"max_blank_lines": 0}),
        ("a\n\n\nb", "a\n\n\nb", {"max_blank_lines": 2}),
        ("a\x00b\x1bc\x7fd\x9fe", "abcde", {}),
        ("\ufeffa\u200bb\u00adc\u2060", "abc", {}),
        ("\ufeffa", "\ufeffa", {"remove_invisible": False}),
        ("می\u200cخواهم 👩\u200d🔬", "می\u200cخواهم 👩\u200d🔬", {}),
        (" \r\n\x00", "<empty>", {}),
    ],
)
def test_whitespace(text, wanted, settings):
    assert apply(normalize_whitespace, text, **settings) == wanted


@given(st.text(st.sampled_from(list("ab \t\n\r\x00\x0b\x85\u00a0\u00ad\u200b\u2028\ufeff\u3000"))), st.integers(0, 3), st.booleans())
@example(" \x00 \n", 0, True)
def test_whitespace_twice_is_once(text, max_blank_lines, remove_invisible):
    settings = {"max_blank_lines": max_blank_lines, "remove_invisible": remove_invisible}
    once = normalize_whitespace(Document("web", "file", 0, text), **settings)
    if isinstance(once, Document):
        assert normalize_whitespace(once, **settings) is once
        assert "\n" * (max_blank_lines + 2) not in once.text and once.text == once.text.strip("\n")


@given(st.text(), st.sampled_from(["NFC", "NFKC", "NFD", "NFKD"]))
def test_unicode_twice_is_once(text, form):
    once = normalize_unicode(Document("web", "file", 0, text), form=form)
    assert isinstance(once, Document) and normalize_unicode(once, form=form) is once


def test_unicode_forms():
    assert apply(normalize_unicode, "e\u0301 ﬁ") == "é ﬁ"
    assert apply(normalize_unicode, "é ﬁ", form="NFKD") == "e\u0301 fi"


def test_mojibake_is_repaired():
    pytest.importorskip("ftfy", reason="needs ftfy, which pretrain[filters] brings")
    assert apply(repair_encoding, "schÃ¶n, â€œquotedâ€\x9d") == "schön, “quoted”"
    unharmed = Document("web", "file", 0, "schön, “quoted” &amp; <b>")
    assert repair_encoding(unharmed) is unharmed


def test_missing_ftfy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(UserError, match=r"pretrain\[filters\]"):
        apply(repair_encoding, "text")


FIRST, SECOND = EMAIL_PLACEHOLDERS


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("write to a.b+c@mail.example.de.", f"write to {FIRST}."),
        ("a@b.de, c@d.de, a@b.de, e@f.de", f"{FIRST}, {SECOND}, {FIRST}, {FIRST}"),
        ("a@[192.168.0.1]", FIRST),
        ("user@localhost", "user@localhost"),
        ("@name and a@ b.de", "@name and a@ b.de"),
        ("mailto:x_y@b-c.de>", f"mailto:{FIRST}>"),
        ("no address", "no address"),
    ],
)
def test_emails(text, wanted):
    assert apply(redact_emails, text) == wanted
    assert apply(redact_emails, wanted) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("at 8.8.8.8:53", f"at {IP_PLACEHOLDERS[0]}:53"),
        ("8.8.8.8 1.1.1.1 8.8.8.8", f"{IP_PLACEHOLDERS[0]} {IP_PLACEHOLDERS[1]} {IP_PLACEHOLDERS[0]}"),
        ("192.168.1.1 10.0.0.1 127.0.0.1 172.16.0.1", "192.168.1.1 10.0.0.1 127.0.0.1 172.16.0.1"),
        ("version 1.2.3", "version 1.2.3"),
        ("08.8.8.8", "08.8.8.8"),
        ("999.8.8.8", f"9{IP_PLACEHOLDERS[0]}"),  # as datatrove: the last two digits make an octet
        *((address, address) for address in IP_PLACEHOLDERS),
    ],
)
def test_ip_addresses(text, wanted):
    assert apply(redact_ip_addresses, text) == wanted
    assert apply(redact_ip_addresses, wanted) == wanted


def test_addresses_are_found_where_datatrove_finds_them(seed):
    pii = pytest.importorskip("datatrove.pipeline.formatters.pii", reason="needs datatrove, a peer that nothing of ours brings")
    chosen = random.Random(seed)
    # Theirs rotate through their placeholders; with one for all, and ours brought to the same, the spans can be compared.
    peer = pii.PIIFormatter(email_replacement="<email>", ip_replacement="<ip>")
    parts = [
        "a",
        "x.y",
        "@",
        ".",
        "de",
        "b-c",
        " ",
        "8.8.8.8",
        "192.168.0.1",
        "1",
        "25",
        "256",
        "[",
        "]",
        "+",
        "é",
        "_",
        "-",
        "\n",
        "..",
        "//",
    ]
    for _ in range(20_000):
        text = "".join(chosen.choices(parts, k=chosen.randint(1, 14)))
        ours = apply(redact_emails, text)
        for placeholder in EMAIL_PLACEHOLDERS:
            ours = ours.replace(placeholder, "<email>")
        ours = apply(redact_ip_addresses, ours)
        for placeholder in IP_PLACEHOLDERS:
            ours = ours.replace(placeholder, "<ip>")
        assert ours == peer.format(text), text


def test_every_rule_has_a_sentence():
    for name, rule in RULES.items():
        assert rule.__name__ == name and (rule.__doc__ or "").split("\n")[0].endswith(".")

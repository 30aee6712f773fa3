"""Rules that mend a document's characters and never judge its content: Unicode, whitespace, encoding, addresses of persons.

In: a `Document`. Out: the same object if nothing changes, else a copy with another text; only a text of which nothing is left
is dropped, for the reason empty. Equal texts give equal results, whatever came before them.
"""

import ipaddress
import re
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from pydantic import NonNegativeInt

from configs.errors import UserError
from data_pipeline.documents import Document

# CR LF, CR, vertical tab, form feed, next line, line and paragraph separator.
LINE_BREAKS = re.compile(r"\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
# Soft hyphen, zero-width space, word joiner, byte order mark. The zero-width joiner and non-joiner stay: Persian, Indic
# scripts and emoji are spelled with them.
INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")
TRAILING_BLANKS = re.compile(r"[^\S\n]+$", re.MULTILINE)

ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"  # RFC 5322, section 3.2.3
LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"  # RFC 1035, section 2.3.1, and a digit in front (RFC 1123)
OCTET = r"(?:25[0-5]|2[0-4][0-9]|[01]?[0-9][0-9]?)"
LITERAL = rf"\[(?:{OCTET}\.){{3}}(?:{OCTET}|[A-Za-z0-9-]*[A-Za-z0-9]:)]"
EMAIL = re.compile(rf"\b{ATOM}(?:\.{ATOM})*@(?:(?:{LABEL}\.)+{LABEL}|{LITERAL})")
IP_ADDRESS = re.compile(rf"(?:{OCTET}\.){{3}}{OCTET}")
# Names and addresses that are set aside for examples: RFC 2606, RFC 5737.
EMAIL_PLACEHOLDERS = ("someone@example.com", "somebody.else@example.org")
IP_PLACEHOLDERS = ("192.0.2.1", "198.51.100.2", "203.0.113.3")


def normalize_unicode(document: Document, *, form: Literal["NFC", "NFKC", "NFD", "NFKD"] = "NFC") -> Document | str:
    """Write every character in one Unicode normal form (Unicode Standard Annex 15), so that equal words are equal.

    NFC keeps what is seen; NFKC also unfolds ligatures, full-width letters and superscripts.
    """
    return _with_text(document, unicodedata.normalize(form, document.text))


def normalize_whitespace(document: Document, *, max_blank_lines: NonNegativeInt = 1, remove_invisible: bool = True) -> Document | str:
    """End lines with LF, and take away trailing blanks, surplus blank lines and control characters.

    max_blank_lines: as many stay in a row, none at the start and end of the text. Every line break of Unicode becomes LF; tabs
    stay; other control characters go. remove_invisible: soft hyphens, zero-width spaces, word joiners and byte order marks
    go too. Reason: empty.
    """
    text = CONTROLS.sub("", LINE_BREAKS.sub("\n", document.text))
    if remove_invisible:
        text = INVISIBLE.sub("", text)
    text = TRAILING_BLANKS.sub("", text)
    text = re.sub(rf"\n{{{max_blank_lines + 2},}}", "\n" * (max_blank_lines + 1), text).strip("\n")
    return _with_text(document, text) if text else "empty"


def repair_encoding(document: Document) -> Document | str:
    """Repair text that was decoded with the wrong encoding (mojibake), as the library ftfy does.

    Raises UserError if ftfy is not installed.
    """
    try:
        import ftfy
    except ImportError:
        raise UserError(
            "the rule repair_encoding needs the library ftfy, which is not installed; install it with "
            "pip install 'pretrain[filters]', or take the rule out of data.clean."
        ) from None
    return _with_text(document, ftfy.fix_encoding(document.text))


def redact_emails(document: Document) -> Document | str:
    """Put placeholders of example.com and example.org for addresses of e-mail.

    Of different addresses in a document the first gets the first placeholder, and so on, from the start again when they are
    used up; equal addresses get equal ones.
    """
    if "@" not in document.text:
        return document
    return _with_text(document, _put_placeholders(EMAIL, EMAIL_PLACEHOLDERS, document.text, lambda _: True))


def redact_ip_addresses(document: Document) -> Document | str:
    """Put placeholders of the ranges for documentation (RFC 5737) for public IPv4 addresses; private ones stay.

    They are chosen as those of `redact_emails`.
    """
    return _with_text(document, _put_placeholders(IP_ADDRESS, IP_PLACEHOLDERS, document.text, is_public))


def is_public(address: str) -> bool:
    """Whether an IPv4 address may be that of somebody's machine: not private, reserved, or written with leading zeros."""
    try:
        return ipaddress.IPv4Address(address).is_global
    except ValueError:
        return False


def _put_placeholders(pattern: re.Pattern[str], placeholders: tuple[str, ...], text: str, is_meant: Callable[[str], bool]) -> str:
    chosen: dict[str, str] = {}

    def choose(match: re.Match[str]) -> str:
        found = match.group()
        if not is_meant(found):
            return found
        return chosen.setdefault(found, placeholders[len(chosen) % len(placeholders)])

    return pattern.sub(choose, text)


def _with_text(document: Document, text: str) -> Document:
    return document if text == document.text else replace(document, text=text)


RULES: dict[str, Callable[..., Document | str]] = {
    rule.__name__: rule for rule in (normalize_unicode, normalize_whitespace, repair_encoding, redact_emails, redact_ip_addresses)
}

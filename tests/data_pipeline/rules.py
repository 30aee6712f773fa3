"""Rules of one's own: one for the source settings of `conftest.py`, and two that a document is poison to."""

import os


def drop_short(document, *, words=4):
    return document if len(document.text.split()) >= words else "too_short"


def die_of_poison(document):
    if "POISON" in document.text:
        os._exit(1)
    return document


def fail_on_poison(document):
    if "POISON" in document.text:
        raise RuntimeError("this document is poison")
    return document

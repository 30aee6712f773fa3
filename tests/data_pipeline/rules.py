"""A rule of one's own, for the source settings of `conftest.py`."""


def drop_short(document, *, words=4):
    return document if len(document.text.split()) >= words else "too_short"

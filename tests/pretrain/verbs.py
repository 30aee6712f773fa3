"""For tests of the `data` verbs: a run file, a rule, and what a verb printed."""

from collections.abc import Callable

RUN_FILE = """
data:
  root: shards
  sources:
  - {name: notes, path: notes}
  - {name: rows, path: rows, id_field: url, metadata_fields: [lang]}
  clean: [{rule: "shown_rules:drop_short", settings: {words: 4}}]
  tokenizer: {vocabulary_size: 300}
  held_out_fraction: 0.2
  work_unit_bytes: 1500
  quarantine_limit: 0.2
model: {vocabulary_size: 320}
"""
RULES = """
def drop_short(document, *, words):
    return document if len(document.text.split()) >= words else "too_short"
"""


class Result:
    """What a verb printed and how it ended."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


Run = Callable[..., Result]

"""For tests of the verbs: a way to call one, and for those of `data` a run file and a rule."""

import signal
from collections.abc import Callable

from typer.testing import CliRunner

from pretrain import cli

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


def call(*arguments: object) -> Result:
    """`pretrain ARGUMENTS` in this process; an error of ours is raised."""
    done = CliRunner().invoke(cli.app, list(map(str, arguments)), prog_name="pretrain")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Result(done.exit_code, done.stdout, done.stderr)


def hear_ctrl_c() -> None:
    """In a child, before its program: a suite that a shell started with `&` has it ignored, and the command keeps to that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

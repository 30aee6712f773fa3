"""The README says what is there: its tables are the code's, its examples load and work on a corpus of one's own."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from configs.data_section import SOURCE_FORMATS
from configs.deepspeed_keys import OWNED_KEYS
from configs.loader import load_config
from data_pipeline.build import build_dataset
from data_pipeline.execution import open_here
from data_pipeline.find import JSON_SUFFIXES, JSONL_SUFFIXES, TEXT_SUFFIXES, WARC_SUFFIXES
from tests.tiny import tiny_texts

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

# What a user would change in the copied file: the corpus, and sizes that take seconds.
EDITED = """
data:
  root: datasets/mine
  sources: [{name: notes, path: my-notes/}]
  held_out_fraction: 0.1
model: {num_layers: 1, width: 32, num_heads: 2, feed_forward_width: 64}
schedule: {warmup_tokens: 64, decay_tokens: 256}
"""


def test_the_table_of_owned_keys_is_the_codes() -> None:
    section = README.partition("## DeepSpeed's keys")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    assert {key.strip("`"): instead for key, instead in rows} == OWNED_KEYS


def section_of(title: str) -> str:
    return README.partition(f"## {title}\n")[2].partition("\n## ")[0]


def blocks_of(section: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)


def test_the_table_of_formats_is_the_codes() -> None:
    _, *rows = re.findall(r"^\| `([\w:]+)`.*? \| (.*) \|$", section_of("Your corpus"), re.MULTILINE)
    assert [name for name, _ in rows] == [*SOURCE_FORMATS, "module:function"]
    suffixes = {name: set(re.findall(r"`(\.\w+)`", what)) for name, what in rows}
    plain = {suffix for suffix in (*JSONL_SUFFIXES, *WARC_SUFFIXES) if not suffix.endswith((".gz", ".zst"))}
    assert suffixes["auto"] == {*TEXT_SUFFIXES, ".py", *plain, ".parquet"}
    assert suffixes["jsonl"] | suffixes["warc"] == plain | {JSON_SUFFIXES[0]}


def test_the_example_of_a_corpus_is_a_run_file(tmp_path: Path) -> None:
    example, _ = blocks_of(section_of("Your corpus"), "yaml")
    (tmp_path / "mine.yaml").write_text(example)
    assert len(load_config(tmp_path / "mine.yaml").data.clean) == 6


def test_a_rule_and_a_reader_of_ones_own_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, in the current folder; each block of Python begins with the name of its file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the current folder is added to it
    section = section_of("Your corpus")
    for block in blocks_of(section, "python"):
        Path(block.removeprefix("# ").partition(":")[0]).write_text(block)
    Path("mine.yaml").write_text(blocks_of(section, "yaml")[1])
    Path("my-notes").mkdir()
    notes = ["A recipe for bread.", "A letter to a friend.", "A recipe for soup."]
    Path("my-notes", "spring.notes").write_text("\n---\n".join(notes))
    Path("my-notes", "draft.txt").write_text("A recipe that the pattern leaves out.")
    data = load_config(Path("mine.yaml"), ["data.tokenizer.vocabulary_size=300", "data.tokenizer.engine=tokenizers"]).data
    documents = build_dataset(data, lambda _: None, open_here).manifest.documents
    assert (documents.read, documents.kept, documents.dropped, documents.quarantined) == (3, 2, {"no_recipe": 1}, {})


def test_the_five_lines_work(tmp_path: Path) -> None:
    """Each line as it stands, in an empty folder; only `mine.yaml` is edited, as the first line says."""
    block = README.partition("## Your own text, in five lines\n```\n")[2].partition("```")[0]
    copy, *commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert (copy[0], len(commands)) == ("cp", 4)
    content = (ROOT / copy[1]).read_text()
    for key in ("schedule", "data", "model"):
        assert f"\n{key}: " not in content or key == "schedule"
    kept = [line for line in content.splitlines() if not line.startswith("schedule:")]
    text = "\n".join(kept).replace("total_tokens: 409_600", "total_tokens: 10_240") + EDITED
    (tmp_path / copy[2]).write_text(text)
    (tmp_path / "my-notes").mkdir()
    for number, one in enumerate(tiny_texts(80, seed=3)):
        (tmp_path / "my-notes" / f"{number}.txt").write_text(one)
    for command in commands:
        assert command[0] == "pretrain"
        done = subprocess.run(
            [sys.executable, "-m", "pretrain.cli", *command[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, (command, done.stderr[-3000:])
    assert done.stdout.startswith("Once")
    assert (tmp_path / "runs" / "mine" / "checkpoints" / "step-00000010" / "MANIFEST.json").is_file()

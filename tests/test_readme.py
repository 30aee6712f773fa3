"""The README says what is there: its table of DeepSpeed's keys is the code's, its five lines work on a corpus of one's own."""

import shlex
import subprocess
import sys
from pathlib import Path

from configs.deepspeed_keys import OWNED_KEYS
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

"""What the demo prints is measured: the held-out text comes back from the shards, xz is xz."""

import json
import lzma
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from configs.steps import Steps
from pretrain.demo import choose_run, describe_data_wait, held_out_text, load_name, run_demo, xz_bits_per_byte
from pretrain.run.folder import RunFolder
from tests.tiny import END_OF_TEXT, tiny_texts, write_tiny_dataset


def test_the_held_out_text_is_the_documents_to_the_byte(tmp_path: Path) -> None:
    write_tiny_dataset(tmp_path / "data", num_documents=300, seed=7)
    assert held_out_text(tmp_path / "data", END_OF_TEXT) == "".join(tiny_texts(300, 7)[200:]).encode()


def test_xz_is_what_the_command_needs_for_blocks_of_64_kb(tmp_path: Path) -> None:
    text = "".join(tiny_texts(2000, 5)).encode()
    assert len(text) > 2 * 65536
    blocks = [text[start : start + 65536] for start in range(0, len(text), 65536)]
    assert xz_bits_per_byte(text) == 8 * sum(len(lzma.compress(block, preset=9)) for block in blocks) / len(text)
    if (xz := shutil.which("xz")) is None:
        return
    sizes = [len(subprocess.run([xz, "-9", "-c"], input=block, capture_output=True, timeout=60, check=True).stdout) for block in blocks]
    assert xz_bits_per_byte(text) == pytest.approx(8 * sum(sizes) / len(text), rel=1e-3)


@pytest.mark.parametrize(("path", "name"), [("my-notes", "my-notes"), ("a b.jsonl.gz", "a-b"), ("...", "corpus"), ("wiki.txt", "wiki")])
def test_a_dataset_is_named_after_its_corpus(path: str, name: str, tmp_path: Path) -> None:
    assert load_name(tmp_path / path) == name


def test_the_share_of_waiting_is_of_the_time_of_all_steps(tmp_path: Path) -> None:
    """Rows every 10 steps of 8 tokens; two polite stops between rows; the last attempt crashed and names its first row."""
    folder = RunFolder(tmp_path)
    assert describe_data_wait(folder, 8) == "nothing: no step was logged"
    begins = [(1, 0), (2, 13), (3, 25), (4, 40)]
    folder.attempts_file.write_text("".join(json.dumps({"attempt": number, "first_step": step}) + "\n" for number, step in begins))
    wanted = [  # attempt, step, steps that it spans, seconds, seconds waited
        (1, 10, 10, 10.0, 2.0),
        (2, 20, 7, 3.5, 0.035),
        (3, 30, 5, 1.0, 0.0),
        (4, 40, 10, 4.0, 0.004),
    ]
    rows = [
        {"step": step, "attempt": attempt, "tokens_per_second": 8 * steps / seconds, "data_wait_share": waited / seconds}
        for attempt, step, steps, seconds, waited in wanted
    ]
    rows.append({"step": 40, "attempt": 4, "held_out/bits_per_byte": 2.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    share, middle = 100 * 2.039 / 18.5, (0.1 + 1.0) / 2
    assert describe_data_wait(folder, 8) == (
        f"{share:.4f} % of the time of 32 steps (18 s), {middle:.4f} % in the median of their 4 rows in metrics.jsonl (goal: under 0.1 %)"
    )


def test_a_row_of_a_ramp_spans_the_tokens_of_its_own_steps(tmp_path: Path) -> None:
    """Four steps of 2 samples, then steps of 5, all of 8 tokens; an attempt begins between two rows."""
    steps, folder = Steps(1000, 8, [(8 * 8, 2)], 5), RunFolder(tmp_path)
    folder.attempts_file.write_text('{"attempt": 1, "first_step": 0}\n{"attempt": 2, "first_step": 7}\n')
    wanted = [(1, 5, 13, 4.0, 1.0), (2, 10, 15, 2.0, 0.0)]  # attempt, step, samples that it spans, seconds, seconds waited
    rows = [
        {"step": step, "attempt": attempt, "tokens_per_second": 8 * samples / seconds, "data_wait_share": waited / seconds}
        for attempt, step, samples, seconds, waited in wanted
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert describe_data_wait(folder, 8, steps.samples_before).startswith(f"{100 / 6:.4f} % of the time of 8 steps (6 s), 12.5000 % in")


TINY_DEMO = """
include: runs/demo.yaml
data: {tokenizer: {vocabulary_size: 300}, held_out_fraction: 0.05}
model: {num_layers: 1, width: 32, num_heads: 2, feed_forward_width: 64}
training: {sequence_length: 64, total_tokens: 102_400}
schedule: {warmup_tokens: 1024, decay_tokens: 20_000}
checkpoint: {every_steps: null}
watch: {log_every_steps: 1}
"""


def test_the_demo_on_a_corpus_of_ones_own_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Text, shards, a stop half way, a resume in a fresh process, a paragraph; a second demo gets a folder of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    for number, text in enumerate(tiny_texts(120, seed=1)):
        (tmp_path / "notes" / f"{number}.txt").write_text(text)
    (tmp_path / "tiny.yaml").write_text(TINY_DEMO)
    assert run_demo(tmp_path / "notes", "3 plus 4", tmp_path / "tiny.yaml") == 0
    said = capfd.readouterr()
    assert said.out.startswith("3 plus 4")
    attempts = [json.loads(line) for line in (tmp_path / "runs" / "demo" / "attempts.jsonl").read_text().splitlines()]
    assert [row["status"] for row in attempts] == [75, 0]
    assert attempts[1]["first_step"] == attempts[0]["last_step"] < attempts[1]["last_step"] == 400
    assert "resumed from step-" in said.err
    assert "400 steps, 102,400 tokens, 2 attempts" in said.err
    share = re.search(
        r"  data wait   (\d+\.\d{4}) % of the time of 400 steps \(\d+ s\), (\d+\.\d{4}) % in the median of their 400 rows", said.err
    )
    assert share is not None and all(0 <= float(one) < 100 for one in share.groups())
    held_out = len(held_out_text(tmp_path / "datasets" / "notes", END_OF_TEXT))
    assert f"{held_out:,} bytes: model" in said.err
    assert choose_run(tmp_path / "notes", tmp_path / "tiny.yaml").run.name == "demo-2"

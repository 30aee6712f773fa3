"""The loop on a CUDA device, by the command line: nccl, bf16, fused attention, exact resume. Not run where there is none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import write_tiny_dataset

RUN_FILE = """
data: {{root: {root}/data, tokenizer: {{vocabulary_size: 300}}}}
model: {{vocabulary_size: 320, num_layers: 2, width: 128, num_heads: 4, num_kv_heads: 2, feed_forward_width: 256, largest_context: 64}}
training: {{sequence_length: 32, global_batch_samples: 8, micro_batch_samples: 4, total_tokens: 5120}}
run: {{root: {root}/runs, deterministic: true}}
parallel: {{processes: 1}}
checkpoint: {{every_steps: 10}}
watch: {{log_every_steps: 1, wandb: disabled}}
"""


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_resumed_run_ends_with_the_same_bits(stage: int, tmp_path: Path) -> None:
    """20 steps at once, and 20 steps of which the second half starts again from the commit of step 10."""
    from pretrain.checkpoint.commit import reject_commit
    from pretrain.checkpoint.index import state_hash
    from pretrain.checkpoint.verify import read_commit

    write_tiny_dataset(tmp_path / "data")
    run_file = tmp_path / "tiny.yaml"
    run_file.write_text(RUN_FILE.format(root=tmp_path))
    command = [sys.executable, "-m", "pretrain.cli", "train", str(run_file), f"parallel.zero_stage={stage}"]
    final = tmp_path / "runs" / "tiny" / "checkpoints" / "step-00000020"
    hashes, losses = [], []
    for _ in range(2):
        subprocess.run(command, check=True, timeout=300)
        hashes.append(state_hash(read_commit(final)))
        rows = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
        losses.append([row["loss"] for row in map(json.loads, rows) if "loss" in row])
        reject_commit(final)
    assert hashes[0] == hashes[1]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 20

"""What one rank does in the training tests: the real loop, on a tiny model and tiny data.

Functions here are called by `run_on_ranks` in processes that have joined a gloo group; arguments and results are JSON.
"""

import json
import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed

from configs.loader import load_config
from configs.schema import RunConfig
from pretrain import train as loop
from pretrain.checkpoint.fragments import owned_slices, read_fragments, state_hash, torch_optimizer, write_fragments
from pretrain.checkpoint.verify import list_commits
from pretrain.data.batches import IGNORED_LABEL, Batches, MicroBatch
from pretrain.engine.parallel import Layout
from pretrain.engine.setup import initialize_engine
from pretrain.model.decoder import Decoder, initialize_weights
from pretrain.run.folder import RunFolder

TINY = {
    "model": (
        "{vocabulary_size: 320, num_layers: 2, width: 48, num_heads: 4, num_kv_heads: 2, feed_forward_width: 80, largest_context: 64, "
        "tied_head: true, qk_norm: true, dropout: 0.1}"
    ),
    "data.tokenizer.vocabulary_size": "300",
    "training": "{sequence_length: 32, global_batch_samples: 8, micro_batch_samples: 2, total_tokens: 2560}",
    "optimizer.peak_lr": "1e-2",
    "schedule": "{warmup_tokens: 512, decay_tokens: 1024}",
    "run.deterministic": "true",
    "parallel.cpu_processes": "2",
    "checkpoint.every_steps": "null",
    "evaluate.every_steps": "4",
    "watch": "{log_every_steps: 1, wandb: disabled}",
}
"""A run of 10 steps, every step logged, saved only at the end or when it stops."""


def tiny_config(dataset: Path | str, runs: Path | str, **overrides: str) -> RunConfig:
    """The tiny run, with dotted overrides (`__` for the dots)."""
    given = {
        "data.root": str(dataset),
        "run.root": str(runs),
        **TINY,
        **{key.replace("__", "."): value for key, value in overrides.items()},
    }
    empty = Path(runs) / "tiny.yaml"
    empty.parent.mkdir(parents=True, exist_ok=True)
    if not empty.exists():
        empty.write_text("{}")
    return load_config(empty, [f"{key}={value}" for key, value in given.items()])


TENSORS = ("tokens_BT", "labels_BT", "documents_BT", "positions_BT")
"""Of a micro-batch."""


class StopAfter:
    """Stands in for a signal: asks to stop at the given step (it is asked once per step)."""

    def __init__(self, step: int | None, first_step: int = 0) -> None:
        self._step, self._seen = step, first_step

    @property
    def asked(self) -> bool:
        self._seen += 1
        return self._step is not None and self._seen >= self._step


def this_rank() -> Layout:
    """The layout of this process in the group it has joined."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    rank, size = distributed.get_rank(), distributed.get_world_size()
    return Layout(rank, size, rank, size, torch.device("cpu"))


def hold_lease(run: RunFolder, attempt: int) -> None:
    """What the supervisor would have done."""
    run.path.mkdir(parents=True, exist_ok=True)
    run.lease_file.write_text(json.dumps({"attempt": attempt}))


def train_runs(dataset: str, runs: str, cases: dict[str, dict[str, str]], stop_at: int | None = None, attempt: int = 1) -> dict[str, Any]:
    """Train (or go on with) one run per case in this process group; returns loss per step, state hash and how it ended."""
    layout, result = this_rank(), {}
    for name, overrides in cases.items():
        config = tiny_config(dataset, runs, run__name=name, **overrides)
        run = RunFolder.of(config)
        if layout.rank == 0:
            hold_lease(run, attempt)
        distributed.barrier()
        outcome = loop.train(config, run, attempt, layout, StopAfter(stop_at))
        rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        newest = list_commits(run.checkpoints)[0]
        result[name] = {
            "outcome": outcome.kind,
            "steps": [outcome.first_step, outcome.last_step],
            "losses": [[row["step"], row["loss"].hex(), row["gradient_norm"], row["learning_rate"]] for row in rows if "loss" in row],
            "held_out": [[row["step"], row["held_out/bits_per_byte"]] for row in rows if "held_out/bits_per_byte" in row],
            "hash": state_hash(newest) if layout.rank == 0 else None,
            "commit": newest.name,
        }
        distributed.barrier()
    return result


def rewrite(dataset: str, runs: str, commit: str, copies: str, cases: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Read a commit into a fresh engine of each case and write it out again; returns each copy's state hash.

    Also checks that every live weight is the fp32 weight rounded, and what DeepSpeed itself says the fp32 weights are.
    """
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param

    layout, result = this_rank(), {}
    for name, overrides in cases.items():
        config = tiny_config(dataset, runs, **overrides)
        model = Decoder(config.model)
        initialize_weights(model, 99)  # other weights: whatever is right afterwards was read
        engine = initialize_engine(config, layout, model)
        read_fragments(engine, Path(commit))
        folder = Path(copies) / name
        if layout.rank == 0:
            folder.mkdir(parents=True)
        distributed.barrier()
        write_fragments(engine, folder, layout.rank, layout.world_size, {})
        distributed.barrier()
        stale, public = [], {}
        for parameter_name, parameter in engine.module.named_parameters():
            public[parameter_name] = None
            if config.parallel.zero_stage > 0:
                full = safe_get_full_fp32_param(parameter)
                with zero.GatheredParameters([parameter], enabled=config.parallel.zero_stage == 3):
                    if not torch.equal(parameter.detach().cpu(), full.to(parameter.dtype).view(parameter.shape).cpu()):
                        stale.append(parameter_name)
        result[name] = {
            "hash": state_hash(folder),
            "stale": stale,
            "slices": len(owned_slices(engine)),
            "optimizer": type(engine.optimizer).__name__,
        }
    return result


def one_masked_step(dataset: str, runs: str, overrides: dict[str, str]) -> dict[str, Any]:
    """One step of the real loop in which every rank and micro-step has another number of valid targets."""
    layout = this_rank()
    config = tiny_config(dataset, runs, run__name="masked", **overrides)
    run = RunFolder.of(config)
    if layout.rank == 0:
        hold_lease(run, 1)
    distributed.barrier()
    plain = Batches.next_step
    fed: list[dict[str, Any]] = []

    def masked(self: Batches) -> list[MicroBatch]:
        batches = []
        for micro_step, batch in enumerate(plain(self)):
            labels_BT = batch.labels_BT.clone()
            labels_BT[:, : 5 + 11 * layout.rank + 7 * micro_step] = IGNORED_LABEL
            if layout.rank == 1 and micro_step == 1:
                labels_BT[:] = IGNORED_LABEL  # nothing to learn here at all
            batches.append(replace(batch, labels_BT=labels_BT, num_valid=int((labels_BT != IGNORED_LABEL).sum())))
            fed.append({name.removesuffix("_BT"): getattr(batches[-1], name).tolist() for name in TENSORS})
        return batches

    Batches.next_step = masked  # type: ignore[method-assign]
    try:
        loop.train(config, run, 1, layout, StopAfter(None))
    finally:
        Batches.next_step = plain  # type: ignore[method-assign]
    row = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[0])
    return {"fed": fed, "loss": row["loss"], "gradient_norm": row["gradient_norm"], "commit": str(list_commits(run.checkpoints)[0])}


def private_attributes(dataset: str, runs: str, cases: dict[str, dict[str, str]]) -> dict[str, Any]:
    """After two steps: what `owned_slices` says is there, against what is there."""
    layout, result = this_rank(), {}
    for name, overrides in cases.items():
        config = tiny_config(dataset, runs, **overrides)
        model = Decoder(config.model)
        initialize_weights(model, 5)
        before = {key: value.detach().clone() for key, value in model.named_parameters()}
        engine = initialize_engine(config, layout, model)
        wrong, covered = [], dict.fromkeys(before, 0)
        for piece in owned_slices(engine):
            covered[piece.parameter] += piece.count
            expected = before[piece.parameter].reshape(-1)[piece.start : piece.start + piece.count]
            expected = expected.to(torch.bfloat16).float() if config.precision == "bf16" else expected
            if not torch.equal(piece.of(piece.flat).cpu(), expected):
                wrong.append(piece.parameter)
        counts = torch.tensor([covered[key] for key in sorted(covered)])
        distributed.all_reduce(counts)
        whole = [int(np.prod(before[key].shape)) for key in sorted(covered)]
        copies = layout.world_size if config.parallel.zero_stage == 0 else 1
        result[name] = {
            "wrong": wrong,
            "covered": counts.tolist() == [count * copies for count in whole],
            "optimizer": type(torch_optimizer(engine)).__name__,
        }
    return result

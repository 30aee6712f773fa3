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
from deepspeed import DeepSpeedEngine

from configs.loader import load_config
from configs.schema import RunConfig
from pretrain import train as loop
from pretrain.checkpoint.fragments import image_of, owned_slices, prepare_weights, read_fragments, refresh_weights, torch_optimizer
from pretrain.checkpoint.index import FragmentIndex, state_hash
from pretrain.checkpoint.verify import Commit, list_commits, read_commit, write_manifest
from pretrain.data.batches import IGNORED_LABEL, Batches, MicroBatch
from pretrain.engine.parallel import Layout, initialize_layout
from pretrain.engine.setup import construct_model, initialize_engine
from pretrain.model.decoder import Decoder
from pretrain.model.weights import initialize_weights
from pretrain.run.folder import RunFolder
from pretrain.state import TrainState

TINY = {
    "model": (
        "{vocabulary_size: 320, num_layers: 2, width: 48, num_heads: 4, num_kv_heads: 2, feed_forward_width: 80, largest_context: 64, "
        "tied_head: true, qk_norm: head, dropout: 0.1}"
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
    return initialize_layout()


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
            "scores": [[row["step"], row["task/arithmetic/exact_match"]] for row in rows if "task/arithmetic/exact_match" in row],
            "hash": state_hash(read_commit(newest)) if layout.rank == 0 else None,
            "commit": newest.name,
        }
        distributed.barrier()
    return result


def write(engine: DeepSpeedEngine, folder: Path, layout: Layout, state: TrainState) -> Commit:
    """A folder with the files of all ranks and a manifest, without the protocol. Collective."""
    folder.mkdir(parents=True, exist_ok=True)
    records = layout.gather(image_of(engine, layout.rank, layout.world_size, {}).write(folder))
    files = {name: record for one in records for name, record in one.items()}
    commit = Commit(folder, state, files, {}, {}, layout.world_size, 1, 1.5, 0)
    if layout.rank == 0:
        write_manifest(commit)
    distributed.barrier()
    return commit


def load(engine: DeepSpeedEngine, commit: Commit) -> None:
    """Fill an engine from a commit that is whole. Collective."""
    prepare_weights(engine)
    with FragmentIndex(commit) as index:
        read_fragments(engine, index)
    refresh_weights(engine)


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
        initialize_weights(model, model.section, 99)  # other weights: whatever is right afterwards was read
        engine = initialize_engine(config, layout, model)
        original = read_commit(Path(commit))
        load(engine, original)
        folder = Path(copies) / name
        copy = write(engine, folder, layout, original.state)
        stale, public = [], {}
        for parameter_name, parameter in engine.module.named_parameters():
            public[parameter_name] = None
            if config.parallel.zero_stage > 0:
                full = safe_get_full_fp32_param(parameter)
                with zero.GatheredParameters([parameter], enabled=config.parallel.zero_stage == 3):
                    if not torch.equal(parameter.detach().cpu(), full.to(parameter.dtype).view(parameter.shape).cpu()):
                        stale.append(parameter_name)
        result[name] = {
            "hash": state_hash(copy),
            "stale": stale,
            "slices": len(owned_slices(engine)),
            "optimizer": type(engine.optimizer).__name__,
        }
    return result


def first_weights_of(dataset: str, runs: str, copies: str, cases: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Hash of the weights that each case begins with, and the most that a rank held of a parameter before the engine was made."""
    layout, result = this_rank(), {}
    for name, overrides in cases.items():
        config = tiny_config(dataset, runs, **overrides)
        model = construct_model(config, layout)
        largest = max(getattr(parameter, "ds_tensor", parameter).numel() for parameter in model.parameters())
        engine = initialize_engine(config, layout, model)
        folder = Path(copies) / name
        result[name] = {"hash": state_hash(write(engine, folder, layout, TrainState())), "largest": largest}
    return result


def loss_scale_through_a_commit(dataset: str, runs: str, commit: str) -> dict[str, Any]:
    """Write an fp16 engine whose loss scale stands somewhere, read it into a fresh one; what that has."""
    layout = this_rank()
    config = tiny_config(dataset, runs, precision="fp16", parallel__zero_stage="2")
    engine = initialize_engine(config, layout, construct_model(config, layout))
    scaler = engine.optimizer.loss_scaler
    scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter, scaler.cur_hysteresis = 2.0**11, 37, 12, 1
    written = write(engine, Path(commit), layout, TrainState())
    fresh = initialize_engine(config, layout, construct_model(config, layout))
    load(fresh, written)
    return {key: getattr(fresh.optimizer.loss_scaler, key) for key in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")}


def masked_steps(dataset: str, runs: str, cases: dict[str, dict[str, str]]) -> dict[str, Any]:
    """`one_masked_step` of each case."""
    return {name: one_masked_step(dataset, f"{runs}/{name}", overrides) for name, overrides in cases.items()}


def compiled_steps(dataset: str, runs: str, cases: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Three steps of each case with compiled layers and with eager ones: losses, graphs of the layers, and what broke them.

    With a backend that needs no C++ compiler: what is counted is dynamo's.
    """
    from functools import partial

    from torch._dynamo.utils import counters

    layout, result = this_rank(), {}
    torch.compile = partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]
    for name, overrides in cases.items():
        losses: dict[str, list[float]] = {}
        for kind in ("compiled", "eager"):
            torch.compiler.reset()
            counters.clear()
            config = tiny_config(dataset, runs, model__dropout="0.0", performance__compile=str(kind == "compiled").lower(), **overrides)
            engine = initialize_engine(config, layout, construct_model(config, layout))
            tokens_BT = torch.arange(64).reshape(2, 32) % 300
            documents_BT = (tokens_BT % 32 > 10).long()
            losses[kind] = []
            for _ in range(3):
                for _ in range(config.training.accumulation(layout.data_size)):
                    loss = engine(tokens_BT, tokens_BT, documents_BT=documents_BT)
                    engine.backward(loss / 64, scale_wrt_gas=False)
                    engine.step()
                losses[kind].append(loss.item())
            if kind == "compiled":
                found = {"breaks": dict(counters["graph_break"]), "graphs": counters["stats"]["unique_graphs"]}
        result[name] = {**found, **losses}
    return result


def one_masked_step(dataset: str, runs: str, overrides: dict[str, str]) -> dict[str, Any]:
    """One step (or more) of the real loop in which every rank and micro-step has another number of valid targets."""
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
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    steps = [[row["loss"], row["gradient_norm"]] for row in rows if "loss" in row]
    loss, gradient_norm = steps[0]
    return {"fed": fed, "loss": loss, "gradient_norm": gradient_norm, "steps": steps, "commit": str(list_commits(run.checkpoints)[0])}


def private_attributes(dataset: str, runs: str, cases: dict[str, dict[str, str]]) -> dict[str, Any]:
    """After two steps: what `owned_slices` says is there, against what is there."""
    layout, result = this_rank(), {}
    for name, overrides in cases.items():
        config = tiny_config(dataset, runs, **overrides)
        model = Decoder(config.model)
        initialize_weights(model, model.section, 5)
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

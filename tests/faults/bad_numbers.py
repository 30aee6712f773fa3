"""One rank of a training in which numbers go bad: the real loop, with a hook that spoils a loss, a gradient or a weight.

Functions here are called by `run_on_ranks` in processes that have joined a gloo group; arguments and results are JSON.
"""

import json
import math
import os
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from deepspeed import DeepSpeedEngine

from configs.errors import UserError
from pretrain import start as beginning
from pretrain import train as loop
from pretrain.checkpoint.fragments import owned_slices, torch_optimizer
from pretrain.checkpoint.index import FragmentIndex, state_hash
from pretrain.checkpoint.set_aside import ROLLED_BACK
from pretrain.checkpoint.verify import list_commits, read_commit
from pretrain.data.batches import Batches
from pretrain.engine.replicas import CorruptReplicaError, compare_replicas
from pretrain.run.folder import RunFolder
from pretrain.run.rollback import read_rollbacks, record_rollback
from pretrain.watch.metrics import METRICS_FILE, read_rows
from tests.training import StopAfter, hold_lease, this_rank, tiny_config

VALUES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def train_with_bad_numbers(dataset: str, runs: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Train one run per case; a case is {"overrides", "rank", "steps", "micro_step", "place": loss, gradient or weight, "value"}.

    Returns by case: how it ended, which steps were applied, whose bits changed in a skipped step, what is not finite at the end, the rows.
    """
    layout, result = this_rank(), {}
    plain = beginning.initialize_engine
    for name, case in cases.items():
        config = tiny_config(dataset, runs, run__name=name, **case["overrides"])
        run, applied, changed, engines = RunFolder.of(config), list[bool](), list[str](), list[DeepSpeedEngine]()
        if layout.rank == 0:
            hold_lease(run, 1)
        distributed.barrier()

        def spoilt(*arguments: Any, case: Any = case, applied: Any = applied, changed: Any = changed, engines: Any = engines) -> Any:
            engines.append(plain(*arguments))
            spoil(engines[-1], case, layout.rank)
            watch(engines[-1], applied, changed)
            return engines[-1]

        beginning.initialize_engine = spoilt
        try:
            ended = loop.train(config, run, 1, layout, StopAfter(case.get("stop_at"))).kind
        except Exception as error:
            ended = f"{type(error).__name__}: {error}"
        finally:
            beginning.initialize_engine = plain
        distributed.barrier()
        commits = list_commits(run.checkpoints)
        result[name] = {
            "ended": ended,
            "applied": applied,
            "changed": changed,
            "not_finite": [key for key, value in bits_of(engines[-1]).items() if not torch.isfinite(value.float()).all()],
            "rows": read_rows(run.path / METRICS_FILE),
            "committed_not_finite": not_finite_in(commits) if layout.rank == 0 else [],
            "commits": {commit.name: json.loads((commit / "MANIFEST.json").read_text()) for commit in commits},
        }
        distributed.barrier()
    return result


def not_finite_in(commits: list[Path]) -> list[str]:
    """Weights and moments of commits that are not finite."""
    found: list[str] = []
    for commit in commits:
        with FragmentIndex(read_commit(commit)) as index:
            for parameter, shape in index.shapes.items():
                for kind in sorted(index.kinds(parameter)):
                    if not torch.isfinite(index.read(kind, parameter, 0, math.prod(shape))).all():
                        found.append(f"{commit.name}: {kind} of {parameter}")
    return found


def spoil(engine: DeepSpeedEngine, case: dict[str, Any], rank: int) -> None:
    """Make a number bad in some steps (counted from 1) of one rank."""

    def is_now() -> bool:
        micro_step = engine.micro_steps % engine.gradient_accumulation_steps()
        here = rank == case["rank"] and micro_step == case["micro_step"]
        return here and engine.global_steps + 1 in case["steps"] and torch.is_grad_enabled()

    def spoil_loss(module: Any, given: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss + VALUES[case["value"]] if is_now() else loss  # its own gradient stays finite

    def spoil_gradient(module: Any, given: Any, output: torch.Tensor) -> None:
        if is_now() and output.requires_grad:
            output.register_hook(one_bad)

    def one_bad(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[gradient.numel() // 2] = VALUES[case["value"]]
        return gradient

    model: Any = engine.module
    plain = engine.step

    def spoil_weight() -> None:
        now = is_now()
        plain()
        if now:
            weight = next(model.parameters()).detach().view(-1)
            weight.view(torch.int16)[5] ^= 1  # of its mantissa

    if case["place"] == "loss":
        model.register_forward_hook(spoil_loss)
    elif case["place"] == "gradient":
        model.blocks[0].register_forward_hook(spoil_gradient)
    else:
        engine.step = spoil_weight


def watch(engine: DeepSpeedEngine, applied: list[bool], changed: list[str]) -> None:
    """Note of each step whether it was applied, and whose bits changed though it was not."""
    plain = engine.step

    def step() -> None:
        if not engine.is_gradient_accumulation_boundary():
            return plain()
        before = bits_of(engine)
        plain()
        applied.append(engine.was_step_applied())
        if not applied[-1]:
            after = bits_of(engine)
            changed.extend(key for key in before | after if key not in before or not torch.equal(before[key], after[key]))
        return None

    engine.step = step


def bits_of(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Copies of every fp32 weight, moment, step of the optimizer and live weight that this rank holds."""
    state, found = torch_optimizer(engine).state, {}
    for piece in owned_slices(engine):
        found[f"fp32 {piece.parameter}"] = piece.of(piece.flat).clone()
        for key, value in state.get(piece.flat, {}).items():
            whole = torch.as_tensor(value)
            found[f"{key} {piece.parameter}"] = (piece.of(whole) if whole.numel() == piece.flat.numel() and whole.dim() else whole).clone()
    for name, parameter in engine.module.named_parameters():
        found[f"live {name}"] = getattr(parameter, "ds_tensor", parameter).detach().clone()
    return found


def train_each_past_bad_samples(dataset: str, runs: str, bad: list[int], cases: dict[str, dict[str, str]]) -> dict[str, Any]:
    """`train_past_bad_samples` of each case: run name -> overrides."""
    return {name: train_past_bad_samples(dataset, runs, name, bad, overrides) for name, overrides in cases.items()}


def train_past_bad_samples(
    dataset: str, runs: str, name: str, bad: list[int], overrides: dict[str, str], attempts: int = 9
) -> dict[str, Any]:
    """Train a run whose loss is far higher in steps that see a sample of `bad` (first, end), and do what the supervisor does.

    Returns how each attempt ended, which sample numbers each step of the last lineage learnt from, the rows and the state's hash.
    """
    layout = this_rank()
    config = tiny_config(dataset, runs, run__name=name, **overrides)
    run, ended, seen = RunFolder.of(config), list[str](), dict[int, list[int]]()
    plain_engine, plain_step, is_bad = beginning.initialize_engine, Batches.next_step, [False]
    num_samples, positions = config.training.global_batch_samples, dict[int, int]()

    def initialize(*arguments: Any) -> Any:
        engine = plain_engine(*arguments)
        engine.module.register_forward_hook(lambda module, given, loss: loss + 500.0 * is_bad[0] if torch.is_grad_enabled() else loss)
        return engine

    def next_step(batches: Batches) -> Any:
        position = positions.setdefault(id(batches), batches._seen)  # which it has not read ahead yet
        positions[id(batches)] += num_samples
        samples = batches.order.numbers(position, num_samples).tolist()
        is_bad[0] = any(bad[0] <= number < bad[1] for number in samples)
        seen[position // num_samples + 1] = samples
        return plain_step(batches)

    beginning.initialize_engine, Batches.next_step = initialize, next_step
    try:
        for attempt in range(1, attempts + 1):
            if layout.rank == 0:
                hold_lease(run, attempt)
            distributed.barrier()
            try:
                outcome = loop.train(config, run, attempt, layout, StopAfter(None))
            except UserError as error:
                ended.append(str(error))
                break
            ended.append(outcome.kind)
            if outcome.rollback is None:
                break
            if layout.rank == 0:
                record_rollback(run.path, outcome.rollback)
            distributed.barrier()
    finally:
        beginning.initialize_engine, Batches.next_step = plain_engine, plain_step
    distributed.barrier()
    commits = list_commits(run.checkpoints)
    return {
        "ended": ended,
        "seen": [seen[step] for step in sorted(seen)],
        "rows": read_rows(run.path / METRICS_FILE),
        "rollbacks": [asdict(one) for one in read_rollbacks(run.path)],
        "state": json.loads((commits[0] / "MANIFEST.json").read_text())["state"] if commits else None,
        "hash": state_hash(read_commit(commits[0])) if commits else None,
        "commits": [commit.name for commit in commits],
        "aside": sorted(path.name for path in (run.checkpoints / ROLLED_BACK).glob("*")),
    }


def compare_after_flips(dataset: str, runs: str, cases: dict[str, dict[str, str]], seed: int, flips: int) -> dict[str, Any]:
    """Two steps of each case, then `flips` times a random bit of a random live weight of a random rank; what the comparison says."""
    layout, chosen, result = this_rank(), random.Random(seed), {}
    for name, overrides in cases.items():
        config = tiny_config(dataset, runs, **overrides)
        engine = beginning.initialize_engine(config, layout, beginning.construct_model(config, layout))
        tokens_BT = (torch.arange(64).reshape(2, 32) * 7 + layout.rank) % 300
        for _ in range(2 * config.training.accumulation(layout.data_size)):
            engine.backward(engine(tokens_BT, tokens_BT) / 64, scale_wrt_gas=False)
            engine.step()

        def compare(engine: DeepSpeedEngine = engine) -> str:
            try:
                compare_replicas(engine, ((one.parameter, one.start, one.of(one.flat)) for one in owned_slices(engine)), layout)
            except CorruptReplicaError as error:
                return str(error)
            return "equal"

        weights, result[name] = dict(engine.module.named_parameters()), []
        for _ in range(flips):
            rank, parameter = chosen.randrange(layout.world_size), chosen.choice(sorted(weights))
            flat = weights[parameter].detach().view(-1)
            bits = flat.view(torch.int16 if flat.element_size() == 2 else torch.int32)
            place, bit = chosen.randrange(flat.numel()), chosen.randrange(8 * flat.element_size())
            flip = {"rank": rank, "host": os.uname().nodename, "parameter": parameter, "place": place, "bit": bit, "before": compare()}
            for key in ("found", "after"):
                if layout.rank == rank:
                    bits[place] ^= torch.tensor(1 << bit).to(bits.dtype)
                flip[key] = compare()
            result[name].append(flip)
    return result

"""The loop: exact resume at every stage, an exact loss, and a page to read."""

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import write_tiny_dataset

TASK = Path(__file__).parents[2] / "configs/tasks/arithmetic.yaml"
RAMP = {
    "training__batch_ramp": "[{until_tokens: 384, global_batch_samples: 4}, {until_tokens: 1400, global_batch_samples: 8}]",
    "training__global_batch_samples": "12",
}
"""Ten steps too: three, four and three, of one, two and three micro-steps. The resume is in the middle of the ramp."""
STAGES = {
    "zero-1": {"parallel__zero_stage": "1", "performance__activation_checkpointing": "full", **RAMP},
    "zero-2": {"parallel__zero_stage": "2"},
    "zero-3": {
        "parallel__zero_stage": "3",
        "performance__activation_checkpointing": "selective",
        **RAMP,
        "evaluate__tasks": f"[{TASK}]",
        "evaluate__tasks_limit": "2",
    },
    "muon": {"parallel__zero_stage": "1", "optimizer__kind": "muon"},
    "fp16": {"parallel__zero_stage": "2", "precision": "fp16"},
}


def test_ten_steps_are_five_and_a_resume_and_five(run_on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    """ZeRO 1, 2, 3, two ranks, bf16, dropout on: losses, norms, evaluations, final weights and moments are equal to the bit."""
    dataset = tmp_path / "data"
    write_tiny_dataset(dataset)
    whole = run_on_ranks("tests.training:train_runs", 2, {"dataset": str(dataset), "runs": str(tmp_path / "whole"), "cases": STAGES})[0]
    parts = {"dataset": str(dataset), "runs": str(tmp_path / "parts"), "cases": STAGES}
    first = run_on_ranks("tests.training:train_runs", 2, {**parts, "stop_at": 5})[0]
    second = run_on_ranks("tests.training:train_runs", 2, {**parts, "attempt": 2})[0]
    for name in STAGES:
        assert (first[name]["outcome"], first[name]["steps"]) == ("stopped", [0, 5]), name
        assert (second[name]["outcome"], second[name]["steps"]) == ("done", [5, 10]), name
        assert [row[0] for row in whole[name]["losses"]] == list(range(1, 11)), name
        assert second[name]["losses"] == whole[name]["losses"], name
        assert second[name]["held_out"] == whole[name]["held_out"], name
        assert second[name]["scores"] == whole[name]["scores"], name
        assert second[name]["hash"] == whole[name]["hash"] != first[name]["hash"], name
        assert float.fromhex(whole[name]["losses"][-1][1]) < float.fromhex(whole[name]["losses"][0][1]) - 1, "nothing was learnt"
    assert [step for step, _ in whole["zero-3"]["scores"]] == [10], "only at the end"


@pytest.mark.long
def test_compiled_layers_are_one_graph_without_breaks_at_every_stage(run_on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    """DeepSpeed's hooks, by which stage 3 gathers weights, stay outside of what is compiled; recomputation is inside."""
    dataset = tmp_path / "data"
    write_tiny_dataset(dataset)
    cases = {
        f"zero-{stage}-{kind}": {"parallel__zero_stage": str(stage), "performance__activation_checkpointing": kind}
        for stage, kind in ((1, "null"), (3, "null"), (3, "selective"))
    }
    for rank in run_on_ranks("tests.training:compiled_steps", 2, {"dataset": str(dataset), "runs": str(tmp_path), "cases": cases}):
        for name, case in rank.items():
            assert case["breaks"] == {}, name
            assert case["graphs"] == 2, (name, "one for all layers, one for the loss")
            assert case["compiled"] == pytest.approx(case["eager"], rel=1e-4), name
            assert case["compiled"][-1] < case["compiled"][0], name


@pytest.mark.long
def test_the_loss_is_exact_over_the_global_batch_with_unequal_masks(run_on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    """Two ranks, two micro-steps, all with other numbers of valid targets, one with none: loss, gradient norm and updated
    weights are those of one device that sees the whole batch at once."""
    import torch

    from pretrain.checkpoint.index import FragmentIndex
    from pretrain.checkpoint.verify import read_commit
    from pretrain.engine.optimizer import build_optimizer, rate_share, set_learning_rate
    from pretrain.model.decoder import Decoder
    from pretrain.model.weights import initialize_weights
    from tests.training import tiny_config

    dataset, runs = tmp_path / "data", tmp_path / "runs"
    write_tiny_dataset(dataset)
    for stage in ("1", "3"):
        overrides = {
            "precision": "fp32",
            "parallel__zero_stage": stage,
            "model__dropout": "0.0",
            "training__total_tokens": "256",
            "schedule": "{decay_tokens: 0}",
        }
        here = {"dataset": str(dataset), "runs": str(runs / stage), "overrides": overrides}
        ranks = run_on_ranks("tests.training:one_masked_step", 2, here)
        parts = [part for rank in ranks for part in rank["fed"]]
        tokens, labels, documents, positions = (
            torch.cat([torch.tensor(part[name]) for part in parts]) for name in ("tokens", "labels", "documents", "positions")
        )
        config = tiny_config(dataset, runs / stage, **overrides)
        model = Decoder(config.model)
        initialize_weights(model, model.section, config.run.seed)
        optimizer = build_optimizer(model, config.optimizer)
        set_learning_rate(optimizer, rate_share(128, config.training, config.schedule))
        loss = model(tokens, labels, documents_BT=documents, positions_BT=positions) / (labels != -100).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert ranks[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert ranks[0]["gradient_norm"] == pytest.approx(norm.item(), rel=1e-5)
        trained = FragmentIndex(read_commit(Path(ranks[0]["commit"]))).weights()
        for name, parameter in model.named_parameters():
            # Adam's first step is rate x gradient / (|gradient| + 1e-8): where a gradient is that small, its last digits count.
            torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_every_step_of_a_ramp_learns_from_its_own_batch_at_once(run_on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    """At every ZeRO stage: losses and gradient norms are those of one device that is fed 4, 8, 8, 12 and 12 samples at once."""
    import torch

    from pretrain.checkpoint.index import FragmentIndex
    from pretrain.checkpoint.verify import read_commit
    from pretrain.engine.optimizer import build_optimizer, rate_share, set_learning_rate
    from pretrain.model.decoder import Decoder
    from pretrain.model.weights import initialize_weights
    from tests.training import tiny_config

    write_tiny_dataset(tmp_path / "data")
    overrides = {
        "precision": "fp32",
        "model__dropout": "0.0",
        "training__global_batch_samples": "12",
        "training__batch_ramp": "[{until_tokens: 128, global_batch_samples: 4}, {until_tokens: 640, global_batch_samples: 8}]",
        "training__total_tokens": "1408",
        "schedule": "{warmup_tokens: 512, decay_tokens: 512}",
    }
    cases = {f"stage-{stage}": {**overrides, "parallel__zero_stage": str(stage)} for stage in range(4)}
    here = {"dataset": str(tmp_path / "data"), "runs": str(tmp_path / "runs"), "cases": cases}
    ranks = run_on_ranks("tests.training:masked_steps", 2, here)

    for name, of_stage in cases.items():
        config = tiny_config(tmp_path / "data", tmp_path / "runs" / name, **of_stage)
        model = Decoder(config.model)
        initialize_weights(model, model.section, config.run.seed)
        optimizer = build_optimizer(model, config.optimizer)
        fed = [rank[name]["fed"] for rank in ranks]
        assert [len(of_rank) for of_rank in fed] == [1 + 2 + 2 + 3 + 3] * 2
        seen, losses, norms = 0, [], []
        for size in (4, 8, 8, 12, 12):
            parts = [of_rank.pop(0) for of_rank in fed for _ in range(size // 4)]
            columns = ("tokens", "labels", "documents", "positions")
            tokens, labels, documents, positions = (torch.cat([torch.tensor(part[column]) for part in parts]) for column in columns)
            assert len(tokens) == size
            set_learning_rate(optimizer, rate_share((seen + size // 2) * 32, config.training, config.schedule))
            loss = model(tokens, labels, documents_BT=documents, positions_BT=positions) / (labels != -100).sum()
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.item())
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
            optimizer.step()
            seen += size
        found_losses, found_norms = zip(*ranks[0][name]["steps"], strict=True)
        assert list(found_losses) == pytest.approx(losses, rel=1e-4), name
        if name != "stage-0":  # there DeepSpeed does not tell
            assert list(found_norms) == pytest.approx(norms, rel=1e-3), name
        trained = FragmentIndex(read_commit(Path(ranks[0][name]["commit"]))).weights()
        for parameter_name, parameter in model.named_parameters():
            assert (trained[parameter_name] - parameter.detach()).norm() < 1e-3 * parameter.norm(), (name, parameter_name)


def test_the_loop_is_one_page_of_plain_calls() -> None:
    """A step of `train` fits a page, and calls the engine by its own three names."""
    from pretrain import train

    source = inspect.getsource(train.train)
    (step,) = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.While))
    assert step.end_lineno is not None and step.end_lineno - step.lineno < 85
    calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    assert {"engine", "engine.backward", "engine.step"} <= set(calls)

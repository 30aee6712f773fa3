"""The loop: exact resume at every stage, an exact loss, and a page to read."""

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import write_tiny_dataset

STAGES = {f"zero-{stage}": {"parallel__zero_stage": str(stage)} for stage in (1, 2, 3)}


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
        assert second[name]["hash"] == whole[name]["hash"] != first[name]["hash"], name
        assert float.fromhex(whole[name]["losses"][-1][1]) < float.fromhex(whole[name]["losses"][0][1]) - 1, "nothing was learnt"


def test_the_loss_is_exact_over_the_global_batch_with_unequal_masks(run_on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    """Two ranks, two micro-steps, all with other numbers of valid targets, one with none: loss, gradient norm and updated
    weights are those of one device that sees the whole batch at once."""
    import torch

    from pretrain.checkpoint.fragments import FragmentIndex
    from pretrain.engine.optimizer import build_optimizer, learning_rate, set_learning_rate
    from pretrain.model.decoder import Decoder, initialize_weights
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
        initialize_weights(model, config.run.seed)
        optimizer = build_optimizer(model, config.optimizer)
        set_learning_rate(optimizer, learning_rate(128, config.training, config.optimizer, config.schedule))
        loss = model(tokens, labels, documents_BT=documents, positions_BT=positions) / (labels != -100).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert ranks[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert ranks[0]["gradient_norm"] == pytest.approx(norm.item(), rel=1e-5)
        trained = FragmentIndex(Path(ranks[0]["commit"])).weights()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-4, atol=2e-5)


def test_the_loop_is_one_page_of_plain_calls() -> None:
    """`train` fits a page, and calls the engine by its own three names."""
    from pretrain import train

    source = inspect.getsource(train.train)
    assert len(source.splitlines()) <= 75
    calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    assert {"engine", "engine.backward", "engine.step"} <= set(calls)

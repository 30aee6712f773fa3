"""What one rank does in the tests of the self-test: called by `run_on_ranks`; arguments and results are JSON."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as distributed
from deepspeed import DeepSpeedEngine, zero
from torch import nn

from configs.errors import UserError
from pretrain.checkpoint import self_test
from pretrain.checkpoint.arena import Arena
from pretrain.checkpoint.fragments import check_slices, image_of, owned_slices
from pretrain.checkpoint.self_test import save_and_load
from pretrain.checkpoint.verify import read_commit
from pretrain.engine.setup import construct_model, deepspeed_config, initialize_engine
from pretrain.state import TrainState
from tests.training import load, this_rank, tiny_config, write


def self_tests(dataset: str, runs: str, cases: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Of each case: is the state as before, and what the self-test says of what is broken on purpose."""
    layout, result = this_rank(), {}

    def said(act: Callable[[], object]) -> str | None:
        try:
            act()
        except (RuntimeError, UserError) as error:
            return type(error).__name__
        finally:
            distributed.barrier()
        return None

    for name, overrides in cases.items():
        config = tiny_config(dataset, runs, **overrides)
        engine = initialize_engine(config, layout, construct_model(config, layout))
        checkpoints, arena = Path(runs) / name, Arena(1000)
        before = Arena(1000)
        before.start(Path(runs) / f"before-{name}", image_of(engine, layout.rank, layout.world_size, {}))(True)
        save_and_load(engine, arena, checkpoints, 1)
        distributed.barrier()
        found: dict[str, Any] = {
            "unchanged": before.differences(image_of(engine, layout.rank, layout.world_size, {})) == [],
            "left": sorted(path.name for path in checkpoints.iterdir()),
        }
        slices = owned_slices(engine)
        moved = [*slices[1:], slices[0]]
        wrong = [
            type(one)(one.parameter, one.shape, one.start, one.count, one.flat, one.offset, None if one.live is None else other.live)
            for one, other in zip(slices, moved, strict=True)
            if other.count == one.count or one.live is None
        ]
        with patch("pretrain.checkpoint.fragments.owned_slices", lambda engine, wrong=wrong: wrong):
            found["round robin"] = said(lambda engine=engine: check_slices(engine))
        # Written as it is, read with one slice left out: what was overwritten does not come back.
        with patch.object(self_test, "read_fragments", lambda engine, index: None):
            found["a slice that is not written"] = said(
                lambda engine=engine, arena=arena, checkpoints=checkpoints: save_and_load(engine, arena, checkpoints, 2)
            )
        blocked = Path(runs) / f"blocked-{name}"
        if layout.rank == 0:
            blocked.write_text("a file stands where the folder should")
        distributed.barrier()
        fresh = initialize_engine(config, layout, construct_model(config, layout))
        found["no folder"] = said(lambda fresh=fresh, arena=arena, blocked=blocked: save_and_load(fresh, arena, blocked, 3))
        arena.close()
        before.close()
        result[name] = found
    return result


class Odd(nn.Module):
    """A frozen matrix, a matrix that is used twice, an odd vector; buffers that belong to the state and one that does not."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(37, 11)
        self.frozen = nn.Linear(11, 11, bias=False)
        self.frozen.weight.requires_grad_(False)
        self.head = nn.Linear(11, 37)
        self.head.weight = self.table.weight
        self.register_buffer("mean", torch.randn(11))
        self.register_buffer("count", torch.randint(0, 2**40, (3,)))
        self.register_buffer("scratch", torch.randn(2), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.frozen(self.table(tokens))).float().pow(2).mean()


def _engine(folder: str, overrides: dict[str, str], seed: int) -> DeepSpeedEngine:
    config = tiny_config("none", folder, **overrides)
    layout = this_rank()
    model = Odd(seed)
    groups = [{"name": "matrices", "params": [one for one in model.parameters() if one.requires_grad], "peak_lr": 0.1}]
    settings = deepspeed_config(config, layout.data_size, 1000)
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=0.1), config=settings)
    return engine


def _state(engine: DeepSpeedEngine) -> dict[str, Any]:
    """Everything the model computes with, whole."""
    parameters = dict(engine.module.named_parameters())
    with zero.GatheredParameters(list(parameters.values()), enabled=engine.zero_optimization_stage() == 3):
        found = {name: parameter.detach().float().clone() for name, parameter in parameters.items()}
    kept = {name: buffer for name, buffer in engine.module.named_buffers() if name != "scratch"}
    return found | {name: buffer.detach().double().clone() for name, buffer in kept.items()}


def write_odd_models(folder: str, cases: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Train each case a step and write it; the whole state beside it, for `read_odd_models`."""
    layout, result = this_rank(), {}
    for name, overrides in cases.items():
        engine = _engine(folder, overrides, seed=1)
        for _ in range(engine.gradient_accumulation_steps()):
            loss = engine(torch.arange(8, device=layout.device).view(2, 4))
            engine.backward(loss)
            engine.step()
        commit = write(engine, Path(folder) / name, layout, TrainState(1))
        state = _state(engine)
        if layout.rank == 0:
            torch.save(state, Path(folder) / f"{name}.pt")
        result[name] = sorted(commit.files)
    return result


def read_odd_models(folder: str, cases: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Read each written case into a model of each case with other weights; names of what is not as it was written, rounded."""
    result: dict[str, Any] = {}
    for wrote in cases:
        wanted = torch.load(Path(folder) / f"{wrote}.pt", weights_only=True)
        for name, overrides in cases.items():
            engine = _engine(folder, overrides, seed=2)
            load(engine, read_commit(Path(folder) / wrote))
            check_slices(engine)
            found = _state(engine)
            low = torch.float32 if name.startswith("fp32") and wrote.startswith("fp32") else torch.bfloat16
            dtypes = {key: torch.int64 if key == "count" else low for key in wanted}
            different = [key for key, dtype in dtypes.items() if not torch.equal(found[key].to(dtype), wanted[key].to(dtype))]
            result[f"{wrote} -> {name}"] = different + sorted(found.keys() ^ wanted.keys())
    return result

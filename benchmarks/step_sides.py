"""The sides of benchmarks/step.py that are loops in a process of their own: a bare one, DeepSpeed's, transformers', what watching costs.

Run by benchmarks/step.py: python benchmarks/step_sides.py SIDE CASE STEPS. Out: a line of JSON with the median of a step's seconds and
the peak of memory in bytes.
"""

import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from configs.loader import load_config
from configs.schema import RunConfig

SMALL = {"vocabulary_size": 16384, "num_layers": 6, "width": 384, "num_heads": 6, "largest_context": 512, "tied_head": True}
GPT2 = {"feed_forward": "gelu", "norm": "layernorm", "positions": "learned", "biases": True}


@dataclass(frozen=True)
class Case:
    """A model, and how much of it is fed at once."""

    model: dict[str, Any]
    length: int
    micro_batch: int
    accumulation: int = 1
    recompute: str | None = None


CASES = {
    "llama": Case({**SMALL, "feed_forward_width": 1024}, 512, 8),
    "gpt2": Case({**SMALL, **GPT2, "feed_forward_width": 1536}, 512, 8),
}
GPU_CASES = {
    "llama-1b": Case({"file": "llama-1b"}, 4096, 4),
    "olmo2-1b": Case({"file": "olmo-2-1b"}, 4096, 4),
    "gpt2-124m": Case({"file": "gpt2-124m"}, 1024, 32),
}
LARGE_CASES = {"llama-3-8b": Case({"file": "llama-3-8b"}, 4096, 2, recompute="selective")}
"""What a GPU of 141 GB holds with bf16 states only."""


def cases() -> dict[str, Case]:
    """Those that this machine can run in a reasonable time."""
    return GPU_CASES if torch.cuda.is_available() else CASES


def configure(folder: Path, name: str, steps: int, ranks: int, compiled: bool, apart: bool, wandb: str = "disabled") -> RunConfig:
    """The run file of a case, resolved."""
    case = (cases() | LARGE_CASES)[name]
    batch = case.micro_batch * case.accumulation * ranks
    model = dict(case.model)
    run = {
        "include": [f"models/{model.pop('file')}.yaml"] if "file" in model else [],
        "run": {"name": "step", "root": str(folder / "runs")},
        "data": {"root": str(folder / "data"), "tokenizer": {"vocabulary_size": 8192}},
        "model": model,
        "training": {
            "sequence_length": case.length,
            "micro_batch_samples": case.micro_batch,
            "global_batch_samples": batch,
            "total_tokens": batch * case.length * steps,
            "separate_documents": apart,
            "restart_positions": apart,
        },
        "parallel": {"zero_stage": 1, "cpu_processes": ranks},
        "performance": {"compile": compiled, "activation_checkpointing": case.recompute},
        "checkpoint": {"every_steps": None},
        "evaluate": {"every_steps": None},
        "watch": {"log_every_steps": 1, "wandb": wandb},
    }
    file = folder / "step.yaml"
    file.write_text(yaml.safe_dump(run))
    return load_config(file, [])


def time_steps(step: Callable[[], Any], steps: int) -> dict[str, float]:
    """The median of a step's seconds once it is warm, and the process's largest memory (a GPU's, where there is one)."""
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else host
    return {"seconds": statistics.median(times[steps // 3 :]), "peak_bytes": float(peak)}


def device() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def draw_tokens(case: Case, vocabulary_size: int) -> torch.Tensor:
    """One micro-batch of random tokens, with one more to be targets."""
    return torch.randint(0, vocabulary_size, (case.micro_batch, case.length + 1), generator=torch.Generator().manual_seed(1)).to(device())


def bare_step(case: Case, config: RunConfig) -> Callable[[], float]:
    """Our model, compiled, with bf16 weights and a flat fp32 copy that the optimizer changes."""
    from pretrain.engine.parallel import Layout
    from pretrain.engine.setup import construct_model
    from pretrain.engine.speed import prepare_compiler, speed_up

    prepare_compiler(config.performance, device())
    model = construct_model(config, Layout(0, 1, 0, 1, device())).to(device(), torch.bfloat16)
    speed_up(model, config.performance, device())
    live = list(model.parameters())
    sizes = [parameter.numel() for parameter in live]
    flat = torch.cat([parameter.detach().float().flatten() for parameter in live])
    flat.grad = torch.zeros_like(flat)
    optimizer = torch.optim.AdamW([flat], lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = draw_tokens(case, config.model.vocabulary_size)

    def step() -> float:
        loss = model(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
        loss.backward()
        with torch.no_grad():
            for parameter, part in zip(live, flat.grad.split(sizes), strict=True):
                part.copy_(parameter.grad.flatten())
                parameter.grad = None
            torch.nn.utils.clip_grad_norm_([flat], 1.0)
            optimizer.step()
            for parameter, part in zip(live, flat.detach().split(sizes), strict=True):
                parameter.copy_(part.view_as(parameter))
        return loss.item()

    return step


def bf16_states_step(case: Case, config: RunConfig) -> Callable[[], float]:
    """Our model, compiled, weights and AdamW's moments in bf16, no fp32 copy: 8 bytes a parameter with the gradient. For speed only."""
    from pretrain.engine.parallel import Layout
    from pretrain.engine.setup import construct_model
    from pretrain.engine.speed import prepare_compiler, speed_up

    prepare_compiler(config.performance, device())
    with device():
        model = construct_model(config, Layout(0, 1, 0, 1, device())).to(torch.bfloat16)
    speed_up(model, config.performance, device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = draw_tokens(case, config.model.vocabulary_size)

    def step() -> float:
        loss = model(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def join_alone() -> None:
    """A process group of one, for what expects the launcher's variables."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}.items():
        os.environ.setdefault(name, value)


def deepspeed_step(case: Case, config: RunConfig) -> Callable[[], float]:
    """The engine's step, without the rest of the loop."""
    from pretrain.engine.parallel import initialize_layout
    from pretrain.engine.setup import construct_model, initialize_engine

    join_alone()
    layout = initialize_layout()
    engine = initialize_engine(config, layout, construct_model(config, layout))
    tokens = draw_tokens(case, config.model.vocabulary_size)

    def step() -> float:
        loss = engine(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
        engine.backward(loss, scale_wrt_gas=False)
        engine.step()
        return loss.item()

    return step


def measure_bare(name: str, steps: int) -> dict[str, float]:
    """The side `bare`."""
    with tempfile.TemporaryDirectory() as folder:
        return time_steps(bare_step(cases()[name], configure(Path(folder), name, steps, 1, True, False)), steps)


def measure_bf16_states(name: str, steps: int) -> dict[str, float]:
    """The side `bf16 states`."""
    with tempfile.TemporaryDirectory() as folder:
        case = (cases() | LARGE_CASES)[name]
        return time_steps(bf16_states_step(case, configure(Path(folder), name, steps, 1, True, False)), steps)


def measure_transformers(name: str, steps: int, autocast: bool = True) -> dict[str, float]:
    """The side `transformers`."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        section = configure(Path(folder), name, steps, 1, True, False).model
    torch._dynamo.config.cache_size_limit = 64
    if section.norm == "layernorm":
        shape = transformers.GPT2Config(
            vocab_size=section.vocabulary_size, n_positions=section.largest_context, n_embd=section.width, n_layer=section.num_layers,
            n_head=section.num_heads, n_inner=section.feed_forward_width, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        model: Any = transformers.GPT2LMHeadModel(shape)
    else:
        kind = (transformers.Olmo2Config, transformers.Olmo2ForCausalLM) if section.norm_placement == "after" else (
            transformers.LlamaConfig, transformers.LlamaForCausalLM
        )  # fmt: skip
        model = kind[1](
            kind[0](
                vocab_size=section.vocabulary_size, hidden_size=section.width, num_hidden_layers=section.num_layers,
                num_attention_heads=section.num_heads, num_key_value_heads=section.kv_heads, intermediate_size=section.feed_forward_width,
                max_position_embeddings=section.largest_context, tie_word_embeddings=section.tied_head,
            )
        )  # fmt: skip
    model = model.to(device()).train()
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = draw_tokens(cases()[name], section.vocabulary_size)[:, :-1].contiguous()

    def step() -> float:
        with torch.autocast(device().type, torch.bfloat16, enabled=autocast):
            loss = compiled(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return time_steps(step, steps)


def measure_watching(name: str, steps: int) -> dict[str, float]:
    """What the loop does for its figures in a step that is logged, and nothing else: the sum over ranks, the row, its three places."""
    from pretrain.engine.parallel import initialize_layout
    from pretrain.state import TrainState
    from pretrain.watch.journal import Journal
    from pretrain.watch.verdicts import Verdicts

    join_alone()
    layout, state, case = initialize_layout(), TrainState(), cases()[name]
    loss, num_valid = (torch.ones((), dtype=torch.float64, device=layout.device) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        config = configure(Path(folder), name, steps, 1, True, False, wandb="offline")
        verdicts = Verdicts(layout)
        with Journal(config, Path(folder), 1, state, is_writer=True) as journal:

            def step() -> None:
                nonlocal state
                verdicts.add(loss)
                state = state.advance(case.micro_batch, case.micro_batch * case.length, True)
                verdicts.send(state.step, num_valid, False, False, True)
                journal.step(state, verdicts.read(now=True).loss, 3e-4, 1.0, 0.0)

            return time_steps(step, steps)


def measure_peak(name: str, steps: int) -> dict[str, float]:
    """FLOP/s of a product of 2,048 x 2,048 x 2,048 in fp32, the best of some: what this CPU can do now."""
    one, other = torch.randn(2048, 2048), torch.randn(2048, 2048)
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        torch.mm(one, other)
        seconds.append(time.perf_counter() - began)
    return {"seconds": min(seconds), "flops": 2 * 2048**3 / min(seconds), "peak_bytes": 0.0}


IN_PROCESS: dict[str, Callable[[str, int], dict[str, float]]] = {
    "bare": measure_bare,
    "bf16 states": measure_bf16_states,
    "watching": measure_watching,
    "peak": measure_peak,
    "transformers": measure_transformers,
    "transformers fp32": lambda name, steps: measure_transformers(name, steps, autocast=False),
}


def profile(folder: Path) -> None:
    """Operations of the bare step and of DeepSpeed's, milliseconds of each by themselves, those that differ most first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    name, case = next(iter(cases().items()))
    config, spent = configure(folder, name, 8, 1, True, False), {}
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    steps = {"bare": bare_step(case, config), "DeepSpeed": deepspeed_step(case, config)}
    for side, step in steps.items():
        for _ in range(3):
            step()
        with record(activities=activities) as found:
            for _ in range(5):
                step()
        field = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        spent[side] = {event.key: getattr(event, field) / 5e3 for event in found.key_averages()}
    print(f"{'ms a step':44} {'bare':>9} {'DeepSpeed':>9} {'more':>9}")
    keys = sorted(set().union(*spent.values()), key=lambda key: -abs(spent["DeepSpeed"].get(key, 0) - spent["bare"].get(key, 0)))
    for key in ["all", *keys[:20]]:
        one, other = (sum(side.values()) if key == "all" else side.get(key, 0.0) for side in spent.values())
        print(f"{key[:44]:44} {one:9.2f} {other:9.2f} {other - one:+9.2f}")


if __name__ == "__main__":
    print(json.dumps(IN_PROCESS[sys.argv[1]](sys.argv[2], int(sys.argv[3]))))

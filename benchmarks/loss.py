"""How fast, how lean and how exact the loss of a decoder's last layer is, beside its alternatives, in one run.

Run: .venv/bin/python benchmarks/loss.py [--quick] [--json] [--rounds 5] [--sides NAME ...] [--tokens N --vocabulary N --width N]

In: nothing; hidden states, a head's weight and targets are drawn, so that logits have a standard deviation of 2.4. Each side computes
the mean loss and its gradients by hidden states and weight. On a CPU: 4,096 tokens (1,024 with --quick), vocabulary 16,384, width 384,
in fp32 and bf16; on a GPU the house's goal: 32,768 tokens, vocabulary 128,256, width 4,096, in bf16. Sides:

    ours            pretrain.model.loss.summed_cross_entropy, as `pretrain train` calls it on this device if nothing else is said:
                    compiled on a GPU only; of bf16 weights on a CPU without matrix units the products in fp32
    ours compiled   the same compiled, where it is not; `ours eager`, where it is
    ours in bf16    the same with products in bf16, where they are not
    plain           logits of all tokens in fp32, then F.cross_entropy
    torch           torch's own F.linear_cross_entropy, with its default options: whole logits, in the dtype of its inputs
    torch chunked   the same with LinearCrossEntropyOptions(): a chunk of tokens at a time
    liger           Liger's fused linear cross-entropy, on a GPU, where liger_kernel is installed
    liger fp32      the same with the weight's gradient added up in fp32 (accum_dtype)

Speed: tokens per second; the sides take turns in one process, with the allocator's settings of training, and each row gives the median
of the rounds. Memory: the peak in a side's second call, less what was there before and less the two gradients, which every side has
to make (one that peaks before it makes them, such as plain, seems leaner by as much); on a GPU of torch's allocator, on a CPU as the
kernel counts it (Linux), in a fresh process for each side. Deviation: from float64, relative, of the gradients by their norm, in parts
per million. With --json one object per row: name, unit, ours, peer, ratio,
target, met, note; peer is null where it cannot be had, and the note says why.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from data import row, show, tell, timed

from configs.errors import UserError
from configs.schema import PerformanceSection
from pretrain.engine.speed import activation_dtype, compiles, prepare_compiler
from pretrain.model.loss import MEMORY_BYTES, summed_cross_entropy
from pretrain.run.ranks import rank_environment

ROOT = Path(__file__).parent.parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOGIT_DEVIATION = 2.4
LOGITS_OF_A_BLOCK = 2**26
"""Of the reference in float64, at once."""
FLOAT64 = 2.0**-53
"""No deviation from float64 that is smaller means anything."""
PAGE_BYTES = 4096
# What a number in the dtype is off by at most: see tests/pretrain/model/test_loss.py.
LARGEST_DEVIATION = {
    "fp32": {"loss": 1e-5, "hidden states' gradient": 1e-5, "weight's gradient": 1e-5},
    "bf16": {"loss": 1e-3, "hidden states' gradient": 2**-7, "weight's gradient": 2**-7},
}

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(hidden_CD, weight_VD, labels_C) -> the mean loss."""


class Case(NamedTuple):
    """What the loss is computed of."""

    precision: str
    tokens: int
    vocabulary: int
    width: int


def main() -> None:
    """Print every row as soon as its figures are there, or measure in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round; on a CPU 1,024 tokens")
    parser.add_argument("--json", action="store_true", help="one object per row")
    parser.add_argument("--rounds", type=int, default=None, help="5, or 1 with --quick")
    parser.add_argument("--sides", nargs="*", default=None, help="beside these only, such as: plain 'torch chunked'")
    for size in Case._fields[1:]:
        parser.add_argument(f"--{size}", type=int, default=None, help=f"another number than the case's: {size}")
    parser.add_argument("--precision", choices=DTYPES, default=None, help="only this one")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--figures", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    rounds = options.rounds or (1 if options.quick else 5)
    for case in cases(options):
        if options.figures or options.peak_of:
            torch.set_num_threads(os.cpu_count() or 1)
            answer = {"bytes": peak_bytes(case, options.peak_of)} if options.peak_of else figures_of(case, rounds, options.sides)
            print(json.dumps(answer))
            return
        for one in rows_of(case, rounds, options.sides):
            print(json.dumps(one) if options.json else show(one), flush=True)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Those of this machine, in the sizes that were asked for."""
    on_gpu = device().type == "cuda"
    standard = (32_768, 128_256, 4096) if on_gpu else (1024 if options.quick else 4096, 16_384, 384)
    sizes = [getattr(options, name) or size for name, size in zip(Case._fields[1:], standard, strict=True)]
    for precision in [options.precision] if options.precision else ["bf16"] if on_gpu else DTYPES:
        yield Case(precision, *sizes)


def device() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rows_of(case: Case, rounds: int, wanted: list[str] | None) -> Iterator[dict[str, Any]]:
    """Row after row: speed, memory, and how far loss and gradients are off."""
    tell(f"{case.precision}: {case.tokens:,} tokens x {case.vocabulary:,} vocabulary x {case.width:,} width on {device()}")
    as_trained = {name: value for name, value in rank_environment(1, ROOT, device().type == "cuda").items() if name.startswith("MALLOC_")}
    answer = in_process(case, ["--figures", "--rounds", str(rounds), *(["--sides", *wanted] if wanted is not None else [])], as_trained)
    sides, absent = answer["sides"], answer["absent"]
    if device().type == "cpu":
        for side, figures in sides.items():
            # Each array is mapped for itself, so that it is gone when it is freed.
            figures["bytes"] = in_process(case, ["--peak-of", side], {"MALLOC_MMAP_THRESHOLD_": "65536"})["bytes"]
    ours, others = sides.pop("ours"), sides
    yield from speed_rows(case, ours, others, absent)
    name = f"{case.precision} memory beside inputs and gradients"
    yield row(name, "MB", ours["bytes"] / 1e6, None, MEMORY_BYTES / 1e6, most=True)
    for side, figures in others.items():
        yield row(f"{case.precision} memory, beside {side}", "MB", ours["bytes"] / 1e6, figures["bytes"] / 1e6)
    for part, largest in LARGEST_DEVIATION[case.precision].items():
        name = f"{case.precision} {part} off float64"
        yield row(name, "ppm", ours[part] * 1e6, None, largest * 1e6, most=True, note=spoken(ours, answer, part))
        for side, figures in others.items():
            yield row(f"{name}, beside {side}", "ppm", ours[part] * 1e6, figures[part] * 1e6, note=spoken(figures, answer, part))


def speed_rows(case: Case, ours: dict[str, Any], others: dict[str, Any], absent: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Tokens per second; also of the sides that cannot be had, with the reason."""
    rate, spread = tokens_per_second(case, ours)
    for side, figures in others.items():
        peer, peer_spread = tokens_per_second(case, figures)
        yield row(f"{case.precision} speed, beside {side}", "tokens/s", rate, peer, note=f"ours {spread}, {side} {peer_spread}")
    for side, reason in absent.items():
        yield row(f"{case.precision} speed, beside {side}", "tokens/s", rate, note=f"{side}: {reason}")


def tokens_per_second(case: Case, figures: dict[str, Any]) -> tuple[float, str]:
    """The median, and from where to where."""
    rates = [case.tokens / seconds for seconds in figures["seconds"]]
    return statistics.median(rates), f"{min(rates):,.0f}-{max(rates):,.0f}"


def spoken(figures: dict[str, Any], answer: dict[str, Any], part: str) -> str:
    """Of a loss, in nats."""
    return f"{figures['value']:.5f} where {answer['exact']:.5f} is true" if part == "loss" else ""


# --- processes ---------------------------------------------------------------------------------------------------


def in_process(case: Case, arguments: list[str], allocator: dict[str, str]) -> dict[str, Any]:
    """What a fresh process answers."""
    sizes = [word for name, value in case._asdict().items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, **allocator, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, *sizes, *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False, timeout=1800)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def figures_of(case: Case, rounds: int, wanted: list[str] | None) -> dict[str, Any]:
    """Of each side: its loss, the deviations, seconds of each round, and on a GPU its peak; of those that cannot be had, why."""
    sides, absent = choose_sides(case.precision)
    if wanted is not None:
        absent = {name: reason for name, reason in absent.items() if name in wanted}
        sides = {name: side for name, side in sides.items() if name in ("ours", *wanted)}
    inputs = draw(case)
    exact = exact_loss_and_gradients(*inputs)
    found: dict[str, dict[str, Any]] = {}
    for name, side in sides.items():
        try:
            found[name] = deviations(loss_and_gradients(side, inputs), exact)
            if device().type == "cuda":
                found[name]["bytes"] = gpu_peak_bytes(side, inputs)
        except torch.OutOfMemoryError:
            absent[name] = "out of memory"
            torch.cuda.empty_cache()
        except UserError as error:  # no compiler
            absent[name] = str(error)
    del exact
    for _ in range(rounds):
        for name, figures in found.items():
            figures.setdefault("seconds", []).append(timed(functools.partial(loss_and_gradients, sides[name], inputs)))
    return {"sides": found, "absent": absent, "exact": found["ours"].pop("exact")}


def peak_bytes(case: Case, name: str) -> int:
    """What a side takes in its second call beside its inputs and their gradients, as the kernel counts it."""
    side, inputs = choose_sides(case.precision)[0][name], draw(case)
    loss_and_gradients(side, inputs)
    status = Path("/proc/self/status")
    before = kilobytes(status.read_text(), "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    results = loss_and_gradients(side, inputs)
    return net_bytes(1024 * (kilobytes(status.read_text(), "VmHWM") - before), results)


def kilobytes(status: str, name: str) -> int:
    """A number of /proc/self/status."""
    return int(status.split(f"{name}:")[1].split()[0])


def gpu_peak_bytes(side: Loss, inputs: tuple[torch.Tensor, ...]) -> int:
    """The same as torch's allocator counts it; the first call has been made."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = loss_and_gradients(side, inputs)
    return net_bytes(torch.cuda.max_memory_allocated() - before, results)


def net_bytes(peak: int, results: tuple[torch.Tensor, ...]) -> int:
    """A peak less the gradients, a page at least."""
    return max(PAGE_BYTES, peak - sum(gradient.nbytes for gradient in results[1:]))


# --- sides -------------------------------------------------------------------------------------------------------


def choose_sides(precision: str) -> tuple[dict[str, Loss], dict[str, str]]:
    """Sides that this machine has, ours first; names of the others with the reason."""
    dtype = DTYPES[precision]
    products = activation_dtype(precision, device()) or dtype
    compiled = compiles(PerformanceSection(), device())
    sides: dict[str, Loss] = {"ours": functools.partial(ours, compiled=compiled, products=products)}
    absent: dict[str, str] = {}
    sides["ours eager" if compiled else "ours compiled"] = functools.partial(ours, compiled=not compiled, products=products)
    if products != dtype:
        sides[f"ours in {precision}"] = functools.partial(ours, compiled=compiled, products=dtype)
    sides["plain"] = plain
    if hasattr(F, "linear_cross_entropy"):
        sides["torch"] = F.linear_cross_entropy
        sides["torch chunked"] = functools.partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())
    else:
        absent |= dict.fromkeys(("torch", "torch chunked"), f"torch {torch.__version__} has no linear_cross_entropy")
    if device().type != "cuda":
        return sides, absent | {"liger": "runs on GPUs only"}
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        sides["liger"] = liger_fused_linear_cross_entropy
        sides["liger fp32"] = functools.partial(liger_fused_linear_cross_entropy, accum_dtype=torch.float32)
    except ImportError as error:
        absent["liger"] = str(error)
    return sides, absent


def ours(
    hidden_CD: torch.Tensor, weight_VD: torch.Tensor, labels_C: torch.Tensor, *, compiled: bool, products: torch.dtype
) -> torch.Tensor:
    """The loop divides the sum by the number of targets. Raises UserError without a compiler."""
    if compiled:
        prepare_compiler(PerformanceSection(compile=True), device())
    return summed_cross_entropy(hidden_CD.to(products), weight_VD, labels_C, compiled=compiled) / len(labels_C)


def plain(hidden_CD: torch.Tensor, weight_VD: torch.Tensor, labels_C: torch.Tensor) -> torch.Tensor:
    """Whole logits, in fp32."""
    return F.cross_entropy((hidden_CD @ weight_VD.T).float(), labels_C)


def loss_and_gradients(side: Loss, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The mean loss, and its gradients by hidden states and weight; they are there when it returns."""
    loss = side(*inputs)
    gradients = torch.autograd.grad(loss, inputs[:2])
    if loss.device.type == "cuda":
        torch.cuda.synchronize()
    return loss.detach(), *gradients


# --- numbers -----------------------------------------------------------------------------------------------------


def draw(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden_CD, weight_VD and labels_C."""
    generator = torch.Generator(device()).manual_seed(1)
    hidden_CD, weight_VD = (torch.randn(rows, case.width, generator=generator, device=device()) for rows in (case.tokens, case.vocabulary))
    weight_VD *= LOGIT_DEVIATION / case.width**0.5
    labels_C = torch.randint(0, case.vocabulary, (case.tokens,), generator=generator, device=device())
    dtype = DTYPES[case.precision]
    return hidden_CD.to(dtype).requires_grad_(), weight_VD.to(dtype).requires_grad_(), labels_C


def exact_loss_and_gradients(hidden_CD: torch.Tensor, weight_VD: torch.Tensor, labels_C: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same as `loss_and_gradients` in float64, a block of tokens at a time."""
    weight_VD = weight_VD.detach().double().requires_grad_()
    rows = max(1, LOGITS_OF_A_BLOCK // len(weight_VD))
    total = torch.zeros((), dtype=torch.float64, device=weight_VD.device)
    hidden_gradients, weight_gradient_VD = [], torch.zeros_like(weight_VD)
    for hidden_cD, labels_c in zip(hidden_CD.detach().split(rows), labels_C.split(rows), strict=True):
        hidden_cD = hidden_cD.double().requires_grad_()
        loss = F.cross_entropy(hidden_cD @ weight_VD.T, labels_c, reduction="sum") / len(labels_C)
        hidden_gradient_cD, block_gradient_VD = torch.autograd.grad(loss, (hidden_cD, weight_VD))
        hidden_gradients.append(hidden_gradient_cD)
        weight_gradient_VD += block_gradient_VD
        total += loss.detach()
    return total, torch.cat(hidden_gradients), weight_gradient_VD


def deviations(found: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    """The loss that was found, and the distance of each result from the truth in terms of the truth's norm."""
    parts = {
        part: max(FLOAT64, float((ours.double() - truth).norm() / truth.norm()))
        for part, ours, truth in zip(LARGEST_DEVIATION["fp32"], found, exact, strict=True)
    }
    return {"value": float(found[0]), "exact": float(exact[0]), **parts}


if __name__ == "__main__":
    main()

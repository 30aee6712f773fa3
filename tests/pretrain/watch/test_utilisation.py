"""Utilisation against numbers reckoned by hand."""

import pytest
import torch

from configs.schema import RunConfig
from pretrain.watch.utilisation import PEAK_TFLOPS, Utilisation, known_peak, peak_flops, training_flops

CPU = torch.device("cpu")
L, D, N, K, H, F, V, T = 3, 64, 4, 2, 16, 160, 500, 128


def config(recompute: str | None = None, **changes: object) -> RunConfig:
    model = {"num_layers": L, "width": D, "num_heads": N, "num_kv_heads": K, "feed_forward_width": F, "vocabulary_size": V}
    return RunConfig.model_validate(
        {
            "model": {**model, "largest_context": T, "tied_head": False},
            "training": {"sequence_length": T},
            "data": {"tokenizer": {"vocabulary_size": 400}},
            "performance": {"activation_checkpointing": recompute},
            **changes,
        }
    )


def test_operations_of_a_small_model_by_hand() -> None:
    """Swiglu, grouped queries, a head of its own."""
    layer = D * N * H + 2 * D * K * H + N * H * D + 3 * D * F
    matrices = L * layer + D * V
    palm, causal = 6 * matrices + 12 * L * N * H * T, 6 * matrices + 6 * L * N * H * T
    found = training_flops(config())
    assert found is not None
    assert (found.palm, found.causal, found.hardware) == (palm, causal, causal)
    again = L * (2 * layer + 2 * N * H * T)  # the layers' forward pass once more, the head's not
    assert training_flops(config("full")) == (palm, causal, causal + again)
    assert training_flops(config("selective")) == found, "no matrix product is computed again"


def test_shares_of_a_peak_that_is_given() -> None:
    watch = {"device_tflops": 2.0}
    found = Utilisation(config("full", watch=watch), CPU, num_devices=4).shares(tokens_per_second=1e6)
    flops = training_flops(config("full"))
    assert flops is not None
    assert found == pytest.approx({f"mfu/{name}": value * 1e6 / (4 * 2e12) for name, value in flops._asdict().items()})
    assert found["mfu/hardware"] > found["mfu/causal"]


def test_nothing_is_told_of_what_is_not_known() -> None:
    assert Utilisation(config(), CPU, 1).shares(1e6) == {}
    own = {"implementation": "my_model:Model", "vocabulary_size": V}
    assert Utilisation(config(model=own, watch={"device_tflops": 1.0}), CPU, 1).shares(1e6) == {}


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_peaks_by_the_names_that_torch_tells(name: str, tflops: float | None) -> None:
    assert known_peak(name) == (None if tflops is None else tflops * 1e12)


def test_a_longer_name_is_looked_for_before_the_shorter_one_in_it() -> None:
    names = list(PEAK_TFLOPS)
    assert all(
        not (longer in names[place + 1 :] and short in longer) for place, short in enumerate(names) for longer in names if longer != short
    )


def test_the_run_file_goes_first_and_fp32_has_no_data_sheet() -> None:
    assert peak_flops(config(watch={"device_tflops": 3.5}), CPU) == 3.5e12
    assert peak_flops(config(), CPU) is None

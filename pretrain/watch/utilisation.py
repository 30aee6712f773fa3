"""How much of what the devices could compute a run makes use of (MFU).

In: a run's configuration, the device's name, a speed in tokens per second. Out: shares of the device's peak.

- `palm` and `causal`: model FLOPs utilisation, by the two formulas of `operations.ModelTable.training_flops_per_token`, of which
  published figures use either; what is computed twice counts once.
- `hardware`: the operations that are really done (Korthikanti et al. 2022): `causal`, and once more the forward pass of what
  `performance.activation_checkpointing: full` recomputes. `selective` recomputes no matrix product. What kernels of attention compute
  again inside of them is not counted.

All are for `training.sequence_length`, and as if each sample were one document.
"""

from typing import NamedTuple

import torch

from configs.schema import RunConfig
from pretrain.model.operations import tabulate_model

PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.0,
    "H200 NVL": 836.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
}
"""Dense products in bf16 or fp16, summed in fp32, by what is found first in the device's name: NVIDIA's data sheets, which where they tell
figures with sparsity tell twice as much (nvidia.com/en-us/data-center: a100, h100, h200, dgx-b200, gb200-nvl72, l40s)."""


class TrainingFlops(NamedTuple):
    """Operations of the forward and backward passes for one token."""

    palm: float
    causal: float
    hardware: float


def training_flops(config: RunConfig) -> TrainingFlops | None:
    """Of the run's model; None where it, or its layers, are the user's own, whose operations nobody counts."""
    if config.model.implementation is not None or config.model.block is not None:
        return None
    length, recompute = config.training.sequence_length, config.performance.activation_checkpointing
    table = tabulate_model(config.model, batch_size=1, num_tokens=length, bytes_per_number=2, recompute=recompute)
    formulas = table.training_flops_per_token()
    layers = sum(one.flops for one in table.operations if one.in_layer) * table.num_layers / length
    return TrainingFlops(formulas["palm"], formulas["causal"], formulas["causal"] + (layers if recompute == "full" else 0.0))


def peak_flops(config: RunConfig, device: torch.device) -> float | None:
    """Operations per second that one device does at most: `watch.device_tflops`, else its data sheet's; None where nothing is known."""
    if config.watch.device_tflops is not None:
        return 1e12 * config.watch.device_tflops
    return known_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" and config.precision != "fp32" else None


def known_peak(device_name: str) -> float | None:
    """The same by the name that torch tells, such as `NVIDIA H100 80GB HBM3`; None for one that is not in the table."""
    return next((1e12 * tflops for name, tflops in PEAK_TFLOPS.items() if name in device_name), None)


class Utilisation:
    """Of a run on so many devices. Where the peak or the operations are not known, there is nothing to tell."""

    def __init__(self, config: RunConfig, device: torch.device, num_devices: int) -> None:
        flops, peak = training_flops(config), peak_flops(config, device)
        self._share_per_rate: dict[str, float] = {}
        if flops is not None and peak is not None:
            self._share_per_rate = {name: value / peak / num_devices for name, value in flops._asdict().items()}

    def shares(self, tokens_per_second: float) -> dict[str, float]:
        """`mfu/palm`, `mfu/causal` and `mfu/hardware` at a speed of all devices together; nothing where they are not known."""
        return {f"mfu/{name}": share * tokens_per_second for name, share in self._share_per_rate.items()}

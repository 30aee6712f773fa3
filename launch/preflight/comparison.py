"""What only shows when nodes stand side by side: differences, clocks, slow devices, slow links, sums that are wrong. Pure.

In: a `NodeReport` of each node, and what the cluster file says of them. Out: findings, each with the node it is about.
"""

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from configs.cluster import HardwareSection
from launch.preflight.report import Device, Finding, NodeReport, spell_nodes

SLOW = 0.8
"""Of the median of all devices: what is slower holds up every step of all the others."""
SLOW_LINK = 0.5
"""Of the median of all links of a kind: an all-reduce of a fraction of a second varies more than a matrix product."""
DATA_SHEET = 0.5
"""Of what its maker says: no real product reaches all of it, and a sound device more than this."""
CLOCK_SECONDS = 5.0
DIFFERS_WITHOUT_HARM = ("driver", "variable ")
"""Facts that may differ among nodes, which is said: how the names of these begin."""


class Group(NamedTuple):
    """Processes that reduce together."""

    kind: str
    nodes: tuple[int, ...]
    ranks: tuple[int, ...]


def growing_groups(num_nodes: int, processes: int, node: int) -> Iterator[Group]:
    """The groups that a node's processes take part in, in the order of all nodes: its own, with each neighbour, everybody.

    processes: of each node. A broken node is slow with both its neighbours, a broken cable with one. Pairs that share no node run at once.
    """
    every = [tuple(range(number * processes, (number + 1) * processes)) for number in range(num_nodes)]
    if processes > 1:
        yield Group("within a node", (node,), every[node])
    if num_nodes > 2:
        for first in (node - node % 2, node - 1 + node % 2):
            if 0 <= first < num_nodes - 1:
                yield Group("pair of nodes", (first, first + 1), every[first] + every[first + 1])
    if num_nodes > 1:
        yield Group("all", tuple(range(num_nodes)), tuple(rank for ranks in every for rank in ranks))


def compare_nodes(nodes: Sequence[NodeReport], hardware: HardwareSection) -> list[Finding]:
    """What only shows when nodes stand side by side. nodes: of all that arrived, in their order."""
    return [*_different_facts(nodes), *_wrong_clocks(nodes), *_bad_devices(nodes, hardware), *_bad_links(nodes, hardware)]


COMPARISONS = ("same everywhere", "clock", "matrix products", "memory bandwidth", "device memory", "all-reduce", "links")


def _different_facts(nodes: Sequence[NodeReport]) -> Iterator[Finding]:
    for name in dict.fromkeys(name for node in nodes for name in node.facts):
        values = [node.facts.get(name, "none") for node in nodes]
        usual = Counter(values).most_common(1)[0][0]  # of as many, that of the first node
        for node, value in zip(nodes, values, strict=True):
            if value != usual:
                others = [other.node for other, of_other in zip(nodes, values, strict=True) if of_other == usual]
                yield Finding(
                    "same everywhere",
                    node.node,
                    node.host,
                    f"{name} {value}",
                    f"{usual}, as on {spell_nodes(others)}",
                    _advice_on(name),
                    name.startswith(DIFFERS_WITHOUT_HARM),
                )


def _advice_on(name: str) -> str:
    if name == "code":
        return "start all nodes from one copy of the code (a shared folder, one image)"
    if name == "configuration":
        return "give all nodes the same run file and overrides"
    if name.startswith("variable "):
        return "set it in job.environment of the cluster file"
    return "install the same versions on all nodes (constraints.txt), or exclude the node"


def _wrong_clocks(nodes: Sequence[NodeReport]) -> Iterator[Finding]:
    for node in nodes:
        if abs(node.clock_offset_seconds) > CLOCK_SECONDS:
            yield Finding(
                "clock",
                node.node,
                node.host,
                f"{node.clock_offset_seconds:+.1f} s against node 0",
                f"within {CLOCK_SECONDS:g} s",
                "start chronyd or ntpd there: times in logs and on shared files will not fit together, and TLS and Kerberos refuse more",
                is_warning=True,
            )


def _bad_devices(nodes: Sequence[NodeReport], hardware: HardwareSection) -> Iterator[Finding]:
    devices = [(node, device) for node in nodes for device in node.devices if device.error is None]
    for measure, unit, check, promised in (
        ("matmul_tflops", "TFLOP/s", "matrix products", hardware.bf16_tflops),
        ("memory_gb_per_second", "GB/s", "memory bandwidth", hardware.gpu_memory_gb_per_second),
    ):
        rates = [(node, device, rate) for node, device in devices if (rate := getattr(device, measure)) is not None]
        # Of two, the faster one: the median of both would be half the slower one's own.
        median = statistics.median_high([rate for *_, rate in rates]) if rates else 0.0
        for node, device, rate in rates:
            found = f"{_spell(device)}: {rate:.3g} {unit}"
            if rate < SLOW * median and (device.is_gpu or len(nodes) > 1):  # processes of one node share its cores as it comes
                advice = "look at temperature, power limit and clocks (nvidia-smi -q -d PERFORMANCE), or exclude the node"
                if not device.is_gpu:
                    advice = "see what else uses these cores (top), or give each process cores of its own"
                yield Finding(
                    check, node.node, node.host, found, f"{SLOW:g} of the median {median:.3g}", advice, is_warning=not device.is_gpu
                )
            elif device.is_gpu and promised is not None and rate < DATA_SHEET * promised:
                advice = f"correct hardware in the cluster file if it is another {device.name}; else look at clocks and power limit"
                yield Finding(check, node.node, node.host, found, f"{DATA_SHEET:g} of {promised:g}", advice, is_warning=True)
    for node, device in devices:
        if device.memory_gb and device.free_memory_gb is not None and device.free_memory_gb < 0.9 * device.memory_gb:
            found = f"{_spell(device)}: {device.free_memory_gb:.1f} of {device.memory_gb:.1f} GB free"
            advice = "end what still holds it (nvidia-smi names the processes)"
            yield Finding("device memory", node.node, node.host, found, "nine tenths free", advice)


def _bad_links(nodes: Sequence[NodeReport], hardware: HardwareSection) -> Iterator[Finding]:
    links = [(node, link) for node in nodes for link in node.links]
    for node, link in links:
        if not link.is_exact:
            found = f"a wrong sum of integers over {spell_nodes(link.nodes)} ({link.kind})"
            advice = "exclude the node, and have its devices and network cards tested: what it computes cannot be trusted"
            yield Finding("all-reduce", node.node, node.host, found, "the right one", advice)
    for kind in dict.fromkeys(link.kind for _, link in links):
        rates = [(node, link, link.gb_per_second) for node, link in links if link.kind == kind and link.gb_per_second is not None]
        median = statistics.median_high([rate for *_, rate in rates]) if rates else 0.0
        promised = hardware.intra_node_gb_per_second if kind == "within a node" else hardware.inter_node_gb_per_second
        for node, link, rate in rates:
            found = f"{rate:.3g} GB/s over {spell_nodes(link.nodes)} ({kind})"
            advice = "look at cables, switch and network cards of these nodes, and at NCCL_DEBUG=INFO for what is used"
            if rate < SLOW_LINK * median:
                yield Finding("links", node.node, node.host, found, f"{SLOW_LINK:g} of the median {median:.3g}", advice, is_warning=True)
            elif promised is not None and rate < DATA_SHEET * promised:
                yield Finding("links", node.node, node.host, found, f"{DATA_SHEET:g} of {promised:g}", advice, is_warning=True)


def _spell(device: Device) -> str:
    return f"process {device.local_rank} on {device.name}"

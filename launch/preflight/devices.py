"""What one process does with its device: multiplies and copies alone, then sums with growing groups of the others.

In: `Orders`, in a process of its own. Out: in the meeting, how fast the device is, and how fast and how exact its groups are.
"""

import json
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as distributed
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from launch.preflight.comparison import growing_groups
from launch.preflight.processes import Orders
from launch.preflight.report import Device, Link, first_line, to_json

MEASURE_SECONDS = 0.4
"""For each rate, behind a warm-up; the best of what fits in is the device's."""
GROUP_SECONDS = 40.0
"""Of one all-reduce, and for all to come together: less than `processes.py` waits, so that an error has words."""


def measure(orders: Orders) -> None:
    """Do both, the second where node 0 says so. Raises what the process group raises."""
    store = TCPStore(orders.host, orders.port, None, False, timedelta(seconds=GROUP_SECONDS), wait_for_workers=False)
    meeting = PrefixStore(orders.prefix, store)
    try:
        found = measure_device(orders.local_rank)
    except Exception as error:  # of a driver, of a library: its words are what the person needs
        found = Device(orders.local_rank, error=f"{type(error).__name__}: {first_line(error)}")
    meeting.set(f"alone/{orders.name}", json.dumps(to_json(found)))
    while not meeting.check(["together"]):
        time.sleep(0.05)
    if json.loads(meeting.get("together")):
        links = [to_json(link) for link in measure_links(orders, PrefixStore("group", meeting))]
        meeting.set(f"links/{orders.name}", json.dumps(links))


def measure_device(local_rank: int) -> Device:
    """Rates of a GPU (bf16), or of this process's share of the CPU cores (fp32). Raises what CUDA raises."""
    is_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if is_gpu else torch.device("cpu")
    free = total = None
    if is_gpu:
        torch.cuda.set_device(device)
        free, total = torch.cuda.mem_get_info(device)
    width, dtype, num_bytes = (8192, torch.bfloat16, 1 << 30) if is_gpu else (1024, torch.float32, 1 << 26)
    left, right = (torch.randn(width, width, dtype=dtype, device=device) for _ in range(2))
    product = torch.empty_like(left)
    multiply_seconds = _best_seconds(lambda: torch.mm(left, right, out=product), is_gpu)
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy_seconds = _best_seconds(lambda: target.copy_(source), is_gpu)
    return Device(
        local_rank,
        torch.cuda.get_device_name(device) if is_gpu else f"{torch.get_num_threads()} CPU threads",
        is_gpu,
        matmul_tflops=2 * width**3 / multiply_seconds / 1e12,
        memory_gb_per_second=2 * num_bytes / copy_seconds / 1e9,
        memory_gb=None if total is None else total / 1e9,
        free_memory_gb=None if free is None else free / 1e9,
    )


def _best_seconds(act: Callable[[], object], is_gpu: bool, seconds: float = MEASURE_SECONDS) -> float:
    """The shortest time of an act, of several at a time on a GPU (a start takes as long as a small act does)."""
    repeats = 10 if is_gpu else 1
    act()
    best, until = float("inf"), time.monotonic() + seconds
    while best == float("inf") or time.monotonic() < until:
        best = min(best, _seconds_of(lambda: [act() for _ in range(repeats)], is_gpu) / repeats)
    return best


def _seconds_of(act: Callable[[], object], is_gpu: bool) -> float:
    if is_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    act()
    if is_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure_links(orders: Orders, store: Store) -> Iterator[Link]:
    """All-reduces of growing groups. Yields what this process tells: of those it is the first of, and of those with a wrong sum.

    Collective over all processes of all nodes. Raises what the process group raises (a process that is lost, or does not come in time).
    """
    is_gpu = torch.cuda.is_available()
    rank, world_size = orders.node * orders.processes + orders.local_rank, orders.num_nodes * orders.processes
    limit = timedelta(seconds=GROUP_SECONDS)
    distributed.init_process_group("nccl" if is_gpu else "gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
    device = torch.device("cuda", orders.local_rank) if is_gpu else torch.device("cpu")
    numbers = torch.arange(1 << 16, dtype=torch.int64, device=device) % 997
    for kind, nodes, ranks in growing_groups(orders.num_nodes, orders.processes, orders.node):
        group = distributed.new_group(list(ranks), timeout=limit, use_local_synchronization=True)
        summed = numbers * (rank + 1)
        distributed.all_reduce(summed, group=group)
        is_exact = torch.equal(summed, numbers * sum(member + 1 for member in ranks))
        values = torch.zeros((1 << 28 if is_gpu else 1 << 22) // 4, device=device)
        distributed.all_reduce(values, group=group)
        seconds = min(_seconds_of(lambda: distributed.all_reduce(values, group=group), is_gpu) for _ in range(5))  # noqa: B023 - called here
        if rank == ranks[0] or not is_exact:
            rate = 2 * (len(ranks) - 1) / len(ranks) * values.nbytes / seconds / 1e9
            yield Link(kind, nodes, len(ranks), is_exact, rate if rank == ranks[0] else None)
    distributed.barrier()  # who leaves first would break the sums of the others
    distributed.destroy_process_group()

"""What is looked at on one node before anything runs there: folders, limits, names, ports, GPUs. Each check is a function of a `Site`.

In: where a run is going to be on this node. Out: for each check its troubles; none for one that passed.
"""

import errno
import hashlib
import os
import resource
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

from configs.durable import sha256_of_file, write_file
from launch.preflight.limited import Failed, within
from launch.preflight.report import Trouble
from launch.preflight.site import MINE, Site, remove_files

LIMIT_SECONDS = 10.0
NETWORK_SECONDS = 5.0
FREE_GB = 2.0
"""Beside what the run's checkpoints take, which is counted when it starts."""
SHARED_MEMORY_GB_PER_PROCESS = 0.25
PORTS_TRIED = 5
"""By the training, from its rendezvous port on."""
Check = Callable[[Site], Iterable[Trouble]]


def run_checks(site: Site, checks: Mapping[str, Check], seconds: float = LIMIT_SECONDS) -> dict[str, list[Trouble]]:
    """The troubles of each check. One that raised or did not end is in trouble itself."""

    def doing(check: Check) -> Callable[[], list[Trouble]]:
        return lambda: list(check(site))

    found = within({name: doing(check) for name, check in checks.items()}, seconds)
    return {
        name: [Trouble(came_to.why, "an answer", "do by hand on this node what the check does (--help), and see what hangs or fails")]
        if isinstance(came_to, Failed)
        else [Trouble(*row) for row in came_to]
        for name, came_to in found.items()
    }


def check_gpus(site: Site, ask: Callable[[], str | None] | None = None) -> Iterable[Trouble]:
    """As many as the cluster file says, of that kind and size, without memory errors. ask: gives what nvidia-smi prints."""
    hardware, wanted = site.hardware, site.hardware.gpus_per_node
    told = (ask or _ask_nvidia_smi)()
    if told is None:
        if wanted:
            yield Trouble("no nvidia-smi", f"{wanted} x {hardware.gpu}", "install the driver, or start the container with GPUs")
        return
    rows = [[cell.strip() for cell in line.split(",")] for line in told.splitlines() if line.count(",") >= 2]
    if wanted and len(rows) < wanted:
        yield Trouble(f"{len(rows)} GPUs", f"{wanted} x {hardware.gpu}", "one has fallen off the bus (dmesg, Xid 79) or was not given")
    for number, (name, megabytes, errors, *_) in enumerate(rows):
        if hardware.gpu is not None and hardware.gpu.lower() not in name.lower():
            yield Trouble(f"GPU {number} is {name}", hardware.gpu, "correct hardware.gpu in the cluster file, or ask for other nodes")
        if hardware.gpu_memory_gb is not None and megabytes.isdigit() and int(megabytes) * 1.048576e-3 < 0.9 * hardware.gpu_memory_gb:
            found = f"GPU {number} has {int(megabytes) * 1.048576e-3:.0f} GB"
            yield Trouble(found, f"{hardware.gpu_memory_gb:g} GB", "correct hardware.gpu_memory_gb, or see whether it is cut up (MIG)")
        if errors.isdigit() and int(errors):
            yield Trouble(f"GPU {number}: {errors} uncorrected memory errors", "0", "reset the GPU or exclude the node")


def _ask_nvidia_smi() -> str | None:
    fields = "name,memory.total,ecc.errors.uncorrected.volatile.total"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        return None
    if done.returncode:
        raise OSError(done.returncode, (done.stdout + done.stderr).strip().splitlines()[-1], "nvidia-smi")
    return done.stdout


def check_run_folder(site: Site, usage: Callable[[Path], tuple[int, int, int]] = shutil.disk_usage) -> Iterable[Trouble]:
    """Room, and a file that is written, synced, renamed and read again. usage: total, used and free bytes."""
    yield from _check_folder(site.existing_run_folder, "free some, or put the run elsewhere with run.root=FOLDER", usage, is_needed=True)


def check_scratch(site: Site, usage: Callable[[Path], tuple[int, int, int]] = shutil.disk_usage) -> Iterable[Trouble]:
    """The same of the node's own folder."""
    yield from _check_folder(Path(site.job.scratch), "free some, or set job.scratch in the cluster file", usage, is_needed=False)


def _check_folder(folder: Path, advice: str, usage: Callable[[Path], tuple[int, int, int]], is_needed: bool) -> Iterable[Trouble]:
    free = usage(folder)[2]
    if free < FREE_GB * 1e9:
        yield Trouble(f"{folder} has {free / 1e9:.2f} GB free", f"{FREE_GB:g} GB", advice, is_warning=not is_needed)
    counts = os.statvfs(folder)
    if counts.f_files and counts.f_favail < 1000:  # some file systems count none
        yield Trouble(f"{folder} takes {counts.f_favail} more files", "1000", advice)
    written, path = os.urandom(1 << 20), folder / f"{MINE}{uuid.uuid4().hex[:12]}"
    try:
        write_file(path, written)
        if path.read_bytes() != written:
            yield Trouble(f"{folder} gives back other bytes than were written", "the same", "have the disk or the file server checked")
    except OSError as error:
        yield Trouble(f"{folder} cannot be written: {error.strerror}", "write, sync, rename and read", advice)
    finally:
        remove_files([path])


def check_checkpoint(site: Site) -> Iterable[Trouble]:
    """A tiny state goes to the run folder as a checkpoint does, and comes back with the same hash."""
    folder = site.existing_run_folder
    state = {"weight": np.arange(4096, dtype=np.float32).reshape(64, 64), "moment": np.full(4096, 1 / 3, dtype=np.float32)}
    content, path = save(state), folder / f"{MINE}{uuid.uuid4().hex[:12]}.safetensors"
    try:
        write_file(path, content)
        read = load_file(path)
        is_same = sha256_of_file(path) == hashlib.sha256(content).hexdigest() and read.keys() == state.keys()
        if not is_same or any(not np.array_equal(read[name], state[name]) for name in state):
            yield Trouble(f"a checkpoint in {folder} came back changed", "the same bits", "have the disk or the file server checked")
    except OSError as error:
        yield Trouble(f"{folder} takes no checkpoint: {error.strerror}", "write and read", "see `run folder`")
    finally:
        remove_files([path])


def check_shared_folders(site: Site) -> Iterable[Trouble]:
    """They are there, and this node's mark can be made in each; the other nodes then look for it."""
    for mark in site.marks if site.num_nodes > 1 else []:
        try:
            write_file(mark, site.token.encode())
        except OSError as error:
            advice = "mount it on this node with the right to write, or correct job.shared_folders"
            yield Trouble(f"{mark.parent}: {error.strerror}", "a folder that all nodes can write to", advice)


def check_data(site: Site) -> Iterable[Trouble]:
    """The dataset is seen from this node."""
    if site.data is not None and not (site.data / "manifest.json").is_file():
        advice = "mount its folder on this node, or build it (`pretrain data build RUN.yaml`)"
        yield Trouble(f"{site.data / 'manifest.json'} is not there", "the dataset", advice, is_warning=site.num_nodes == 1)


def check_shared_memory(site: Site, usage: Callable[[Path], tuple[int, int, int]] = shutil.disk_usage) -> Iterable[Trouble]:
    """Processes of a node exchange by it; a container has 64 MB unless it is told otherwise."""
    folder = Path("/dev/shm")
    processes = site.processes or site.hardware.gpus_per_node or site.cpu_processes
    wanted = SHARED_MEMORY_GB_PER_PROCESS * processes
    free = usage(folder)[2] / 1e9 if folder.is_dir() else 0.0
    if free < wanted:
        advice = "give the container more (--shm-size, --ipc=host, kubernetes.shared_memory_gb), or remove what lies there"
        yield Trouble(f"{free:.2f} GB free in {folder}", f"{wanted:g} GB for {processes} processes", advice)


def check_open_files(site: Site, limits: Callable[[int], tuple[int, int]] = resource.getrlimit) -> Iterable[Trouble]:
    """Each process is joined to all others, and maps shards."""
    wanted = 256 + 4 * site.num_nodes * (site.processes or site.hardware.gpus_per_node or site.cpu_processes)
    found = limits(resource.RLIMIT_NOFILE)[0]
    if found != resource.RLIM_INFINITY and found < wanted:
        yield Trouble(f"{found} open files", f"{wanted}", f"put `ulimit -n {max(wanted, 65536)}` into job.setup of the cluster file")


def check_locked_memory(
    site: Site, limits: Callable[[int], tuple[int, int]] = resource.getrlimit, devices: Path = Path("/sys/class/infiniband")
) -> Iterable[Trouble]:
    """InfiniBand cards read memory that is locked in place."""
    found = limits(resource.RLIMIT_MEMLOCK)[0]
    if devices.is_dir() and any(devices.iterdir()) and found != resource.RLIM_INFINITY:
        advice = "`ulimit -l unlimited` in job.setup, or LimitMEMLOCK=infinity for what starts jobs: NCCL may not get memory for its cards"
        yield Trouble(f"{found / 1e6:.1f} MB may be locked", "unlimited, with InfiniBand", advice, is_warning=True)


def check_names(site: Site) -> Iterable[Trouble]:
    """This node's own name and that of node 0 lead to an address. The second is asked for again for a while: a pod's takes its time."""
    until = time.monotonic() + NETWORK_SECONDS
    while isinstance(first := _addresses(site.host), str) and time.monotonic() < until:
        time.sleep(0.5)
    if isinstance(first, str):
        yield Trouble(
            f"{site.host}: {first}", "the address of node 0", "use a name or an address that all nodes know, in DNS or /etc/hosts"
        )
    name = socket.gethostname()
    own, is_alone = _addresses(name), site.num_nodes == 1 or _is_here(first)
    if site.job.network_interface is None and (isinstance(own, str) or (_is_here(own) and not is_alone)):
        # Many systems have 127.0.1.1 for their own name. gloo goes by it; NCCL looks for interfaces itself.
        why = own if isinstance(own, str) else f"it is {', '.join(sorted(own))}, which others cannot reach"
        advice = "add it to DNS or /etc/hosts, or name job.network_interface in the cluster file"
        yield Trouble(f"{name}: {why}", "an address of this node", advice, is_warning=is_alone or site.hardware.gpus_per_node > 0)


def _addresses(host: str) -> set[str] | str:
    """Where a name leads, or why nowhere."""
    try:
        return {str(row[4][0]) for row in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError) as error:
        return str(getattr(error, "strerror", None) or error)


def _is_here(addresses: set[str] | str) -> bool:
    """Whether they lead nobody away from this machine."""
    return not isinstance(addresses, str) and all(address.startswith("127.") or address == "::1" for address in addresses)


def check_ports(site: Site) -> Iterable[Trouble]:
    """Node 0 can listen where the training is going to meet. The others reach it, or never arrive."""
    if site.node or site.port is None:
        return
    ports = range(site.port, site.port + PORTS_TRIED)
    if not any(is_free(port) for port in ports):
        advice = "another run is there: stop it, or choose job.rendezvous_port in the cluster file"
        yield Trouble(f"ports {ports[0]} to {ports[-1]} are taken", "one that is free", advice)


def is_free(port: int) -> bool:
    """Whether one may listen on a port of all this node's addresses."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            return False
        return True


def check_wandb(site: Site) -> Iterable[Trouble]:
    """The server answers, where a key is configured. Node 0 alone writes to it. Nothing secret is sent."""
    if site.wandb is None or site.node:
        return
    advice = "let node 0 out (HTTPS_PROXY), or set watch.wandb=offline and upload later with `wandb sync`"
    if not site.wandb.startswith(("https://", "http://")):
        yield Trouble("an address of another kind", "https://...", "correct WANDB_BASE_URL", is_warning=True)
        return
    try:
        with urllib.request.urlopen(site.wandb, timeout=NETWORK_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError as error:
        found = f"{site.wandb} does not answer: {getattr(error, 'reason', error)}"
        yield Trouble(found, f"an answer in {NETWORK_SECONDS:g} s", advice, is_warning=True)


CHECKS: dict[str, Check] = {
    "GPUs": check_gpus,
    "run folder": check_run_folder,
    "scratch": check_scratch,
    "checkpoint": check_checkpoint,
    "shared folders": check_shared_folders,
    "data": check_data,
    "shared memory": check_shared_memory,
    "open files": check_open_files,
    "locked memory": check_locked_memory,
    "names": check_names,
    "ports": check_ports,
    "Weights & Biases": check_wandb,
}

"""What the doctor looks at on one node, each check with a planted fault, and the limit of time over all of them."""

import os
import resource
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from configs.cluster import HardwareSection, JobSection
from launch.preflight import probes
from launch.preflight.devices import measure_device
from launch.preflight.limited import Failed, within
from launch.preflight.probes import CHECKS, PORTS_TRIED, run_checks
from launch.preflight.report import Trouble
from launch.preflight.site import Site, hash_code, look_for, remove_marks

H100 = HardwareSection(gpu="H100", gpus_per_node=2, gpu_memory_gb=80)
READ_ONLY = Path("/sys/kernel")
"""Nobody can make a file there, root neither."""


@pytest.fixture(name="site")
def _site(tmp_path: Path) -> Callable[..., Site]:
    def make(**changed: Any) -> Site:
        return Site(**{"run_folder": tmp_path / "runs" / "mine", "job": JobSection(scratch=str(tmp_path)), **changed})

    return make


def one(troubles: Iterable[Trouble]) -> Trouble:
    (trouble,) = troubles
    assert trouble.advice
    return trouble


def usage(free: float) -> Callable[[Path], tuple[int, int, int]]:
    return lambda path: (10**12, 0, int(free))


# --- a limit of time ---------------------------------------------------------------------------------------


def test_acts_run_at_once_and_come_to_what_they_say() -> None:
    def sleep_and_say(text: str) -> Callable[[], str]:
        def act() -> str:
            time.sleep(0.5)
            return text

        return act

    began = time.monotonic()
    assert within({text: sleep_and_say(text) for text in "abcdef"}, 30) == {text: text for text in "abcdef"}
    assert time.monotonic() - began < 2.5


def test_what_is_stuck_raises_or_dies_is_said(tmp_path: Path) -> None:
    came_to = within(
        {
            "stuck": lambda: time.sleep(600),
            "deaf": lambda: [signal.signal(signal.SIGTERM, signal.SIG_IGN), time.sleep(600)],
            "raising": lambda: {}["no such key"],
            "refused": lambda: (tmp_path / "no").read_text(),
            "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
            "long": lambda: "x" * 1_000_000,
        },
        2.0,
    )
    assert came_to.pop("long") == "x" * 1_000_000
    assert came_to == {
        "stuck": Failed("no answer in 2 s"),
        "deaf": Failed("no answer in 2 s"),
        "raising": Failed("KeyError: 'no such key'"),
        "refused": Failed(f"{tmp_path / 'no'}: No such file or directory"),
        "killed": Failed("its process died"),
    }


def test_a_stuck_check_is_named_in_time_and_the_others_pass(site: Callable[..., Site]) -> None:
    began = time.monotonic()
    found = run_checks(site(), {**CHECKS, "hung mount": lambda site: time.sleep(600) or ()}, seconds=6.0)
    assert time.monotonic() - began < 12
    assert {name for name, troubles in found.items() if any(not trouble.is_warning for trouble in troubles)} == {"hung mount"}
    assert found["hung mount"][0].found == "no answer in 6 s"


def test_the_checks_of_a_node_leave_nothing(site: Callable[..., Site], tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    found = run_checks(site(), CHECKS)
    assert {name: troubles for name, troubles in found.items() if any(not trouble.is_warning for trouble in troubles)} == {}
    assert sorted(tmp_path.rglob("*")) == before


# --- folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [probes.check_run_folder, probes.check_scratch])
def test_a_folder_that_cannot_be_written(site: Callable[..., Site], check: Callable[..., Any]) -> None:
    found = one(check(site(run_folder=READ_ONLY, job=JobSection(scratch=str(READ_ONLY))), usage=usage(1e12)))
    assert found.found.startswith("/sys/kernel cannot be written: ")
    assert not found.is_warning


def test_a_disk_without_room(site: Callable[..., Site], tmp_path: Path) -> None:
    found = one(probes.check_run_folder(site(), usage=usage(0.1e9)))
    assert (found.found, found.wanted, found.is_warning) == (f"{tmp_path} has 0.10 GB free", "2 GB", False)
    assert one(probes.check_scratch(site(), usage=usage(0.1e9))).is_warning


def test_a_disk_that_gives_back_other_bytes(site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "write_file", lambda path, content: path.write_bytes(content[:-1] + b"\0" + content[:0]))
    monkeypatch.setattr(os, "urandom", lambda count: b"\1" * count)
    assert "gives back other bytes" in one(probes.check_run_folder(site())).found


def test_a_checkpoint_that_comes_back_changed(site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    def flip_a_bit(path: Path, content: bytes) -> None:
        path.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])

    monkeypatch.setattr(probes, "write_file", flip_a_bit)
    assert "came back changed" in one(probes.check_checkpoint(site())).found
    monkeypatch.undo()
    assert list(probes.check_checkpoint(site())) == []
    assert "takes no checkpoint" in one(probes.check_checkpoint(site(run_folder=READ_ONLY))).found


def test_a_dataset_that_is_not_seen(site: Callable[..., Site], tmp_path: Path) -> None:
    found = one(probes.check_data(site(data=tmp_path / "shards", num_nodes=2)))
    assert (found.found, found.is_warning) == (f"{tmp_path / 'shards' / 'manifest.json'} is not there", False)
    assert one(probes.check_data(site(data=tmp_path / "shards"))).is_warning  # a dataset may be built later
    assert list(probes.check_data(site(num_nodes=2))) == []


def test_shared_folders(site: Callable[..., Site], tmp_path: Path) -> None:
    """A mark in each, which others find, and which is taken away again; a folder that is missing is named."""
    (tmp_path / "shared").mkdir()
    good = site(num_nodes=2, job=JobSection(shared_folders=(str(tmp_path / "shared"),)))
    assert list(probes.check_shared_folders(good)) == []
    marks = {str(path): good.token for path in good.marks}
    assert len(marks) == 2
    assert look_for(marks, 1.0) == []
    remove_marks(good)
    assert look_for(marks, 0.3) == list(marks)
    gone = site(num_nodes=2, job=JobSection(shared_folders=("/no/such/mount",)))
    assert one(probes.check_shared_folders(gone)).found == "/no/such/mount: No such file or directory"
    remove_marks(gone)


def test_a_mark_that_comes_late_is_found_and_another_nodes_is_not_taken_for_it(tmp_path: Path) -> None:
    late = threading.Timer(0.5, lambda: (tmp_path / "late").write_text("token"))
    late.start()
    (tmp_path / "other").write_text("another token")
    marks = {str(tmp_path / "late"): "token", str(tmp_path / "other"): "token"}
    assert look_for(marks, 2.0) == [str(tmp_path / "other")]
    late.join()


def test_the_run_folder_stands_for_what_is_not_made_yet(tmp_path: Path) -> None:
    wanted = Site(run_folder=tmp_path / "runs" / "mine")
    assert wanted.existing_run_folder == tmp_path
    (tmp_path / "runs" / "mine" / "launches").mkdir(parents=True)
    assert wanted.existing_run_folder == tmp_path / "runs" / "mine" / "launches"  # where no start minds a file


# --- limits ------------------------------------------------------------------------------------------------


def test_shared_memory_of_a_container(site: Callable[..., Site]) -> None:
    found = one(probes.check_shared_memory(site(processes=8), usage=usage(64e6)))
    assert (found.found, found.wanted) == ("0.06 GB free in /dev/shm", "2 GB for 8 processes")


def test_open_files(site: Callable[..., Site]) -> None:
    found = one(probes.check_open_files(site(num_nodes=64, processes=8), limits=lambda number: (1024, 1024)))
    assert (found.found, found.wanted) == ("1024 open files", "2304")
    assert list(probes.check_open_files(site(), limits=lambda number: (1024, 1024))) == []
    assert list(probes.check_open_files(site(), limits=lambda number: (resource.RLIM_INFINITY,) * 2)) == []


def test_locked_memory_matters_with_infiniband(site: Callable[..., Site], tmp_path: Path) -> None:
    (tmp_path / "mlx5_0").touch()
    found = one(probes.check_locked_memory(site(), limits=lambda number: (65536, 65536), devices=tmp_path))
    assert (found.found, found.is_warning) == ("0.1 MB may be locked", True)
    assert list(probes.check_locked_memory(site(), limits=lambda number: (resource.RLIM_INFINITY,) * 2, devices=tmp_path)) == []
    assert list(probes.check_locked_memory(site(), limits=lambda number: (1, 1), devices=tmp_path / "none")) == []


# --- names, ports, servers ---------------------------------------------------------------------------------


def test_a_name_that_leads_nowhere(site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "NETWORK_SECONDS", 0.1)
    found = one(probes.check_names(site(num_nodes=2, host="no-such-host.invalid", job=JobSection(network_interface="lo"))))
    assert found.found.startswith("no-such-host.invalid: ")
    monkeypatch.setattr(socket, "gethostname", lambda: "me.invalid")
    assert [trouble.is_warning for trouble in probes.check_names(site(num_nodes=2, host="10.0.0.1"))] == [False]
    assert [trouble.is_warning for trouble in probes.check_names(site(num_nodes=2, host="10.0.0.1", hardware=H100))] == [True]
    found = one(probes.check_names(site()))
    assert (found.found.partition(":")[0], found.is_warning) == ("me.invalid", True)


def test_a_name_that_leads_others_to_themselves(site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    """As Debian has it in /etc/hosts."""
    addresses = {"me": "127.0.1.1", "first": "10.0.0.1", "127.0.0.1": "127.0.0.1"}
    monkeypatch.setattr(socket, "gethostname", lambda: "me")
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port: [(0, 0, 0, "", (addresses[host], 0))])
    found = one(probes.check_names(site(num_nodes=2, host="first")))
    assert (found.found, found.is_warning) == ("me: it is 127.0.1.1, which others cannot reach", False)
    assert list(probes.check_names(site(num_nodes=2))) == []  # two nodes that one machine plays
    assert list(probes.check_names(site(num_nodes=2, host="first", job=JobSection(network_interface="eth0")))) == []


def test_ports_that_are_taken(site: Callable[..., Site]) -> None:
    port, listeners = 29000 + os.getpid() % 20000, list[socket.socket]()
    try:
        while len(listeners) < PORTS_TRIED:
            listener = socket.socket()
            try:
                listener.bind(("", port + len(listeners)))
            except OSError:  # somebody else's: begin behind it
                for taken in [*listeners, listener]:
                    taken.close()
                port, listeners = port + 2 * PORTS_TRIED, []
                continue
            listener.listen()
            listeners.append(listener)
        found = one(probes.check_ports(site(num_nodes=2, port=port)))
        assert found.found == f"ports {port} to {port + PORTS_TRIED - 1} are taken"
        assert list(probes.check_ports(site(num_nodes=2, port=port, node=1))) == []  # it is node 0 that listens
        listeners.pop().close()
        assert list(probes.check_ports(site(num_nodes=2, port=port))) == []
    finally:
        for listener in listeners:
            listener.close()


def test_a_server_of_weights_and_biases(site: Callable[..., Site]) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    assert list(probes.check_wandb(site(wandb=address))) == []  # it answers, whatever it says
    thread.join(10)
    server.server_close()
    found = one(probes.check_wandb(site(wandb=address)))
    assert (found.is_warning, found.found.partition(" does")[0]) == (True, address)
    assert one(probes.check_wandb(site(wandb="file:///etc/passwd"))).found == "an address of another kind"
    assert list(probes.check_wandb(site())) == []
    assert list(probes.check_wandb(site(wandb=address, node=1))) == []


# --- devices and code --------------------------------------------------------------------------------------

GPUS = "NVIDIA H100 80GB HBM3, 81559, 0\nNVIDIA H100 80GB HBM3, 81559, [N/A]\n"


@pytest.mark.parametrize(
    ("told", "found"),
    [
        (GPUS, []),
        (None, ["no nvidia-smi"]),
        (GPUS.splitlines()[0], ["1 GPUs"]),
        (GPUS.replace("81559, 0", "40960, 3"), ["GPU 0 has 43 GB", "GPU 0: 3 uncorrected memory errors"]),
        (GPUS.replace("NVIDIA H100", "NVIDIA A100", 1), ["GPU 0 is NVIDIA A100 80GB HBM3"]),
    ],
)
def test_gpus(site: Callable[..., Site], told: str | None, found: list[str]) -> None:
    assert [trouble.found for trouble in probes.check_gpus(site(hardware=H100), ask=lambda: told)] == found


def test_a_machine_without_gpus_needs_none(site: Callable[..., Site]) -> None:
    assert list(probes.check_gpus(site(), ask=lambda: None)) == []


def test_a_driver_that_does_not_answer_is_named(site: Callable[..., Site], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi itself, in a process of its own, broken in two ways."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'Unable to determine the device handle for GPU0: Unknown Error'\nexit 15\n")
    fake.chmod(0o755)
    found = one(run_checks(site(hardware=H100), {"GPUs": probes.check_gpus})["GPUs"])
    assert found.found == "nvidia-smi: Unable to determine the device handle for GPU0: Unknown Error"
    fake.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nsleep 60\n")
    found = one(run_checks(site(hardware=H100), {"GPUs": probes.check_gpus}, seconds=3.0)["GPUs"])
    assert found.found == "no answer in 3 s"
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_device_is_measured() -> None:
    device = measure_device(0)
    assert device.error is None
    assert 0 < (device.matmul_tflops or 0) < 1e4
    assert 0 < (device.memory_gb_per_second or 0) < 1e5


def test_code_that_differs_in_a_byte_has_another_hash(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "a.py").write_text("x = 1\n")
    before = hash_code(tmp_path)
    shutil.copytree(tmp_path / "configs", tmp_path / "elsewhere" / "configs")
    assert hash_code(tmp_path / "elsewhere") == before
    (tmp_path / "configs" / "a.py").write_text("x = 2\n")
    assert hash_code(tmp_path) != before

"""What the doctor makes of what was found, and the whole of it for real: two processes, two nodes, a node that is absent."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from configs.cluster import ClusterConfig, HardwareSection
from configs.errors import UserError
from configs.loader import load_cluster
from launch.plan import LaunchPlan, render_node_script
from launch.preflight.comparison import Group, compare_nodes, growing_groups
from launch.preflight.probes import PORTS_TRIED
from launch.preflight.report import (
    Device,
    Finding,
    Link,
    NodeReport,
    Report,
    advice_of,
    bad_hosts,
    from_json,
    spell_nodes,
    table_of,
    to_json,
    verdict_of,
)
from launch.snapshot import own_files
from tests.launch.plans import a_plan, moved
from tests.pretrain.verbs import call

ROOT = Path(__file__).parent.parent.parent
NO_HARDWARE = HardwareSection()
H100 = HardwareSection(gpu="H100", gpus_per_node=1, bf16_tflops=989, gpu_memory_gb_per_second=3350, inter_node_gb_per_second=50)


def a_node(node: int, tflops: float = 600.0, is_gpu: bool = True, **changed: Any) -> NodeReport:
    device = Device(0, "NVIDIA H100", is_gpu, tflops, 2500.0, 80.0, 79.0)
    return replace(NodeReport(node, f"n{node}", {"torch": "2.13.0"}, devices=(device,)), **changed)


# --- nodes side by side ------------------------------------------------------------------------------------


def test_nodes_that_are_alike_are_well() -> None:
    assert compare_nodes([a_node(node, 600.0 + node) for node in range(5)], H100) == []


@pytest.mark.parametrize("num_nodes", [2, 3, 8])
def test_a_slow_device_is_named(num_nodes: int) -> None:
    nodes = [a_node(node, 600.0) for node in range(num_nodes - 1)] + [a_node(num_nodes - 1, 470.0)]
    (found,) = compare_nodes(nodes, NO_HARDWARE)
    assert (found.check, found.node, found.host, found.is_warning) == ("matrix products", num_nodes - 1, f"n{num_nodes - 1}", False)
    assert (found.found, found.wanted) == ("process 0 on NVIDIA H100: 470 TFLOP/s", "0.8 of the median 600")
    assert compare_nodes([*nodes[:-1], a_node(num_nodes - 1, 481.0)], NO_HARDWARE) == []


def test_a_slow_memory_is_named_and_cores_are_only_warned_of() -> None:
    slow = a_node(2, is_gpu=False)
    slow = replace(slow, devices=(replace(slow.devices[0], memory_gb_per_second=1000.0, name="4 CPU threads"),))
    (found,) = compare_nodes([a_node(0), a_node(1), slow], NO_HARDWARE)
    assert (found.check, found.node, found.is_warning) == ("memory bandwidth", 2, True)
    assert found.found == "process 0 on 4 CPU threads: 1e+03 GB/s"
    shared = replace(slow, devices=(slow.devices[0], replace(slow.devices[0], local_rank=1, memory_gb_per_second=2000.0)))
    assert compare_nodes([shared], NO_HARDWARE) == []


def test_what_a_data_sheet_promises_is_compared() -> None:
    (found,) = compare_nodes([a_node(0, 400.0)], H100)
    assert (found.check, found.wanted, found.is_warning) == ("matrix products", "0.5 of 989", True)


def test_a_device_that_somebody_else_uses_is_named() -> None:
    taken = replace(a_node(1).devices[0], free_memory_gb=30.0)
    (found,) = compare_nodes([a_node(0), a_node(1, devices=(taken,))], NO_HARDWARE)
    assert (found.check, found.host, found.found) == ("device memory", "n1", "process 0 on NVIDIA H100: 30.0 of 80.0 GB free")


def test_mixed_versions_are_named_with_both_values() -> None:
    nodes = [a_node(0), a_node(1), a_node(2, facts={"torch": "2.9.0", "driver": "535"}), a_node(3)]
    torch, driver = compare_nodes(nodes, NO_HARDWARE)
    assert (torch.node, torch.found, torch.wanted) == (2, "torch 2.9.0", "2.13.0, as on nodes 0, 1, 3")
    assert not torch.is_warning
    assert (driver.found, driver.is_warning) == ("driver 535", True)


def test_of_two_that_differ_the_first_is_right() -> None:
    (found,) = compare_nodes([a_node(0), a_node(1, facts={"torch": "2.9.0"})], NO_HARDWARE)
    assert (found.node, found.wanted) == (1, "2.13.0, as on node 0")


def test_clocks() -> None:
    (found,) = compare_nodes([a_node(0), a_node(1, clock_offset_seconds=-7.0), a_node(2, clock_offset_seconds=4.0)], NO_HARDWARE)
    assert (found.check, found.node, found.found, found.is_warning) == ("clock", 1, "-7.0 s against node 0", True)


def test_a_wrong_sum_and_a_slow_link_are_named() -> None:
    pairs = [Link("pair of nodes", (node, node + 1), 2, True, 10.0 if node == 2 else 45.0) for node in range(4)]
    nodes = [a_node(node, links=(pairs[node],)) for node in range(4)]
    nodes[1] = replace(nodes[1], links=(*nodes[1].links, Link("all", (0, 1, 2, 3), 4, False)))
    wrong, slow = compare_nodes(nodes, H100)
    assert (wrong.check, wrong.node, wrong.is_warning) == ("all-reduce", 1, False)
    assert (slow.check, slow.found, slow.wanted) == ("links", "10 GB/s over nodes 2, 3 (pair of nodes)", "0.5 of the median 45")
    alone = [a_node(0, links=(Link("all", (0, 1), 2, True, 20.0),)), a_node(1)]
    assert [found.wanted for found in compare_nodes(alone, H100)] == ["0.5 of 50"]


def test_groups_grow_and_never_wait_in_a_circle(seed: int) -> None:
    """Every process runs through its groups in order; a group begins when all its members have come to it."""
    chance = random.Random(seed)
    num_nodes, processes = chance.randint(1, 9), chance.randint(1, 3)
    waiting: dict[int, list[Group]] = {
        node * processes + local: list(growing_groups(num_nodes, processes, node))
        for node in range(num_nodes)
        for local in range(processes)
    }
    met: set[tuple[int, ...]] = set()
    while any(waiting.values()):
        ready = [groups[0] for groups in waiting.values() if groups]
        together = next(group for group in ready if all(waiting[rank] and waiting[rank][0] == group for rank in group.ranks))
        met.add(together.ranks)
        for rank in together.ranks:
            waiting[rank].pop(0)
    assert all(len(ranks) > 1 for ranks in met)
    if num_nodes * processes > 1:
        assert tuple(range(num_nodes * processes)) in met
    if num_nodes > 2:
        pairs = {tuple(range(node * processes, (node + 2) * processes)) for node in range(num_nodes - 1)}
        assert pairs <= met


# --- what is said ------------------------------------------------------------------------------------------


def a_finding(node: int = 1, check: str = "scratch", is_warning: bool = False) -> Finding:
    return Finding(check, node, f"n{node}", "0.10 GB free", "2 GB", "free some", is_warning)


def a_report(*findings: Finding, num_nodes: int = 4) -> Report:
    return Report(tuple(a_node(node) for node in range(num_nodes)), findings, 23, num_nodes, 12.0)


def test_the_last_line() -> None:
    assert verdict_of(a_report()) == "all 23 checks passed on 4 nodes (12 s)"
    assert verdict_of(a_report(a_finding(is_warning=True), num_nodes=1)) == "all 23 checks passed on 1 node, 1 warning (12 s)"
    assert verdict_of(a_report(a_finding(1), a_finding(3))) == "2 failures on nodes 1, 3 of 4 nodes (12 s)"


def test_the_table_has_failures_first_and_a_line_to_do_for_each() -> None:
    findings = [a_finding(0, "clock", is_warning=True), a_finding(2), a_finding(1)]
    assert table_of(findings) == [
        ("FAILED", "scratch", "1 (n1)", "0.10 GB free", "2 GB"),
        ("FAILED", "scratch", "2 (n2)", "0.10 GB free", "2 GB"),
        ("warning", "clock", "0 (n0)", "0.10 GB free", "2 GB"),
    ]
    assert advice_of(findings) == ["scratch on 1 (n1), 2 (n2): free some", "clock on 0 (n0): free some"]


def test_numbers_of_nodes_are_spelt_shortly() -> None:
    assert [spell_nodes(nodes) for nodes in ([3], [1, 0], [5, 0, 1, 2, 7])] == ["node 3", "nodes 0, 1", "nodes 0 to 2, 5, 7"]


def test_hosts_to_do_without_are_those_that_fail_alone() -> None:
    assert bad_hosts(a_report(a_finding(1), a_finding(2, is_warning=True))) == ["n1"]
    everywhere = [a_finding(node, "run folder") for node in range(3)]
    assert bad_hosts(a_report(*everywhere, a_finding(3))) == ["n3"]  # a full shared disk is nobody's own
    assert bad_hosts(a_report(a_finding(0), num_nodes=1)) == ["n0"]
    assert bad_hosts(a_report(Finding("arrival", 2, "", "it did not arrive", "it", "look"))) == []
    assert bad_hosts(a_report(a_finding(1, "arrival"), a_finding(0, "all-reduce"))) == ["n1"]


def test_a_report_goes_through_json() -> None:
    report = a_report(a_finding())
    report = replace(report, nodes=(replace(report.nodes[0], links=(Link("all", (0, 1), 2, True, 1.5),), findings=(a_finding(),)),))
    assert from_json(Report, json.loads(json.dumps(to_json(report)))) == report


# --- for real ----------------------------------------------------------------------------------------------

EXAMINE = """
import json, sys
from dataclasses import replace
from pathlib import Path
from configs.cluster import JobSection
from launch.preflight.examination import examine
from launch.preflight.report import to_json
from launch.preflight.site import Site

asked = json.loads(sys.argv[1])
job = JobSection(join_seconds=asked.pop("join_seconds"), scratch=asked.pop("scratch"))
asked["run_folder"] = Path(asked["run_folder"])
report = examine(Site(cpu_processes=1, job=job, **asked), lambda text: print(text, file=sys.stderr))
print(json.dumps(to_json(report)))
"""


def a_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return min(probe.getsockname()[1], 65535 - 2 * PORTS_TRIED)


def start(tmp_path: Path, port: int, node: int, join_seconds: float = 60.0, **asked: Any) -> "subprocess.Popen[str]":
    """One node of two."""
    orders = {"num_nodes": 2, "node": node, "port": port, "run_folder": str(tmp_path / "runs" / "mine"), "scratch": str(tmp_path)}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", EXAMINE, json.dumps({**orders, "join_seconds": join_seconds, **asked})],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def told(process: "subprocess.Popen[str]", seconds: float = 120) -> Report:
    try:
        out, said = process.communicate(timeout=seconds)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, said
    return from_json(Report, json.loads(out))


def test_two_processes_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pretrain doctor` alone: every check, a device each, and the way between them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    done = call("doctor", "--json")
    found = json.loads(done.out)
    failures = [finding for finding in found["findings"] if not finding["is_warning"]]
    assert (done.status, failures, found["passed"]) == (0, [], True)
    assert found["seconds"] < 60
    (node,) = found["nodes"]
    assert node["host"] == "n7", "what is to be excluded is told to Slurm by Slurm's name"
    num_devices = min(2, os.cpu_count() or 1)
    assert [device["local_rank"] for device in node["devices"]] == list(range(num_devices))
    assert all(device["matmul_tflops"] > 0 and device["memory_gb_per_second"] > 0 for device in node["devices"])
    if num_devices == 2:
        (link,) = node["links"]
        assert (link["kind"], link["processes"], link["is_exact"]) == ("within a node", 2, True)
    assert node["facts"]["numpy"]
    assert list(tmp_path.iterdir()) == []


def test_two_nodes_of_which_one_has_another_version(tmp_path: Path) -> None:
    """It is named, both learn the same verdict, and each has seen the file of the other."""
    (tmp_path / "here" / "runs").mkdir(parents=True)
    (tmp_path / "there" / "runs").mkdir(parents=True)
    port = a_port()
    second = start(tmp_path / "there", port, 1, facts={"numpy": "1.0", "code": "same"})
    first = start(tmp_path / "here", port, 0, facts={"numpy": "2.0", "code": "same"})
    reports = [told(first), told(second)]
    assert replace(reports[0], seconds=0.0) == replace(reports[1], seconds=0.0)
    failures = {(finding.check, finding.node): finding for finding in reports[0].failures}
    assert (failures["same everywhere", 1].found, failures["same everywhere", 1].wanted) == ("numpy 1.0", "2.0, as on node 0")
    assert set(failures) == {("same everywhere", 1)}
    assert [link.kind for node in reports[0].nodes for link in node.links] == ["all"]
    assert all(abs(node.clock_offset_seconds) < 2 for node in reports[0].nodes)
    assert [path.name for path in tmp_path.rglob(".doctor-*")] == []


def test_a_node_that_is_absent_is_named(tmp_path: Path) -> None:
    """By the first one, of another; and by another, of the first one. They are of two launches, which do not hear each other."""
    port = a_port()
    first = start(tmp_path, port, 0, join_seconds=1.0)
    other = start(tmp_path, port, 1, join_seconds=1.0, launch="another")
    (finding,) = told(first, 60).failures
    assert (finding.check, finding.node, finding.found) == ("arrival", 1, "it did not arrive within 1 s")
    (finding,) = told(other, 60).failures
    assert (finding.check, finding.node) == ("arrival", 1)
    wanted = f"no doctor of node 0 at 127.0.0.1:{port + PORTS_TRIED} to {port + 2 * PORTS_TRIED - 1} within 1 s"
    assert finding.found == wanted


def is_of_a_device(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):  # gone meanwhile
        return process.cmdline()[1:3] == ["-m", "launch.preflight"]
    return False


def test_a_killed_doctor_leaves_no_process(tmp_path: Path) -> None:
    process = start(tmp_path, a_port(), 0, num_nodes=1)
    try:
        deadline, children = time.monotonic() + 60, list[psutil.Process]()
        while not children and time.monotonic() < deadline:
            children = [child for child in psutil.Process(process.pid).children() if is_of_a_device(child)]
            time.sleep(0.02)
        assert children
        process.send_signal(signal.SIGKILL)
        _, left = psutil.wait_procs(children, timeout=10)
        assert [child for child in left if child.status() != psutil.STATUS_ZOMBIE] == []  # who reaps orphans may be slow at it
    finally:
        process.kill()
        process.communicate(timeout=10)


# --- the verb, and the script of a node --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--nodes", "2"), "--rendezvous: found None, wanted HOST:PORT"),
        (("--nodes", "2", "--node", "2", "--rendezvous", "a:29400"), "--node 2 of --nodes 2"),
        (("--nodes", "2", "--rendezvous", "a:65530"), "wanted one up to 65525"),
        (("--cluster", "no-such"), "there is no cluster 'no-such'"),
        (("--run", "no-such.yaml"), "no-such.yaml: no such file"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError) as caught:
        call("doctor", *arguments)
    assert said in str(caught.value)


def test_a_failure_is_said_and_the_host_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.preflight import examination

    reports = {0: a_report(a_finding(1), a_finding(2, "clock", is_warning=True)), 1: a_report(num_nodes=2)}
    monkeypatch.setattr(examination, "examine", lambda site, say: reports[0])
    (tmp_path / "bad-nodes").write_text("n9\nn1\n")
    done = call("doctor", "--bad-nodes", str(tmp_path / "bad-nodes"))
    assert done.status == 1
    assert (tmp_path / "bad-nodes").read_text() == "n9\nn1\n"
    assert " ".join(done.out.splitlines()[1].split()) == "FAILED scratch 1 (n1) 0.10 GB free 2 GB"
    assert "  scratch on 1 (n1): free some" in done.out.splitlines()
    monkeypatch.setattr(examination, "examine", lambda site, say: a_report(a_finding(2)))
    assert call("doctor", "--bad-nodes", str(tmp_path / "bad-nodes")).status == 75, "a new one: without it, another start may do better"
    assert (tmp_path / "bad-nodes").read_text() == "n9\nn1\nn2\n"
    monkeypatch.setattr(examination, "examine", lambda site, say: a_report(a_finding(is_warning=True)))
    assert call("doctor").status == 0


STAND_IN = """#!/usr/bin/env bash
echo "$3" >> "$TOLD"
test "$3" = train || exec python3 -c 'import sys, time; time.sleep(float(sys.argv[1])); sys.exit(int(sys.argv[2]))' $DOCTOR
"""


def a_node_script(tmp_path: Path, **job: Any) -> LaunchPlan:
    """The script of a node, on disk, with an interpreter that only writes down which verb it was given."""
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)
    plan = moved(a_plan(tmp_path, job={"python": str(tmp_path / "python"), **job}), tmp_path)
    plan = replace(plan, code=replace(plan.code, source=str(tmp_path)))
    Path(plan.folder).mkdir(parents=True)
    for name, content in own_files(plan, {}).items():
        Path(plan.folder, name).write_text(content)
    return plan


def run_node(plan: LaunchPlan, tmp_path: Path, doctor: str) -> "subprocess.Popen[bytes]":
    """doctor: seconds that it takes, and its exit status."""
    environment = {**os.environ, "TOLD": str(tmp_path / "told"), "DOCTOR": doctor}
    return subprocess.Popen(["bash", f"{plan.folder}/node.sh", "0", "127.0.0.1:29400"], env=environment, start_new_session=True)


@pytest.mark.parametrize(("doctor", "status", "verbs"), [("0 0", 0, "doctor\ntrain\n"), ("0 1", 1, "doctor\n"), ("0 2", 2, "doctor\n")])
def test_a_node_trains_only_when_the_doctor_says_so(tmp_path: Path, doctor: str, status: int, verbs: str) -> None:
    assert run_node(a_node_script(tmp_path), tmp_path, doctor).wait(timeout=30) == status
    assert (tmp_path / "told").read_text() == verbs


def test_a_cluster_without_a_doctor(tmp_path: Path) -> None:
    assert run_node(a_node_script(tmp_path, doctor=False), tmp_path, "0 1").wait(timeout=30) == 0
    assert (tmp_path / "told").read_text() == "train\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_stop_before_the_training_can_be_started_again(tmp_path: Path, number: signal.Signals) -> None:
    """At once, and the doctor goes with its node."""
    process = run_node(a_node_script(tmp_path), tmp_path, "60 0")
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "told").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        children = psutil.Process(process.pid).children()
        assert len(children) == 1
        process.send_signal(number)
        assert process.wait(timeout=20) == 75
        _, left = psutil.wait_procs(children, timeout=10)
        assert [child for child in left if child.status() != psutil.STATUS_ZOMBIE] == []
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "told").read_text() == "doctor\n"


def test_the_doctor_of_a_launch_reads_the_launchs_cluster(tmp_path: Path) -> None:
    cluster = {"hardware": {"gpu": "H100", "gpus_per_node": 8}, "slurm": {"extra": ("--mail-type=FAIL",)}, "container": None}
    plan = moved(a_plan(tmp_path, job={"setup": ("module load cuda/12.8",), "doctor": True}, **cluster), tmp_path)
    Path(plan.folder).mkdir(parents=True)
    Path(plan.folder, "cluster.yaml").write_text(own_files(plan, {})["cluster.yaml"])
    assert load_cluster(f"{plan.folder}/cluster.yaml") == plan.cluster
    assert isinstance(plan.cluster, ClusterConfig)
    assert f"--cluster {plan.folder}/cluster.yaml" in render_node_script(plan)

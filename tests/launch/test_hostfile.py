"""Which hosts a launch over ssh takes, what is refused, and the files that are written for it."""

import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest

from configs.cluster import ClusterConfig, HostsSection
from configs.errors import UserError
from launch.hostfile import Host, hosts_of, read_hostfile, render
from launch.plan import Code, LaunchPlan

GOLDEN = Path(__file__).parent / "golden"


def make_plan() -> LaunchPlan:
    cluster = ClusterConfig.model_validate(
        {
            "name": "machines",
            "hosts": {"hosts": ("worker-1", "worker-2"), "user": "train", "ssh_port": 2222},
            "job": {"python": "/opt/pretrain/bin/python", "scratch": "/local", "setup": ("module load cuda/12.8",)},
        }
    )
    return LaunchPlan(
        "hostfile",
        "20261123-1",
        "llama",
        "/shared/runs/it's",
        "/shared/runs/it's/launches/20261123-1",
        2,
        8,
        cluster,
        Code("/shared/code", None, None),
    )


def test_a_hostfile_is_read_in_its_order(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text("\ufeff# ours\n\nworker-2 slots=8\r\n  10.0.0.7\tslots=4   # the old one\n#worker-9 slots=1\nlast.site.org slots=08")
    assert read_hostfile(path) == (Host("worker-2", 8), Host("10.0.0.7", 4), Host("last.site.org", 8))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "No such file"),
        ("", "names no host"),
        ("# worker-1 slots=8\n\n", "names no host"),
        ("worker-1\n", "line 1: found 'worker-1'"),
        ("worker-1 slots=8\nworker-2 slots=0\n", "line 2: found 'worker-2 slots=0'"),
        ("worker-1 slots=-1\n", "line 1: found 'worker-1 slots=-1'"),
        ("worker-1 slots=eight\n", "line 1: found 'worker-1 slots=eight'"),
        ("worker-1 slots = 8\n", "line 1: found 'worker-1 slots = 8'"),
        ("worker-1 slots=8 max_slots=9\n", "line 1: found 'worker-1 slots=8 max_slots=9'"),
        ("worker-1 slots=8\n# again\nWORKER-1 slots=8\n", "line 3: WORKER-1 stands in line 1 already"),
        ("worker-1 slots=8\n;$(touch${IFS}x) slots=8\n", "line 2: found ';$(touch${IFS}x)'"),
        ("-oProxyCommand=x slots=8\n", "line 1: found '-oProxyCommand=x'"),
        ("root@worker-1 slots=8\n", "line 1: found 'root@worker-1'"),
        ("worker_1 slots=8\n", "line 1: found 'worker_1'"),
        ("worker-1 slots=\u0668\n", "line 1: found"),
        (b"\xff\xfe\x00", "is no text"),
        ("folder", "Is a directory"),
    ],
)
def test_a_bad_hostfile_is_refused_with_its_line(tmp_path: Path, content: str | bytes | None, named: str) -> None:
    path = tmp_path / "hostfile"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as refused:
        read_hostfile(path)
    assert str(path) in str(refused.value) and named in str(refused.value)


def test_the_first_hosts_are_taken() -> None:
    assert hosts_of(make_plan()) == (Host("worker-1", 8), Host("worker-2", 8))
    assert hosts_of(dataclasses.replace(make_plan(), nodes=1)) == (Host("worker-1", 8),)
    with pytest.raises(UserError, match="has 2 hosts and 3 nodes are wanted"):
        hosts_of(dataclasses.replace(make_plan(), nodes=3))


@pytest.mark.parametrize(
    ("hosts", "named"),
    [
        (None, "no section `hosts`"),
        ({}, "either hosts.hostfile or hosts.hosts"),
        ({"hostfile": "HOSTFILE", "hosts": ("a",)}, "either hosts.hostfile or hosts.hosts"),
        ({"hosts": ("b", "a", "B")}, "names b more than once"),
        ({"hostfile": "HOSTFILE"}, "no room on small (slots=1)"),
    ],
)
def test_a_cluster_that_does_not_say_which_hosts_is_refused(tmp_path: Path, hosts: dict | None, named: str) -> None:
    (tmp_path / "hostfile").write_text("large slots=8\nsmall slots=1\n")
    hosts = hosts and {key: str(tmp_path / "hostfile") if value == "HOSTFILE" else value for key, value in hosts.items()}
    section = None if hosts is None else HostsSection.model_validate(hosts)
    cluster = make_plan().cluster.model_copy(update={"hosts": section})
    with pytest.raises(UserError) as refused:
        hosts_of(dataclasses.replace(make_plan(), cluster=cluster, nodes=2, processes_per_node=4))
    assert named in str(refused.value)


@pytest.mark.parametrize("unfit", [{"chain": 2}, {"builds_data": True}])
def test_what_ssh_does_not_do_is_refused(unfit: dict) -> None:
    with pytest.raises(UserError, match="no data build and no chain"):
        render(dataclasses.replace(make_plan(), **unfit))


@pytest.mark.parametrize("name", [";$(touch x)", "a b", "-x", "a'b", "$HOME", "a\nb", "`x`", "x;"])
def test_a_hostile_name_is_no_host(name: str) -> None:
    with pytest.raises(ValueError, match="wanted a host name"):
        HostsSection(hosts=(name,))


@pytest.mark.parametrize("name", ["hosts", "check.sh", "host.sh", "node-again.sh"])
def test_the_files_are_as_they_were(name: str) -> None:
    assert render(make_plan())[name] == (GOLDEN / f"hostfile-{name}").read_text()


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
@pytest.mark.parametrize("name", ["check.sh", "host.sh"])
def test_the_scripts_are_clean(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(render(make_plan())[name])
    done = subprocess.run(["shellcheck", "--exclude=SC1091", str(tmp_path / name)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout

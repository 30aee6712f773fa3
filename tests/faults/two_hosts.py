"""Two hosts that this machine plays: network namespaces with names and addresses of their own, a cable between them, ssh to both.

In: nothing but root, `ip` and `unshare`; `install` fetches what else is missing. Out: hosts in which commands are started, a cable that can
be pulled out and put back. Both see the same files. What is made (namespaces, processes, keys, folders) is gone at the end.
"""

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.faults.builds import kill_all

PROGRAMS = ("ip", "unshare", "bash")
SSH_PROGRAMS, SSH_PACKAGES = ("sshd", "ssh", "ssh-keygen"), ("openssh-server", "openssh-client")
NAMES_FOLDER = Path("/etc/netns")
"""Where `ip netns exec` takes a namespace's own /etc from."""
CONNECTIONS_FOLDER = Path("/run/sshd")
"""sshd wants it, empty."""
START_SECONDS = 30
DAEMON = """\
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
"""


@dataclass(frozen=True)
class Host:
    """A host of its own, as far as its network goes."""

    number: int
    namespace: str
    address: str

    @property
    def name(self) -> str:
        """What it calls itself."""
        return f"host{self.number}"

    @property
    def prefix(self) -> tuple[str, ...]:
        """Starts a command there; the process stays the same one."""
        return ("ip", "netns", "exec", self.namespace, "unshare", "--uts", "bash", "-c", f'hostname {self.name}; exec "$@"', "bash")

    @property
    def processes(self) -> list[psutil.Process]:
        """All that run there now, whoever started them."""
        found: list[psutil.Process] = []
        for pid in _ip("netns", "pids", self.namespace).split():
            with suppress(psutil.Error):
                found.append(psutil.Process(int(pid)))
        return found

    def pull_cable(self) -> None:
        """Nothing arrives and nothing leaves any more; no connection is told."""
        _ip("-n", self.namespace, "link", "set", "cable", "down")

    def plug_cable(self) -> None:
        """As it was before."""
        _ip("-n", self.namespace, "link", "set", "cable", "up")


def reason_to_skip() -> str:
    """Why there can be no two hosts here, or nothing."""
    if os.geteuid() != 0 or not all(map(shutil.which, PROGRAMS)):
        return f"needs root, {', '.join(PROGRAMS)}"
    probe = f"p{secrets.token_hex(3)}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode:
        return "needs the right to make network namespaces"
    _ip("netns", "del", probe)
    return ""


def install_ssh() -> str:
    """Fetch ssh and its daemon where they are missing. Returns why that cannot be, or nothing."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if all(shutil.which(name, path=path) for name in SSH_PROGRAMS):
        return ""
    if shutil.which("apt-get") is None:
        return f"needs {', '.join(SSH_PROGRAMS)}, and there is no apt-get"
    # RUNLEVEL: where this machine has init scripts, none is to start a daemon for the whole machine.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    command = ["apt-get", "install", "-y", "--no-install-recommends", *SSH_PACKAGES]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    missing = [name for name in SSH_PROGRAMS if not shutil.which(name, path=path)]
    return f"apt-get cannot install {', '.join(SSH_PACKAGES)}: {ended.stderr.strip()[-300:]}" if missing else ""


@contextmanager
def two_hosts() -> Generator[tuple[Host, Host], None, None]:
    """Two network namespaces with a cable between them, which know each other by name; all that runs in them ends with them."""
    mark, network = secrets.token_hex(3), f"10.231.{secrets.randbelow(256)}"
    hosts = (Host(1, f"f{mark}1", f"{network}.1"), Host(2, f"f{mark}2", f"{network}.2"))
    names = "".join(f"{host.address} {host.name}\n" for host in hosts)
    with ExitStack() as stack:
        for host in hosts:
            _ip("netns", "add", host.namespace)
            stack.callback(_ip, "netns", "del", host.namespace)
            stack.callback(lambda host=host: kill_all(host.processes))
            own = NAMES_FOLDER / host.namespace
            own.mkdir(parents=True)
            stack.callback(shutil.rmtree, own)
            (own / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        _ip("link", "add", "cable", "netns", hosts[0].namespace, "type", "veth", "peer", "name", "cable", "netns", hosts[1].namespace)
        for host in hosts:
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "cable")
            _ip("-n", host.namespace, "link", "set", "cable", "up")
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        yield hosts


@contextmanager
def ssh_between(hosts: Sequence[Host], folder: Path) -> Generator[tuple[str, ...], None, None]:
    """A daemon on each host, and a key that opens both. folder: for keys, this test's alone. Yields options for `ssh -o`."""
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True, timeout=START_SECONDS)
    public = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text("".join(f"{host.name} {public}" for host in hosts))
    CONNECTIONS_FOLDER.mkdir(mode=0o755, exist_ok=True)
    with ExitStack() as stack:
        for host in hosts:
            stack.enter_context(_daemon(host, folder))
        yield (f"IdentityFile={folder}/key", "IdentitiesOnly=yes", f"UserKnownHostsFile={folder}/known_hosts", "StrictHostKeyChecking=yes")


@contextmanager
def _daemon(host: Host, folder: Path) -> Generator[None, None, None]:
    settings, log = folder / f"{host.name}.sshd", folder / f"{host.name}.log"
    settings.write_text(DAEMON.format(address=host.address, folder=folder))
    sshd = shutil.which("sshd", path="/usr/sbin:/sbin:/usr/bin") or "/usr/sbin/sshd"  # it wants to be started by its whole path
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*host.prefix, sshd, "-D", "-e", "-f", str(settings)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while b"listening" not in log.read_bytes():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=START_SECONDS).stdout

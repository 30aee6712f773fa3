"""Stands in for `ssh`, without a network: runs the command on this machine as another host would, or says why it cannot.

In: ssh's own command line, and SSH_IN_PLACE, a folder in which `refused-HOST` makes that host unreachable. Out: the command's exit
status. As on a host, the command sees nothing of the launcher's environment, and has a session and pipes of its own that end with this
process.
"""

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path


def main() -> int:
    words = sys.argv[1:]
    host, command = words[words.index("--") + 1 :]
    folder = Path(os.environ["SSH_IN_PLACE"])
    (folder / f"{host}.arguments").write_text("\0".join(words))
    if (folder / f"refused-{host}").exists():
        print(f"ssh: connect to host {host} port 22: Connection refused", file=sys.stderr)
        return 255
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "SSH_IN_PLACE_HOST": host}
    pipe = subprocess.PIPE
    child = subprocess.Popen(["sh", "-c", command], env=environment, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
    (folder / f"{host}.pid").write_text(str(os.getpid()))
    threading.Thread(target=pass_on, args=(0, child.stdin.fileno()), daemon=True).start()
    complaints = threading.Thread(target=pass_on, args=(child.stderr.fileno(), 2))
    complaints.start()
    pass_on(child.stdout.fileno(), 1)
    complaints.join()
    return child.wait()


def pass_on(source: int, target: int) -> None:
    """Until the source ends; then the target does."""
    with contextlib.suppress(OSError):
        while block := os.read(source, 1 << 16):
            os.write(target, block)
    with contextlib.suppress(OSError):
        os.close(target)


if __name__ == "__main__":
    sys.exit(main())

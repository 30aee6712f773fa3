"""The process of one device: `python -m launch.preflight ORDERS` (JSON), started by `processes.py`.

It ends with the doctor that started it, also while torch is still being imported. What it does stands in `devices.py`.
"""

import ctypes
import json
import os
import signal
import sys

from launch.preflight.processes import Orders

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Be that process."""
    orders = Orders(**json.loads(sys.argv[1]))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != orders.parent:
        return
    from launch.preflight.devices import measure

    measure(orders)
    os._exit(0)  # libraries' threads sometimes abort at the interpreter's own exit


if __name__ == "__main__":
    main()

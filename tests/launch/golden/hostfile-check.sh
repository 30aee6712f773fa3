#!/usr/bin/env bash
# Whether a host can run a node of launch 20261123-1: bash check.sh FIRST_HOST NODE. What it lacks is the last line.
set -eo pipefail
[[ -w /local ]] || { echo 'cannot write to /local; name another folder of each node as job.scratch' >&2; exit 1; }
module load cuda/12.8
source '/shared/runs/it'"'"'s/launches/20261123-1/environment'
command -v /opt/pretrain/bin/python >/dev/null || { echo 'found no /opt/pretrain/bin/python; job.python and job.setup of the cluster file say where it is' >&2; exit 1; }
cd /shared/code || { echo 'does not see /shared/code, which holds the code; put it on a path that all hosts share' >&2; exit 1; }
exec /opt/pretrain/bin/python -c '
import importlib.util, ipaddress, socket, sys
lacks = [name for name in ("pretrain", "torch", "deepspeed") if importlib.util.find_spec(name) is None]
if lacks:
    sys.exit(f"{sys.executable} has no {'"'"', '"'"'.join(lacks)}; install the project there, or name another job.python")
first, node = sys.argv[1:]
try:
    address = socket.gethostbyname(first)
except OSError as error:
    sys.exit(f"does not know the first host by its name, {first} ({error}); put it into /etc/hosts, or use its address")
if node != "0" and address != first and ipaddress.ip_address(address).is_loopback:
    sys.exit(f"takes the first host, {first}, for itself ({address}); use its name in the network, or its address")
' "$1" "$2"

#!/usr/bin/env bash
# The Ray job of launch 20261123-abc, on the head; Ray says in RAY_ADDRESS where that is.
set -eo pipefail # not -u: what sites have for modules and conda reads variables that are not set
module load cuda
source '/shared/runs/my run/launches/20261123-abc/environment'
cd '/shared/it'"'"'s code'
exec python3 -m launch.ray_train '/shared/runs/my run/launches/20261123-abc/node.sh' --nodes 2 --cpus 32 --gpus 8 --port 29400 --stop-file '/shared/runs/my run/STOP'

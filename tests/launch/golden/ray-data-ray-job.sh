#!/usr/bin/env bash
# The Ray job of launch 20261123-abc, on the head; Ray says in RAY_ADDRESS where that is.
set -eo pipefail # not -u: what sites have for modules and conda reads variables that are not set
module load cuda
source '/shared/runs/my run/launches/20261123-abc/environment'
cd '/shared/it'"'"'s code'
exec python3 -m pretrain.cli data build '/shared/runs/my run/launches/20261123-abc/run.yaml' data.workers=64

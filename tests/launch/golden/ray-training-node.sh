#!/usr/bin/env bash
# One node of launch 20261123-abc: bash node.sh NODE HOST:PORT
set -eo pipefail # not -u: what sites have for modules and conda reads variables that are not set
module load cuda
source '/shared/runs/my run/launches/20261123-abc/environment'
cd '/shared/it'"'"'s code'
trap 'kill $(jobs -p) || true; exit 75' TERM INT HUP USR1 USR2 # a stop before the training: it can be started again
python3 -m pretrain.cli doctor --cluster '/shared/runs/my run/launches/20261123-abc/cluster.yaml' --run '/shared/runs/my run/launches/20261123-abc/run.yaml' --bad-nodes '/shared/runs/my run/launches/20261123-abc/bad-nodes' --nodes 2 --node "$1" --rendezvous "$2" --launch 20261123-abc &
wait "$!"
trap - TERM INT HUP USR1 USR2
exec python3 -m pretrain.cli train '/shared/runs/my run/launches/20261123-abc/run.yaml' --nodes 2 --node "$1" --rendezvous "$2" --launch 20261123-abc --join-seconds 300

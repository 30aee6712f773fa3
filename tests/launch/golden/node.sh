#!/usr/bin/env bash
# One node of launch 20260102-030405-abcd: bash node.sh NODE HOST:PORT
set -eo pipefail # not -u: what sites have for modules and conda reads variables that are not set
module load cuda/12.8
export PATH="/opt/site bin:$PATH"
source /shared/runs/mine/launches/20260102-030405-abcd/environment
cd /shared/pretrain
trap 'kill $(jobs -p) || true; exit 75' TERM INT HUP USR1 USR2 # a stop before the training: it can be started again
/shared/venv/bin/python -m pretrain.cli doctor --cluster /shared/runs/mine/launches/20260102-030405-abcd/cluster.yaml --run /shared/runs/mine/launches/20260102-030405-abcd/run.yaml --bad-nodes /shared/runs/mine/launches/20260102-030405-abcd/bad-nodes --nodes 2 --node "$1" --rendezvous "$2" --launch 20260102-030405-abcd &
wait "$!"
trap - TERM INT HUP USR1 USR2
exec /shared/venv/bin/python -m pretrain.cli train /shared/runs/mine/launches/20260102-030405-abcd/run.yaml --nodes 2 --node "$1" --rendezvous "$2" --launch 20260102-030405-abcd --join-seconds 300

#!/usr/bin/env bash
# One node of launch 20261123-1: bash node.sh NODE HOST:PORT
set -eo pipefail # not -u: what sites have for modules and conda reads variables that are not set
module load cuda/12.8
source '/shared/runs/it'"'"'s/launches/20261123-1/environment'
cd /shared/code
exec /opt/pretrain/bin/python -m pretrain.cli train '/shared/runs/it'"'"'s/launches/20261123-1/run.yaml' --nodes 2 --node "$1" --rendezvous "$2" --launch 20261123-1 --join-seconds 300

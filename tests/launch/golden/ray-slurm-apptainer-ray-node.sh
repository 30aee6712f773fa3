#!/usr/bin/env bash
# Ray on one node of launch 20261123-abc, and on the head the build: bash ray-node.sh head|worker
set -eo pipefail # not -u: what sites have for modules and conda reads variables that are not set
module load cuda
source '/shared/runs/my run/launches/20261123-abc/environment'
cd '/shared/it'"'"'s code'
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH='/shared/runs/my run/launches/20261123-abc/ray-token' RAY_USAGE_STATS_ENABLED=0

# A name that nobody can foresee, and short: Ray puts sockets below it, whose paths have at most 107 bytes.
scratch=$(mktemp -d /scratch/r-XXXXXX)
trap exit INT TERM
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$scratch"' EXIT
trap '' USR2 # Slurm's signal to stop is for the build alone: Ray would end under it
start_ray() {
    python3 -m ray.scripts.scripts start "$@" --temp-dir="$scratch/t" --num-cpus=32 --num-gpus=0 \
        --object-store-memory=1000000000 --disable-usage-stats --block &
}

address='/shared/runs/my run/launches/20261123-abc/ray-address'
if [ "$1" = worker ]; then
    until [ -s "$address" ]; do sleep 1; done
    start_ray --address="$(cat "$address")"
    wait "$!"
    exit
fi
host=$(python3 -c 'import ray.util; print(ray.util.get_node_ip_address())')
port=$((6379 + SLURM_JOB_ID % 1000))
start_ray --head --node-ip-address="$host" --port="$port" --include-dashboard=false
until (exec 3<>"/dev/tcp/$host/$port") 2>/dev/null; do kill -0 "$!"; sleep 1; done # or it ends here
export RAY_ADDRESS="$host:$port"
echo "$RAY_ADDRESS" >"$address.new" && mv "$address.new" "$address"

# Others join while it works.
trap : USR2 # a handler, which the build does not inherit
python3 -m pretrain.cli data build '/shared/runs/my run/launches/20261123-abc/run.yaml' data.workers=64 &
build=$!
status=0
wait "$build" || status=$?
while kill -0 "$build" 2>/dev/null; do status=0; wait "$build" || status=$?; done # a signal ends `wait` too
exit "$status"

#!/usr/bin/env bash
#SBATCH --job-name=my_run
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=60
#SBATCH --partition=cpu
#SBATCH --signal=B:USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output='/shared/runs/my run/launches/20261123-abc/slurm-%j.log'
#SBATCH --export=NONE

# The data build of launch 20261123-abc, on a Ray cluster that lives as long as this job.
set -uo pipefail
folder='/shared/runs/my run/launches/20261123-abc'
rm -f "$folder/ray-token" "$folder/ray-address" # of the time before a requeue
# Whoever has the token may run what he likes here: each start has another one, and only its owner can read it.
(umask 077; od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$folder/ray-token")

# Slurm's signal before the time ends reaches this script alone; srun hands it on. A cancelled job is told everywhere.
trap '[ -z "${step:-}" ] || kill -USR2 "$step"' USR2
trap : TERM
# A node that is lost ends nothing here: what it had in hand is done by the others.
others=$((SLURM_JOB_NUM_NODES - 1))
if ((others > 0)); then
srun --nodes="$others" --ntasks="$others" --exclude="$SLURMD_NODENAME" --no-kill \
    --export=ALL --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --wait=0 --label \
    bash '/shared/runs/my run/launches/20261123-abc/ray-node.sh' worker &
fi
srun --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" \
    --export=ALL --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --wait=0 --label \
    bash '/shared/runs/my run/launches/20261123-abc/ray-node.sh' head &
step=$!
while kill -0 "$step" 2>/dev/null; do wait "$step"; done # a signal ends `wait` too
wait "$step"
status=$?
exit "$status" # and with this script, Slurm ends the workers

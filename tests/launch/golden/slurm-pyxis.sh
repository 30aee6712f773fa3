#!/usr/bin/env bash
#SBATCH --job-name=tiny
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=1440
#SBATCH --signal=B:USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/tiny/launches/20260102-030405-abcd/slurm-%j.log
#SBATCH --export=NONE

# Launch 20260102-030405-abcd: the run tiny on 2 nodes, one supervisor on each.
# It sees nothing of the shell that submits it; what nodes are told stands in the file `environment`.
set -uo pipefail
folder=/shared/runs/tiny/launches/20260102-030405-abcd
run=/shared/runs/tiny

stop_asked() { [ "$run/STOP" -nt "$folder/plan.json" ]; } # made since this launch was
if stop_asked; then
    echo "$run/STOP is there: nothing is started. To go on, launch the run again."
    exit 75
fi

# Where the supervisors meet: the first node, by the address that Slurm itself has for it, and a port that is this job's own.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node --oneliner "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
port=$((29400 + SLURM_JOB_ID % 200 * 5))

# Before the time ends, Slurm signals this script alone (--signal=B:); srun hands it on to the supervisors of all nodes, which save and end.
trap '[ -z "${step:-}" ] || kill -USR2 "$step"' USR2
# Where a job is cancelled or preempted, Slurm tells the supervisors itself. This script stays to learn how they end.
trap : TERM
rm -f "$folder/status"
touch "$folder/started"
# shellcheck disable=SC2016 # each task knows its own number
srun --export=ALL --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --wait=60 --label --container-image=site/pretrain:1 --container-mounts=/shared:/shared,/a:/b:ro \
    bash -c '
    trap : TERM USR1 USR2
    bash "$0" "$SLURM_NODEID" "$1"
    status=$?
    [ "$SLURM_NODEID" -ne 0 ] || echo "$status" >"${0%/*}/status"
    exit "$status"' /shared/runs/tiny/launches/20260102-030405-abcd/node.sh "$address:$port" &
step=$!
while kill -0 "$step" 2>/dev/null; do wait "$step"; done # a signal ends `wait` too
wait "$step"
status=$?
if [ -s "$folder/status" ]; then status=$(cat "$folder/status"); fi # the first node decides for all

# 75: stopped early, to be gone on with. Above 128: somebody killed the supervisors; it counts as an attempt if one had begun.
is_unfinished() { [ "$status" -eq 75 ] || { [ "$status" -gt 128 ] && has_begun; }; }
has_begun() { [ "$run/lease.json" -nt "$folder/started" ] || [ "$run/attempts.jsonl" -nt "$folder/started" ]; }

exclude() { # from a job that waits, what the supervisors have found to be bad
    [ -s "$folder/bad-nodes" ] || return 0
    scontrol update JobId="$1" ExcNodeList="$(cut -d. -f1 "$folder/bad-nodes" | sort -u | paste -sd,)"
}
# A job that was cancelled is not RUNNING any more, and a requeue would bring it back.
is_wanted() { ! stop_asked && [[ $(scontrol show job --oneliner "$SLURM_JOB_ID") =~ JobState=RUNNING|Reason=TimeLimit ]]; }
if is_unfinished && is_wanted; then
    trap '' TERM # the requeue ends this script, too
    scontrol requeue "$SLURM_JOB_ID"
    exclude "$SLURM_JOB_ID" # not before: Slurm refuses that of a job that runs
fi
exit "$status"

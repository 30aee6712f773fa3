#!/usr/bin/env bash
# One host of launch 20261123-1, from ssh: bash host.sh NODE HOST:PORT NODE_SCRIPT. It reads what the launcher says:
# `stop` asks the node to save and end; the end of it, or silence, ends it at once. Its exit status is the node's.
set -uo pipefail
launch=20261123-1
mark="PRETRAIN_NODE=$launch/$1"
scratch=/local
silent_seconds=20
# Processes are found by what stands in their environment: ranks and trackers have sessions of their own, and parents that are gone.
end_all() {
  local -a found
  for _ in {1..50}; do
    mapfile -t found < <(grep -slzFx "$1" /proc/[0-9]*/environ | cut -d / -f 3)
    ((${#found[@]})) || return 0
    kill -KILL "${found[@]}" 2>/dev/null
    sleep 0.2
  done
  echo "processes ${found[*]} do not end" >&2
}

end_all "$mark" # what a connection of this node that was cut off left
# What is compiled is this connection's alone: a lock that a kill left there would hold up all who come after.
builds=$(mktemp -d "$scratch/pretrain-$launch-XXXXXXXXXX") || exit 1
trap 'end_all "PRETRAIN_SESSION=$builds"; rm -rf -- "$builds"' EXIT
exec 3<&0 </dev/null
env "$mark" PRETRAIN_SESSION="$builds" TORCH_EXTENSIONS_DIR="$builds" bash "$3" "$1" "$2" 3<&- &
node=$!
{
  while read -r -t "$silent_seconds" word <&3; do
    [[ $word != stop ]] || kill -TERM "$node"
  done
  kill -KILL "$node"
} 2>/dev/null &
listener=$!
exec 3<&-
wait "$node" 2>/dev/null
status=$?
kill "$listener"
exit "$status"

#!/usr/bin/env bash
# Start the ranks of this node, pass a request to stop on to them, and end with their exit code.
#
#     examples/ranks.sh SETTINGS...        (those of rm_scale/train.py)
#
# The main process of a container, or of a node's task, where a scheduler reads the exit code:
#   0 finished · 85 saved and stopped, start me again · 2 a message for you, starting again won't help · else failed.
# torchrun in its place would end with 1 whatever happened, and kills ranks that are still saving 30 s after a SIGTERM.
#
# Read from the environment:
#   PET_NNODES, PET_NPROC_PER_NODE, PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT
#       the place of this node, by the names that torchrun reads and Kubeflow Trainer sets
#   OUTPUT_DIR, RM_SCALE_JOB
#       optional, both or none: the run's output directory, and a name that all attempts of this job share and no other
#       job has. For schedulers that never run two attempts at once: a killed attempt's lock is then taken over.
#   RM_SCALE_KILL_SECONDS
#       how long the other ranks may go on after one has failed; default 30
set -uo pipefail

home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

refuse() {
    echo "ranks.sh: $1" >&2
    exit 2
}

number() { # NAME: the whole number that this variable holds
    [[ ${!1:-} =~ ^[0-9]{1,9}$ ]] || refuse "$1='${!1:-}': must be a whole number. Fix: set it as torchrun would read it."
    echo "${!1}"
}

# Training can't tell whether the owner of a lock still runs on another machine or in another container.
take_over_lock() {
    local lock=$OUTPUT_DIR/.rm_scale_lock owner=${OUTPUT_DIR%/}.job
    if [[ -e $lock && -e $owner && $(<"$owner") == "$RM_SCALE_JOB" ]]; then
        echo "ranks.sh: an earlier attempt of this job was killed; its $lock is removed"
        rm -f "$lock"
    fi
    [[ -e $lock ]] || { mkdir -p "$(dirname "$owner")" && echo "$RM_SCALE_JOB" >"$owner"; }
}

start_rank() { # LOCAL_RANK SETTINGS...: become this rank
    trap '' TERM # until training has installed its own handler
    export LOCAL_RANK=$1 RANK=$((node * per_node + $1)) WORLD_SIZE=$((nodes * per_node)) LOCAL_WORLD_SIZE=$per_node
    export GROUP_RANK=$node MASTER_ADDR=$PET_MASTER_ADDR MASTER_PORT=$PET_MASTER_PORT
    exec python -u "$home/rm_scale/train.py" "${@:2}"
}

# Ask the ranks that run, again every 5 seconds until all have ended; and end them when one has failed long ago.
pass_on() {
    local running
    mapfile -t running <<<"$(jobs -pr)"
    [[ -n ${running[0]} ]] || return 0
    if [[ -n $asked ]] && ((SECONDS >= ask_at)); then
        kill -USR1 "${running[@]}" 2>/dev/null
        ask_at=$((SECONDS + 5))
    fi
    if ((failed)) && ((SECONDS >= kill_at)); then
        kill -KILL "${running[@]}" 2>/dev/null
    fi
}

# Note the codes of the ranks that have ended: `failed` is the first that is neither 0 nor 85.
collect() {
    local local_rank code running
    running=" $(jobs -pr | tr '\n' ' ')"
    for local_rank in "${!pids[@]}"; do
        [[ $running == *" ${pids[local_rank]} "* ]] && continue
        wait "${pids[local_rank]}"
        code=$?
        unset "pids[$local_rank]"
        if ((code == 85)); then
            stopped=85
        elif ((code && !failed)); then
            failed=$code kill_at=$((SECONDS + ${RM_SCALE_KILL_SECONDS:-30}))
            echo "ranks.sh: rank $((node * per_node + local_rank)) ended with code $code" >&2
        fi
    done
}

nodes=$(number PET_NNODES) && per_node=$(number PET_NPROC_PER_NODE) && node=$(number PET_NODE_RANK) || exit 2
[[ -n ${PET_MASTER_ADDR:-} && -n ${PET_MASTER_PORT:-} ]] || refuse "PET_MASTER_ADDR, PET_MASTER_PORT: must name the first node. Fix: set both."
if ((node == 0)) && [[ -n ${OUTPUT_DIR:-} && -n ${RM_SCALE_JOB:-} ]]; then
    take_over_lock
fi

asked="" ask_at=0 failed=0 kill_at=0 stopped=0 pids=()
trap 'asked=yes' TERM
trap '' USR1 # ignored by the ranks too, until training has installed its own handler
for ((place = 0; place < per_node; place++)); do
    start_rank "$place" "$@" &
    pids[place]=$!
done
while ((${#pids[@]})); do
    pass_on
    sleep 0.5
    collect
done
exit $((failed ? failed : stopped))

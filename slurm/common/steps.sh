# shellcheck shell=bash
# Python on this node and on all nodes: the check, and the training.

# Sets RM_SCALE_COMMAND: srun with one task on each node. Each comment says what the default would get wrong.
rm_scale_on_all_nodes() { # SRUN_OPTION PYTHON_ARGUMENTS...
    RM_SCALE_COMMAND=(srun)
    # One task a node, whatever sbatch was told.
    RM_SCALE_COMMAND+=("--nodes=$SLURM_JOB_NUM_NODES" "--ntasks=$SLURM_JOB_NUM_NODES" --ntasks-per-node=1)
    # Ranks meet by torch's own means; a site's default such as pmix would look for libraries that a container lacks.
    RM_SCALE_COMMAND+=(--mpi=none)
    RM_SCALE_COMMAND+=(--cpu-bind=none) # a node's ranks share all cores that the job has there
    RM_SCALE_COMMAND+=(--export=ALL)    # also where the site exports nothing by default
    RM_SCALE_COMMAND+=("${RM_SCALE_SRUN[@]}" "$1")
    shift
    # Requests to stop would end the shells and containers between srun and our process: ignored here, they are ignored
    # in all that those start, until a process asks for them.
    # shellcheck disable=SC2016 # expands in the task
    RM_SCALE_COMMAND+=(bash -c 'trap "" USR1 $(seq 40 59); exec "$@"' rm_scale "${RM_SCALE_PYTHON[@]}" "$@")
}

# Python on this node, where the job's software is.
rm_scale_here() {
    if [[ ${#RM_SCALE_SRUN[@]} -gt 0 ]]; then
        srun --nodes=1 --ntasks=1 --nodelist="${SLURMD_NODENAME:-$(hostname -s)}" --export=ALL --mpi=none \
            "${RM_SCALE_SRUN[@]}" "${RM_SCALE_PYTHON[@]}" "$@"
    else
        "${RM_SCALE_PYTHON[@]}" "$@"
    fi
}

# Settings, plan and port of this attempt, and the check of its nodes. Ends the script when anything is wrong.
rm_scale_prepare() { # SETTINGS...
    local code=0 began=$SECONDS
    rm_scale_write_start "$@" || code=$?
    # A disk may be full or away when a later attempt begins. What is refused would be refused again.
    while ((code != 0 && code != RM_SCALE_NOTHING_TO_START && code != RM_SCALE_REFUSED)) && [[ -z $RM_SCALE_STOP ]] &&
        rm_scale_wait_to_retry "$began" "the attempt could not be prepared (code $code)"; do
        code=0
        rm_scale_write_start "$@" || code=$?
    done
    case $code in
        0) ;;
        "$RM_SCALE_NOTHING_TO_START") rm_scale_exit 0 ;;
        "$RM_SCALE_REFUSED") rm_scale_exit "$code" ;;
        "$RM_SCALE_TRY_AGAIN") rm_scale_not_started "$RM_SCALE_REFUSED" ;;
        *) rm_scale_not_started "$code" ;;
    esac
    rm_scale_check || code=$?
    if ((code == RM_SCALE_PORT_TAKEN && RM_SCALE_PORTS_TRIED < 4)); then
        RM_SCALE_PORTS_TRIED=$((RM_SCALE_PORTS_TRIED + 1))
        rm_scale_prepare "$@"
        return
    fi
    if ((code != 0)); then
        rm_scale_say "the check of the nodes failed (code $code): nothing was started. Fix: as the lines above say; sinfo -R" \
            "names nodes that are down" >&2
        rm_scale_not_started "$RM_SCALE_REFUSED"
    fi
}

# Runs rm_scale.slurm.prepare, with Slurm's answer where it can't ask for that itself; returns its exit code.
rm_scale_write_start() { # SETTINGS...
    local code=0
    rm_scale_here -m rm_scale.slurm.prepare "$RM_SCALE_ATTEMPT_DIR" "$@" || code=$?
    while ((code == RM_SCALE_ASK_SLURM)); do # once, unless another job has left its lock there since
        rm_scale_ask_slurm
        code=0
        rm_scale_here -m rm_scale.slurm.prepare "$RM_SCALE_ATTEMPT_DIR" "$@" || code=$?
    done
    return "$code"
}

# Answers what a container can't ask: does the job that has left its lock in the output directory still run? The answer
# is for the attempt that has left it: when the job is requeued, a later one may begin.
rm_scale_ask_slurm() {
    local asked job seen
    asked=$(<"$RM_SCALE_ATTEMPT_DIR/asked_job") # JOB ATTEMPT
    job=${asked%% *}
    export RM_SCALE_JOB_ASKED=$asked RM_SCALE_JOB_ENDED=''
    if seen=$(timeout 60 squeue --noheader --jobs "$job" --states RUNNING,COMPLETING,SUSPENDED --format %A 2>&1); then
        grep -qx -- "$job" <<<"$seen" || RM_SCALE_JOB_ENDED=1
    elif [[ $seen == *"Invalid job id"* ]]; then
        RM_SCALE_JOB_ENDED=1 # Slurm has forgotten jobs that ended long ago
    fi
}

# Do all nodes answer, see the disk, and reach the first one? An srun that can't start its tasks would wait for ever.
rm_scale_check() {
    local code=0
    rm_scale_on_all_nodes --wait=0 -m rm_scale.slurm.node --check "$RM_SCALE_ATTEMPT_DIR/start.json"
    timeout --foreground "$((RM_SCALE_CHECK_SECONDS + 30))" "${RM_SCALE_COMMAND[@]}" || code=$?
    ((code != 124)) || rm_scale_say "srun could not start a task on every node in $((RM_SCALE_CHECK_SECONDS + 30)) s." \
        "Fix: sinfo -R names nodes that are down; RM_SCALE_CHECK_SECONDS=180 gives slow ones time" >&2
    return "$code"
}

# Passes lines on to the job's log. A full disk costs lines, and neither the job nor the lines after them.
rm_scale_copy() {
    local line lost=0 missing='rm_scale: %s lines are missing here: they could not be written\n'
    trap '' USR1 TERM # it ends when srun does
    while IFS= read -r line || [[ -n $line ]]; do
        # shellcheck disable=SC2059 # the format is the text above
        if ((lost > 0)) && printf "$missing" "$lost" 2>/dev/null; then lost=0; fi
        printf '%s\n' "$line" 2>/dev/null || lost=$((lost + 1))
    done
}

# Sets RM_SCALE_CODE, the exit code of srun.
rm_scale_train() {
    rm_scale_on_all_nodes --kill-on-bad-exit=1 -m rm_scale.slurm.node "$RM_SCALE_ATTEMPT_DIR/start.json"
    # Not straight into the job's log: at the first full disk srun gives a file up for good.
    local log copier
    exec {log}> >(rm_scale_copy)
    copier=$!
    "${RM_SCALE_COMMAND[@]}" >&"$log" 2>&1 &
    RM_SCALE_SRUN_PID=$!
    exec {log}>&-
    [[ -z $RM_SCALE_STOP ]] || rm_scale_tell_ranks # the signal came a moment before
    # bash's wait returns whenever a signal comes; the training has ended when srun is gone.
    while kill -0 "$RM_SCALE_SRUN_PID" 2>/dev/null; do wait "$RM_SCALE_SRUN_PID" || :; done
    # shellcheck disable=SC2034 # slurm/common.sh reads it
    wait "$RM_SCALE_SRUN_PID" && RM_SCALE_CODE=0 || RM_SCALE_CODE=$?
    RM_SCALE_SRUN_PID=
    wait "$copier" || :
    if [[ -n $RM_SCALE_REPEATER ]]; then
        kill "$RM_SCALE_REPEATER" 2>/dev/null || :
        wait "$RM_SCALE_REPEATER" 2>/dev/null || : # else bash reports its end in the log
    fi
}

# shellcheck shell=bash
# What libraries read from the environment, on every node.

# What libraries read from the environment, on every node. A value that is already set stays.
rm_scale_environment() {
    export PYTHONUNBUFFERED=1 # lines reach the log when they are printed
    [[ -z $RM_SCALE_HF_HOME ]] || export HF_HOME="$RM_SCALE_HF_HOME"
    [[ -z $RM_SCALE_SCRATCH ]] || export TMPDIR="$RM_SCALE_SCRATCH"
    # Say what is wrong, and with which peer, but not every connection.
    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
    # The interface over which NCCL's and gloo's processes find each other (data goes over InfiniBand where there is
    # any). Without it each node chooses by itself, and nodes with docker0 or several networks choose differently: a
    # hang at start.
    if [[ -n $RM_SCALE_INTERFACE ]]; then
        export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-=$RM_SCALE_INTERFACE}" # "=": this very name, not its beginning
        export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$RM_SCALE_INTERFACE}"
    fi
    # Which adapters carry the data; NCCL's own choice is right unless some of them belong to storage.
    [[ -z $RM_SCALE_NCCL_HCA ]] || export NCCL_IB_HCA="${NCCL_IB_HCA:-$RM_SCALE_NCCL_HCA}"
    # A rank whose collective failed or timed out ends (ddp_timeout, 30 minutes) instead of waiting for ever.
    export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
    # Each rank remembers its last 2000 collectives and writes them down on a timeout: which rank lacked in which.
    export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
    export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
    # Memory of one kind of allocation grows in place, so that rows of changing length leave no holes.
    export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
    # An attempt's own files: what a job that was submitted from within another has inherited names the other's.
    case ${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-} in
        '' | */attempt-*/nccl_trace_) export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=$RM_SCALE_ATTEMPT_DIR/nccl_trace_ ;;
    esac
    unset RM_SCALE_JOB_ASKED RM_SCALE_JOB_ENDED
    # Rank 0 makes this file when training has begun: see rm_scale_idle_attempts.
    export RM_SCALE_BEGUN_FILE=$RM_SCALE_ATTEMPT_DIR/begun
    # Unix seconds at which this attempt began and at which Slurm ends it: training saves before that even when no signal
    # comes. An administrator may move the end; rm_scale_watch_limit writes it anew into the file.
    RM_SCALE_START_TIME=$(date +%s)
    export RM_SCALE_START_TIME RM_SCALE_END_TIME_FILE=$RM_SCALE_ATTEMPT_DIR/end_time
    RM_SCALE_END_TIME=$(rm_scale_ask_end)
    if [[ -z $RM_SCALE_END_TIME && ${SLURM_JOB_END_TIME:-} =~ ^[0-9]+$ ]]; then RM_SCALE_END_TIME=$SLURM_JOB_END_TIME; fi
    if [[ -n $RM_SCALE_END_TIME ]]; then export RM_SCALE_END_TIME; else unset RM_SCALE_END_TIME; fi
    rm_scale_nodes
}

# The job's nodes, and the address that Slurm has of the first: inside a container there is nothing to ask for them.
rm_scale_nodes() {
    local first
    RM_SCALE_NODES=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" 2>/dev/null | paste -sd' ' || :)
    first=${RM_SCALE_NODES%% *}
    RM_SCALE_NODE_ADDRESS=$(scontrol show node "$first" 2>/dev/null | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p' || :)
    export RM_SCALE_NODES RM_SCALE_NODE_ADDRESS
}

# Prints the end that Slurm has of the job now, in Unix seconds; nothing where there is none, or Slurm does not answer.
rm_scale_ask_end() {
    local text
    text=$(SLURM_TIME_FORMAT=standard timeout 30 squeue --noheader --jobs "$RM_SCALE_JOB" --format %e 2>/dev/null || :)
    if [[ $text =~ ^[0-9]{4}- ]]; then date -d "$text" +%s 2>/dev/null || :; fi
}

# Prints the end as it is known now; nothing where nobody has told it.
rm_scale_known_end() {
    local text=''
    if [[ -f ${RM_SCALE_END_TIME_FILE:-} ]]; then text=$(cat -- "$RM_SCALE_END_TIME_FILE" 2>/dev/null || :); fi
    if [[ $text =~ ^[0-9]+$ ]]; then echo "$text"; else echo "${RM_SCALE_END_TIME:-}"; fi
}

# Keeps the end time that training reads up to date, until this script ends. Where Slurm does not answer, what it said
# before stays: SLURM_JOB_END_TIME is that of the limit which the job was started with.
rm_scale_watch_limit() {
    local known=${RM_SCALE_END_TIME:-} seen file=$RM_SCALE_END_TIME_FILE
    (
        trap '' USR1
        while rm_scale_nap "$RM_SCALE_LIMIT_SECONDS"; do
            seen=$(rm_scale_ask_end)
            if [[ -z $seen || $seen == "$known" ]]; then continue; fi
            # A full disk: written at the next look.
            { echo "$seen" >"$file.new" && mv -- "$file.new" "$file"; } || continue
            if [[ -n $known ]]; then
                rm_scale_say "the time limit was moved: the job ends at $(date -d "@$seen" '+%F %T')"
            else
                rm_scale_say "the time limit is known now: the job ends at $(date -d "@$seen" '+%F %T')"
            fi
            known=$seen
        done
    ) 2>/dev/null &
    RM_SCALE_HELPERS+=" $!"
}

# Sleeps in a process of the background, which rm_scale_end_helpers ends together with its sleep.
rm_scale_nap() { # SECONDS
    sleep "$1" >/dev/null 2>&1 &
    # shellcheck disable=SC2064 # the number of this very sleep
    trap "kill $! 2>/dev/null; exit 143" TERM
    wait "$!" && trap - TERM
}

# Ends what this script has left running beside it: under slurm/bench.sh the job goes on after it.
rm_scale_end_helpers() {
    local -a helpers
    read -ra helpers <<<"$RM_SCALE_HELPERS"
    [[ ${#helpers[@]} -eq 0 ]] || kill "${helpers[@]}" 2>/dev/null || :
}

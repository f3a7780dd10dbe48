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
    export TORCH_NCCL_DEBUG_INFO_TEMP_FILE="${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-$RM_SCALE_ATTEMPT_DIR/nccl_trace_}"
    # Memory of one kind of allocation grows in place, so that rows of changing length leave no holes.
    export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
    # Unix seconds at which this attempt began and at which Slurm ends it: training saves before that even when no signal
    # comes. An administrator may move the end; rm_scale_watch_limit writes it anew.
    export RM_SCALE_START_TIME=${RM_SCALE_START_TIME:-$(date +%s)}
    RM_SCALE_END_TIME=$(rm_scale_end_time)
    if [[ -n $RM_SCALE_END_TIME ]]; then
        export RM_SCALE_END_TIME RM_SCALE_END_TIME_FILE=$RM_SCALE_ATTEMPT_DIR/end_time
    else
        unset RM_SCALE_END_TIME
    fi
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

rm_scale_end_time() {
    local text
    text=$(timeout 30 squeue --noheader --jobs "$RM_SCALE_JOB" --format %e 2>/dev/null || :)
    if [[ $text =~ ^[0-9]{4}- ]]; then
        date -d "$text" +%s 2>/dev/null || :
    elif [[ ${SLURM_JOB_END_TIME:-} =~ ^[0-9]+$ ]]; then
        echo "$SLURM_JOB_END_TIME"
    fi
}

# Keeps the end time that training reads up to date, until this script ends.
rm_scale_watch_limit() {
    local known=${RM_SCALE_END_TIME:-} seen
    [[ -n $known ]] || return 0
    while sleep "$RM_SCALE_LIMIT_SECONDS"; do
        seen=$(rm_scale_end_time)
        if [[ -n $seen && $seen != "$known" ]]; then
            known=$seen
            echo "$seen" >"$RM_SCALE_END_TIME_FILE.new" && mv -- "$RM_SCALE_END_TIME_FILE.new" "$RM_SCALE_END_TIME_FILE" &&
                rm_scale_say "the time limit was moved: the job ends at $(date -d "@$seen" '+%F %T')"
        fi
    done 2>/dev/null &
}

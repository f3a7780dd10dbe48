# shellcheck shell=bash
# What the job scripts share: sourced by slurm/rm_1b.sh and the others, inside a job, on its first node.
#
#   rm_scale_main HOME SETTINGS...    check the allocation, start one task per node, wait, exit or requeue
#   rm_scale_bench HOME OPTIONS...    benchmarks/throughput.py on this node, which starts a rm_scale_main for each case
#
# One attempt of a job: this script starts -> rm_scale.slurm.prepare (settings, plan, port) -> a check that all nodes
# answer -> one rm_scale.slurm.node per node, which starts the ranks -> rm_scale.slurm.requeue, which decides: exit with
# a code, or `scontrol requeue` and another attempt. The run's settings are not expanded by a shell: "$@" goes to prepare,
# which writes them into start.json, and nodes read them there.

RM_SCALE_REQUEUE=85 # exit code of ranks that have saved and stopped
RM_SCALE_NOTHING_TO_START=64 # exit code of rm_scale.slurm.prepare after --dry_run

rm_scale_say() { printf 'rm_scale: %s\n' "$*"; }
rm_scale_fail() {
    printf 'rm_scale: %s\n' "$*" >&2
    exit 2
}

# --- Site ------------------------------------------------------------------------------------------------------------

rm_scale_load_site() {
    local file
    for file in "${RM_SCALE_SITE_ENV:-}" "$RM_SCALE_HOME/slurm/site.local.env" "$RM_SCALE_HOME/slurm/site.env"; do
        if [[ -f $file ]]; then
            # shellcheck source=slurm/site.env
            source "$file"
        fi
    done
    export RM_SCALE_DEVICE RM_SCALE_RANKS_PER_NODE RM_SCALE_GPU RM_SCALE_INTERFACE RM_SCALE_RESUME
    export RM_SCALE_CHECK_SECONDS RM_SCALE_KILL_SECONDS RM_SCALE_SWEEP="${RM_SCALE_SWEEP:-}"
    [[ $RM_SCALE_MAX_RESTARTS =~ ^[0-9]+$ ]] ||
        rm_scale_fail "RM_SCALE_MAX_RESTARTS=$RM_SCALE_MAX_RESTARTS: must be a whole number. Fix: correct site.env."
}

rm_scale_modules() {
    local -a modules
    read -ra modules <<<"$RM_SCALE_MODULES"
    if [[ ${#modules[@]} -gt 0 ]]; then
        command -v module >/dev/null ||
            rm_scale_fail "RM_SCALE_MODULES=$RM_SCALE_MODULES: there is no 'module' command here. Fix: leave it empty."
        module load "${modules[@]}"
    fi
    if [[ -n $RM_SCALE_SETUP ]]; then
        [[ -f $RM_SCALE_SETUP ]] || rm_scale_fail "RM_SCALE_SETUP=$RM_SCALE_SETUP: no such file. Fix: check the path."
        # shellcheck source=/dev/null
        source "$RM_SCALE_SETUP"
    fi
}

# Sets RM_SCALE_PYTHON, the command that starts Python on a node, and RM_SCALE_SRUN, further options of srun.
rm_scale_python() {
    RM_SCALE_SRUN=()
    if [[ -f $RM_SCALE_HOME/rm_scale/__init__.py ]]; then
        # A checkout: its own package, whatever is installed.
        export PYTHONPATH="$RM_SCALE_HOME${PYTHONPATH:+:$PYTHONPATH}"
    fi
    if [[ -n $RM_SCALE_CONTAINER ]]; then
        rm_scale_container
    elif [[ -n $RM_SCALE_VENV ]]; then
        [[ -x $RM_SCALE_VENV/bin/python ]] ||
            rm_scale_fail "RM_SCALE_VENV=$RM_SCALE_VENV: has no bin/python. Fix: make venv, or correct slurm/site.env."
        RM_SCALE_PYTHON=("$RM_SCALE_VENV/bin/python")
        export PATH="$RM_SCALE_VENV/bin:$PATH" # DeepSpeed looks for ninja there
    elif [[ -x $RM_SCALE_HOME/.venv/bin/python ]]; then
        RM_SCALE_PYTHON=("$RM_SCALE_HOME/.venv/bin/python")
        export PATH="$RM_SCALE_HOME/.venv/bin:$PATH"
    elif [[ -x $RM_SCALE_HOME/../../../../../bin/python ]]; then
        # Installed: this is PREFIX/lib/pythonX/site-packages/rm_scale/shipped.
        RM_SCALE_PYTHON=("$RM_SCALE_HOME/../../../../../bin/python")
    else
        RM_SCALE_PYTHON=(python3)
    fi
}

rm_scale_container() {
    local -a mounts
    local mount
    read -ra mounts <<<"$RM_SCALE_CONTAINER_MOUNTS"
    mounts+=("$RM_SCALE_HOME" "$PWD" "$RM_SCALE_LOGS")
    case $RM_SCALE_CONTAINER_ENGINE in
        apptainer)
            RM_SCALE_PYTHON=(apptainer exec --nv)
            for mount in "${mounts[@]}"; do RM_SCALE_PYTHON+=(--bind "$mount"); done
            RM_SCALE_PYTHON+=("$RM_SCALE_CONTAINER" python3)
            ;;
        pyxis)
            mount=$(printf '%s\n' "${mounts[@]}" | sed 's/^[^:]*$/&:&/' | paste -sd,)
            RM_SCALE_SRUN=("--container-image=$RM_SCALE_CONTAINER" "--container-mounts=$mount")
            RM_SCALE_SRUN+=("--container-workdir=$PWD")
            RM_SCALE_PYTHON=(python3)
            ;;
        *)
            rm_scale_fail "RM_SCALE_CONTAINER_ENGINE=$RM_SCALE_CONTAINER_ENGINE: must be apptainer or pyxis. Fix:" \
                "correct slurm/site.env."
            ;;
    esac
}

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
    # Unix seconds at which Slurm ends the job: training saves before it even when no signal comes.
    RM_SCALE_END_TIME=$(rm_scale_end_time)
    if [[ -n $RM_SCALE_END_TIME ]]; then export RM_SCALE_END_TIME; else unset RM_SCALE_END_TIME; fi
}

rm_scale_end_time() {
    local text
    if [[ ${SLURM_JOB_END_TIME:-} =~ ^[0-9]+$ ]]; then
        echo "$SLURM_JOB_END_TIME"
        return
    fi
    text=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %e 2>/dev/null || :)
    if [[ $text =~ ^[0-9]{4}- ]]; then date -d "$text" +%s 2>/dev/null || :; fi
}

# --- Records ---------------------------------------------------------------------------------------------------------

# One line of JSON per event; no value needs escaping. `rm-scale slurm status` reads them.
rm_scale_note() { # EVENT [KEY VALUE]
    local line='{"event": "%s", "time": %s, "attempt": %s, "%s": "%s"}\n'
    # shellcheck disable=SC2059 # the format is the line above
    printf "$line" "$1" "$(date +%s.%3N)" "$RM_SCALE_ATTEMPT" "${2:-script}" "${3:-$RM_SCALE_TIER}" \
        >>"$RM_SCALE_JOB_DIR/events.jsonl" || : # a full disk must not end a job
}

# --- Signals ---------------------------------------------------------------------------------------------------------

# The trap of USR1, which Slurm sends as --signal=B:USR1@GRACE asks, and of TERM; bash runs it between commands.
rm_scale_stop() {
    [[ -z $RM_SCALE_STOP ]] || return 0
    RM_SCALE_STOP=$1
    rm_scale_say "$1 received at $(date '+%F %T'): the run saves and stops"
    rm_scale_note signal signal "$1"
    rm_scale_tell_ranks
}

# Through Slurm, to the tasks of every node. (kill -TERM on srun would kill the tasks; kill -USR1 on an srun that has
# not started them yet would kill srun.) Repeated, since a step that is just starting is not there to hear it.
rm_scale_tell_ranks() {
    [[ -n $RM_SCALE_SRUN_PID && -z $RM_SCALE_REPEATER ]] || return 0
    while kill -0 "$RM_SCALE_SRUN_PID" 2>/dev/null; do
        scancel --signal=USR1 "$SLURM_JOB_ID" 2>/dev/null || :
        sleep 10
    done &
    RM_SCALE_REPEATER=$!
}

# --- Running ---------------------------------------------------------------------------------------------------------

# Sets RM_SCALE_COMMAND: srun with one task on each node. Each comment says what the default would get wrong.
rm_scale_on_all_nodes() { # SRUN_OPTION PYTHON_ARGUMENTS...
    RM_SCALE_COMMAND=(srun)
    # One task a node, whatever sbatch was told.
    RM_SCALE_COMMAND+=("--nodes=$SLURM_JOB_NUM_NODES" "--ntasks=$SLURM_JOB_NUM_NODES" --ntasks-per-node=1)
    RM_SCALE_COMMAND+=(--cpu-bind=none) # a node's ranks share all cores that the job has there
    RM_SCALE_COMMAND+=(--export=ALL)    # also where the site exports nothing by default
    RM_SCALE_COMMAND+=("${RM_SCALE_SRUN[@]}" "$1")
    shift
    # USR1 would end the shells and containers between srun and our process: ignored here, it is ignored in all that
    # they start, until a process asks for it.
    # shellcheck disable=SC2016 # expands in the task
    RM_SCALE_COMMAND+=(bash -c 'trap "" USR1; exec "$@"' rm_scale "${RM_SCALE_PYTHON[@]}" "$@")
}

# Python on this node, where the job's software is.
rm_scale_here() {
    if [[ ${#RM_SCALE_SRUN[@]} -gt 0 ]]; then
        srun --nodes=1 --ntasks=1 --nodelist="${SLURMD_NODENAME:-$(hostname -s)}" --export=ALL \
            "${RM_SCALE_SRUN[@]}" "${RM_SCALE_PYTHON[@]}" "$@"
    else
        "${RM_SCALE_PYTHON[@]}" "$@"
    fi
}

# Do all nodes answer, see the disk, and reach the first one? An srun that can't start its tasks would wait for ever.
rm_scale_check() {
    local code=0
    rm_scale_on_all_nodes --wait=0 -m rm_scale.slurm.node --check "$RM_SCALE_ATTEMPT_DIR/start.json"
    timeout --foreground "$((RM_SCALE_CHECK_SECONDS + 30))" "${RM_SCALE_COMMAND[@]}" || code=$?
    ((code != 124)) || rm_scale_say "srun could not start a task on every node in $((RM_SCALE_CHECK_SECONDS + 30)) s"
    return "$code"
}

# Sets RM_SCALE_CODE, the exit code of srun.
rm_scale_train() {
    rm_scale_on_all_nodes --kill-on-bad-exit=1 -m rm_scale.slurm.node "$RM_SCALE_ATTEMPT_DIR/start.json"
    "${RM_SCALE_COMMAND[@]}" &
    RM_SCALE_SRUN_PID=$!
    [[ -z $RM_SCALE_STOP ]] || rm_scale_tell_ranks # the signal came a moment before
    # bash's wait returns whenever a signal comes; the training has ended when srun is gone.
    while kill -0 "$RM_SCALE_SRUN_PID" 2>/dev/null; do wait "$RM_SCALE_SRUN_PID" || :; done
    wait "$RM_SCALE_SRUN_PID" && RM_SCALE_CODE=0 || RM_SCALE_CODE=$?
    RM_SCALE_SRUN_PID=
    if [[ -n $RM_SCALE_REPEATER ]]; then
        kill "$RM_SCALE_REPEATER" 2>/dev/null || :
        wait "$RM_SCALE_REPEATER" 2>/dev/null || : # else bash reports its end in the log
    fi
}

# --- The end ---------------------------------------------------------------------------------------------------------

# Ends the script as rm_scale.slurm.requeue decides: with an exit code, or by handing the job back to Slurm.
rm_scale_end() { # SRUN_CODE, or none when no rank was started
    local state answer action code
    state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T 2>/dev/null || :)
    answer=$(
        trap '' USR1 TERM # at the time limit Slurm signals every process, and this one must finish
        rm_scale_here -m rm_scale.slurm.requeue "$RM_SCALE_ATTEMPT_DIR" --srun_code "$1" --state "$state" \
            --restarts "$RM_SCALE_ATTEMPT" --max_restarts "$RM_SCALE_MAX_RESTARTS" \
            --end_time "${RM_SCALE_END_TIME:-}" | tail -n 1
    ) || :
    read -r action code <<<"$answer"
    if [[ ! "$action $code" =~ ^(exit|requeue)\ [0-9]+$ ]]; then
        # A job that has saved must come back also where Python can't be started any more.
        rm_scale_say "rm_scale.slurm.requeue did not answer: srun's exit code decides" >&2
        code=$1 action=requeue
        [[ $code != none ]] || code=$RM_SCALE_REQUEUE
        if ((code != RM_SCALE_REQUEUE || RM_SCALE_ATTEMPT >= RM_SCALE_MAX_RESTARTS)); then rm_scale_exit "$code"; fi
    fi
    if [[ $action == requeue ]]; then
        if scontrol requeue "$SLURM_JOB_ID"; then
            rm_scale_say "saved, stopped and requeued; attempt $((RM_SCALE_ATTEMPT + 1)) goes on from the checkpoint"
            sleep 120 # Slurm ends this script; a normal end would make the job COMPLETED
        fi
        rm_scale_say "scontrol requeue failed. The checkpoint is whole: submit the same command again to go on"
    fi
    exit "$code"
}

rm_scale_exit() { # CODE
    rm_scale_note end code "$1"
    exit "$1"
}

rm_scale_main() {
    set -euo pipefail
    RM_SCALE_HOME=$(cd -- "$1" && pwd)
    shift
    RM_SCALE_ATTEMPT=${SLURM_RESTART_COUNT:-0}
    RM_SCALE_STOP='' RM_SCALE_SRUN_PID='' RM_SCALE_REPEATER=''
    export RM_SCALE_HOME RM_SCALE_TIER RM_SCALE_CONFIG
    rm_scale_load_site
    RM_SCALE_LOGS=$(mkdir -p -- "$RM_SCALE_LOGS" && cd -- "$RM_SCALE_LOGS" && pwd) ||
        rm_scale_fail "RM_SCALE_LOGS: can't be made below $PWD. Fix: a folder on the shared disk, in slurm/site.env."
    RM_SCALE_JOB_DIR=$RM_SCALE_LOGS/$SLURM_JOB_ID
    RM_SCALE_ATTEMPT_DIR=$RM_SCALE_JOB_DIR/attempt-$RM_SCALE_ATTEMPT
    mkdir -p -- "$RM_SCALE_ATTEMPT_DIR"
    rm_scale_note attempt
    trap 'rm_scale_stop USR1' USR1
    trap 'rm_scale_stop TERM' TERM
    rm_scale_modules
    rm_scale_python
    rm_scale_environment

    local code=0
    rm_scale_here -m rm_scale.slurm.prepare "$RM_SCALE_ATTEMPT_DIR" "$@" || code=$?
    if ((code == RM_SCALE_NOTHING_TO_START)); then rm_scale_exit 0; fi
    if ((code != 0)); then rm_scale_exit "$code"; fi
    rm_scale_check || code=$?
    if ((code != 0)); then
        rm_scale_say "the check of the nodes failed (code $code): nothing was started" >&2
        rm_scale_exit 2
    fi
    rm_scale_note start
    if [[ -n $RM_SCALE_STOP ]]; then rm_scale_end none; fi # the signal came before there was anything to save
    rm_scale_train
    rm_scale_end "$RM_SCALE_CODE"
}

rm_scale_bench() {
    set -euo pipefail
    RM_SCALE_HOME=$(cd -- "$1" && pwd)
    shift
    export RM_SCALE_HOME
    rm_scale_load_site
    [[ -z $RM_SCALE_CONTAINER ]] ||
        rm_scale_fail "RM_SCALE_CONTAINER is set, and srun can't be called inside one. Fix: a venv for benchmarks."
    [[ -f $RM_SCALE_HOME/benchmarks/throughput.py ]] ||
        rm_scale_fail "$RM_SCALE_HOME/benchmarks is not there. Fix: submit from a checkout of the repository."
    rm_scale_modules
    rm_scale_python
    exec "${RM_SCALE_PYTHON[@]}" "$RM_SCALE_HOME/benchmarks/throughput.py" --launcher slurm "$@"
}

# shellcheck shell=bash
# Where the job's Python is: modules, virtual environment, packed environment or container; and compilers' caches.

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
    rm_scale_caches
    if [[ -f $RM_SCALE_HOME/rm_scale/__init__.py ]] && ! rm_scale_packed_is_this; then
        # A checkout: its own package, whatever is installed.
        export PYTHONPATH="$RM_SCALE_HOME${PYTHONPATH:+:$PYTHONPATH}"
    fi
    if [[ -n $RM_SCALE_PACKED_ENV ]]; then
        rm_scale_packed
    elif [[ -n $RM_SCALE_CONTAINER ]]; then
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

# Sets RM_SCALE_LOCAL, a folder on the disk of each node. Its name must be the same on all: the first node tells it to
# the others.
rm_scale_local_disk() {
    RM_SCALE_LOCAL=${RM_SCALE_SCRATCH:-${TMPDIR:-/tmp}}
    RM_SCALE_LOCAL=${RM_SCALE_LOCAL%/}/rm_scale-$UID
}

# A packed environment: each node has its own copy, made by the first process that needs it.
rm_scale_packed() {
    [[ -z $RM_SCALE_CONTAINER ]] ||
        rm_scale_fail "RM_SCALE_PACKED_ENV and RM_SCALE_CONTAINER are both set, and an image is one file already. Fix:" \
            "leave one of them empty."
    [[ -f $RM_SCALE_PACKED_ENV ]] ||
        rm_scale_fail "RM_SCALE_PACKED_ENV=$RM_SCALE_PACKED_ENV: no such file. Fix: rm-scale slurm pack --output FILE.tar."
    RM_SCALE_PACKED_ENV=$(realpath -- "$RM_SCALE_PACKED_ENV")
    export RM_SCALE_PACKED_DAYS
    RM_SCALE_PYTHON=(bash "$RM_SCALE_HOME/slurm/common/packed_python.sh" "$RM_SCALE_PACKED_ENV" "$RM_SCALE_LOCAL")
}

# Is the packed rm_scale that of the checkout? Else the checkout's is used, over the shared disk: nobody's change is
# without effect.
rm_scale_packed_is_this() {
    local packed
    [[ -n $RM_SCALE_PACKED_ENV ]] || return 1
    packed=$(tar -xOf "$RM_SCALE_PACKED_ENV" --occurrence=1 rm_scale_packed.txt 2>/dev/null | sed -n 's/^sources=//p') || :
    if [[ $packed != "$(rm_scale_sources)" ]]; then
        rm_scale_say "$RM_SCALE_PACKED_ENV holds another rm_scale than $RM_SCALE_HOME, whose own is used, over the shared" \
            "disk. rm-scale slurm pack would pack it anew" >&2
        return 1
    fi
}

# The digest of a checkout's package, as `digest_of_sources` in rm_scale/slurm/packed_environment.py computes it.
rm_scale_sources() {
    (cd -- "$RM_SCALE_HOME/rm_scale" && find . -type f ! -name '*.pyc' ! -path './shipped/*' -print0 |
        LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1)
}

# Has every node unpack the packed environment, all at once and with time for it, before anything is timed.
rm_scale_unpack() {
    local code=0
    [[ -n $RM_SCALE_PACKED_ENV ]] || return 0
    rm_scale_on_all_nodes --wait=0 -V
    timeout --foreground "$RM_SCALE_UNPACK_SECONDS" "${RM_SCALE_COMMAND[@]}" >/dev/null || code=$?
    ((code != 124)) || rm_scale_say "RM_SCALE_UNPACK_SECONDS=$RM_SCALE_UNPACK_SECONDS: not every node could unpack" \
        "$RM_SCALE_PACKED_ENV in this time. Fix: more of it; --output FILE.tar.zst is smaller" >&2
    ((code == 0)) || rm_scale_not_started "$RM_SCALE_REFUSED"
}

# Compilers' caches on each node's own disk: ranks of all nodes must not lock and write one folder of a shared home.
# What a user has set stays. The folders are made on each node by rm_scale/launch/extensions.py, which also keeps
# DeepSpeed's compiled operators there, by environment.
rm_scale_caches() {
    rm_scale_local_disk
    export RM_SCALE_CACHES="${RM_SCALE_CACHES:-$RM_SCALE_LOCAL/caches}"
    # Without: ~/.triton/cache, torchinductor_USER below TMPDIR, ~/.cache/torch/kernels, ~/.nv/ComputeCache.
    export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$RM_SCALE_CACHES/triton}"
    export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$RM_SCALE_CACHES/inductor}"
    export PYTORCH_KERNEL_CACHE_PATH="${PYTORCH_KERNEL_CACHE_PATH:-$RM_SCALE_CACHES/kernels}"
    export CUDA_CACHE_PATH="${CUDA_CACHE_PATH:-$RM_SCALE_CACHES/cuda}"
}

rm_scale_container() {
    local -a mounts
    local mount
    read -ra mounts <<<"$RM_SCALE_CONTAINER_MOUNTS"
    mounts+=("$RM_SCALE_HOME" "$PWD" "$RM_SCALE_LOGS")
    # TMPDIR and the compilers' caches.
    if [[ -n $RM_SCALE_SCRATCH ]]; then mounts+=("$RM_SCALE_SCRATCH"); fi
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

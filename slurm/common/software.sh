# shellcheck shell=bash
# Where the job's Python is: modules, virtual environment or container.

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

#!/usr/bin/env bash
# Throughput of a tier on this job's nodes:  sbatch --nodes=2 slurm/bench.sh --tier 7b --methods lora,qlora --stages 3
#
# Words are those of benchmarks/throughput.py. Every case is a training on all ranks of the allocation, started as
# slurm/rm_7b.sh starts one; a job that was ended goes on where it was when it is submitted again, since cases that have
# a record are not run twice. For scaling, submit it with several numbers of nodes. Docs in benchmarks/README.md.

#SBATCH --job-name=rm_bench
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-gpu=8
#SBATCH --mem-per-gpu=60G
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log

RM_SCALE_TIER=''
RM_SCALE_CONFIG=none
export RM_SCALE_FORCE=plan # running out of memory is a result here

# Slurm runs a copy of this script from a folder of its own. The repository is looked for where the script lies that
# was submitted, also behind a symbolic link, where it was submitted from, and where a Python on PATH has rm_scale.
submitted=$(scontrol show job "${SLURM_JOB_ID:-none}" 2>/dev/null | sed -n 's/^ *Command=//p' | head -n 1)
while [[ ! -f $submitted && $submitted == *' '* ]]; do submitted=${submitted% *}; done # words after the script's name
above() { # FOLDER...: each, and all folders above it
    local folder
    for folder; do
        while [[ $folder == /?* ]]; do
            echo "$folder"
            folder=${folder%/*}
        done
    done
}
installed() {
    local python command code='import os, rm_scale; print(os.path.dirname(os.path.abspath(rm_scale.__file__)))'
    command=$(command -v rm-scale) || command=/nowhere/rm-scale
    for python in "${RM_SCALE_VENV:-/nowhere}/bin/python" "${command%/*}/python" python3; do
        "$python" -c "$code" 2>/dev/null | sed 's:.*:&/shipped\n&/..:'
    done
}
if [[ -n ${SLURM_JOB_ID:-} ]]; then
    while IFS= read -r home; do
        [[ -f $home/slurm/common.sh && -f $home/slurm/rm_1b.sh ]] && break
    done < <(
        echo "${RM_SCALE_HOME:-/nowhere}"
        above "$(readlink -f -- "$submitted")" "$submitted" "$(cd -- "${SLURM_SUBMIT_DIR:-.}" && pwd)"
        installed
        echo # none of them
    )
    if [[ -z $home ]]; then
        echo "rm_scale: slurm/common.sh was not found. Fix: submit from the repository, or set RM_SCALE_HOME to it." >&2
        exit 2
    fi
    # shellcheck source=slurm/common.sh
    source "$home/slurm/common.sh"
    if [[ ${1:-} == --one_case ]]; then
        # Started by throughput.py inside the job: a run with folders of its own, that nothing restarts.
        shift
        unset SLURM_RESTART_COUNT
        RM_SCALE_RESUME=none RM_SCALE_MAX_RESTARTS=0
        rm_scale_main "$home" "$@" # ends the script
    fi
    rm_scale_bench "$home" "$@" # ends the script
fi
echo "rm_scale: this is a job script, and there is no job around it. Fix: sbatch $0." >&2
exit 2

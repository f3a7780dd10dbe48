#!/usr/bin/env bash
# A 7B reward model by full fine-tuning:  sbatch slurm/rm_7b.sh [--setting value ...]
#
# Settings are those of rm_scale/train.py and count before the configuration's, as sbatch's options count before the
# lines below:  sbatch --nodes=2 slurm/rm_7b.sh --dataset_path my_pairs.jsonl --output_dir outputs/mine
# By LoRA instead:  sbatch slurm/rm_7b.sh --config configs/qwen2.5_7b_lora.yaml
# What differs from cluster to cluster is in slurm/site.env; what happens in slurm/common.sh; docs in docs/slurm.md.

#SBATCH --job-name=rm_7b
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
# Whole nodes, with all their cores.
#SBATCH --exclusive
# And all their memory.
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
# Slurm's second attempt of a job writes on in the same file.
#SBATCH --open-mode=append
# After a lost node Slurm may start the job again by itself.
#SBATCH --requeue
# Ten minutes before the time limit this script is told, and the run saves.
#SBATCH --signal=B:USR1@600

RM_SCALE_TIER=${RM_SCALE_TIER:-7b}
RM_SCALE_CONFIG=${RM_SCALE_CONFIG:-configs/qwen2.5_7b_full.yaml}
settings=()

# --- The rest is the same in each of these scripts -------------------------------------------------------------------

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
    rm_scale_main "$home" "${settings[@]}" "$@" # ends the script
fi
echo "rm_scale: this is a job script, and there is no job around it. Fix: sbatch $0, or rm-scale slurm submit." >&2
exit 2

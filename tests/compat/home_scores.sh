#!/usr/bin/env bash
# Other projects' reward models, written and scored by their own released code, then scored by rm_scale.
#
#   tests/compat/home_scores.sh [FOLDER]        default: outputs/compat/home_scores
#
# Makes an environment of its own in FOLDER/venv: OpenRLHF, TRL 0.9.6, LLaMA-Factory and RewardBench there, and everything
# else as pinned in .venv, which is not changed. About a minute on two CPU cores. Not part of `make test`: it installs
# packages that the project does not need.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. tests/compat/environment.sh
folder=${1:-outputs/compat/home_scores}
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
make_environment "$folder" tests/compat/home_scores.txt
rm -rf "$folder"/venv/lib/python3*/site-packages/tests # packages bring a folder of this name along
"$main_python" -m tests.compat.home_scores --folder "$folder/models" --make_base
"$folder/venv/bin/python" -m tests.compat.home_scores --folder "$folder/models" --write
"$main_python" -m tests.compat.home_scores --folder "$folder/models" --compare

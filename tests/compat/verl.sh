#!/usr/bin/env bash
# verl's own reward managers with examples/verl_reward.py, and its client of reward servers, release 0.9.1.
#
#   tests/compat/verl.sh [FOLDER]        default: outputs/compat/verl
#
# Makes an environment of its own in FOLDER/venv: the package, Ray and what they load, and everything else as pinned in
# .venv, which is not changed. Then trains a tiny model, serves it, and asks for rewards. Two minutes on two CPU cores.
# Not part of `make test`: it installs packages that the project does not need.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. tests/compat/environment.sh
folder=${1:-outputs/compat/verl}
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
make_environment "$folder" tests/compat/verl.txt
rm -rf "$folder"/venv/lib/python3*/site-packages/tests # the package brings a folder of this name along
"$folder/venv/bin/python" -m tests.compat.verl_managers --folder "$folder"

#!/usr/bin/env bash
# RewardBench's own scorer, package rewardbench 0.1.4, against `rm-scale eval --benchmark` on the same rows and scores.
#
#   tests/compat/rewardbench.sh [FOLDER]        default: outputs/compat/rewardbench
#
# Makes an environment of its own in FOLDER/venv: the package there, and everything else as pinned in .venv, which is
# not changed. Then prints one table, section by section; ends with 1 where a difference is above 1e-9. About half a
# minute on two CPU cores. Not part of `make test`: it installs a package that the project does not need.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. tests/compat/environment.sh
folder=${1:-outputs/compat/rewardbench}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES=
make_environment "$folder" tests/compat/rewardbench.txt
rm -rf "$folder"/venv/lib/python3*/site-packages/tests # a package brings a folder of this name along
"$folder/venv/bin/python" -m tests.compat.rewardbench_parity --output_dir "$folder/run" --record "$folder/record.json"

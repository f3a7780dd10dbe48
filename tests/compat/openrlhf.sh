#!/usr/bin/env bash
# OpenRLHF's own client of reward servers, release 0.11.2, against `rm-scale serve`: rewards, and what it says of refusals.
#
#   tests/compat/openrlhf.sh [FOLDER]        default: outputs/compat/openrlhf
#
# Makes an environment of its own in FOLDER/venv: the package there, and everything else as pinned in .venv, which is
# not changed. Then trains a tiny model, serves it, and runs the client. About a minute on two CPU cores. Not part of
# `make test`: it installs a package that the project does not need.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. tests/compat/environment.sh
folder=${1:-outputs/compat/openrlhf}
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
make_environment "$folder" tests/compat/openrlhf.txt
rm -rf "$folder"/venv/lib/python3*/site-packages/tests # the package brings a folder of this name along
"$folder/venv/bin/python" -m tests.compat.openrlhf_client --folder "$folder"

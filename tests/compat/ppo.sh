#!/usr/bin/env bash
# PPO with a reward model of rm_scale, in the newest TRL that still has a PPOTrainer (1.12.0; 1.13 dropped it).
#
#   tests/compat/ppo.sh [FOLDER]        default: outputs/compat/ppo
#
# Makes an environment of its own in FOLDER/venv: TRL 1.12.0 there, and everything else (torch, transformers, ...) as
# pinned in .venv, which is not changed. Then makes the tiny task and runs PPO on it, about a minute on two CPU cores.
# Not part of `make test`: it installs another TRL.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. tests/compat/environment.sh
folder=${1:-outputs/compat/ppo}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
make_environment "$folder" tests/compat/trl_with_ppo.txt
python=$folder/venv/bin/python
"$python" -c 'import torch, transformers, trl
print(f"[ppo] trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")'

if [[ ! -f $folder/task/reward_model/config.json ]]; then
    "$main_python" examples/tiny_task.py --output_dir "$folder/task" >"$folder/task.log" 2>&1
fi
"$python" -m tests.compat.ppo_run --task "$folder/task" --output_dir "$folder/run" --record "$folder/record.json"

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
folder=${1:-outputs/compat/ppo}
trl_version=1.12.0
main=.venv/bin/python
if [[ ! -x $main ]]; then
    printf 'ERROR: there is no .venv. Fix: make venv, then run this again\n' >&2
    exit 2
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=

python=$folder/venv/bin/python
if [[ $("$python" -c 'import trl; print(trl.__version__)' 2>/dev/null || true) != "$trl_version" ]]; then
    mkdir -p "$folder"
    "$main" -m venv --clear --without-pip "$folder/venv"
    site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # Without the constraints of this repository, which name another TRL.
    PIP_CONSTRAINT='' "$main" -m pip install -qq --no-deps --target "$site" "trl==$trl_version"
    # What this environment lacks comes from .venv, after its own packages.
    theirs=$("$main" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    printf 'import site; site.addsitedir(%s)\n' "'$theirs'" >"$site/rm_scale_venv.pth"
fi
"$python" -c 'import torch, transformers, trl
print(f"[ppo] trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")'

if [[ ! -f $folder/task/reward_model/config.json ]]; then
    "$main" examples/tiny_task.py --output_dir "$folder/task" >"$folder/task.log" 2>&1
fi
"$python" tests/compat/ppo_run.py --task "$folder/task" --output_dir "$folder/run"

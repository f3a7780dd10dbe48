#!/usr/bin/env bash
# OpenRLHF with rewards from rm-scale serve. Two terminals:
#
#   MODEL=outputs/mine examples/openrlhf_remote.sh serve       # where the reward model is
#   POLICY=Qwen/Qwen2.5-1.5B-Instruct PROMPTS=prompts.jsonl examples/openrlhf_remote.sh train
#
# OpenRLHF posts {"query": [...], "prompts": [...], "labels": [...]} to the address; a query is prompt and response as its
# tokenizer decodes them. The server strips padding, ends the text as the scoring contract says, and answers
# {"rewards": [...], "scores": [...], "extra_logs": {}}. tests/e2e/test_rl.py holds that exchange; OpenRLHF itself needs Ray
# and GPUs and was not run by us: its options below are those of 0.10 and newer. Before, --remote_rm_url.
#
# A text longer than the reward model's max_length is refused (422) and ends the run, so keep prompt and response below it.
# OpenRLHF sends no token: let the server listen where only the trainer can reach it (HOST, default this machine).
set -euo pipefail

host=${HOST:-127.0.0.1}
port=${PORT:-5000}

case ${1:-} in
serve)
    exec rm-scale serve --model "${MODEL:?folder of the reward model}" --host "$host" --port "$port"
    ;;
train)
    exec python3 -m openrlhf.cli.train_ppo_ray \
        --actor.model_name_or_path "${POLICY:?the policy}" \
        --reward.remote_url "http://$host:$port/get_reward" \
        --data.prompt_dataset "${PROMPTS:?JSONL with prompts}" \
        --data.input_key prompt \
        --data.apply_chat_template \
        "${@:2}"
    ;;
*)
    printf 'ERROR: %s: serve or train. Fix: %s serve\n' "${1:-nothing asked}" "$0" >&2
    exit 2
    ;;
esac

"""GRPO under DeepSpeed ZeRO-3 on several ranks, rewarded by path, by function and over a server at once.

    torchrun --nproc_per_node 2 tests/support/rl_ranks.py TASK SERVER OUTPUT

Rank 0 writes the logged rewards of each step to OUTPUT/rewards.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

from rm_scale.inference.reward_function import plain_text_tokenizer, reward_function

REPOSITORY = Path(__file__).resolve().parents[2]


def main(task: str, server: str, output: str) -> None:
    """Train a few steps."""
    # Before the model is loaded, or transformers shards it for a world of one.
    deepspeed.init_distributed("gloo")
    folder = f"{task}/reward_model"
    arguments = GRPOConfig(
        output_dir=output,
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=8,
        max_steps=3,
        learning_rate=5e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        ddp_backend="gloo",
        gradient_checkpointing=False,
        deepspeed=str(REPOSITORY / "ds_configs" / "zero3.json"),
    )
    trainer = GRPOTrainer(
        model=f"{task}/policy",
        reward_funcs=[
            folder,  # TRL shards this one
            reward_function(folder, device="cpu", name="function"),
            reward_function(server, name="remote"),
        ],
        reward_processing_classes=[plain_text_tokenizer(folder), None, None],
        args=arguments,
        train_dataset=load_dataset("json", data_files=f"{task}/prompts.jsonl", split="train"),
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        names = ("reward_model", "function", "remote")
        steps = [line for line in trainer.state.log_history if "rewards/function/mean" in line]
        found = {name: [line[f"rewards/{name}/mean"] for line in steps] for name in names}
        Path(output, "rewards.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

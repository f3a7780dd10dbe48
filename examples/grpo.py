"""GRPO with a reward model of rm_scale, in TRL 1.16.

The tiny task, in seconds on a CPU:
    python examples/tiny_task.py --output_dir outputs/rl
    python examples/grpo.py --policy outputs/rl/policy --reward_model outputs/rl/reward_model \
        --prompts outputs/rl/prompts.jsonl --output_dir outputs/rl/grpo

A model and prompts of your own, several GPUs, rewards from a server (rm-scale serve --model outputs/mine --port 8000):
    accelerate launch examples/grpo.py --policy Qwen/Qwen2.5-0.5B-Instruct --reward_model http://127.0.0.1:8000 \
        --prompts prompts.jsonl --output_dir outputs/grpo --learning_rate 1e-6 --max_steps 500 \
        --max_completion_length 256 --beta 0.04 --normalized --clip 5

Prompts are JSONL rows with `prompt`: text, or a list of messages. Use the kind that the reward model was trained on.
`--by_path` gives TRL the folder instead of our function; docs/rl.md says when that gives the same rewards.
"""

from __future__ import annotations

from recipe import load_prompts, options, reward, summary
from trl import GRPOConfig, GRPOTrainer


def main() -> None:
    """Train, and say how rewards moved."""
    given = options(__doc__)
    arguments = GRPOConfig(
        output_dir=given.output_dir,
        max_steps=given.max_steps,
        learning_rate=given.learning_rate,
        per_device_train_batch_size=given.batch_size,
        num_generations=8,
        max_completion_length=given.max_completion_length,
        beta=given.beta,
        bf16=given.bf16,
        seed=given.seed,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
    )
    trainer = GRPOTrainer(
        model=given.policy, reward_funcs=reward(given), args=arguments, train_dataset=load_prompts(given.prompts)
    )
    trainer.train()
    trainer.save_model()
    summary(trainer, "reward")


if __name__ == "__main__":
    main()

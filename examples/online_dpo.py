"""Online DPO with a reward model of rm_scale, in TRL 1.16 (`trl.experimental.online_dpo`).

The tiny task, in seconds on a CPU:
    python examples/tiny_task.py --output_dir outputs/rl
    python examples/online_dpo.py --policy outputs/rl/policy --reward_model outputs/rl/reward_model \
        --prompts outputs/rl/prompts.jsonl --output_dir outputs/rl/online_dpo

A model and prompts of your own; --unscorable is the reward of what is too long to be scored:
    accelerate launch examples/online_dpo.py --policy Qwen/Qwen2.5-0.5B-Instruct --reward_model http://127.0.0.1:8000 \
        --prompts prompts.jsonl --output_dir outputs/online_dpo --learning_rate 5e-7 --max_steps 500 \
        --max_completion_length 256 --beta 0.1 --unscorable -10

This trainer counts a completion without a reward as 0, so our function refuses to give none: choose --unscorable. The
trainer's own tokenizer adds special tokens to its prompts only; rewards follow the scoring contract all the same.
"""

from __future__ import annotations

from recipe import load_prompts, options, reward, summary
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer


def main() -> None:
    """Train, and say how rewards moved."""
    given = options(__doc__, beta=0.1, learning_rate=1e-2)
    arguments = OnlineDPOConfig(
        output_dir=given.output_dir,
        max_steps=given.max_steps,
        learning_rate=given.learning_rate,
        per_device_train_batch_size=given.batch_size,
        max_new_tokens=given.max_completion_length,
        beta=given.beta,
        bf16=given.bf16,
        seed=given.seed,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
    )
    trainer = OnlineDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(given.policy),
        processing_class=AutoTokenizer.from_pretrained(given.policy, padding_side="left"),
        reward_funcs=reward(given),
        args=arguments,
        train_dataset=load_prompts(given.prompts),
    )
    trainer.train()
    trainer.save_model()
    summary(trainer, "objective/scores")


if __name__ == "__main__":
    main()

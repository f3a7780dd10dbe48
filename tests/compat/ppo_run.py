"""PPO on the tiny task, started by ppo.sh under TRL 1.12; ends with 1 when it does not do what docs/rl.md says.

The reward model is given as PPO scripts give it: `PPOConfig.reward_model_path`, loaded by
`AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)`. Two things are checked: each reward equals
`RewardScorer`'s for the same tokens, and the mean reward rises.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from itertools import takewhile
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from rm_scale.inference.scoring.scorer import RewardScorer
from tests.compat.records import write_record

MAX_DIFFERENCE = 1e-4
LEAST_RISE = 1.0


def main() -> int:
    """Train, compare, and print what was found as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    options = parser.parse_args()
    arguments = PPOConfig(
        output_dir=options.output_dir,
        reward_model_path=f"{options.task}/reward_model",
        sft_model_path=f"{options.task}/policy",
        total_episodes=64 * options.steps,
        per_device_train_batch_size=64,
        num_ppo_epochs=4,
        response_length=12,
        stop_token="eos",
        temperature=1.0,
        kl_coef=0.01,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        num_sample_generations=0,
        logging_steps=1,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        seed=0,
    )
    seen = record_rewards()
    trainer = make_trainer(arguments, f"{options.task}/prompts.jsonl")
    trainer.train()
    return judge(trainer, seen, arguments.reward_model_path, options.record)


def make_trainer(arguments: Any, prompts: str) -> Any:
    """The trainer with policy, value model and reward model, as TRL's own PPO script makes them."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.sft_model_path, padding_side="left")
    # As the scoring contract tokenises plain text: with the tokenizer's own BOS. EOS is the policy's to write.
    rows = load_dataset("json", data_files=prompts, split="train").map(
        lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]}, remove_columns=["prompt"]
    )

    def classifier() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(arguments.reward_model_path, num_labels=1)

    return PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(arguments.sft_model_path),
        ref_model=AutoModelForCausalLM.from_pretrained(arguments.sft_model_path),
        reward_model=classifier(),
        value_model=classifier(),
        # A batch larger than the file: the prompts again and again.
        train_dataset=rows.select([place % len(rows) for place in range(256)]),
        eval_dataset=rows,
    )


def record_rewards() -> list[tuple[list[list[int]], torch.Tensor]]:
    """Let TRL's own function say which tokens got which reward; what it gives is unchanged."""
    seen: list[tuple[list[list[int]], torch.Tensor]] = []
    original = ppo_trainer.get_reward

    def recording(model: Any, tokens: torch.Tensor, pad: int, context: int) -> Any:
        result = original(model, tokens, pad, context)
        # A response ends before its first padding token, one that the policy wrote itself included.
        queries = [[token for token in row if token != pad] for row in tokens[:, :context].tolist()]
        responses = [list(takewhile(lambda token: token != pad, row)) for row in tokens[:, context:].tolist()]
        seen.append(([query + response for query, response in zip(queries, responses, strict=True)], result[1].clone()))
        return result

    ppo_trainer.get_reward = recording
    return seen


def judge(trainer: Any, seen: list[tuple[list[list[int]], torch.Tensor]], reward_model: str, record: Path) -> int:
    """Compare with the scorer, and the first quarter of the steps with the last."""
    scorer = RewardScorer.from_pretrained(reward_model, device="cpu")
    eos = scorer.tokenizer.eos_token_id
    differences, ended = [], 0
    # Values and rewards come in turn; the first ones are of the value model, which is trained.
    for sequences, given in seen[1::2][:8]:
        ended += sum(sequence[-1] == eos for sequence in sequences)
        own = scorer.score_tokens(sequences)
        differences += [abs(a - b) for a, b in zip(given.tolist(), own, strict=True)]
    rewards = [line["objective/scores"] for line in trainer.state.log_history if "objective/scores" in line]
    quarter = len(rewards) // 4
    first, last = statistics.mean(rewards[:quarter]), statistics.mean(rewards[-quarter:])
    found = {
        "steps": len(rewards),
        "first_quarter": round(first, 3),
        "last_quarter": round(last, 3),
        "compared": len(differences),
        "ended_by_eos": ended,
        "largest_difference": max(differences),
    }
    good = bool(max(differences) <= MAX_DIFFERENCE and last > first + LEAST_RISE)
    print(json.dumps({**found, "ok": good}))
    row = [f"{found['steps']}", f"{first:.2f}", f"{last:.2f}", f"{len(differences)}", f"{max(differences):.1e}"]
    what = "PPO of the tiny task, the reward model given by its path"
    heads = ["steps", "mean reward, first quarter", "last quarter", "scores compared", "largest difference", ""]
    write_record(record, "trl_with_ppo.txt", ["trl"], what, heads, [[*row, "holds" if good else "**off**"]])
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())

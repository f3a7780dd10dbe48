"""What the recipes beside this file share: options, prompts, the reward, and a summary. Nothing to run here."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from datasets import Dataset, load_dataset

from rm_scale.inference.reward_function import reward_function


def options(description: str | None, beta: float = 0.0, learning_rate: float = 5e-3) -> argparse.Namespace:
    """Return the options of a recipe; the defaults suit the tiny task."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, help="a causal language model, folder or hub name")
    parser.add_argument("--reward_model", required=True, help="a folder, or the address of rm-scale serve")
    parser.add_argument("--prompts", required=True, help="JSONL with prompt: text or messages")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--by_path", action="store_true", help="let TRL load the folder itself")
    parser.add_argument("--normalized", action="store_true", help="mean 0, deviation 1 over the evaluation set")
    parser.add_argument("--clip", type=float, help="hold rewards within -CLIP and CLIP")
    parser.add_argument("--unscorable", type=float, help="reward of what can't be scored (default: left out)")
    parser.add_argument("--max_steps", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=32, help="completions per device and step")
    parser.add_argument("--learning_rate", type=float, default=learning_rate)
    parser.add_argument("--max_completion_length", type=int, default=12)
    parser.add_argument("--beta", type=float, default=beta, help="weight of the KL penalty")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load_prompts(file: str) -> Dataset:
    """Return the column `prompt` of a JSONL file."""
    return load_dataset("json", data_files=file, split="train").select_columns(["prompt"])


def reward(given: argparse.Namespace) -> Any:
    """Return the reward function, or the folder for TRL to load."""
    if given.by_path:
        return given.reward_model
    return reward_function(
        given.reward_model, normalized=given.normalized, clip=given.clip, unscorable=given.unscorable
    )


def summary(trainer: Any, key: str) -> None:
    """Print the mean reward of the first and the last quarter of the steps, as JSON on the last line."""
    rewards = [line[key] for line in trainer.state.log_history if key in line]
    quarter = max(1, len(rewards) // 4)
    first, last = torch.tensor(rewards[:quarter]), torch.tensor(rewards[-quarter:])
    if trainer.accelerator.is_main_process:
        found = {"steps": len(rewards), "first_quarter": round(first.mean().item(), 3)}
        print(json.dumps({**found, "last_quarter": round(last.mean().item(), 3), "rewards": rewards}))

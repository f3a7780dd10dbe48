"""A task for the other recipes that takes seconds: a tiny policy, prompts, and a reward model that likes digits.

    python examples/tiny_task.py --output_dir outputs/rl

Writes policy/ (a two-layer Llama with random weights), reward_model/ (trained by rm_scale/train.py on generated
preferences: of two completions, the one with more digits is better) and prompts.jsonl. `--conversational` makes chat
prompts and messages instead of plain text. What the policy should learn is plain to see: to write digits.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

from transformers import AutoTokenizer

import rm_scale
from rm_scale.demo.assets import make_tiny_model

QUESTIONS = ["Name a number.", "How many?", "What is the code?", "Count.", "Which year was it?", "Say something."]
COMPLETION_TOKENS = 12


def main() -> None:
    """Make the task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/rl"))
    parser.add_argument("--conversational", action="store_true", help="messages instead of plain text")
    parser.add_argument("--architecture", default="llama", help="llama, qwen2, ... (default llama)")
    parser.add_argument("--use_peft", action="store_true", help="train the reward model as a LoRA adapter")
    options = parser.parse_args()
    words = ["--use_peft"] if options.use_peft else []
    make_task(options.output_dir, *words, conversational=options.conversational, architecture=options.architecture)
    print(f"made {options.output_dir}/: policy, reward_model, prompts.jsonl")


def make_task(folder: Path, *words: str, conversational: bool = False, architecture: str = "llama") -> Path:
    """Policy, prompts and reward model; `words` go to the training of the latter."""
    policy = make_tiny_model(folder / "policy", architecture, vocab_size=400, hidden_size=32, seed=1)
    for name, num_pairs in (("train", 800), ("heldout", 100)):
        write_pairs(folder / f"{name}.jsonl", policy, conversational, num_pairs)
    prompts = [{"prompt": _prompt(question, conversational)} for question in QUESTIONS]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    command = [sys.executable, str(Path(rm_scale.__file__).parent / "train.py")]
    command += ["--model_name_or_path", str(policy), "--dataset_path", str(folder / "train.jsonl")]
    command += ["--eval_dataset_path", str(folder / "heldout.jsonl")]
    command += ["--output_dir", str(folder / "reward_model"), "--force", "overwrite", "--disable_tqdm"]
    command += ["--max_length", "128", "--sample_scores", "0", "--bf16", "false"]
    command += ["--max_steps", "60", "--per_device_train_batch_size", "16", "--learning_rate", "5e-3", *words]
    subprocess.run(command, check=True)
    return folder


def write_pairs(path: Path, policy: Path, conversational: bool, num_pairs: int) -> None:
    """Preferences over random tokens, as an untrained policy writes them, with digits strewn in."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    special = set(tokenizer.all_special_ids)
    words = [number for number in range(len(tokenizer)) if number not in special]
    digits = [tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789"]
    random_numbers = random.Random(path.name)

    def completion(num_digits: int) -> str:
        length = random_numbers.randint(max(1, num_digits), COMPLETION_TOKENS)
        kinds = [digits] * num_digits + [words] * (length - num_digits)
        random_numbers.shuffle(kinds)
        return tokenizer.decode([random_numbers.choice(kind) for kind in kinds])

    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_pairs):
            fewer, more = sorted(random_numbers.sample(range(COMPLETION_TOKENS), 2))
            row = {"prompt": _prompt(random_numbers.choice(QUESTIONS), conversational)}
            for name, text in (("chosen", completion(more)), ("rejected", completion(fewer))):
                row[name] = [{"role": "assistant", "content": text}] if conversational else text
            file.write(json.dumps(row) + "\n")


def _prompt(question: str, conversational: bool) -> str | list[dict[str, str]]:
    return [{"role": "user", "content": question}] if conversational else f"Human: {question}\nAssistant:"


if __name__ == "__main__":
    main()

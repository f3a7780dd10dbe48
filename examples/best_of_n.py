"""Best-of-n: sample completions from a policy, keep the best by a reward model of rm_scale, and make pairs for DPO.

The tiny task, in seconds on a CPU:
    python examples/tiny_task.py --output_dir outputs/rl
    python examples/best_of_n.py --policy outputs/rl/policy --reward_model outputs/rl/reward_model \
        --prompts outputs/rl/prompts.jsonl --output_dir outputs/rl/best_of_n

Writes samples.jsonl, what `rm-scale rank` reads: best.jsonl and pairs.jsonl are made from it by that command, and the
curve (expected reward over n, with the bound of the KL divergence that it costs) is printed. A model of your own: name
it, and give --num_samples and --max_completion_length.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rm_scale.cli import main as rm_scale


def main() -> None:
    """Sample, rank, and print the curve as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, help="a causal language model, folder or hub name")
    parser.add_argument("--reward_model", required=True, help="a folder")
    parser.add_argument("--prompts", required=True, type=Path, help="JSONL with prompt: text or messages")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--num_samples", type=int, default=16)
    parser.add_argument("--max_completion_length", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.output_dir.mkdir(parents=True, exist_ok=True)
    samples = given.output_dir / "samples.jsonl"
    write_samples(given, samples)
    for name, form in (("best", ["best"]), ("pairs", ["pairs", "--pairs", "best_worst"])):
        output = ["--output", str(given.output_dir / f"{name}.jsonl"), "--output_format", *form]
        curves = ["--curves", str(given.output_dir / "curves.json")] if name == "best" else []
        files = ["--model", given.reward_model, "--input", str(samples), *output, *curves, "--overwrite"]
        if rm_scale(["rank", *files]) != 0:
            raise SystemExit("rm-scale rank failed, see above")
    points = json.loads((given.output_dir / "curves.json").read_text())["points"]
    print(json.dumps([{key: round(point[key], 3) for key in ("n", "reward", "kl_bound_nats")} for point in points]))


def write_samples(given: argparse.Namespace, path: Path) -> None:
    """Completions of each prompt, as the policy writes them."""
    torch.manual_seed(given.seed)
    tokenizer = AutoTokenizer.from_pretrained(given.policy)
    model = AutoModelForCausalLM.from_pretrained(given.policy)
    with path.open("w", encoding="utf-8") as file:
        for line in given.prompts.read_text(encoding="utf-8").splitlines():
            prompt = json.loads(line)["prompt"]
            texts = sample(model, tokenizer, prompt, given)
            chat = not isinstance(prompt, str)
            completions = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
            file.write(json.dumps({"prompt": prompt, "completions": completions}) + "\n")


def sample(model: Any, tokenizer: Any, prompt: Any, given: argparse.Namespace) -> list[str]:
    """Completions of one prompt, without special tokens."""
    if isinstance(prompt, str):
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    with torch.no_grad():
        tokens = model.generate(
            **inputs,
            do_sample=True,
            top_k=0,
            num_return_sequences=given.num_samples,
            max_new_tokens=given.max_completion_length,
            pad_token_id=tokenizer.pad_token_id,
        )
    texts: list[str] = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


if __name__ == "__main__":
    main()

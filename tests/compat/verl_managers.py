"""verl's own code, as released, asks for rewards of a model of rm_scale: started by verl.sh.

Its reward managers call examples/verl_reward.py, with the model's folder and with `rm-scale serve`; its client of
reward servers asks `rm-scale serve` as it asks a vLLM or an SGLang that it has started. Ray is loaded, not started.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from verl import DataProto
from verl.experimental.reward_loop.reward_loop import RewardLoopWorker
from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls as reward_loop_manager
from verl.trainer.ppo.reward import get_custom_reward_fn
from verl.workers.reward_manager import get_reward_manager_cls as batch_manager

from rm_scale.demo.assets import make_tiny_model
from rm_scale.demo.synthetic_preferences import generate_pairs
from rm_scale.inference.scoring.scorer import RewardScorer
from tests.compat.records import write_record
from tests.support.launching import REPOSITORY
from tests.support.serving import served
from tests.support.tiny_runs import train_tiny

QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]
ANSWERS = ["4", "5", "It is four."]
LARGEST_DIFFERENCE = 1e-5


def trained(folder: Path) -> Path:
    """A tiny reward model; made once."""
    output, pairs = folder / "model", folder / "pairs.jsonl"
    if not (output / "scoring_contract.json").exists():
        base = make_tiny_model(folder / "base", vocab_size=400, hidden_size=32)
        pairs.write_text("".join(json.dumps(row) + "\n" for row in generate_pairs(120, seed=3, split="train")))
        train_tiny(base, pairs, output)
    return output


def rollouts(tokenizer: Any) -> DataProto:
    """What verl holds after a rollout: token ids, masks, and the rows' other columns."""
    prompts = [tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)] * len(ANSWERS)
    asked = tokenizer(prompts, add_special_tokens=False, return_tensors="pt", padding=True, padding_side="left")
    ends = [answer + tokenizer.eos_token for answer in ANSWERS]
    said = tokenizer(ends, add_special_tokens=False, return_tensors="pt", padding=True, padding_side="right")
    columns: dict[str, list[Any]] = {
        "data_source": ["mine"] * len(ANSWERS),
        "reward_model": [{"ground_truth": None} for _ in ANSWERS],
        "extra_info": [{"prompt": QUESTION} for _ in ANSWERS],
        "raw_prompt": [QUESTION for _ in ANSWERS],
    }
    found = {name: np.empty(len(ANSWERS), dtype=object) for name in columns}
    for name, values in columns.items():
        found[name][:] = values
    masks = torch.cat([asked["attention_mask"], said["attention_mask"]], dim=1)
    tensors = {"prompts": asked["input_ids"], "responses": said["input_ids"], "attention_mask": masks}
    return DataProto.from_dict(tensors=tensors, non_tensors=found)


def custom(name: str, reward_model: str) -> Any:
    """The function of examples/verl_reward.py, found and bound by verl as its configuration says."""
    path = str(REPOSITORY / "examples" / "verl_reward.py")
    given = {"path": path, "name": name, "reward_kwargs": {"reward_model": reward_model}}
    return get_custom_reward_fn(SimpleNamespace(reward={"custom_reward_function": given}))  # type: ignore[arg-type]


async def one_by_one(ask: Any, data: DataProto) -> list[float]:
    """Rewards, asked for all at once as verl does."""
    answers = await asyncio.gather(*[ask(data[place : place + 1]) for place in range(len(data))])
    return [float(answer["reward_score"]) for answer in answers]


async def by_naive_manager(reward_model: str, scorer: RewardScorer) -> list[float]:
    """The manager that verl's trainers take by default."""
    manager = reward_loop_manager("naive")(None, scorer.tokenizer, custom("compute_score", reward_model))
    return await one_by_one(manager.run_single, rollouts(scorer.tokenizer))


def by_batch_manager(reward_model: str, scorer: RewardScorer) -> list[float]:
    """The manager that takes a function of many responses; rewards stand at each response's last token."""
    manager = batch_manager("batch")(scorer.tokenizer, 0, custom("compute_scores", reward_model))
    return manager(rollouts(scorer.tokenizer)).sum(dim=1).tolist()


async def by_client(engine: str, url: str, scorer: RewardScorer) -> list[float]:
    """verl's client of the engine that it starts for a reward model, given our server's address instead."""
    worker = object.__new__(RewardLoopWorker)  # what it does before asking is to load tokenizers
    reward_model = SimpleNamespace(enable=True, model_path="/a/path", rollout=SimpleNamespace(name=engine))
    reward = SimpleNamespace(reward_model=reward_model, custom_reward_function=SimpleNamespace(path=None))
    worker.config = SimpleNamespace(reward=reward)
    worker.input_tokenizer = worker.reward_model_tokenizer = scorer.tokenizer
    worker.reward_router_address = url.removeprefix("http://")
    return await one_by_one(worker.compute_score, rollouts(scorer.tokenizer))


def main() -> None:
    """Compare rewards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    folder: Path = parser.parse_args().folder
    model = trained(folder)
    scorer = RewardScorer.from_pretrained(model, device="cpu")
    expected = [scorer.score_one(QUESTION, [{"role": "assistant", "content": answer}]) for answer in ANSWERS]
    assert max(expected) - min(expected) > 0.01, expected
    rows = []
    with served(scorer) as (url, _):
        asked = {
            ("`NaiveRewardManager`", "the model's folder"): partial(asyncio.run, by_naive_manager(str(model), scorer)),
            ("`NaiveRewardManager`", "`rm-scale serve`"): partial(asyncio.run, by_naive_manager(url, scorer)),
            ("`BatchRewardManager`", "the model's folder"): partial(by_batch_manager, str(model), scorer),
            ("`BatchRewardManager`", "`rm-scale serve`"): partial(by_batch_manager, url, scorer),
            ("client of vLLM", "`rm-scale serve`"): partial(asyncio.run, by_client("vllm", url, scorer)),
            ("client of SGLang", "`rm-scale serve`"): partial(asyncio.run, by_client("sglang", url, scorer)),
        }
        for name, ask in asked.items():
            found = ask()
            worst = max(abs(one - score) for one, score in zip(found, expected, strict=True))
            assert worst < LARGEST_DIFFERENCE, (name, found, expected)
            rows.append([*name, str(len(found)), f"{worst:.1e}", "holds"])
    what = "verl's own code, asked for rewards with `examples/verl_reward.py` (the managers) or itself (the clients)"
    heads = ("who asks", "whom", "rewards", "largest difference to RewardScorer", "")
    write_record(folder / "record.json", "verl.txt", ("verl", "ray"), what, heads, rows)


if __name__ == "__main__":
    main()

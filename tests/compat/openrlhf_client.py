"""OpenRLHF's client of reward servers (`openrlhf/utils/agent.py`, as released) against a served model of rm_scale.

Only that module and the one for its log are loaded: the package itself imports Ray and DeepSpeed. In the place of its
vLLM engine stands one that gives fixed token ids.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import json
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from rm_scale.demo.assets import make_tiny_model
from rm_scale.demo.synthetic_preferences import generate_pairs
from rm_scale.inference.scoring.scorer import RewardScorer
from tests.compat.records import write_record
from tests.support.launching import TRAIN, run
from tests.support.serving import served

PROMPT, ANSWERS = "What is 2 + 2?", [" 4", " 5", " It is four."]


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self.lines.append(record.getMessage())


def load_client() -> Any:
    """`openrlhf.utils.agent`, without what the packages above it import."""
    spec = importlib.util.find_spec("openrlhf")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    for name, path in (("openrlhf", folder), ("openrlhf.utils", folder / "utils")):
        package = ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package
    return importlib.import_module("openrlhf.utils.agent")


def trained(folder: Path) -> Path:
    """A tiny reward model, trained in .venv's fashion; made once."""
    output = folder / "model"
    if not (output / "scoring_contract.json").exists():
        base, pairs = make_tiny_model(folder / "base", vocab_size=400, hidden_size=32), folder / "pairs.jsonl"
        pairs.write_text("".join(json.dumps(row) + "\n" for row in generate_pairs(120, seed=3, split="train")))
        words = ["--model_name_or_path", str(base), "--dataset_path", str(pairs), "--output_dir", str(output)]
        words += ["--bf16", "false", "--eval_split_size", "12", "--max_steps", "4", "--sample_scores", "0"]
        done = run([sys.executable, str(TRAIN), *words, "--disable_tqdm"])
        assert done.code == 0, done.output[-3000:]
    return output


def roll_out(client: Any, url: str, tokenizer: Any, answer: str) -> dict[str, Any]:
    """One rollout of OpenRLHF, whose engine says this answer."""
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]

    class Engine:
        """Stands for its vLLM engine."""

        async def generate(self, *_: Any, **__: Any) -> Any:
            """The answer."""
            return SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, finish_reason="stop", logprobs=None)])

    executor = client.SingleTurnAgentExecutor(f"{url}/get_reward")
    sampling = SimpleNamespace(max_tokens=8, logprobs=None)
    return asyncio.run(executor.execute(PROMPT, None, sampling, 100_000, tokenizer, Engine()))


def main() -> None:
    """Compare rewards, then provoke a refusal and read what the client logs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    folder = parser.parse_args().folder
    client = load_client()
    log = Lines()
    logging.getLogger("openrlhf.utils.agent").addHandler(log)
    scorer = RewardScorer.from_pretrained(trained(folder), device="cpu")
    expected = scorer.score(PROMPT, ANSWERS)
    with served(scorer) as (url, _):
        worst = 0.0
        for answer, score in zip(ANSWERS, expected, strict=True):
            found = roll_out(client, url, scorer.tokenizer, answer)
            assert found["reward"] == found["scores"], found
            (reward,) = found["reward"]  # a list of one, as from its own server; its trainer flattens it
            worst = max(worst, abs(reward - score))
        assert worst < 1e-5, worst
        assert not log.lines, log.lines
        long = roll_out(client, url, scorer.tokenizer, " 7" * 3000)
    assert long["reward"] is None, "its trainer fails on this, after the lines below"
    told = [line for line in log.lines if "a text is too long to be scored: " in line and "Fix: " in line]
    assert len(told) == 5, log.lines
    rows = [
        ["rewards of a prompt's answers", f"{len(ANSWERS)} rewards, largest difference to RewardScorer {worst:.1e}"],
        ["an over-long text", f"no reward; its log says {len(told)} times why, with what to do"],
    ]
    what = "Its client's own code against `rm-scale serve`"
    write_record(folder / "record.json", "openrlhf.txt", ["openrlhf"], what, ["asked for", "got"], rows)


if __name__ == "__main__":
    main()

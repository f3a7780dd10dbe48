"""Real chat templates through every door: training's evaluation, score, rank, eval, serve, rewards, GRPO by path.

One conversation and answer has one score, to 1e-5; what no door can score, all refuse by one name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rm_scale.cli import main
from rm_scale.inference.remote_scorer import RemoteScorer
from rm_scale.inference.reward_function import reward_function
from rm_scale.inference.scoring.scorer import RewardScorer
from tests.support.in_process import train_here
from tests.support.launching import read_lines
from tests.support.serving import served
from tests.support.template_shapes import SHAPES, tokenizer_of

pytestmark = [pytest.mark.e2e, pytest.mark.long]

TEN = [
    "qwen2_5-instruct",
    "qwen2_5-base",
    "qwen3",
    "llama2",
    "llama3",
    "gemma",
    "gemma3",
    "mistral",
    "phi3",
    "chatml",
    "zephyr",
]
ANSWERS = {
    "How many legs has a spider?": ("Eight.", "Six."),
    "Name a colour.": ("Blue, like the sky.\n\nOr green.", "Table"),
    "Wie viele Tage hat eine Woche?": ("Sieben 🎉", "Zwölf"),
}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Yes, surely.", "No."))
TURNS = [
    {"role": "user", "content": "Is it so?"},
    {"role": "assistant", "content": "It is."},
    {"role": "user", "content": "Sure?"},
]
Conversation = list[dict[str, str]]


def rows() -> list[dict[str, Any]]:
    """Pairs of conversations, one of them of several turns."""
    found = [
        {
            "id": str(number),
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for number, (question, (chosen, rejected)) in enumerate(ANSWERS.items())
    ]
    return [*found, {"id": "3", "prompt": TURNS, "chosen": [GOOD], "rejected": [BAD]}]


def write(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def make_model(folder: Path, shape: str) -> Path:
    tokenizer = tokenizer_of(shape)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.15,
    )
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Trained:
    """A reward model of one template's shape, and what training's evaluation gave each answer."""

    def __init__(self, shape: str, folder: Path, captured: Any) -> None:
        self.shape, self.folder = shape, folder
        self.run = folder / "run of it"
        self.pairs = write(folder / "pairs.jsonl", rows())
        settings = ["--model_name_or_path", str(make_model(folder / "model", shape)), "--dataset_path", self.pairs]
        settings += ["--eval_dataset_path", self.pairs, "--output_dir", str(self.run), "--bf16", "false"]
        settings += ["--dataset_cache_dir", str(folder / "cache"), "--max_steps", "4", "--learning_rate", "5e-3"]
        done = train_here([*settings, "--sample_scores", "0", "--disable_tqdm"], captured)
        assert done.code == 0, done.output[-3000:]
        self.scorer = RewardScorer.from_pretrained(self.run, device="cpu")
        lines = {line["id"]: line["rewards"] for line in read_lines(self.run / "run" / "evaluation_scores.jsonl")}
        self.expected = [reward for row in rows() for reward in lines[row["id"]]]
        self.prompts: list[Conversation] = [row["prompt"] for row in rows() for _ in range(2)]
        self.answers: list[Conversation] = [row[side] for row in rows() for side in ("chosen", "rejected")]

    def texts(self) -> list[str]:
        """What a policy that stops at the end of its turn has written, decoded with its prompt."""
        return [
            f"{self.scorer.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)}"
            f"{answer[0]['content']}{SHAPES[self.shape][3]}"
            for prompt, answer in zip(self.prompts, self.answers, strict=True)
        ]

    def command(self, name: str, lines: list[dict[str, Any]], *words: str) -> list[dict[str, Any]]:
        """The rows that `rm-scale NAME` writes for these rows."""
        output = self.folder / f"{name}.out.jsonl"
        given = ["--input", write(self.folder / f"{name}.jsonl", lines), "--output", str(output), "--overwrite", *words]
        assert main([name, "--model", str(self.run), "--device", "cpu", *given]) == 0
        return read_lines(output)


@pytest.fixture(scope="module", params=TEN)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trained once per shape; module-wide, so that pytest runs all doors of one shape together."""
    return request.param, tmp_path_factory.mktemp(str(request.param))


_MADE: dict[str, Trained] = {}


@pytest.fixture
def model(trained: tuple[str, Path], capfd: pytest.CaptureFixture[str]) -> Trained:
    shape, folder = trained
    if shape not in _MADE:
        _MADE[shape] = Trained(shape, folder, capfd)
    return _MADE[shape]


def score_messages(model: Trained) -> list[float]:
    both = zip(model.prompts, model.answers, strict=True)
    lines = [{"messages": prompt + answer} for prompt, answer in both]
    return [line["score"] for line in model.command("score", lines)]


def score_prompt_and_completion(model: Trained) -> list[float]:
    both = zip(model.prompts, model.answers, strict=True)
    lines = [{"prompt": prompt, "completion": answer[0]["content"]} for prompt, answer in both]
    return [line["score"] for line in model.command("score", lines)]


def score_texts(model: Trained) -> list[float]:
    return [line["score"] for line in model.command("score", [{"text": text} for text in model.texts()])]


def rank(model: Trained) -> list[float]:
    lines = [{"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]]} for row in rows()]
    found = []
    for line in model.command("rank", lines):
        placed = dict(zip(line["order"], line["scores"], strict=True))
        found += [placed[0], placed[1]]
    return found


def evaluate(model: Trained) -> list[float]:
    output = model.folder / "eval"
    words = ["eval", "--model", str(model.run), "--dataset_path", model.pairs, "--device", "cpu", "--overwrite"]
    assert main([*words, "--output", str(output), "--dataset_cache_dir", str(model.folder / "cache")]) == 0
    lines = {line["id"]: line["rewards"] for line in read_lines(output / "evaluation_scores.jsonl")}
    return [reward for row in rows() for reward in lines[row["id"]]]


def reward_by_function(model: Trained) -> list[float]:
    return reward_function(model.run, device="cpu")(model.prompts, model.answers)  # type: ignore[return-value]


def serve(model: Trained) -> list[float]:
    """All doors of the server, and the two ways in which our own code asks it."""
    texts = model.texts()
    with served(model.scorer) as (url, _):

        def post(path: str, body: Any) -> Any:
            answer = httpx.post(url + path, json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            return answer.json()

        both = zip(model.prompts, model.answers, strict=True)
        found = {
            "/score messages": post("/score", {"items": [{"messages": p + a} for p, a in both]})["scores"],
            "/score texts": post("/score", {"items": [{"text": text} for text in texts]})["scores"],
            "/get_reward": post("/get_reward", {"query": texts})["rewards"],
            "/classify": [row["probs"][0] for row in post("/classify", {"input": texts})["data"]],
            "/pooling": [row["data"][0] for row in post("/pooling", {"input": texts})["data"]],
            "RemoteScorer": RemoteScorer(url).score(model.prompts, model.answers),
            "reward function": reward_function(url)(model.prompts, model.answers),
        }
    for door, scores in found.items():
        assert scores == pytest.approx(model.expected, abs=1e-5), door
    return found["/score messages"]


DOORS: list[Callable[[Trained], list[float]]] = [
    score_messages,
    score_prompt_and_completion,
    score_texts,
    rank,
    evaluate,
    reward_by_function,
    serve,
]


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_one_conversation_has_one_score(model: Trained, door: Callable[[Trained], list[float]]) -> None:
    assert len({round(score, 6) for score in model.expected}) == len(model.expected), "scores that tell answers apart"
    assert door(model) == pytest.approx(model.expected, abs=1e-5)


def test_grpo_by_path_gives_the_same(model: Trained, tiny_model: Path) -> None:
    """TRL's own code: the tokenizer's template, no further special tokens."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    arguments = GRPOConfig(
        output_dir=str(model.folder / "grpo"),
        per_device_train_batch_size=4,
        num_generations=4,
        report_to="none",
        bf16=False,
        use_cpu=True,
    )
    trainer = GRPOTrainer(
        model=str(tiny_model),
        reward_funcs=[str(model.run)],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": TURNS}] * 4),
    )
    inputs = [{"prompt": prompt} for prompt in model.prompts]
    found = trainer._calculate_rewards(inputs, model.prompts, model.answers, [[1]] * len(inputs))
    assert found[:, 0].tolist() == pytest.approx(model.expected, abs=1e-5)


def test_a_conversation_without_an_answer_is_refused_by_one_name(model: Trained) -> None:
    asked = model.scorer.tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    with served(model.scorer) as (url, _):
        answers = [
            httpx.post(f"{url}/get_reward", json={"query": [asked]}, timeout=60),
            httpx.post(f"{url}/classify", json={"input": [asked]}, timeout=60),
            httpx.post(f"{url}/pooling", json={"input": [asked]}, timeout=60),
            httpx.post(f"{url}/score", json={"items": [{"text": asked}]}, timeout=60),
        ]
    assert {(answer.status_code, answer.json()["reason"]) for answer in answers} == {(422, "unfinished_text")}
    lines = model.command("score", [{"text": asked}, {"text": model.texts()[0]}], "--max_rejected_share", "1")
    assert lines[0]["score"] is None and lines[0]["error"].startswith("unfinished_text")
    assert lines[1]["score"] == pytest.approx(model.expected[0], abs=1e-5)

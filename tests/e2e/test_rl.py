"""TRL's trainers, best-of-n and OpenRLHF's protocol with our reward models: run, compared, and seen to learn."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from rm_scale.commands import serve
from rm_scale.errors import DataError
from rm_scale.files import free_port
from tests.support.launching import REPOSITORY, environment, read_lines, run
from tests.support.marks import mostly_long
from tests.support.tiny_runs import train_tiny

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]
EXAMPLES = REPOSITORY / "examples"
TRAINERS = ("grpo", "rloo", "online_dpo")
QUESTION = [{"role": "user", "content": "How many?"}]


def recipe(name: str, capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """Run a recipe as its header says, in this process; gives the JSON of its last line."""
    saved = sys.argv, list(sys.path)
    try:
        # Both as `python examples/NAME.py` has them.
        sys.argv = [f"examples/{name}.py", *words]
        sys.path.insert(0, str(EXAMPLES))
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = saved
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def task_words(task: Path, output: Path, *words: str) -> list[str]:
    files = ["--policy", str(task / "policy"), "--reward_model", str(task / "reward_model")]
    return [*files, "--prompts", str(task / "prompts.jsonl"), "--output_dir", str(output), *words]


def make_task(folder: Path, *words: str) -> Path:
    done = run([sys.executable, str(EXAMPLES / "tiny_task.py"), "--output_dir", str(folder), *words])
    assert done.code == 0, done.output[-3000:]
    return folder


@pytest.fixture(scope="module")
def plain_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain text, a Llama."""
    return make_task(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def chat_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Messages, a Qwen2."""
    return make_task(tmp_path_factory.mktemp("chat"), "--conversational", "--architecture", "qwen2")


@pytest.fixture(scope="module")
def padless_adapter(pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter on a Qwen2 whose own tokenizer pads with EOS, as many published ones do."""
    from transformers import AutoTokenizer

    from rm_scale.demo.assets import make_tiny_model

    folder = tmp_path_factory.mktemp("padless")
    base = make_tiny_model(folder / "base", "qwen2", vocab_size=400, hidden_size=32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(base)
    return train_tiny(base, pairs_file, folder / "run", "--use_peft")


# --- Learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", mostly_long(TRAINERS, short=["grpo"]))
def test_mean_reward_rises(name: str, plain_task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = recipe(name, capsys, *task_words(plain_task, tmp_path))
    assert found["steps"] == 40
    assert found["last_quarter"] > found["first_quarter"] + 2


@pytest.mark.long
def test_by_path_learns_on_conversations(chat_task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = recipe("rloo", capsys, *task_words(chat_task, tmp_path, "--by_path"))
    assert found["last_quarter"] > found["first_quarter"] + 1


@pytest.mark.long
def test_best_of_n_rises_with_n(plain_task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = recipe("best_of_n", capsys, *task_words(plain_task, tmp_path, "--num_samples", "6"))
    assert [point["n"] for point in points] == [1, 2, 3, 4, 5, 6]
    assert all(a["reward"] < b["reward"] for a, b in pairwise(points))
    assert len(read_lines(tmp_path / "best.jsonl")) == 6
    assert all(row["margin"] > 0 for row in read_lines(tmp_path / "pairs.jsonl"))


# --- By path and by function: the same numbers -----------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("name", TRAINERS)
def test_conversations_go_the_same_way_by_path(
    name: str, chat_task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every reward decides what is sampled next, so equal means over some steps are equal rewards."""
    words = task_words(chat_task, tmp_path, "--max_steps", "5")
    by_function = recipe(name, capsys, *words)
    by_path = recipe(name, capsys, *words, "--by_path")
    assert len(by_path["rewards"]) == 5
    assert by_path["rewards"] == pytest.approx(by_function["rewards"], abs=1e-4)


def grpo_trainer(
    policy: Path, output: Path, rewards: list[Any], processing: list[Any] | None = None, bf16: bool = False
) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    arguments = GRPOConfig(
        output_dir=str(output),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=bf16,
        use_cpu=True,
    )
    prompts = Dataset.from_list([{"prompt": QUESTION}] * 4)
    return GRPOTrainer(
        model=str(policy),
        reward_funcs=rewards,
        args=arguments,
        train_dataset=prompts,
        reward_processing_classes=processing,
    )


def rewards_in_trl(trainer: Any, prompts: list[Any], completions: list[Any]) -> torch.Tensor:
    """What TRL's own code gives these texts, one column per reward function."""
    inputs = [{"prompt": prompt} for prompt in prompts]
    rewards: torch.Tensor = trainer._calculate_rewards(inputs, prompts, completions, [[1]] * len(prompts))
    return rewards


def conversations(scorer: Any) -> tuple[list[Any], list[Any]]:
    """System prompt, several turns, unicode, nothing said, the longest text there may be, and one beyond."""
    system = [{"role": "system", "content": "Be brief."}, *QUESTION]
    turns = [*QUESTION, {"role": "assistant", "content": "12"}, {"role": "user", "content": "Sure?"}]
    limit = scorer.encoder.rules.max_length

    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    # A space and a digit are a token each.
    used = len(scorer.encoder.encode(QUESTION, said("")))
    longest = said("7" * (limit - used))
    assert len(scorer.encoder.encode(QUESTION, longest)) == limit
    prompts = [system, turns, QUESTION, QUESTION, QUESTION, QUESTION]
    return prompts, [
        said("34"),
        said("Yes, 12."),
        said("数 42 🎉 é"),
        said(""),
        longest,
        said("7" * (limit - used + 1)),
    ]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["llama", "llama adapter", "qwen2", "qwen2 adapter"])
def test_grpo_by_path_is_the_contract_on_conversations(
    kind: str,
    full_run: Path,
    lora_run: Path,
    chat_task: Path,
    padless_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """System prompts, turns, unicode, empty, at the limit: equal. Beyond it TRL scores what the contract refuses."""
    from transformers import AutoTokenizer

    from rm_scale.inference.reward_function import reward_function

    folders = {"llama": full_run, "llama adapter": lora_run, "qwen2 adapter": padless_adapter}
    folder = folders.get(kind, chat_task / "reward_model")
    ours = reward_function(folder, device="cpu", name="ours")
    # An adapter by path would be read with its base's tokenizer; see the test below.
    processing = [AutoTokenizer.from_pretrained(folder), None]
    trainer = grpo_trainer(chat_task / "policy", tmp_path, [str(folder), ours], processing)
    prompts, completions = conversations(ours.scorer())
    by_path, by_function = rewards_in_trl(trainer, prompts, completions).T.tolist()
    expected = ours.scorer().score(prompts[:-1], completions[:-1])
    assert by_path[:-1] == pytest.approx(expected, abs=1e-4)
    assert by_function[:-1] == pytest.approx(expected, abs=1e-5)
    assert by_path[-1] == by_path[-1] and by_function[-1] != by_function[-1]  # a number, and NaN


def test_trl_reads_an_adapter_with_the_tokenizer_of_its_base(
    padless_adapter: Path, chat_task: Path, tmp_path: Path
) -> None:
    """Padding with EOS, TRL reads the reward one token early and says nothing: docs/rl.md warns of it."""
    from transformers import AutoTokenizer

    from rm_scale.inference.reward_function import reward_function

    ours = reward_function(padless_adapter, device="cpu", name="ours")
    said = [[{"role": "assistant", "content": text}] for text in ("12", "no number at all")]
    for processing, equal in ((None, False), ([AutoTokenizer.from_pretrained(padless_adapter), None], True)):
        trainer = grpo_trainer(chat_task / "policy", tmp_path, [str(padless_adapter), ours], processing)
        by_path, by_function = rewards_in_trl(trainer, [QUESTION] * 2, said).T.tolist()
        assert (by_path == pytest.approx(by_function, abs=1e-4)) is equal


@pytest.mark.long
def test_bf16_training_rounds_rewards_by_path(chat_task: Path, tmp_path: Path) -> None:
    """`bf16`, TRL's default, puts a model by path under autocast, its head included; the function stays in fp32."""
    from rm_scale.inference.reward_function import reward_function

    ours = reward_function(chat_task / "reward_model", device="cpu", name="ours")
    trainer = grpo_trainer(chat_task / "policy", tmp_path, [str(chat_task / "reward_model"), ours], bf16=True)
    said = [[{"role": "assistant", "content": text}] for text in ("12", "no", "1 2 3 four")]
    by_path, by_function = rewards_in_trl(trainer, [QUESTION] * 3, said).T
    assert torch.equal(by_path, by_path.bfloat16().float())
    assert by_function.tolist() == pytest.approx(ours.scorer().score([QUESTION] * 3, said), abs=1e-5)
    assert 1e-4 < float((by_path - by_function).abs().max()) < 0.1


@pytest.mark.long
def test_plain_text_by_path_lacks_the_end(plain_task: Path, tmp_path: Path) -> None:
    """TRL tokenises prompt + completion without BOS and EOS; the contract, as in training, has both."""
    from rm_scale.inference.reward_function import plain_text_tokenizer, reward_function

    folder = plain_task / "reward_model"
    ours = reward_function(folder, device="cpu", name="ours")
    trainer = grpo_trainer(plain_task / "policy", tmp_path, [str(folder), ours])
    prompts = ["Human: How many?\nAssistant:"] * 3
    completions = [" 1234", " no number", ""]
    by_path, by_function = rewards_in_trl(trainer, prompts, completions).T.tolist()
    scorer = ours.scorer()
    assert by_function == pytest.approx(scorer.score(prompts, completions), abs=1e-5)
    bare = [p + c for p, c in zip(prompts, completions, strict=True)]
    tokens = scorer.tokenizer(bare, add_special_tokens=False)["input_ids"]
    assert by_path == pytest.approx(scorer.score_tokens(tokens), abs=1e-4)
    assert max(abs(a - b) for a, b in zip(by_path, by_function, strict=True)) > 0.1
    trainer = grpo_trainer(plain_task / "policy", tmp_path, [str(folder)], [plain_text_tokenizer(folder)])
    assert rewards_in_trl(trainer, prompts, completions)[:, 0].tolist() == pytest.approx(by_function, abs=1e-4)
    with pytest.raises(DataError, match=r"is for plain text, and these prompts are messages\. Fix: reward_processing"):
        rewards_in_trl(trainer, [QUESTION], [[{"role": "assistant", "content": "1"}]])


@pytest.mark.long
def test_logged_rewards_are_the_scorers(chat_task: Path, tmp_path: Path) -> None:
    """What TRL logs by path and by function, for the texts that it generated itself."""
    from rm_scale.inference.reward_function import reward_function
    from rm_scale.inference.scoring.scorer import RewardScorer

    folder = chat_task / "reward_model"
    seen: list[tuple[Any, Any]] = []

    def witness(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        seen.append((prompts, completions))
        return [0.0] * len(prompts)

    rewards = [str(folder), reward_function(folder, device="cpu", name="ours"), witness]
    trainer = grpo_trainer(chat_task / "policy", tmp_path, rewards)
    trainer.train()
    logged = [line for line in trainer.state.log_history if "rewards/ours/mean" in line]
    assert len(logged) == len(seen) == 2
    scorer = RewardScorer.from_pretrained(folder, device="cpu")
    for line, (prompts, completions) in zip(logged, seen, strict=True):
        mean = sum(scorer.score(prompts, completions)) / len(prompts)
        assert line["rewards/reward_model/mean"] == pytest.approx(mean, abs=1e-4)
        assert line["rewards/ours/mean"] == pytest.approx(mean, abs=1e-4)
        assert line["rewards/ours/unscorable"] == 0


def test_what_has_no_score_is_left_out(plain_task: Path, tmp_path: Path) -> None:
    """GRPO excludes it; online DPO would call it 0, so our function stops there."""
    from rm_scale.inference.reward_function import reward_function

    folder = plain_task / "reward_model"
    long = " 7" * 200
    ours = reward_function(folder, device="cpu")
    trainer = grpo_trainer(plain_task / "policy", tmp_path, [ours])
    rewards = rewards_in_trl(trainer, ["a", "a"], [" 1", long])[:, 0]
    assert rewards.isnan().tolist() == [False, True]
    assert trainer._pending_metrics["rewards/reward_model/unscorable"] == [0.5]
    trained = {"trainer_state": None}  # what online DPO gives beside the texts
    with pytest.raises(DataError, match=r"would count that as 0, .*too long to be scored.* Fix: .*unscorable=-3\.0"):
        ours(["a", "a"], [" 1", long], **trained)
    assert reward_function(folder, device="cpu", unscorable=-9.0)(["a"], [long], **trained) == [-9.0]


# --- Over HTTP -------------------------------------------------------------------------------------------------------


@contextmanager
def serving(model: Path, log: Path) -> Iterator[str]:
    """The address of a server, which is stopped at the end."""
    port = free_port()
    command = [sys.executable, "-m", "rm_scale.cli", "serve", "--model", str(model), "--port", str(port)]
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment(), stdout=output, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 600
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            try:
                if httpx.get(f"{url}/ready", timeout=30).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait(600)


@pytest.fixture(scope="module")
def server(plain_task: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serves the plain task's reward model."""
    with serving(plain_task / "reward_model", tmp_path_factory.mktemp("server") / "log.txt") as url:
        yield url


@pytest.mark.long
def test_remote_scores_are_the_models(server: str, plain_task: Path) -> None:
    from rm_scale.inference.remote_scorer import RemoteScorer, Unscorable
    from rm_scale.inference.reward_function import reward_function
    from rm_scale.inference.scoring.scorer import RewardScorer

    scorer = RewardScorer.from_pretrained(plain_task / "reward_model", device="cpu")
    remote = RemoteScorer(server, items_per_request=3)
    prompts: list[Any] = ["Human: Count.\nAssistant:"] * 7
    completions: list[Any] = [" 1", "", " 数 🎉", " 12", " a", ' [{"x": 1}]', '[{"role": "user", "content": "hi"}]']
    prompts.append([{"role": "system", "content": "s"}, *QUESTION])
    completions.append([{"role": "assistant", "content": "12"}])
    expected = scorer.score(prompts, completions)
    assert remote.score(prompts, completions) == pytest.approx(expected, abs=1e-4)
    assert remote.score(prompts, completions, normalized=True) == pytest.approx(scorer.normalize(expected), abs=1e-4)
    assert remote.score([], []) == []
    assert remote.info()["max_length"] == 128
    # What can't be scored is named by its place, and takes nothing else down.
    mixed = remote.try_score(["a"] * 5, [" 1", " 7" * 200, " 2", " \ud800", " 7" * 200])
    assert [one.reason for one in mixed if isinstance(one, Unscorable)] == ["over_long", "bad_unicode", "over_long"]
    assert [mixed[0], mixed[2]] == pytest.approx(scorer.score(["a", "a"], [" 1", " 2"]), abs=1e-4)
    given = reward_function(server)(["a"] * 2, [" 1", " 7" * 200])
    assert given == [pytest.approx(mixed[0], abs=1e-6), None]


@pytest.mark.long
def test_two_ranks_under_zero3_get_the_same_rewards_in_three_ways(
    server: str, plain_task: Path, tmp_path: Path
) -> None:
    """TRL shards the model that it loads by path, the function loads a whole one on each rank, both ask the server."""
    before = scores_served(server)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [str(plain_task), server, str(tmp_path)]
    env = environment(ACCELERATE_USE_DEEPSPEED="true", PYTHONPATH=str(REPOSITORY))
    done = run([*command, str(REPOSITORY / "tests/support/rl_ranks.py"), *arguments], env=env, timeout=600)
    assert done.code == 0, done.output[-3000:]
    rewards = json.loads((tmp_path / "rewards.json").read_text())
    assert len(rewards["function"]) == 3
    assert rewards["reward_model"] == pytest.approx(rewards["function"], abs=1e-4)
    assert rewards["remote"] == pytest.approx(rewards["function"], abs=1e-4)
    assert scores_served(server) - before == 2 * 8 * 3


def scores_served(server: str) -> int:
    lines = httpx.get(f"{server}/metrics").text.splitlines()
    return int(float(next(line.split()[1] for line in lines if line.startswith("rm_scale_scores_total"))))


def openrlhf_rewards(url: str, queries: list[str], prompts: list[str], labels: list[str]) -> list[float]:
    """What OpenRLHF's trainer does, from its documentation: post three lists, read `rewards`, try again on errors."""
    for _ in range(5):
        answer = httpx.post(url, json={"query": queries, "prompts": prompts, "labels": labels}, timeout=600)
        if answer.is_success:
            rewards: list[float] = answer.json()["rewards"]
            return rewards
        time.sleep(0.1)
    raise AssertionError(f"{answer.status_code} {answer.text}")


def test_openrlhf_gets_the_contracts_rewards(server: str, plain_task: Path) -> None:
    """Queries are decoded with special tokens and, depending on the version, with padding on either side."""
    from rm_scale.inference.scoring.scorer import RewardScorer

    scorer = RewardScorer.from_pretrained(plain_task / "reward_model", device="cpu")
    tokenizer = scorer.tokenizer
    prompts = ["Human: Count.\nAssistant:", "Human: Which year was it?\nAssistant:"]
    responses = [" 123", " I do not know."]
    tokens = [scorer.encoder.encode(p, r) for p, r in zip(prompts, responses, strict=True)]
    decoded = tokenizer.batch_decode(tokens, skip_special_tokens=False)
    pad = tokenizer.pad_token * 2
    expected = scorer.score(prompts, responses)
    joined = [p + r for p, r in zip(prompts, responses, strict=True)]
    for queries in (decoded, [pad + text for text in decoded], [text + pad for text in decoded], joined):
        rewards = openrlhf_rewards(f"{server}/get_reward", queries, prompts, ["", ""])
        assert rewards == pytest.approx(expected, abs=1e-4)


# --- Recipes ---------------------------------------------------------------------------------------------------------


def test_the_openrlhf_recipe_starts_real_commands(tmp_path: Path) -> None:
    """Run with stand-ins for the two programs, which write down how they were called."""
    for name in ("rm-scale", "python3"):
        (tmp_path / name).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tmp_path / name).chmod(0o755)
    env = environment(PATH=f"{tmp_path}:{os.environ['PATH']}", MODEL="some/model", POLICY="p", PROMPTS="q.jsonl")
    script = str(EXAMPLES / "openrlhf_remote.sh")
    served = run([script, "serve"], env=env).output.split()
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    assert served.pop(0) == "serve"
    options = parser.parse_args(served)
    assert (options.model, options.port) == ("some/model", 5000)
    trained = run([script, "train", "--more"], env=env).output.split()
    address = trained[trained.index("--reward.remote_url") + 1]
    assert address == "http://127.0.0.1:5000/get_reward" and trained[-1] == "--more"
    wrong = run([script, "x"], env=env)
    assert wrong.code == 2 and "ERROR: x: serve or train. Fix:" in wrong.output


@pytest.mark.parametrize("name", [*TRAINERS, "best_of_n", "tiny_task"])
def test_commands_in_headers_are_understood(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every option that a recipe's header uses is one of that recipe."""
    text = (EXAMPLES / f"{name}.py").read_text().replace("\\\n", " ")
    with pytest.raises(SystemExit):
        recipe(name, capsys, "--help")
    shown = capsys.readouterr().out
    lines = [line for line in text.splitlines() if f"examples/{name}.py --" in line]
    assert lines
    options = {word for line in lines for word in line.split() if word.startswith("--")}
    assert [option for option in options if option not in shown] == []

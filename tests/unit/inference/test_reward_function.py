"""A reward model as a reward function: the contract's numbers, shaped as asked, loaded where and when it is called."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rm_scale.errors import ConfigError, DataError, ModelError
from rm_scale.inference.http_client import RemoteError
from rm_scale.inference.remote_scorer import RemoteScorer
from rm_scale.inference.reward_function import RewardFunction, reward_function
from rm_scale.inference.scoring.scorer import RewardScorer
from tests.support.launching import read_json

PROMPTS = ["What is 2 + 2?", "Say no.", "Say no."]
COMPLETIONS = [" 4", " no", ""]
LONG = " 7" * 1100


@pytest.fixture(scope="module")
def scorer(full_run: Path) -> RewardScorer:
    return RewardScorer.from_pretrained(full_run, device="cpu")


def test_rewards_are_the_scorers(full_run: Path, scorer: RewardScorer) -> None:
    ours = reward_function(full_run, device="cpu")
    expected = scorer.score(PROMPTS, COMPLETIONS)
    # What TRL gives besides, it gives by name.
    given = ours(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=[[1]] * 3, trainer_state=None)
    assert given == pytest.approx(expected, abs=1e-6)
    messages: list[Any] = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    said: list[Any] = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
    assert ours(messages, said) == pytest.approx(scorer.score(messages, said), abs=1e-6)
    tools: list[Any] = [[], None, None]
    assert ours(messages, said, tools=tools) == pytest.approx(scorer.score(messages, said, tools=tools), abs=1e-6)
    unwritten: list[Any] = [[{"name": "f"}], None, None]  # which this model's template does not write
    assert ours(messages, said, tools=unwritten) == [None, *ours(messages[1:], said[1:])]
    assert ours([], []) == []
    assert reward_function(scorer)(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-6)


MESSAGES: list[Any] = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
SAID: list[Any] = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
TOOLS: list[Any] = [[{"name": "f"}], None, None]


@pytest.mark.parametrize(
    ("tools", "told"),
    [
        (TOOLS[:2], "tools has 2 entries for 3 prompts: must have one each. Fix: "),
        ("[]", "tools is str: must be a list with an entry per prompt. Fix: "),
        ({"a": 1}, "tools is dict: must be"),
        (3, "tools is int: must be"),
    ],
)
def test_tools_that_fit_no_prompts_are_refused(scorer: RewardScorer, tools: Any, told: str) -> None:
    for call in (reward_function(scorer), scorer.score, RemoteScorer("http://127.0.0.1:1").score):
        with pytest.raises(DataError, match=re.escape(told)):
            call(MESSAGES, SAID, tools=tools)


@pytest.mark.parametrize(
    ("prompts", "column", "values"),
    [
        (PROMPTS, "tools", TOOLS),
        (MESSAGES, "system", ["", None, "Be short."]),
        (MESSAGES, "images", ([], ["a.png"], [])),
        (MESSAGES, "chat_template_kwargs", [{"enable_thinking": False}] * 3),
        (PROMPTS, "documents", [["The map shows 3 km."]] * 3),
        (MESSAGES, "messages", [[{"role": "system", "content": "Be short."}]] * 3),
    ],
)
def test_columns_with_context_are_refused_by_name(scorer: RewardScorer, prompts: Any, column: str, values: Any) -> None:
    said = COMPLETIONS if prompts is PROMPTS else SAID
    with pytest.raises(DataError, match=rf"reward_model, prompt \d: {column} holds .* ignore_columns=\[...\]"):
        reward_function(scorer)(prompts, said, **{column: values})
    ignoring = reward_function(scorer, ignore_columns=[column])
    assert ignoring(prompts, said, **{column: values}) == reward_function(scorer)(prompts, said)


def test_other_columns_are_the_trainers_own(scorer: RewardScorer) -> None:
    given = {
        "answer": ["4", "no", "no"],
        "question": PROMPTS,
        "messages": [[*asked, {"role": "assistant", "content": "a reference"}] for asked in MESSAGES],
        "task": ["maths", "talk", "talk"],
        "prompt_ids": [[1, 2]] * 3,
        "chat_template_kwargs": [{}, None, {"enable_thinking": None}],
        "images": [None, [], []],
        "system": ["", None, " "],
        "trainer_state": object(),
        "image_processor": object(),
        "log_extra": print,
        "environments": None,
        "tools": [None, [], None],
    }
    assert reward_function(scorer)(MESSAGES, SAID, **given) == reward_function(scorer)(MESSAGES, SAID)


def test_a_trainers_mixed_precision_changes_nothing(scorer: RewardScorer) -> None:
    expected = reward_function(scorer)(PROMPTS, COMPLETIONS)
    with torch.autocast("cpu", torch.bfloat16):
        assert reward_function(scorer)(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-6)
        assert scorer.score(PROMPTS, COMPLETIONS) != pytest.approx(expected, abs=1e-6)


def test_normalised_and_clipped(full_run: Path, scorer: RewardScorer) -> None:
    raw = scorer.score(PROMPTS, COMPLETIONS)
    normal = scorer.normalize(raw)
    assert reward_function(scorer, normalized=True)(PROMPTS, COMPLETIONS) == pytest.approx(normal, abs=1e-6)
    low, middle, high = sorted(normal)
    bounds = (middle - (middle - low) / 2, middle + (high - middle) / 2)
    clipped = [min(max(value, bounds[0]), bounds[1]) for value in normal]
    shaped = reward_function(full_run, device="cpu", normalized=True, clip=bounds)
    assert shaped(PROMPTS, COMPLETIONS) == pytest.approx(clipped, abs=1e-6)
    assert reward_function(scorer, clip=1e-3)(PROMPTS, COMPLETIONS) == [
        pytest.approx(1e-3 if value > 0 else -1e-3) for value in raw
    ]


def test_what_can_not_be_scored(scorer: RewardScorer, caplog: pytest.LogCaptureFixture) -> None:
    """None by default; a penalty is not clipped; the others are scored all the same; the log says it once."""
    texts = [" 4", LONG, " no", LONG]
    expected = scorer.score(["a", "a"], [" 4", " no"])
    metrics: dict[str, float] = {}
    ours = reward_function(scorer)
    with caplog.at_level("WARNING", logger="rm_scale"):
        for _ in range(2):
            given = ours(["a"] * 4, texts, log_metric=metrics.__setitem__)
    assert given == [pytest.approx(expected[0], abs=1e-6), None, pytest.approx(expected[1], abs=1e-6), None]
    assert metrics == {"rewards/reward_model/unscorable": 0.5}
    told = [record.getMessage() for record in caplog.records if "reward function" in record.getMessage()]
    assert len(told) == 1 and "too long to be scored" in told[0] and "It gets no reward" in told[0]
    assert reward_function(scorer, clip=0.1, unscorable=-9)(["a"], [LONG]) == [-9]
    # Both are given to TRL by this name; without `log_metric` it would count None as 0.
    with pytest.raises(DataError, match=r"would count that as 0, which may be better than all others: a text is too l"):
        ours(["a"], [LONG], trainer_state=object())


def test_empty_completions(scorer: RewardScorer) -> None:
    said: list[Any] = [[{"role": "assistant", "content": text}] for text in ("", " \n", "a")]
    asked: list[Any] = [[{"role": "user", "content": "q"}]] * 3
    model = scorer.score(["q"] * 3, ["", " \n", "a"])
    assert reward_function(scorer)(["q"] * 3, ["", " \n", "a"]) == pytest.approx(model, abs=1e-6)
    assert reward_function(scorer, empty=-2.0)(["q"] * 3, ["", " \n", "a"])[:2] == [-2.0, -2.0]
    assert reward_function(scorer, empty=None)(asked, said)[:2] == [None, None]
    with pytest.raises(DataError, match=r"no reward, .* a completion is empty\. Fix: .*unscorable=-3\.0.* for empty"):
        reward_function(scorer, empty=None)(["q"], [""], trainer_state=object())
    calls: list[Any] = [[{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]]
    assert reward_function(scorer, empty=-2.0)._reward(calls[0], 1.5) == 1.5


def test_names(full_run: Path, scorer: RewardScorer, tmp_path: Path) -> None:
    """TRL logs rewards/NAME/mean; by path NAME is the folder's."""
    (tmp_path / "helpful").symlink_to(full_run)
    assert reward_function(f"{tmp_path}/helpful/").__name__ == "helpful"
    assert reward_function(full_run, name="mine").__name__ == "mine"
    assert reward_function(scorer).__name__ == "reward_model"
    assert reward_function("http://127.0.0.1:1").__name__ == "remote_reward"


def test_loaded_at_the_first_call_and_pickled_without_the_model(full_run: Path, scorer: RewardScorer) -> None:
    ours = reward_function(full_run, device="cpu", clip=100)
    assert ours._scorer is None
    expected = ours(PROMPTS, COMPLETIONS)
    assert ours._scorer is not None
    data = pickle.dumps(ours)
    assert len(data) < 5000
    copied: RewardFunction = pickle.loads(data)
    assert copied._scorer is None and copied.__name__ == ours.__name__
    assert copied(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-6)
    # A process that was forked from one that had loaded loads for itself.
    kept = ours._scorer
    ours._pid += 1
    assert ours.scorer() is not kept


def test_loading_leaves_the_trainers_random_numbers_alone(full_run: Path, lora_run: Path) -> None:
    """A resumed run loads at another step than the uninterrupted one."""
    for folder in (full_run, lora_run):
        torch.manual_seed(5)
        state = torch.get_rng_state()
        reward_function(folder, device="cpu")(PROMPTS, COMPLETIONS)
        assert torch.equal(torch.get_rng_state(), state)


def test_loaded_whole_while_a_zero3_run_is_going_on(full_run: Path, scorer: RewardScorer) -> None:
    """Otherwise transformers would shard the reward model over the policy's ranks, with nobody to gather it."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    kept = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    assert is_deepspeed_zero3_enabled()
    ours = reward_function(full_run, device="cpu")
    assert ours(PROMPTS, COMPLETIONS) == pytest.approx(scorer.score(PROMPTS, COMPLETIONS), abs=1e-6)
    assert all(parameter.numel() > 0 for parameter in ours.scorer().model.parameters())
    assert is_deepspeed_zero3_enabled()
    del kept


def test_wrong_requests_are_explained(full_run: Path, tiny_model: Path, scorer: RewardScorer, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is a LlamaForCausalLM, which has no scalar head: not a reward model"):
        reward_function(tiny_model)
    with pytest.raises(ModelError, match=r"there is no such folder\. Fix: give a run's output directory"):
        reward_function(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"clip=\(1, 1\): no reward lies within\. Fix: a positive number, or \(low"):
        reward_function(scorer, clip=(1, 1))
    with pytest.raises(ConfigError, match=r"clip=-2: no reward lies within"):
        reward_function(scorer, clip=-2)
    with pytest.raises(ConfigError, match=r"unscorable='x': must be a finite number, or None\. Fix: -3\.0"):
        reward_function(scorer, unscorable="x")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"empty=nan: must be a finite number, or None, or \"score\"\."):
        reward_function(scorer, empty=float("nan"))
    with pytest.raises(ConfigError, match=r"device: belongs to the scorer, which is there already"):
        reward_function(scorer, device="cpu")
    with pytest.raises(RemoteError, match="is no address of a server"):
        reward_function("http://")
    with pytest.raises(DataError, match="2 prompts and 1 completions"):
        reward_function(scorer)(["a", "b"], ["c"])
    unknown = replace(scorer.contract, score_mean=None, score_std=None)
    shutil.copytree(full_run, tmp_path / "unknown", ignore=shutil.ignore_patterns("run"))
    unknown.save(tmp_path / "unknown")
    assert read_json(tmp_path / "unknown" / "scoring_contract.json")["score_mean"] is None
    with pytest.raises(ModelError, match=r"no score_mean and score_std .* Fix: normalized=False, or train with eval_"):
        reward_function(tmp_path / "unknown", normalized=True)


def test_a_server_takes_the_same_options() -> None:
    ours = reward_function("http://127.0.0.1:1", token_env="MINE", max_retries=0, clip=1)
    assert isinstance(ours.source, RemoteScorer)
    assert (ours.source.client.token_env, ours.shape.clip) == ("MINE", (-1.0, 1.0))
    with pytest.raises(RemoteError, match="no score after 1 tries"):
        ours(["a"], ["b"])
    assert json.dumps(reward_function("http://127.0.0.1:1", normalized=True).shape.normalized) == "true"

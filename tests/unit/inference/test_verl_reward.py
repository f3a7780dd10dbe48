"""`examples/verl_reward.py`, called as verl 0.9.1's reward managers call a custom reward function.

tests/compat/verl.sh lets those managers themselves call it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rm_scale.errors import DataError
from rm_scale.inference.scoring.scorer import RewardScorer
from tests.support.launching import REPOSITORY
from tests.support.serving import served

PROMPTS: list[Any] = ["2 + 2 =", [{"role": "user", "content": "Hi"}], np.array([{"role": "user", "content": "Hi"}])]
ANSWERS = [" 4", "Hello", ""]


@pytest.fixture(scope="module")
def example() -> Any:
    path = REPOSITORY / "examples" / "verl_reward.py"
    spec = importlib.util.spec_from_file_location("verl_reward", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scorer(lora_run: Path) -> RewardScorer:
    return RewardScorer.from_pretrained(lora_run, device="cpu")


@pytest.fixture(scope="module", params=["folder", "server"])
def reward_model(request: pytest.FixtureRequest, lora_run: Path, scorer: RewardScorer) -> Iterator[str]:
    if request.param == "folder":
        yield str(lora_run)
    else:
        with served(scorer) as (url, _):
            yield url


@pytest.fixture
def expected(scorer: RewardScorer) -> list[float]:
    answers = [{"role": "assistant", "content": answer} for answer in ANSWERS]
    asked = [{"role": "user", "content": "Hi"}]
    return [scorer.score_one(PROMPTS[0], ANSWERS[0]), *(scorer.score_one(asked, [one]) for one in answers[1:])]


def rows(prompts: list[Any], answers: list[str]) -> dict[str, Any]:
    """The arguments of `BatchRewardManager`."""
    infos = np.array([{"prompt": prompt, "rollout_reward_scores": {}} for prompt in prompts], dtype=object)
    sources = np.array(["mine"] * len(prompts), dtype=object)
    return {
        "data_sources": sources,
        "solution_strs": answers,
        "ground_truths": [None] * len(answers),
        "extra_infos": infos,
    }


def test_a_batch(example: Any, reward_model: str, expected: list[float]) -> None:
    found = example.compute_scores(**rows(PROMPTS, ANSWERS), reward_model=reward_model)
    assert found == pytest.approx(expected, abs=1e-5)
    clipped = example.compute_scores(**rows(PROMPTS, ANSWERS), reward_model=reward_model, clip=0.1)
    assert clipped == pytest.approx([min(max(one, -0.1), 0.1) for one in expected], abs=1e-5)


def test_one_response(example: Any, reward_model: str, expected: list[float]) -> None:
    """As `NaiveRewardManager` does, an engine of verl's own beside it."""
    engine = {"reward_router_address": "10.0.0.1:1", "reward_model_tokenizer": None}
    info = {"question": "2 + 2 =", "num_turns": 2, "rollout_reward_scores": {}}
    words = {"reward_model": reward_model, "prompt_key": "question", **engine}
    found = example.compute_score(data_source="x", solution_str=" 4", ground_truth="4", extra_info=info, **words)
    assert isinstance(found, float) and found == pytest.approx(expected[0], abs=1e-5)


def test_what_has_no_reward(example: Any, reward_model: str) -> None:
    long = rows(["a"], [" 7" * 2000])
    with pytest.raises(DataError, match=r"response ' 7 7.* can't be scored .* Fix: reward_kwargs\.unscorable=-3\.0"):
        example.compute_scores(**long, reward_model=reward_model)
    assert example.compute_scores(**long, reward_model=reward_model, unscorable=-3.0) == [-3.0]
    with pytest.raises(DataError, match=r"extra_info holds no 'text' \(it holds prompt, .*\)\. Fix: put the prompt"):
        example.compute_scores(**rows(["a"], ["b"]), reward_model=reward_model, prompt_key="text")

"""Rewards of rm_scale in verl 0.9: functions for `reward.custom_reward_function`.

Where the reward model is:
    rm-scale serve --model outputs/mine --host 0.0.0.0 --port 8000

Where verl is (it gives a reward function the response alone, so each row of its data has the prompt in `extra_info`):
    python3 -m verl.trainer.main_ppo ... \
        reward.custom_reward_function.path=examples/verl_reward.py \
        reward.custom_reward_function.name=compute_score \
        +reward.custom_reward_function.reward_kwargs.reward_model=http://HOST:8000 \
        +reward.custom_reward_function.reward_kwargs.unscorable=-3.0

`compute_score` is for what verl 0.9 names `naive`, `limited` and `dapo`, which ask for one response at a time, in many
threads. `compute_scores` takes many, as `BatchRewardManager` asks: `reward_manager=batch` of older verl, a name that
trainers of 0.9 no longer know. docs/rl.md says what was run, and how rm_scale is installed beside verl.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from rm_scale.errors import DataError
from rm_scale.inference.reward_function import RewardFunction, reward_function

_model_lock = threading.Lock()


def compute_score(
    data_source: Any, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any], **options: Any
) -> float:
    """Return the reward of one response; see `compute_scores`."""
    return compute_scores([data_source], [solution_str], [ground_truth], [extra_info], **options)[0]


def compute_scores(
    data_sources: Sequence[Any],
    solution_strs: Sequence[str],
    ground_truths: Sequence[Any],
    extra_infos: Sequence[Mapping[str, Any]],
    *,
    reward_model: str,
    unscorable: float | None = None,
    normalized: bool = False,
    clip: float | None = None,
    prompt_key: str = "prompt",
    reward_router_address: Any = None,
    reward_model_tokenizer: Any = None,
) -> list[float]:
    """Return the rewards of responses, in their order.

    Args:
        data_sources: of the rows; not read.
        solution_strs: responses, without special tokens.
        ground_truths: of the rows; not read.
        extra_infos: of the rows; each holds its prompt.
        reward_model: address of `rm-scale serve`, or the folder of a model, loaded in each process that asks.
        unscorable: reward of what the scoring contract can't score, above all what is too long; `None`: an error.
        normalized: mean 0 and standard deviation 1 over the model's evaluation set, instead of raw.
        clip: rewards are held within -clip and clip.
        prompt_key: of the prompt in `extra_infos`: text, or messages, as the reward model was trained on.
        reward_router_address: of an engine that verl has started; not read.
        reward_model_tokenizer: of that engine's model; not read.

    Raises:
        DataError: a row has no prompt, or a response has no reward.
        RemoteError: the server can't be reached, or refuses.
    """
    prompts = [_prompt(info, prompt_key) for info in extra_infos]
    completions = [
        solution if isinstance(prompt, str) else [{"role": "assistant", "content": solution}]
        for prompt, solution in zip(prompts, solution_strs, strict=True)
    ]
    # verl asks from several threads at once: a server puts them into batches, a model here takes them in turn.
    with nullcontext() if reward_model.startswith(("http://", "https://")) else _model_lock:
        rewards = _function(reward_model, unscorable, normalized, clip)(prompts, completions)
    if None in rewards:
        raise DataError(
            f"the response {solution_strs[rewards.index(None)][:80]!r} can't be scored (the log says why), and verl "
            "needs a number. Fix: reward_kwargs.unscorable=-3.0, say, or shorter prompts and responses."
        )
    return [float(reward) for reward in rewards if reward is not None]


@functools.cache
def _function(reward_model: str, unscorable: float | None, normalized: bool, clip: float | None) -> RewardFunction:
    return reward_function(reward_model, unscorable=unscorable, normalized=normalized, clip=clip)


def _prompt(info: Mapping[str, Any], key: str) -> str | list[Any]:
    found = (info or {}).get(key)
    if found is None or len(found) == 0:
        raise DataError(
            f"extra_info holds no {key!r} (it holds {', '.join(map(str, info or {})) or 'nothing'}). Fix: put the "
            "prompt into extra_info of the data, or name its key by reward_kwargs.prompt_key."
        )
    return found if isinstance(found, str) else list(found)

"""`reward_function`: a saved reward model, or a server, as the `reward_funcs` of TRL's GRPO, RLOO and online DPO."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rm_scale.data.encoding import TextEncoder, unscorable_text
from rm_scale.data.preference_group import Text
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.errors import ConfigError, DataError, ModelError
from rm_scale.inference.model_folder import local_folder, require_reward_model
from rm_scale.inference.remote_scorer import RemoteScorer, Unscorable
from rm_scale.inference.scoring.contract_scorer import ContractScorer, prompt_keys
from rm_scale.inference.scoring.encode_completions import (
    Completion,
    encode_completions,
    read_completions,
    refuse_unread_columns,
    tools_per_prompt,
)
from rm_scale.inference.scoring.scorer import RewardScorer
from rm_scale.logs import get_logger
from rm_scale.modeling.scoring_contract import CONTRACT_FILE, ScoringContract
from rm_scale.modeling.tokenizers import read_tokenizer

logger = get_logger(__name__)


@dataclass(frozen=True)
class RewardShape:
    """What becomes of scores on their way to the trainer.

    Attributes:
        normalized: mean 0 and standard deviation 1 over the reward model's evaluation set, instead of raw.
        clip: lowest and highest reward, after that.
        unscorable: reward of a completion that the contract can't score; `None`: none, TRL leaves it out.
        empty: reward of a completion without text; "score": what the model gives it.
    """

    normalized: bool = False
    clip: tuple[float, float] | None = None
    unscorable: float | None = None
    empty: float | Literal["score"] | None = "score"


class RewardFunction:
    """What `reward_function` returns: called by the trainer on each rank with that rank's completions.

    The model is loaded at the first call, in the process that calls; so the function can be pickled and costs nothing
    where it isn't called.

    Args:
        source: a folder, or a scorer.
        shape: what becomes of its scores.
        name: under which trainers log it.
        batch_size, max_tokens: of a forward pass, see `RewardScorer.score`.
        loading: for `RewardScorer.from_pretrained`.
        ignore_columns: columns of the trainer's data that are not read, whatever their name.
    """

    def __init__(
        self,
        source: Path | ContractScorer | RemoteScorer,
        shape: RewardShape,
        name: str,
        batch_size: int,
        max_tokens: int | None,
        loading: dict[str, Any],
        ignore_columns: Sequence[str] = (),
    ) -> None:
        self.source = source
        self.shape = shape
        self.__name__ = name
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.loading = loading
        self.ignore_columns = tuple(ignore_columns)
        self._scorer: ContractScorer | None = None
        self._pid = 0
        self._told: set[str] = set()

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **kwargs: Any) -> list[float | None]:
        """Rewards of completions, in their order.

        Args:
            prompts: texts or lists of messages.
            completions: as many, of the same kind.
            kwargs: what else the trainer passes: `tools`, a column of tool descriptions or of their JSON text, is used
                for the chat template; `log_metric` is told the share of completions without a score. Other columns of
                its data are not read.

        Raises:
            DataError: the lengths differ; a column holds context, as training would refuse it; or a completion has no
                reward and this trainer would count that as 0.
            RemoteError: the server returns no scores.
        """
        columns = {name: values for name, values in kwargs.items() if name not in self.ignore_columns}
        tools = tools_per_prompt(columns.get("tools"), len(prompts))
        refuse_unread_columns(prompts, completions, {**columns, "tools": tools}, self.__name__)
        found = self._try_score(prompts, completions, tools)
        rewards = [self._reward(one, found[place]) for place, one in enumerate(completions)]
        unscored = [one for one in found if isinstance(one, Unscorable)]
        self._tell(unscored)
        if callable(log_metric := kwargs.get("log_metric")):
            log_metric(f"rewards/{self.__name__}/unscorable", len(unscored) / max(1, len(found)))
        elif "trainer_state" in kwargs and None in rewards:
            raise DataError(_counted_as_zero(unscored, self.__name__))
        return rewards

    # --- One completion ----------------------------------------------------------------------------------------------

    def _reward(self, completion: Text, score: float | Unscorable) -> float | None:
        shape = self.shape
        if shape.empty != "score" and not _has_text(completion):
            return shape.empty
        if isinstance(score, Unscorable):
            return shape.unscorable
        return score if shape.clip is None else min(max(score, shape.clip[0]), shape.clip[1])

    def _tell(self, unscored: Sequence[Unscorable]) -> None:
        """Say each reason once: the share is logged at every step."""
        for one in unscored:
            if one.reason not in self._told:
                self._told.add(one.reason)
                given = "no reward" if self.shape.unscorable is None else f"the reward {self.shape.unscorable:g}"
                logger.warning(f"reward function {self.__name__}: {one.text} It gets {given}, and so will others.")

    # --- Many of them ------------------------------------------------------------------------------------------------

    def _try_score(
        self, prompts: Sequence[Text], completions: Sequence[Text], tools: Sequence[Any] | None
    ) -> list[float | Unscorable]:
        read = read_completions(prompts, completions, tools)
        if isinstance(self.source, RemoteScorer):
            return self._ask_server(self.source, read)
        scorer = self.scorer()
        encoded = encode_completions(scorer.encoder, read)
        keys = prompt_keys(
            ["" if isinstance(one, RejectedRow) else one[0] for one in read],
            [None if isinstance(one, RejectedRow) else one[2] for one in read],
        )
        good = [(ids, key) for ids, key in zip(encoded, keys, strict=True) if not isinstance(ids, RejectedRow)]
        # A trainer's mixed precision is not the contract's: inside it even the head would be rounded.
        kind = torch.device(scorer.device).type if isinstance(scorer, RewardScorer) else "cpu"
        with torch.autocast(kind, enabled=False):
            rewards = iter(
                scorer.try_score_tokens(
                    [ids for ids, _ in good], self.batch_size, [key for _, key in good], self.max_tokens
                )
            )
        found = [ids if isinstance(ids, RejectedRow) else next(rewards) for ids in encoded]
        return [_unscorable(one) if isinstance(one, RejectedRow) else self._scaled(scorer, one) for one in found]

    def _scaled(self, scorer: ContractScorer, reward: float) -> float:
        return scorer.normalize([reward])[0] if self.shape.normalized else reward

    def _ask_server(self, server: RemoteScorer, read: Sequence[Completion | RejectedRow]) -> list[float | Unscorable]:
        good = [one for one in read if not isinstance(one, RejectedRow)]
        scores = iter(
            server.try_score(
                [prompt for prompt, _, _ in good],
                [completion for _, completion, _ in good],
                [tools for _, _, tools in good],
                self.shape.normalized,
            )
        )
        return [_unscorable(one) if isinstance(one, RejectedRow) else next(scores) for one in read]

    def scorer(self) -> ContractScorer:
        """Return the model, loaded when it is first needed in this process.

        Raises:
            ModelError: the folder does not hold a reward model.
        """
        if isinstance(self.source, ContractScorer):
            return self.source
        assert isinstance(self.source, Path)
        if self._scorer is None or self._pid != os.getpid():
            # The trainer's random numbers must not depend on when this is: a resumed run loads at another step.
            with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
                self._scorer = RewardScorer.from_pretrained(self.source, **self.loading)
            self._pid = os.getpid()
            logger.info(f"reward function {self.__name__}: {self.source} on {self._scorer.device}")
        return self._scorer

    def __getstate__(self) -> dict[str, Any]:
        """To other processes goes the folder, not the model."""
        return {**self.__dict__, "_scorer": None}


def reward_function(
    model: str | Path | ContractScorer | RemoteScorer,
    *,
    normalized: bool = False,
    clip: float | tuple[float, float] | None = None,
    unscorable: float | None = None,
    empty: float | Literal["score"] | None = "score",
    name: str | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    ignore_columns: Sequence[str] = (),
    **options: Any,
) -> RewardFunction:
    """Return a reward model as a reward function of TRL's trainers.

        GRPOTrainer(model=..., reward_funcs=reward_function("outputs/mine"), ...)

    Texts become scores by the model's scoring contract, as everywhere else: EOS, template, padding and maximum length
    are those of training, whatever the trainer's own tokenizer does.

    Args:
        model: a run's output directory, an export or a hub name; the address of `rm-scale serve`, http://HOST:PORT; or
            a scorer. A folder is looked at now and loaded in each process at its first call.
        normalized: mean 0 and standard deviation 1 over the reward model's evaluation set, instead of raw.
        clip: rewards are held within -clip and clip, or (lowest, highest); after normalisation.
        unscorable: reward of a completion that the contract can't score, above all one that is over-long with its
            prompt. By default `None`: GRPO and RLOO then leave it out of the group's baseline and learn nothing from
            it. A number is a penalty, not clipped. Trainers that would count `None` as 0 (online DPO) are stopped with
            an error instead.
        empty: reward of a completion without text; by default what the model gives it.
        name: under which trainers log it, `rewards/NAME/mean`; default the folder's name, as for a model by path.
        batch_size: texts in a forward pass, see `RewardScorer.score`; not used with a server.
        max_tokens: tokens in a forward pass; not used with a server.
        ignore_columns: columns of the trainer's data that are not read. Without, one that holds context outside of the
            prompt (`system`, `documents`, `images`, `chat_template_kwargs`, ...) is an error, as in training.
        options: for `RewardScorer.from_pretrained` (`device`, `dtype`, ...), or for `RemoteScorer` (`token_env`, ...).

    Raises:
        ConfigError: an option makes no sense.
        ModelError: the folder holds no reward model; or normalized, and its contract has no mean and deviation.
        RemoteError: the address is none.
    """
    shape = RewardShape(normalized, _clip_bounds(clip), unscorable, empty)
    _check_numbers(shape)
    if isinstance(model, ContractScorer | RemoteScorer):
        if options:
            raise ConfigError([f"{key}: belongs to the scorer, which is there already." for key in options], _HEADING)
        default = "reward_model" if isinstance(model, ContractScorer) else "remote_reward"
        return RewardFunction(model, shape, name or default, batch_size, max_tokens, {}, ignore_columns)
    if isinstance(model, str) and model.startswith(("http://", "https://")):
        remote = RemoteScorer(model, **options)
        return RewardFunction(remote, shape, name or "remote_reward", batch_size, max_tokens, {}, ignore_columns)
    folder = local_folder(model)
    require_reward_model(folder)
    if normalized:
        _require_spread(folder)
    default = Path(model).name or folder.resolve().name
    return RewardFunction(folder, shape, name or default, batch_size, max_tokens, options, ignore_columns)


class PlainTextTokenizer:
    """What TRL needs of a tokenizer to score plain text by path as the contract does; see `plain_text_tokenizer`.

    Args:
        encoder: the contract's, with its tokenizer.
    """

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder
        self.pad_token_id = encoder.tokenizer.pad_token_id
        self.eos_token_id = encoder.tokenizer.eos_token_id

    def __call__(self, text: Sequence[str], add_special_tokens: bool = False, **padding: Any) -> Any:
        """Token ids of prompt + completion, ended and begun as in training whatever the trainer asks for.

        Raises:
            DataError: a text begins with a second BOS.
        """
        return self.encoder.tokenizer.pad(
            {"input_ids": [self.encoder.encode("", one) for one in text]},
            padding=padding.get("padding", True),
            padding_side="right",
            return_tensors=padding.get("return_tensors"),
        )

    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        """Conversations need no such tokenizer.

        Raises:
            DataError: always.
        """
        raise DataError(
            "plain_text_tokenizer is for plain text, and these prompts are messages. Fix: reward_processing_classes="
            "AutoTokenizer.from_pretrained(the reward model's folder), which follows the contract for messages."
        )


def plain_text_tokenizer(folder: str | Path) -> PlainTextTokenizer:
    """Return a tokenizer for TRL's `reward_processing_classes`, for a model given by path and plain-text prompts.

    By itself TRL tokenises prompt + completion without BOS and EOS, and so reads the reward somewhere else than
    training did. Give the path, rather than `reward_function`, where TRL shall shard the reward model (ZeRO-3, FSDP):

        GRPOTrainer(..., reward_funcs="outputs/mine", reward_processing_classes=plain_text_tokenizer("outputs/mine"))

    Nothing is held to the contract's maximum length here.

    Raises:
        ModelError: the folder holds no reward model with its contract.
    """
    found = local_folder(folder)
    require_reward_model(found)
    encoding = ScoringContract.load(found).encoding
    return PlainTextTokenizer(TextEncoder.from_settings(read_tokenizer(str(found)), encoding))


_HEADING = "the reward function can't be made"


def _clip_bounds(clip: float | tuple[float, float] | None) -> tuple[float, float] | None:
    if clip is None:
        return None
    low, high = (-clip, clip) if isinstance(clip, int | float) else clip
    if not low < high:
        raise ConfigError([f"clip={clip}: no reward lies within. Fix: a positive number, or (low, high)."], _HEADING)
    return float(low), float(high)


def _check_numbers(shape: RewardShape) -> None:
    problems = [
        f"{name}={value!r}: must be a finite number, or None{extra}."
        for name, value, extra in (("unscorable", shape.unscorable, ""), ("empty", shape.empty, ', or "score"'))
        if value is not None
        and value != ("score" if name == "empty" else None)
        and not (isinstance(value, int | float) and math.isfinite(value))
    ]
    if problems:
        raise ConfigError([f"{problem} Fix: -3.0" for problem in problems], _HEADING)


def _require_spread(folder: Path) -> None:
    """Refuse a model whose contract lacks mean and deviation of its scores, now rather than at the first step."""
    contract = ScoringContract.load(folder)
    if contract.score_mean is None or not contract.score_std:
        raise ModelError(
            f"{folder}: {CONTRACT_FILE} has no score_mean and score_std (the model was saved without an evaluation), "
            "so rewards can't be normalised. Fix: normalized=False, or train with eval_split_size or eval_dataset_path."
        )


def _unscorable(rejected: RejectedRow) -> Unscorable:
    return Unscorable(rejected.reason, unscorable_text(rejected))


def _has_text(completion: Text) -> bool:
    if isinstance(completion, str):
        return bool(completion.strip())
    return any(str(message.get("content") or "").strip() or message.get("tool_calls") for message in completion)


def _counted_as_zero(unscored: Sequence[Unscorable], name: str) -> str:
    why = unscored[0].text if unscored else "a completion is empty."
    return (
        f"reward function {name}: a completion has no reward, and this trainer (online DPO, or an older one) would "
        f"count that as 0, which may be better than all others: {why} Fix: reward_function(..., unscorable=-3.0), or "
        "another number below what completions get; the same for empty."
    )

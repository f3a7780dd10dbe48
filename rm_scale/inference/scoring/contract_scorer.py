"""`ContractScorer`: what every scorer does with texts by the scoring contract, wherever the model is computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast, overload

import torch
from transformers import PreTrainedTokenizerBase

from rm_scale.data.encoding import TextEncoder, unscorable_text
from rm_scale.data.preference_group import Text
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.errors import DataError, ModelError
from rm_scale.inference.scoring.encode_completions import encode_completions, read_completions
from rm_scale.modeling.known_scores import KnownScores
from rm_scale.modeling.scoring_contract import ScoringContract


class ContractScorer(ABC):
    """Turns texts into tokens as training did, and tokens into rewards as its subclass does.

    Args:
        tokenizer: the model's.
        contract: how a text becomes a score.
        device: where the model is computed.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, contract: ScoringContract, device: torch.device | str
    ) -> None:
        self.tokenizer = tokenizer
        self.contract = contract
        self.device = device
        self.encoder = TextEncoder.from_settings(tokenizer, contract.encoding)
        self.encoder.follow_training([golden.input_ids for golden in contract.golden_scores])

    @property
    @abstractmethod
    def dtype(self) -> str:
        """The type that the backbone is computed in, such as "float32"; "unknown" where nobody says it."""

    # --- Texts -------------------------------------------------------------------------------------------------------

    # A text is a sequence of texts too, so the two can't be told apart by type alone; at run time they can.
    @overload
    def score(  # type: ignore[overload-overlap]
        self,
        prompts: Text,
        completions: Text,
        batch_size: int = ...,
        tools: list[Any] | None = ...,
        max_tokens: int | None = ...,
        normalized: bool = ...,
    ) -> float: ...

    @overload
    def score(
        self,
        prompts: Text | Sequence[Text],
        completions: Sequence[Text],
        batch_size: int = ...,
        tools: Sequence[Any] | None = ...,
        max_tokens: int | None = ...,
        normalized: bool = ...,
    ) -> list[float]: ...

    def score(
        self,
        prompts: Text | Sequence[Text],
        completions: Text | Sequence[Text],
        batch_size: int = 8,
        tools: Sequence[Any] | None = None,
        max_tokens: int | None = None,
        normalized: bool = False,
    ) -> float | list[float]:
        """Return the rewards of `completions` given `prompts`, in their order.

        Args:
            prompts: texts or lists of messages; a single one is the prompt of all completions.
            completions: as many, of the same kind; or a single one.
            batch_size: sequences per forward pass.
            tools: tool descriptions for the chat template, a list per prompt (or `None`); of a single prompt its own.
            max_tokens: tokens per forward pass, instead of `batch_size`.
            normalized: mean 0 and standard deviation 1 over the evaluation set, instead of raw.

        Returns:
            A float for a single completion, else a list.

        Raises:
            DataError: the lengths differ, or a text can't be scored; says which one and why.
            ModelError: normalized, and the contract has no mean and standard deviation.
        """
        single = _is_one(completions)
        many = [cast(Text, completions)] if single else cast(Sequence[Text], completions)
        if single or _is_one(prompts):
            if not (_is_one(prompts) or prompts in ("", [])):
                raise DataError(f"{len(prompts)} prompts and a single completion. Fix: a completion per prompt.")
            prompts, tools = [cast(Text, prompts)] * len(many), None if tools is None else [tools] * len(many)
        rewards = self._score_lists(cast(Sequence[Text], prompts), many, tools, batch_size, max_tokens)
        rewards = self.normalize(rewards) if normalized else rewards
        return rewards[0] if single else rewards

    def _score_lists(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        tools: Sequence[list[Any] | None] | None,
        batch_size: int,
        max_tokens: int | None,
    ) -> list[float]:
        sequences, keys = [], []
        read = read_completions(prompts, completions, tools)
        for number, (one, found) in enumerate(zip(read, encode_completions(self.encoder, read), strict=True)):
            if isinstance(one, RejectedRow) or isinstance(found, RejectedRow):
                raise DataError(f"completion {number}: {unscorable_text(cast(RejectedRow, found))}")
            sequences.append(found)
            keys += prompt_keys([one[0]], [one[2]])
        return self.score_tokens(sequences, batch_size, keys, max_tokens)

    def score_one(self, prompt: Text, completion: Text, tools: list[Any] | None = None) -> float:
        """Return the raw reward of one completion.

        Raises:
            DataError: it can't be scored.
        """
        return self.score([prompt], [completion], tools=[tools])[0]

    def normalize(self, rewards: Sequence[float]) -> list[float]:
        """Shift and scale rewards to mean 0 and standard deviation 1 over the evaluation set.

        Raises:
            ModelError: the contract has no mean and standard deviation.
        """
        mean, std = self.contract.score_mean, self.contract.score_std
        if mean is None or not std:
            raise ModelError(
                "the scoring contract has no score_mean and score_std (the model was saved without an evaluation), so "
                "scores can't be normalised. Fix: raw scores, or train with eval_split_size or eval_dataset_path."
            )
        return [(reward - mean) / std for reward in rewards]

    def score_texts(self, texts: Sequence[str], batch_size: int = 8, max_tokens: int | None = None) -> list[float]:
        """Return the raw rewards of whole texts, prompt and response in one, as a chat template or a policy wrote them.

        A text that stops short, e.g. at the end-of-turn token, gets the end that training gave it; see
        `TextEncoder.encode_rendered`.

        Args:
            texts: whole texts.
            batch_size: sequences per forward pass.
            max_tokens: tokens per forward pass, instead of `batch_size`.

        Raises:
            DataError: a text can't be scored; says which one and why.
        """
        sequences = []
        for number, text in enumerate(texts):
            found = self.encoder.encode_rendered(text)
            if isinstance(found, RejectedRow):
                raise DataError(f"text {number}: {unscorable_text(found)}")
            sequences.append(found)
        return self.score_tokens(sequences, batch_size, max_tokens=max_tokens)

    # --- Token sequences ---------------------------------------------------------------------------------------------

    def score_tokens(
        self,
        sequences: Sequence[Sequence[int]],
        batch_size: int = 8,
        prompt_keys: Sequence[str] | None = None,
        max_tokens: int | None = None,
    ) -> list[float]:
        """Return the raw rewards of token sequences as `TextEncoder.encode` returns them, in their order.

        Identical ones are computed once and have the same reward to the last bit.

        Args:
            sequences: token ids.
            batch_size: sequences per forward pass; in packed rows as many tokens as these could have at most.
            prompt_keys: sequences with the same key share a prompt; default none do.
            max_tokens: tokens per forward pass, padding included, instead of `batch_size`; what is longer goes alone.

        Raises:
            DataError: a sequence is empty or refused by the server that scores it, or `batch_size` or `max_tokens` is
                below 1.
        """
        found = self.try_score_tokens(sequences, batch_size, prompt_keys, max_tokens)
        for place, one in enumerate(found):
            if isinstance(one, RejectedRow):
                raise DataError(f"text {place}: {unscorable_text(one)}")
        return cast("list[float]", found)

    def try_score_tokens(
        self,
        sequences: Sequence[Sequence[int]],
        batch_size: int = 8,
        prompt_keys: Sequence[str] | None = None,
        max_tokens: int | None = None,
    ) -> list[float | RejectedRow]:
        """Score as `score_tokens` does, but return for a sequence that the server refuses why, and score the others.

        Raises:
            DataError: a sequence is empty, or `batch_size` or `max_tokens` is below 1.
        """
        for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                what = "sequences" if name == "batch_size" else "tokens"
                raise DataError(f"{name}={value}: must be at least 1. Fix: {what} per forward pass, e.g. 8.")
        empty = next((place for place, sequence in enumerate(sequences) if not len(sequence)), None)
        if empty is not None:
            raise DataError(f"sequence {empty} has no tokens: there is none to read a reward at. Fix: leave it out.")
        if not sequences:
            return []

        def compute(places: list[int]) -> Sequence[float | RejectedRow]:
            keys = None if prompt_keys is None else [prompt_keys[place] for place in places]
            return self._score_different([sequences[place] for place in places], batch_size, keys, max_tokens)

        return KnownScores().score(sequences, compute)

    @abstractmethod
    def _score_different(
        self,
        sequences: Sequence[Sequence[int]],
        batch_size: int,
        prompt_keys: Sequence[str] | None,
        max_tokens: int | None,
    ) -> Sequence[float | RejectedRow]:
        """Return the raw rewards of token sequences that all differ, or why there is none."""


def _is_one(texts: Text | Sequence[Text]) -> bool:
    """Tell whether this is one text or conversation, rather than a list of them."""
    return isinstance(texts, str) or (len(texts) > 0 and isinstance(texts[0], Mapping))


def prompt_keys(prompts: Sequence[Text], tools: Sequence[list[Any] | None]) -> list[str]:
    """Return keys that are the same for texts with the same prompt and tools."""
    return [repr((prompt, tool)) for prompt, tool in zip(prompts, tools, strict=True)]

"""`RewardScorer`: a saved reward model that scores prompts and completions by its scoring contract."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rm_scale.data.encoding import TextEncoder
from rm_scale.data.groups import Text
from rm_scale.errors import DataError
from rm_scale.modeling.contract import ScoringContract
from rm_scale.modeling.loading import load_reward_model
from rm_scale.modeling.packed import enable_packed_rows
from rm_scale.modeling.scoring import score_packed, score_sequences
from rm_scale.packing.attention import choose_backend
from rm_scale.planning.packing import is_tested


class RewardScorer:
    """Scores texts exactly as training did.

    Args:
        model: a reward model in eval mode.
        tokenizer: its tokenizer.
        contract: how a text becomes a score.
        device: where the model is.
        packed: the model takes packed rows (`rm_scale.modeling.packed`), so that a prompt is computed once for all
            its completions.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        contract: ScoringContract,
        device: torch.device | str = "cpu",
        packed: bool = False,
    ) -> None:
        self.packed = packed
        self.model = model
        self.tokenizer = tokenizer
        self.contract = contract
        self.device = device
        self.encoder = TextEncoder.from_settings(tokenizer, contract.encoding)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        packed: bool | None = None,
    ) -> RewardScorer:
        """Load a run's output directory.

        Args:
            folder: holds the model or adapter, the tokenizer and `scoring_contract.json`.
            device: default the GPU when there is one.
            dtype: type of the backbone; default what it was saved in.
            trust_remote_code: run Python code that comes with the model.
            packed: compute shared prompts once; default for architectures that are tested with it.

        Raises:
            ModelError: the folder does not hold a reward model with its contract.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        contract = ScoringContract.load(folder)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        model = load_reward_model(folder, dtype, device, trust_remote_code=trust_remote_code)
        backbone = model.get_base_model() if isinstance(model, PeftModel) else model
        packed = is_tested(backbone.config.to_dict()) if packed is None else packed
        if packed:
            softcap = getattr(backbone.config.get_text_config(), "attn_logit_softcapping", None)
            dtype_name = str(backbone.dtype).removeprefix("torch.")
            backend = choose_backend("auto", torch.device(device).type, dtype_name, softcap is not None)
            enable_packed_rows(backbone, backend)
        return cls(model, tokenizer, contract, device, packed)

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        batch_size: int = 8,
        tools: Sequence[list[Any] | None] | None = None,
    ) -> list[float]:
        """Raw rewards of `completions` given `prompts`, in their order.

        Args:
            prompts: texts or lists of messages.
            completions: as many, of the same kind.
            batch_size: sequences per forward pass.
            tools: tool descriptions for the chat template, one per prompt.

        Raises:
            DataError: the lengths differ, or a text is longer than the contract allows.
        """
        if len(prompts) != len(completions):
            raise DataError(
                f"{len(prompts)} prompts and {len(completions)} completions: give one prompt per completion."
            )
        tools = tools if tools is not None else [None] * len(prompts)
        sequences = [
            self.encoder.encode_one(prompt, completion, tool)
            for prompt, completion, tool in zip(prompts, completions, tools, strict=True)
        ]
        keys = [repr((prompt, tool)) for prompt, tool in zip(prompts, tools, strict=True)]
        return self.score_tokens(sequences, batch_size, keys)

    def score_tokens(
        self, sequences: Sequence[Sequence[int]], batch_size: int = 8, prompt_keys: Sequence[str] | None = None
    ) -> list[float]:
        """Raw rewards of token sequences as `TextEncoder.encode` gives them, in their order.

        Args:
            sequences: token ids.
            batch_size: sequences per forward pass; in packed rows as many tokens as these could have at most.
            prompt_keys: sequences with the same key share a prompt; default none do.

        Raises:
            DataError: a sequence is empty, or `batch_size` is below 1.
        """
        if batch_size < 1:
            raise DataError(f"batch_size={batch_size}: must be at least 1. Fix: sequences per forward pass, e.g. 8.")
        empty = next((place for place, sequence in enumerate(sequences) if not len(sequence)), None)
        if empty is not None:
            raise DataError(f"sequence {empty} has no tokens: there is none to read a reward at. Fix: leave it out.")
        if not sequences:
            return []
        if self.packed:
            return self._score_packed(sequences, batch_size, prompt_keys)
        # Longest first wastes the least padding, and shows at once whether memory suffices.
        order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
        rewards = score_sequences(
            self.model, [sequences[i] for i in order], self.contract.pad_token_id, batch_size, self.device
        )
        scores = [0.0] * len(sequences)
        for index, reward in zip(order, rewards, strict=True):
            scores[index] = reward
        return scores

    def _score_packed(
        self, sequences: Sequence[Sequence[int]], batch_size: int, prompt_keys: Sequence[str] | None
    ) -> list[float]:
        members: dict[Any, list[int]] = {}
        for place in range(len(sequences)):
            members.setdefault(prompt_keys[place] if prompt_keys is not None else place, []).append(place)
        # A prompt with very many completions is cut, or its row would outgrow every budget.
        places = [part[i : i + batch_size] for part in members.values() for i in range(0, len(part), batch_size)]
        groups = [[sequences[place] for place in part] for part in places]
        max_tokens = batch_size * max(len(sequence) for sequence in sequences)
        rewards = score_packed(self.model, groups, self.contract.pad_token_id, max_tokens, self.device)
        scores = [0.0] * len(sequences)
        for part, values in zip(places, rewards, strict=True):
            for place, value in zip(part, values, strict=True):
                scores[place] = value
        return scores

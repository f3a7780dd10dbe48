"""`RewardScorer`: a saved reward model that scores prompts and completions by its scoring contract."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rm_scale.data.encoding import TextEncoder
from rm_scale.data.groups import Text
from rm_scale.errors import DataError
from rm_scale.modeling.contract import ScoringContract
from rm_scale.modeling.loading import load_reward_model
from rm_scale.modeling.scoring import score_sequences


class RewardScorer:
    """Scores texts exactly as training did.

    Args:
        model: a reward model in eval mode.
        tokenizer: its tokenizer.
        contract: how a text becomes a score.
        device: where the model is.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        contract: ScoringContract,
        device: torch.device | str = "cpu",
    ) -> None:
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
    ) -> RewardScorer:
        """Load a run's output directory.

        Args:
            folder: holds the model or adapter, the tokenizer and `scoring_contract.json`.
            device: default the GPU when there is one.
            dtype: type of the backbone; default what it was saved in.
            trust_remote_code: run Python code that comes with the model.

        Raises:
            ModelError: the folder does not hold a reward model with its contract.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        contract = ScoringContract.load(folder)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        model = load_reward_model(folder, dtype, device, trust_remote_code=trust_remote_code)
        return cls(model, tokenizer, contract, device)

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
        return self.score_tokens(sequences, batch_size)

    def score_tokens(self, sequences: Sequence[Sequence[int]], batch_size: int = 8) -> list[float]:
        """Raw rewards of token sequences as `TextEncoder.encode` gives them, in their order."""
        # Longest first wastes the least padding, and shows at once whether memory suffices.
        order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
        rewards = score_sequences(
            self.model, [sequences[i] for i in order], self.contract.pad_token_id, batch_size, self.device
        )
        scores = [0.0] * len(sequences)
        for index, reward in zip(order, rewards, strict=True):
            scores[index] = reward
        return scores

"""Score with several reward models: one number made of their scores, and how far they are apart.

Raw scores of different models have different zeros and scales, so they are combined as standard scores (each model's
own mean 0 and standard deviation 1 over its evaluation set) unless raw ones are asked for. The minimum is the cautious
choice against over-optimisation (Coste et al. 2023, "Reward model ensembles help mitigate overoptimization",
https://arxiv.org/abs/2310.02743).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rm_scale.batching.packed.layout import common_prefix_length
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.errors import ModelError
from rm_scale.inference.scoring.contract_scorer import ContractScorer, prompt_keys
from rm_scale.inference.scoring.row_files import Scorable
from rm_scale.modeling.known_scores import sequence_key

Combine = Literal["mean", "min"]


@dataclass(frozen=True)
class Scored:
    """What came of one text.

    Attributes:
        scores: raw score of each model; empty when it could not be scored.
        problem: why it could not be.
        key: the same for texts with the same tokens in every model; `None` without scores.
    """

    scores: tuple[float, ...] = ()
    problem: str | None = None
    key: str | None = None


class Ensemble:
    """One reward model or several.

    Args:
        scorers: the models.
        combine: mean or min of their scores.
        raw: combine raw scores rather than standard ones.

    Raises:
        ModelError: there are several, and one of them has no mean and standard deviation.
    """

    def __init__(self, scorers: Sequence[ContractScorer], combine: Combine = "mean", raw: bool = False) -> None:
        assert scorers
        self.scorers = list(scorers)
        self.combine = combine
        self.raw = raw
        if len(self.scorers) > 1 and not raw:
            for number, scorer in enumerate(self.scorers):
                if not self._is_normalizable(scorer):
                    raise ModelError(
                        f"model {number + 1}: its contract has no score_mean and score_std, so its scores can't be "
                        "combined with others'. Fix: --combine_raw, if all models have one scale; or train it with "
                        "evaluation data."
                    )

    @staticmethod
    def _is_normalizable(scorer: ContractScorer) -> bool:
        return scorer.contract.score_mean is not None and bool(scorer.contract.score_std)

    def score(self, texts: Sequence[Scorable], max_tokens: int) -> list[Scored]:
        """Score texts with every model.

        Args:
            texts: what to score.
            max_tokens: tokens per forward pass.
        """
        by_model = [self._score_with(scorer, texts, max_tokens) for scorer in self.scorers]
        results = []
        for found in zip(*by_model, strict=True):
            problem = next((item for item in found if isinstance(item, str)), None)
            known = [item for item in found if not isinstance(item, str)]
            if problem is not None:
                results.append(Scored(problem=problem))
            else:
                key = sequence_key(*(ids for _, ids in known)).hex()
                results.append(Scored(tuple(score for score, _ in known), key=key))
        return results

    def _score_with(
        self, scorer: ContractScorer, texts: Sequence[Scorable], max_tokens: int
    ) -> list[tuple[float, list[int]] | str]:
        """Return the raw score of each text by one model, and its tokens; or why it has none."""
        found, keys = _encode(scorer, texts)
        good = [(number, ids) for number, ids in enumerate(found) if not isinstance(ids, RejectedRow)]
        rewards = scorer.try_score_tokens(
            [ids for _, ids in good], prompt_keys=[keys[n] for n, _ in good], max_tokens=max_tokens
        )
        results: list[tuple[float, list[int]] | str] = [
            str(ids) if isinstance(ids, RejectedRow) else "" for ids in found
        ]
        for (number, ids), reward in zip(good, rewards, strict=True):
            if isinstance(reward, RejectedRow):
                results[number] = str(reward)
            else:
                results[number] = (reward, ids) if math.isfinite(reward) else f"not_finite: the score is {reward}"
        return results

    def columns(self, scored: Scored) -> dict[str, Any]:
        """Return the columns that a row gets: `score`, and what else is known of it."""
        if scored.problem is not None:
            return {"score": None, "error": scored.problem}
        standard = [
            scorer.normalize([score])[0] if self._is_normalizable(scorer) else None
            for scorer, score in zip(self.scorers, scored.scores, strict=True)
        ]
        if len(self.scorers) == 1:
            extra = {"normalized_score": standard[0]} if standard[0] is not None else {}
            return {"score": scored.scores[0], **extra}
        values = list(scored.scores) if self.raw else [value for value in standard if value is not None]
        mean = math.fsum(values) / len(values)
        spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
        return {
            "score": min(values) if self.combine == "min" else mean,
            "score_std": spread,
            "score_min": min(values),
            "score_max": max(values),
            "scores": list(scored.scores),
        }


def _encode(scorer: ContractScorer, texts: Sequence[Scorable]) -> tuple[list[list[int] | RejectedRow], list[str]]:
    """Return the token ids of each text, or why it has none, and keys that are equal for a shared beginning."""
    encoder = scorer.encoder
    pairs = [number for number, text in enumerate(texts) if text.text is None]
    tools = [texts[number].tools for number in pairs]
    prompts = [texts[number].prompt for number in pairs]
    found: list[list[int] | RejectedRow] = [[] for _ in texts]
    keys = [""] * len(texts)
    encoded = encoder.encode_many(prompts, [texts[number].completion for number in pairs], tools)
    for number, key, ids in zip(pairs, prompt_keys(prompts, tools), encoded, strict=True):
        found[number], keys[number] = ids, key
    first: list[int] = []
    key = ""
    for number, text in enumerate(texts):
        if text.text is None:
            continue
        ids = encoder.encode_rendered(text.text)
        found[number] = ids
        if isinstance(ids, list):
            # A whole text doesn't say what of it is the prompt; neighbours that begin alike have the same one.
            begins_alike = bool(first) and 2 * common_prefix_length([first, ids]) >= min(len(first), len(ids))
            first, key = (first, key) if begins_alike else (ids, f"text {number}")
            keys[number] = key
    return found, keys

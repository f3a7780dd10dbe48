"""Score several completions of each prompt and rank them, best first; equal scores are ties.

Identical completions are scored once, so that they always tie, also in different groups with the same prompt. A
completion without a score is kept, under one of `UNSCORED_REASONS`. What is made of a ranking is in `output_rows.py`
and `preference_pairs.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rm_scale.data.preference_group import Text
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.inference.ranking.candidates import CandidateGroup
from rm_scale.modeling.known_scores import KnownScores

UNSCORED_REASONS = {
    "missing_key": "the completion, or its score in --score_column, is absent or null",
    "wrong_type": "the completion is neither text nor a list of messages, or its score is not a finite number",
    "bad_unicode": "the completion holds lone surrogates",
    "bad_conversation": "messages without role or content, roles that don't alternate, or an end that isn't assistant",
    "over_long": "prompt and completion are longer than the contract's max_length (and could not be truncated)",
    "template_error": "the chat template could not render it",
    "refused_by_server": "the server at --endpoint refuses it",
    "not_finite": "its score is NaN or infinite: --dtype float32, or bfloat16 in place of float16; a model that was "
    "trained to NaN can't be mended",
    "double_bos": "it begins with two BOS tokens: the text holds one and another is added to it",
    "ends_with_pad": "it ends with the padding token, so that its last real token can't be found",
}


@dataclass(frozen=True)
class RankedGroup:
    """A group with scores.

    Attributes:
        group: what was scored.
        scores: K scores in the group's order, `None` where there is none.
        problems: K reasons of `UNSCORED_REASONS`, `None` where there is a score.
        order: places of the scored completions in the group, best first; ties in the group's order.
        ranks: their ranks, 0 is best; ties share a rank, and no rank is left out.
    """

    group: CandidateGroup
    scores: tuple[float | None, ...]
    problems: tuple[str | None, ...]
    order: tuple[int, ...]
    ranks: tuple[int, ...]

    def score(self, place: int) -> float:
        """Return the score of the completion at this place of the group, which has one."""
        score = self.scores[place]
        assert score is not None
        return score

    def text_at(self, position: int) -> str:
        """Return what identifies the completion at this position of the ranking; see `text_key`."""
        completion = self.group.completions[self.order[position]]
        assert completion is not None
        return text_key(completion)

    def shared_columns(self) -> dict[str, Any]:
        """Return the columns that every output row of the group has: the prompt, its tools, what it came with."""
        row: dict[str, Any] = {"prompt": self.group.prompt, **self.group.columns}
        if self.group.tools is not None:
            row["tools"] = self.group.tools
        return row


def rank_group(
    group: CandidateGroup, scores: Sequence[float | None], problems: Sequence[str | None] | None = None
) -> RankedGroup:
    """Order the completions of a group by their scores.

    Args:
        group: K completions.
        scores: K scores, `None` where there is none.
        problems: why there is none; default the group's own.
    """
    problems = tuple(problems if problems is not None else group.problems)
    scored = [(place, score) for place, score in enumerate(scores) if score is not None]
    scored.sort(key=lambda entry: -entry[1])
    ranks: list[int] = []
    for number, (_, score) in enumerate(scored):
        ranks.append(0 if number == 0 else ranks[-1] + (score != scored[number - 1][1]))
    return RankedGroup(group, tuple(scores), problems, tuple(place for place, _ in scored), tuple(ranks))


# --- Scoring -------------------------------------------------------------------------------------------------------


class Scorer(Protocol):
    """The part of `rm_scale.inference.scoring.scorer.RewardScorer` that ranking needs."""

    @property
    def encoder(self) -> Any:
        """The `rm_scale.data.encoding.TextEncoder` of the model."""

    def try_score_tokens(
        self,
        sequences: Sequence[Sequence[int]],
        batch_size: int = 8,
        prompt_keys: Sequence[str] | None = None,
        max_tokens: int | None = None,
    ) -> list[float | RejectedRow]:
        """Return the rewards of token sequences, or why there is none."""


def score_groups(
    groups: Iterable[CandidateGroup], scorer: Scorer, max_tokens: int = 4096, chunk_completions: int = 512
) -> Iterator[RankedGroup]:
    """Score groups as they come, some at a time: each prompt is computed once, each different completion once.

    Args:
        groups: any number of them; only one chunk is held.
        scorer: a reward model.
        max_tokens: tokens of a forward pass.
        chunk_completions: completions that are batched together. More of them waste less, and hold more text.
    """
    chunk: list[CandidateGroup] = []
    held = 0
    known = KnownScores()
    for group in groups:
        chunk.append(group)
        held += len(group.completions)
        if held >= chunk_completions:
            yield from _score_chunk(chunk, scorer, max_tokens, known)
            chunk, held = [], 0
    yield from _score_chunk(chunk, scorer, max_tokens, known)


def _score_chunk(
    chunk: Sequence[CandidateGroup], scorer: Scorer, max_tokens: int, known: KnownScores
) -> Iterator[RankedGroup]:
    asked: dict[tuple[int, str], Text] = {}
    for number, group in enumerate(chunk):
        for completion, problem in zip(group.completions, group.problems, strict=True):
            if completion is not None and problem is None:
                asked.setdefault((number, text_key(completion)), completion)
    prompts = [chunk[number].prompt for number, _ in asked]
    encoded = scorer.encoder.encode_many(prompts, list(asked.values()), [chunk[number].tools for number, _ in asked])
    found = dict(zip(asked, encoded, strict=True))
    usable = {key: ids for key, ids in found.items() if not isinstance(ids, RejectedRow)}
    keys = [str(number) for number, _ in usable]
    sequences = list(usable.values())

    def compute(places: list[int]) -> list[float | RejectedRow]:
        some, their_keys = [sequences[place] for place in places], [keys[place] for place in places]
        return scorer.try_score_tokens(some, prompt_keys=their_keys, max_tokens=max_tokens)

    rewards = dict(zip(usable, known.score(sequences, compute), strict=True))
    for number, group in enumerate(chunk):
        scores: list[float | None] = []
        problems: list[str | None] = []
        for completion, problem in zip(group.completions, group.problems, strict=True):
            if completion is not None and problem is None:
                key = (number, text_key(completion))
                score, problem = _score_or_problem(rewards.get(key, found[key]))
            else:
                score = None
            scores.append(score)
            problems.append(problem)
        yield rank_group(group, scores, problems)


def _score_or_problem(found: Any) -> tuple[float | None, str | None]:
    """Return a score, or a reason of `UNSCORED_REASONS`."""
    if isinstance(found, RejectedRow):
        return None, found.reason
    return (float(found), None) if math.isfinite(found) else (None, "not_finite")


def use_given_scores(groups: Iterable[CandidateGroup]) -> Iterator[RankedGroup]:
    """Rank groups by the scores that came with them."""
    for group in groups:
        assert group.scores is not None
        yield rank_group(group, group.scores)


def text_key(text: Text) -> str:
    """Return a text that is the same for the same completion, be it text or messages."""
    return text if isinstance(text, str) else json.dumps(text, sort_keys=True, default=str)

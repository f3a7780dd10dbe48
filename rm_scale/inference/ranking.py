"""Best-of-N: several completions of one prompt become a ranking, the best of them, or preference pairs.

Everything here is a function of scores: equal scores are ties, and what happens to ties is the caller's choice
(`Ties`). Identical completions are scored once, so that they always tie. Nothing is dropped silently: every prompt
that gives no row is counted under one of `LEFT_OUT_REASONS`, every completion without a score under one of
`UNSCORED_REASONS`, every comparison that gives no pair under one of `NO_PAIR_REASONS`.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Any, Literal, Protocol

from rm_scale.data.formats import message_text
from rm_scale.data.groups import RejectedRow, Text
from rm_scale.errors import ModelError
from rm_scale.inference.candidates import CandidateGroup

OutputFormat = Literal["ranked", "top", "best", "pairs"]
PairRule = Literal["best_worst", "best_random", "adjacent", "all"]
Ties = Literal["first", "random", "skip"]

LEFT_OUT_REASONS = {
    "one_completion": "the prompt has one completion that could be scored: nothing to compare it with",
    "no_scored_completion": "none of the prompt's completions could be scored",
    "identical_completions": "all completions of the prompt are the same text",
    "equal_scores": "all completions of the prompt have the same score",
    "tied": "the choice falls between completions of equal score, and --ties skip leaves such prompts out",
    "below_min_score": "the best completion scores less than --min_score",
    "no_pair": "no comparison gave a pair; see the reasons for that",
}
UNSCORED_REASONS = {
    "missing_key": "the completion, or its score in --score_column, is absent or null",
    "wrong_type": "the completion is neither text nor a list of messages, or its score is not a finite number",
    "bad_unicode": "the completion holds lone surrogates",
    "bad_conversation": "messages without role or content, roles that don't alternate, or an end that isn't assistant",
    "over_long": "prompt and completion are longer than the contract's max_length (and could not be truncated)",
    "template_error": "the chat template could not render it",
    "double_bos": "it begins with two BOS tokens: the text holds one and another is added to it",
    "ends_with_pad": "it ends with the padding token, so that its last real token can't be found",
}
NO_PAIR_REASONS = {
    "tie": "equal scores",
    "below_min_margin": "the scores differ by less than --min_margin",
    "empty_completion": "a completion has no text; preference formats refuse that",
    "nul_character": "a completion holds a NUL character; preference formats refuse that",
}
_NUM_EXAMPLES = 5


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
        """The score of a completion that has one."""
        score = self.scores[place]
        assert score is not None
        return score


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
    """What is needed of `rm_scale.inference.scorer.RewardScorer`."""

    @property
    def encoder(self) -> Any:
        """A `rm_scale.data.encoding.TextEncoder`."""

    def score_tokens(
        self,
        sequences: Sequence[Sequence[int]],
        batch_size: int = 8,
        prompt_keys: Sequence[str] | None = None,
        max_tokens: int | None = None,
    ) -> list[float]:
        """Rewards of token sequences."""


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
    for group in groups:
        chunk.append(group)
        held += len(group.completions)
        if held >= chunk_completions:
            yield from _score_chunk(chunk, scorer, max_tokens)
            chunk, held = [], 0
    yield from _score_chunk(chunk, scorer, max_tokens)


def _score_chunk(chunk: Sequence[CandidateGroup], scorer: Scorer, max_tokens: int) -> Iterator[RankedGroup]:
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
    rewards = scorer.score_tokens(list(usable.values()), prompt_keys=keys, max_tokens=max_tokens)
    _require_finite(rewards)
    scored = dict(zip(usable, rewards, strict=True))
    for number, group in enumerate(chunk):
        scores: list[float | None] = []
        problems: list[str | None] = []
        for completion, problem in zip(group.completions, group.problems, strict=True):
            key = None if completion is None or problem is not None else (number, text_key(completion))
            refused = found.get(key) if key is not None else None
            scores.append(scored.get(key) if key is not None else None)
            problems.append(refused.reason if isinstance(refused, RejectedRow) else problem)
        yield rank_group(group, scores, problems)


def _require_finite(rewards: Sequence[float]) -> None:
    broken = sum(not math.isfinite(reward) for reward in rewards)
    if broken:
        raise ModelError(
            f"{broken} of {len(rewards)} scores are not finite, and nothing can be ranked by them. Fix: --dtype "
            "float32, or bfloat16 in place of float16; a model that was trained to NaN can't be mended."
        )


def use_given_scores(groups: Iterable[CandidateGroup]) -> Iterator[RankedGroup]:
    """Rank groups by the scores that came with them."""
    for group in groups:
        assert group.scores is not None
        yield rank_group(group, group.scores)


def text_key(text: Text) -> str:
    """The same for the same text or messages."""
    return text if isinstance(text, str) else json.dumps(text, sort_keys=True, default=str)


# --- What is written -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """What becomes of a ranked group.

    Attributes:
        output_format: `ranked` all completions, best first; `top` the first `top_k` of them; `best` one row with the
            best; `pairs` rows with a chosen and a rejected completion.
        top_k: for `top`.
        min_score: for `best`: prompts whose best completion scores less are left out.
        pairs: for `pairs`: `best_worst` one pair; `best_random` the best and a random one below it; `adjacent`
            neighbours in the ranking; `all` every two.
        min_margin: for `pairs`: least difference of scores.
        margin_column: for `pairs`: the column with the difference.
        ties: which completion is taken among several with the same score, where that matters: `first` in the input,
            one at `random`, or `skip` the prompt.
        seed: of random choices. They depend on it and on the prompt, not on where the prompt stands in the file.
    """

    output_format: OutputFormat = "ranked"
    top_k: int = 1
    min_score: float | None = None
    pairs: PairRule = "best_worst"
    min_margin: float = 0.0
    margin_column: str = "margin"
    ties: Ties = "first"
    seed: int = 0


@dataclass(frozen=True)
class Selected:
    """The rows of one group, or why there are none.

    Attributes:
        rows: what is written.
        left_out: a reason of `LEFT_OUT_REASONS`, `None` when there are rows.
        no_pairs: comparisons that gave no pair, by reason.
    """

    rows: list[dict[str, Any]]
    left_out: str | None = None
    no_pairs: Mapping[str, int] = field(default_factory=dict)


def select(ranked: RankedGroup, how: Selection) -> Selected:
    """The output rows of one group."""
    if not ranked.order:
        return Selected([], "no_scored_completion")
    match how.output_format:
        case "ranked":
            return Selected([_listing(ranked, range(len(ranked.order)))])
        case "top":
            return _top(ranked, how)
        case "best":
            return _best(ranked, how)
        case "pairs":
            return _pairs(ranked, how)


def _listing(ranked: RankedGroup, positions: Iterable[int]) -> dict[str, Any]:
    """Completions of a group as one row, at these positions of the ranking.

    `prompt`, `completions` and `ranks` are what the `ranked` data format reads.
    """
    positions = list(positions)
    places = [ranked.order[position] for position in positions]
    row = _shared_columns(ranked.group)
    row["completions"] = [ranked.group.completions[place] for place in places]
    row["scores"] = [ranked.score(place) for place in places]
    row["ranks"] = [ranked.ranks[position] for position in positions]
    row["order"] = places
    row["num_completions"] = len(ranked.group.completions)
    for name, values in ranked.group.per_completion.items():
        row[name] = [values[place] for place in places]
    return row


def _shared_columns(group: CandidateGroup) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt": group.prompt, **group.columns}
    if group.tools is not None:
        row["tools"] = group.tools
    return row


def _top(ranked: RankedGroup, how: Selection) -> Selected:
    positions = _order_ties(ranked, how)
    count = min(how.top_k, len(positions))
    cut_in_tie = count < len(positions) and ranked.ranks[count - 1] == ranked.ranks[count]
    if how.ties == "skip" and cut_in_tie and _differ(ranked, positions, ranked.ranks[count]):
        return Selected([], "tied")
    return Selected([_listing(ranked, positions[:count])])


def _best(ranked: RankedGroup, how: Selection) -> Selected:
    positions = _order_ties(ranked, how)
    if how.ties == "skip" and _differ(ranked, positions, 0):
        return Selected([], "tied")
    place = ranked.order[positions[0]]
    if how.min_score is not None and ranked.score(place) < how.min_score:
        return Selected([], "below_min_score")
    row = _shared_columns(ranked.group)
    row["completion"] = ranked.group.completions[place]
    row["score"] = ranked.score(place)
    row["place"] = place
    row["num_completions"] = len(ranked.group.completions)
    row |= {name: values[place] for name, values in ranked.group.per_completion.items()}
    return Selected([row])


def _order_ties(ranked: RankedGroup, how: Selection) -> list[int]:
    """Positions of the ranking, best first, with ties in the order that `how` asks for."""
    positions = list(range(len(ranked.order)))
    if how.ties == "random":
        _random_of(ranked, how).shuffle(positions)
        positions.sort(key=lambda position: ranked.ranks[position])
    return positions


def _differ(ranked: RankedGroup, positions: Sequence[int], rank: int) -> bool:
    """Several different completions share this rank; the same text several times is no choice."""
    texts = {_text_at(ranked, position) for position in positions if ranked.ranks[position] == rank}
    return len(texts) > 1


def _text_at(ranked: RankedGroup, position: int) -> str:
    completion = ranked.group.completions[ranked.order[position]]
    assert completion is not None
    return text_key(completion)


def _random_of(ranked: RankedGroup, how: Selection) -> random.Random:
    """Random numbers of this prompt, the same wherever it stands in whichever file."""
    identity = json.dumps([how.seed, ranked.group.prompt, ranked.group.tools], sort_keys=True, default=str)
    return random.Random(hashlib.sha256(identity.encode("utf-8", "surrogatepass")).digest())


# --- Pairs ---------------------------------------------------------------------------------------------------------


def _pairs(ranked: RankedGroup, how: Selection) -> Selected:
    if len(ranked.order) == 1:
        return Selected([], "one_completion")
    distinct = _distinct_positions(ranked)
    if len(distinct) == 1:
        return Selected([], "identical_completions")
    if ranked.ranks[-1] == 0:
        return Selected([], "equal_scores")
    no_pairs = Counter(reason for position in distinct if (reason := _unfit(ranked, position)) is not None)
    filled = [position for position in distinct if _unfit(ranked, position) is None]
    choice = _choose_pairs(ranked, filled, how)
    if choice is None:
        return Selected([], "tied", no_pairs)
    rows = []
    for better, worse in choice:
        margin = ranked.score(ranked.order[better]) - ranked.score(ranked.order[worse])
        if margin <= 0:
            no_pairs["tie"] += 1
        elif margin < how.min_margin:
            no_pairs["below_min_margin"] += 1
        else:
            rows.append(_pair_row(ranked, better, worse, margin, how))
    return Selected(rows, None if rows else "no_pair", no_pairs)


def _distinct_positions(ranked: RankedGroup) -> list[int]:
    """Positions of the ranking without repeated texts; the same text twice would be the same pair twice."""
    seen: set[str] = set()
    positions = []
    for position in range(len(ranked.order)):
        key = _text_at(ranked, position)
        if key not in seen:
            seen.add(key)
            positions.append(position)
    return positions


def _unfit(ranked: RankedGroup, position: int) -> str | None:
    """Why a completion can't be part of a pair that preference formats read; `None` when it can."""
    completion = ranked.group.completions[ranked.order[position]]
    assert completion is not None
    if _has_nul(completion):
        return "nul_character"
    if isinstance(completion, str):
        return None if completion.strip() else "empty_completion"
    last = completion[-1] if completion else {}
    return None if message_text(last).strip() or last.get("tool_calls") else "empty_completion"


def _has_nul(value: Any) -> bool:
    if isinstance(value, str):
        return "\x00" in value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return any(_has_nul(part) for part in parts)


def _choose_pairs(ranked: RankedGroup, positions: list[int], how: Selection) -> list[tuple[int, int]] | None:
    """Which positions of the ranking are compared, the better one first; `None` when ties are to be skipped."""
    if len(positions) < 2:
        return []
    if how.pairs == "all":
        return list(combinations(positions, 2))
    if how.pairs == "adjacent":
        return list(pairwise(positions))
    ranks = [ranked.ranks[position] for position in positions]
    chance = _random_of(ranked, how)
    best = _one_of([p for p in positions if ranked.ranks[p] == ranks[0]], how, chance)
    below = [p for p in positions if ranked.ranks[p] > ranks[0]]
    if not below:
        return [(positions[0], positions[1])]  # a tie, and counted as one
    if how.pairs == "best_random":
        worse: int | None = chance.choice(below)
    else:
        worse = _one_of([p for p in below if ranked.ranks[p] == ranks[-1]], how, chance)
    return None if best is None or worse is None else [(best, worse)]


def _one_of(tied: Sequence[int], how: Selection, chance: random.Random) -> int | None:
    if len(tied) == 1 or how.ties == "first":
        return tied[0]
    return None if how.ties == "skip" else chance.choice(tied)


def _pair_row(ranked: RankedGroup, better: int, worse: int, margin: float, how: Selection) -> dict[str, Any]:
    group = ranked.group
    chosen, rejected = ranked.order[better], ranked.order[worse]
    row = _shared_columns(group)
    row["chosen"] = group.completions[chosen]
    row["rejected"] = group.completions[rejected]
    row["score_chosen"] = ranked.score(chosen)
    row["score_rejected"] = ranked.score(rejected)
    row[how.margin_column] = margin
    for name, values in group.per_completion.items():
        row[f"{name}_chosen"], row[f"{name}_rejected"] = values[chosen], values[rejected]
    return row


# --- The account ---------------------------------------------------------------------------------------------------


@dataclass
class RankReport:
    """What became of every prompt and completion.

    Attributes:
        num_prompts: groups read; each is in `num_prompts_written` or in `left_out`.
        num_completions: their completions; each is in `num_scored` or in `unscored`.
        num_repeated: scored completions whose text occurred before in their prompt.
        num_tied: scored completions that share their score with a different text of their prompt.
        num_prompts_tied_best: prompts whose best score belongs to several different texts.
        num_rows_written: output rows.
        noted: prompts that were written, but are nothing to choose from: `one_completion`, `equal_scores`.
        left_out, unscored, no_pairs: counts by reason.
        examples: input rows of the first prompts of each reason of `left_out` and `unscored`.
    """

    num_prompts: int = 0
    num_prompts_written: int = 0
    num_completions: int = 0
    num_scored: int = 0
    num_repeated: int = 0
    num_tied: int = 0
    num_prompts_tied_best: int = 0
    num_rows_written: int = 0
    noted: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    unscored: Counter[str] = field(default_factory=Counter)
    no_pairs: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[int]] = field(default_factory=dict)

    def add(self, ranked: RankedGroup, selected: Selected) -> None:
        """Count one group."""
        self.num_prompts += 1
        self.num_completions += len(ranked.scores)
        self.num_scored += len(ranked.order)
        for reason in ranked.problems:
            if reason is not None:
                self.unscored[reason] += 1
                self._example(reason, ranked)
        self._count_ties(ranked)
        self.num_rows_written += len(selected.rows)
        self.no_pairs.update(selected.no_pairs)
        if selected.left_out is not None:
            self.left_out[selected.left_out] += 1
            self._example(selected.left_out, ranked)
            return
        self.num_prompts_written += 1
        if len(ranked.order) == 1:
            self.noted["one_completion"] += 1
        elif ranked.ranks[-1] == 0:
            self.noted["equal_scores"] += 1

    def _count_ties(self, ranked: RankedGroup) -> None:
        texts: dict[int, Counter[str]] = {}
        for position, rank in enumerate(ranked.ranks):
            texts.setdefault(rank, Counter())[_text_at(ranked, position)] += 1
        for rank, found in texts.items():
            self.num_repeated += found.total() - len(found)
            if len(found) > 1:
                self.num_tied += found.total()
                self.num_prompts_tied_best += rank == 0

    def _example(self, reason: str, ranked: RankedGroup) -> None:
        rows = self.examples.setdefault(reason, [])
        if len(rows) < _NUM_EXAMPLES and ranked.group.rows[0] not in rows:
            rows.append(ranked.group.rows[0])

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}

    def text(self, output_format: OutputFormat) -> str:
        """The summary a user reads."""
        written = "pairs" if output_format == "pairs" else "rows"
        lines = [
            f"prompts      {self.num_prompts}: {self.num_prompts_written} written, {self.left_out.total()} left out",
            f"completions  {self.num_completions}: {self.num_scored} scored; {self.num_repeated} repeat a text",
            f"ties         {self.num_tied} completions share their score with another text of their prompt; "
            f"{self.num_prompts_tied_best} prompts have no single best one",
            f"{written:<11}  {self.num_rows_written} written",
        ]
        lines += self._reasons("left out", self.left_out, LEFT_OUT_REASONS)
        lines += self._reasons("written, but nothing to choose from", self.noted, LEFT_OUT_REASONS)
        lines += self.unscored_lines()
        lines += self._reasons("comparisons without a pair", self.no_pairs, NO_PAIR_REASONS)
        return "\n".join(lines)

    def unscored_lines(self) -> list[str]:
        """Why completions have no score."""
        return self._reasons("completions without a score", self.unscored, UNSCORED_REASONS)

    def _reasons(self, title: str, counts: Mapping[str, int], meanings: Mapping[str, str]) -> list[str]:
        lines = []
        for reason, count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])):
            rows = self.examples.get(reason, [])
            where = f" (rows {', '.join(map(str, rows))}{', ...' if count > len(rows) else ''})" if rows else ""
            lines.append(f"{title}: {reason} {count}: {meanings[reason]}{where}")
        return lines

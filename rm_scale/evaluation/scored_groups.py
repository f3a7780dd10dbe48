"""Score evaluation groups, texts and benchmarks with one model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rm_scale.data.data_report import NUM_FIRST_ROWS
from rm_scale.data.preference_group import Text
from rm_scale.data.preparation import EvaluationData
from rm_scale.data.rejected_rows import REJECTION_REASONS, RejectedRow
from rm_scale.errors import DataError
from rm_scale.evaluation.benchmarks import Benchmark
from rm_scale.evaluation.benchmarks.lost_items import score_with_lost
from rm_scale.evaluation.evaluation_document import DataUse
from rm_scale.evaluation.scores_file import hash_text
from rm_scale.inference.scoring.contract_scorer import ContractScorer
from rm_scale.modeling.known_scores import KnownScores
from rm_scale.training.pair_counts import ScoredGroup

# Groups handed to the scorer at once: enough for it to fill rows of like lengths.
_GROUPS_PER_BATCH_ELEMENT = 16


def score_groups(data: EvaluationData, scorer: ContractScorer, batch_size: int) -> Iterator[ScoredGroup | RejectedRow]:
    """Yield every group with the rewards of its responses, in the data's order; or why one of them has none.

    Args:
        data: encoded by the scorer's own encoder.
        scorer: the model.
        batch_size: sequences per forward pass.
    """
    step = max(1, batch_size) * _GROUPS_PER_BATCH_ELEMENT
    known = KnownScores()
    for start in range(0, len(data.groups), step):
        places = range(start, min(start + step, len(data.groups)))
        rows = [data.groups[place] for place in places]
        sequences = [ids for row in rows for ids in row["input_ids"]]
        # The group is what shares a prompt in training, too.
        keys = [str(place) for place, row in zip(places, rows, strict=True) for _ in row["input_ids"]]
        rewards = iter(_score_new(sequences, keys, scorer, batch_size, known))
        for place, row in zip(places, rows, strict=True):
            found = _all_or_none([next(rewards) for _ in row["input_ids"]])
            yield found if isinstance(found, RejectedRow) else _scored(data, place, row, found)


def score_texts(
    prompts: Sequence[Text], completions: Sequence[Sequence[Text]], scorer: ContractScorer, batch_size: int
) -> list[list[float] | RejectedRow]:
    """Return the rewards of several completions of each prompt, or why one of them can't be scored.

    Args:
        prompts: texts or lists of messages.
        completions: as many lists of them.
        scorer: the model.
        batch_size: sequences per forward pass.
    """
    results: list[list[float] | RejectedRow] = []
    known = KnownScores()
    step = max(1, batch_size) * _GROUPS_PER_BATCH_ELEMENT
    for start in range(0, len(prompts), step):
        parts = list(zip(prompts[start : start + step], completions[start : start + step], strict=True))
        flat = [(prompt, text) for prompt, texts in parts for text in texts]
        encoded = iter(scorer.encoder.encode_many([prompt for prompt, _ in flat], [text for _, text in flat]))
        groups = [[next(encoded) for _ in texts] for _, texts in parts]
        refused = [next((ids for ids in group if isinstance(ids, RejectedRow)), None) for group in groups]
        sequences = [
            (place, ids)
            for place, group in enumerate(groups)
            for ids in group
            if refused[place] is None and not isinstance(ids, RejectedRow)
        ]
        keys = [str(place) for place, _ in sequences]
        rewards = iter(_score_new([ids for _, ids in sequences], keys, scorer, batch_size, known))
        for reason, group in zip(refused, groups, strict=True):
            results.append(reason if reason is not None else _all_or_none([next(rewards) for _ in group]))
    return results


def _all_or_none(found: Sequence[float | RejectedRow]) -> list[float] | RejectedRow:
    """Return the rewards of a group, or the first reason why one of them is missing."""
    refused = next((one for one in found if isinstance(one, RejectedRow)), None)
    return refused if refused is not None else [one for one in found if not isinstance(one, RejectedRow)]


def _score_new(
    sequences: Sequence[Sequence[int]], keys: Sequence[str], scorer: ContractScorer, batch_size: int, known: KnownScores
) -> list[float | RejectedRow]:
    """Return the rewards of token sequences; those that came before have the reward that they had."""

    def compute(places: list[int]) -> list[float | RejectedRow]:
        return scorer.try_score_tokens([sequences[one] for one in places], batch_size, [keys[one] for one in places])

    return known.score(sequences, compute)


def score_benchmark(
    benchmark: Benchmark, scorer: ContractScorer, batch_size: int, max_rejected_share: float, name: str
) -> dict[str, Any]:
    """Return a model's result on a benchmark; an item that can't be scored (too long, for instance) counts as lost.

    Args:
        benchmark: items and rule.
        scorer: the model; conversations are rendered by its chat template, and without one read as plain text.
        batch_size: sequences per forward pass.
        max_rejected_share: most items that may be lost in this way.
        name: of the benchmark's file, for messages.

    Raises:
        DataError: more of them can't be scored.
    """
    items = benchmark.items_for(bool(scorer.encoder.chat_template))
    found = score_texts([item.prompt for item in items], [item.completions for item in items], scorer, batch_size)
    fix = "a model trained with a longer max_length"
    return score_with_lost(benchmark, found, max_rejected_share, name, "can't be scored by this model", fix)


def _scored(data: EvaluationData, place: int, row: dict[str, Any], rewards: list[float]) -> ScoredGroup:
    origins = data.origins
    return ScoredGroup.of_row(
        row,
        rewards,
        source=_source(data, place),
        prompt=hash_text(origins.prompt[place]),
        content=hash_text(origins.content[place]),
    )


def require_few_lost(
    data: EvaluationData, lost: Mapping[int, RejectedRow], max_rejected_share: float, name: str
) -> None:
    """Stop where the server that scores refuses too many groups.

    Args:
        data: what was scored.
        lost: places of the groups without rewards, and why there are none.
        max_rejected_share: most groups that may be lost in this way.
        name: of the model.

    Raises:
        DataError: more are, or all.
    """
    if not lost or (len(lost) <= max_rejected_share * len(data.groups) and len(lost) < len(data.groups)):
        return
    first = min(lost)
    share = math.ceil(1000 * len(lost) / len(data.groups)) / 1000
    accept = f", or leave them out with --max_rejected_share {share:g}" if len(lost) < len(data.groups) else ""
    raise DataError(
        f"{name}: {len(lost)} of {len(data.groups)} groups have no score, and --max_rejected_share is "
        f"{max_rejected_share:g}; the first is row {data.groups[first]['row']} of {_source(data, first)}: "
        f"{lost[first]}. Fix: a server that takes them{accept}."
    )


def _source(data: EvaluationData, place: int) -> str:
    return str(data.origins.names[data.origins.source[place]])


def data_use(data: EvaluationData, lost: Mapping[int, RejectedRow]) -> DataUse:
    """Return what became of the input rows.

    Args:
        data: the groups and how they were read.
        lost: places of the groups without rewards, and why there are none.
    """
    rows: dict[tuple[str, str], list[int]] = {}
    for place, refused in lost.items():
        rows.setdefault((_source(data, place), refused.reason), []).append(data.groups[place]["row"])
    return DataUse(
        sources=[source.name for source in data.sources],
        rows_read=sum(source.rows_read for source in data.sources),
        rows_used=sum(source.rows_used for source in data.sources) - len(lost),
        rejected=[
            *(
                _refused(source.name, reason, entry.count, entry.first_rows)
                for source in data.sources
                for reason, entry in source.rejected.items()
            ),
            *(_refused(name, reason, len(found), found) for (name, reason), found in rows.items()),
        ],
    )


def _refused(source: str, reason: str, count: int, rows: Sequence[int]) -> dict[str, Any]:
    return {
        "source": source,
        "reason": reason,
        "meaning": REJECTION_REASONS[reason],
        "count": count,
        "first_rows": list(rows[:NUM_FIRST_ROWS]),
    }

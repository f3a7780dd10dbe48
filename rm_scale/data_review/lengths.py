"""How long the sequences are, what `max_length` cuts at several lengths, and how many tokens each row layout takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rm_scale.batching.balancing import split_balanced
from rm_scale.batching.packed.layout import packed_length
from rm_scale.config import RunConfig
from rm_scale.data_review.finding import NUM_EXAMPLES, Finding, Suggestion
from rm_scale.data_review.sample import SampledGroup

IntArray = npt.NDArray[np.int64]
_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768)
_BUDGETS = (2048, 4096, 8192, 16_384, 32_768)
_MICRO_BATCHES = (1, 2, 4, 8, 16)
_KEPT_SHARE = 0.99
_STEP_GROUPS = 64
_NUM_STEPS = 16
_NUM_BINS = 40


@dataclass(frozen=True)
class GroupLengths:
    """Token counts of N groups.

    Attributes:
        prompt: (N,) tokens that a group's sequences share.
        longest: (N,) tokens of its longest sequence.
        total: (N,) tokens of all its sequences.
        num_responses: (N,) sequences.
        responses: (R,) tokens of each response behind the shared ones.
    """

    prompt: IntArray
    longest: IntArray
    total: IntArray
    num_responses: IntArray
    responses: IntArray

    @classmethod
    def of(cls, groups: Sequence[SampledGroup]) -> GroupLengths:
        """Return those of groups whose lengths are known."""
        return cls(
            np.array([group.prompt_length for group in groups], dtype=np.int64),
            np.array([max(group.lengths) for group in groups], dtype=np.int64),
            np.array([sum(group.lengths) for group in groups], dtype=np.int64),
            np.array([len(group.lengths) for group in groups], dtype=np.int64),
            np.array(
                [length - group.prompt_length for group in groups for length in group.lengths],
                dtype=np.int64,
            ),
        )

    def __len__(self) -> int:
        return len(self.longest)


@dataclass(frozen=True)
class Cut:
    """What one `max_length` does.

    Attributes:
        max_length: the limit in tokens.
        over: share of groups with a longer sequence, which `overlong_policy` drop drops.
        truncated: share whose prompt truncate_prompt_left would cut.
        lost_even_so: share that it drops, since the prompt has too few tokens to cut.
        tokens_cut: share of all tokens that it cuts off or drops.
    """

    max_length: int
    over: float
    truncated: float
    lost_even_so: float
    tokens_cut: float


def cut_at(lengths: GroupLengths, max_length: int) -> Cut:
    """Return what a `max_length` does to these groups."""
    excess = lengths.longest - max_length
    over = excess > 0
    saved = over & (excess <= lengths.prompt)
    lost = over & ~saved
    tokens = (excess * lengths.num_responses)[saved].sum() + lengths.total[lost].sum()
    count = len(lengths)
    return Cut(
        max_length,
        float(over.sum() / count),
        float(saved.sum() / count),
        float(lost.sum() / count),
        float(tokens / lengths.total.sum()),
    )


def histogram_of(values: IntArray) -> dict[str, Any]:
    """Return a histogram of token counts up to their 99.5th percentile, and how many lie above it."""
    top = max(1, int(np.percentile(values, 99.5)))
    width = max(1, math.ceil(top / _NUM_BINS))
    edges = np.arange(0, top + width + 1, width)
    counts, _ = np.histogram(values, edges)
    quantiles = np.percentile(values, [5, 25, 50, 75, 95, 99])
    return {
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "above": int((values >= edges[-1]).sum()),
        "mean": float(values.mean()),
        "max": int(values.max()),
        "quantiles": dict(zip(("p05", "p25", "p50", "p75", "p95", "p99"), quantiles.tolist(), strict=True)),
    }


def layouts(lengths: GroupLengths, groups: Sequence[SampledGroup], seed: int) -> dict[str, Any]:
    """Return processed tokens per real token of each row layout, and how full packed rows are at several budgets.

    A real token is one of prompt or response, the prompt counted once per response.
    """
    real = int(lengths.total.sum())
    order = np.random.default_rng(seed).permutation(len(groups))
    padded = {}
    for size in _MICRO_BATCHES:
        rows = [order[start : start + size] for start in range(0, len(order), size)]
        tokens = sum(int(lengths.longest[row].max() * lengths.num_responses[row].sum()) for row in rows)
        padded[str(size)] = tokens / real
    shared = packed_length(lengths.total, lengths.prompt, lengths.num_responses)
    return {
        "padded": padded,
        "padding_free": 1.0,
        "prefix_shared": float(shared.sum() / real),
        "budgets": [filled(shared, budget, order) for budget in _BUDGETS],
    }


def filled(tokens: IntArray, budget: int, order: IntArray) -> dict[str, Any]:
    """Return how full rows of at most `budget` tokens are, and the share of groups that no such row holds.

    Args:
        tokens: (N,) tokens of each group in a packed row.
        budget: `max_tokens_per_device`.
        order: in which the groups come.
    """
    fitting = order[tokens[order] <= budget]
    steps = [fitting[start : start + _STEP_GROUPS] for start in range(0, len(fitting), _STEP_GROUPS)][:_NUM_STEPS]
    rows = used = 0
    for step in steps:
        rows += len(split_balanced(tokens[step].tolist(), 1, budget))
        used += int(tokens[step].sum())
    return {
        "max_tokens_per_device": budget,
        "filled": used / (rows * budget) if rows else None,
        "groups_too_large": float(1 - len(fitting) / len(tokens)),
    }


def review_lengths(
    groups: Sequence[SampledGroup], config: RunConfig, seed: int
) -> tuple[dict[str, Any], list[Finding]]:
    """Return the figures of lengths, and what is to be said about `max_length` and the row layout.

    Args:
        groups: the sample; those that can't be encoded are left out.
        config: `max_length` and `overlong_policy`.
        seed: of the order in which groups meet in a micro-batch.
    """
    known = [group for group in groups if group.lengths]
    if not known:
        return {}, []
    lengths = GroupLengths.of(known)
    limits = sorted({limit for limit in (*_LENGTHS, config.max_length) if _is_telling(limit, lengths, config)})
    figures = {
        "num_groups": len(known),
        "longest_sequence": histogram_of(lengths.longest),
        "prompt": histogram_of(lengths.prompt),
        "response": histogram_of(lengths.responses),
        "cuts": [asdict(cut_at(lengths, limit)) for limit in limits],
        "layouts": layouts(lengths, known, seed),
    }
    return figures, [_over_long(known, lengths, config)]


def _is_telling(limit: int, lengths: GroupLengths, config: RunConfig) -> bool:
    return limit == config.max_length or lengths.longest.min() < limit < 2 * lengths.longest.max()


def _over_long(groups: Sequence[SampledGroup], lengths: GroupLengths, config: RunConfig) -> Finding:
    over = np.flatnonzero(lengths.longest > config.max_length)
    enough = int(math.ceil(np.quantile(lengths.longest, _KEPT_SHARE) / 64) * 64)
    now = cut_at(lengths, config.max_length)
    suggestion = None
    if now.over > 1 - _KEPT_SHARE:
        suggestion = Suggestion(
            f"{enough:,} tokens hold {_KEPT_SHARE:.0%} of the groups. Or cut prompts on the left (--overlong_policy "
            f"truncate_prompt_left): that would lose {now.lost_even_so:.1%} instead of {now.over:.1%}.",
            f"--max_length {enough}",
        )
    elif enough <= config.max_length // 2:
        suggestion = Suggestion(
            f"{enough:,} tokens hold {_KEPT_SHARE:.0%} of the groups: a lower limit plans less memory, so that more "
            "groups fit into a micro-batch.",
            f"--max_length {enough}",
        )
    examples = tuple(groups[place].example() for place in over[:NUM_EXAMPLES])
    return Finding(
        "over_long",
        f"Groups over max_length={config.max_length:,}",
        "problem" if now.over > 1 - _KEPT_SHARE else "note" if len(over) or suggestion else "nothing",
        len(over),
        len(groups),
        "groups",
        True,
        f"Their longest sequence has more tokens than max_length; overlong_policy is {config.overlong_policy}.",
        examples,
        suggestion,
    )

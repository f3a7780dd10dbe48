"""Compute what choosing the best of n completions is worth: expected reward and KL over n, from K per prompt.

The expectation over all subsets of n of the K samples is computed exactly, with order statistics: in ascending order
the i-th sample is the best of C(i-1, n-1) of the C(K, n) subsets. That is without bias for every n <= K, and uses all
samples at once (Nakano et al. 2021, "WebGPT", https://arxiv.org/abs/2112.09332; Hilton and Gao 2022, "Measuring
Goodhart's law"). The same weights on a second score of the same samples give what the first one's choice is worth by
the second (Gao et al. 2022, "Scaling laws for reward model overoptimization", https://arxiv.org/abs/2210.10760).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_NORMAL_QUANTILE_95 = 1.959963984540054
# Above this the percentiles of a resampled mean are those of a normal distribution to well below the band's width.
_MOST_RESAMPLED_PROMPTS = 5000
_RESAMPLE_CHUNK = 50
_LARGEST_MATRIX = 4_000_000
MOST_POINTS = 1000
"""Largest n that is drawn unless one is asked for."""

KL_NOTE = (
    "log n - (n-1)/n nats, per prompt: exact in the limit of many different completions without ties (Stiennon et al. "
    "2020); in general an upper bound, and far too high where a prompt has few different completions (Beirami et al. "
    "2024, https://arxiv.org/abs/2401.01879)"
)


def kl_bound(n: int) -> float:
    """Return the upper bound, in nats, of the KL divergence of best-of-n from what was sampled; see `KL_NOTE`."""
    assert n >= 1
    return math.log(n) - (n - 1) / n


def weight_rows(num_samples: int, max_n: int) -> Iterator[Array]:
    """Yield how often each sample is the best of a subset of n, for n = 1..max_n.

    Args:
        num_samples: K.
        max_n: largest subset, at most K.

    Yields:
        `(K,)`: C(i-1, n-1) / C(K, n) for i = 1..K, samples in ascending order; the sum is 1.
    """
    assert 1 <= max_n <= num_samples
    place = np.arange(1, num_samples + 1, dtype=np.float64)
    weights: Array = np.full(num_samples, 1 / num_samples)
    for n in range(1, max_n + 1):
        yield weights
        # The quotient of a row and the one before it: binomials of thousands of samples have thousands of digits.
        if n < num_samples:
            weights = weights * ((n + 1) / n) * (np.maximum(place - n, 0) / (num_samples - n))


@functools.lru_cache(maxsize=8)
def _weight_matrix(num_samples: int, max_n: int) -> Array:
    return np.stack(list(weight_rows(num_samples, max_n)))


def expected_best(scores: Sequence[float] | Array, max_n: int, values: Sequence[float] | Array | None = None) -> Array:
    """Return the expected value of the sample with the highest score among n, for n = 1..max_n.

    Args:
        scores: of the K samples of one prompt, K >= max_n. Samples with equal scores are chosen among at random.
        values: what the chosen sample is worth; default its score.

    Returns:
        `(max_n,)`.
    """
    order = np.argsort(np.asarray(scores, dtype=np.float64), kind="stable")
    ascending = np.asarray(scores, dtype=np.float64)[order]
    worth = ascending if values is None else _mean_over_ties(ascending, np.asarray(values, dtype=np.float64)[order])
    if len(ascending) * max_n > _LARGEST_MATRIX:
        return np.array([row @ worth for row in weight_rows(len(ascending), max_n)])
    expected: Array = _weight_matrix(len(ascending), max_n) @ worth
    return expected


def _mean_over_ties(ascending: Array, values: Array) -> Array:
    """Replace each value by the mean over the samples of the same score."""
    starts = np.flatnonzero(np.r_[True, ascending[1:] != ascending[:-1]])
    sizes = np.diff(np.r_[starts, len(ascending)])
    means: Array = np.repeat(np.add.reduceat(values, starts) / sizes, sizes)
    return means


def mean_interval(curves: Array, num_resamples: int = 1000, seed: int = 0) -> tuple[Array, Array, str]:
    """Return the 95 % band of the mean over prompts.

    Args:
        curves: `(num_prompts, max_n)`.
        num_resamples: of the bootstrap over prompts.
        seed: of the bootstrap.

    Returns:
        Low and high, `(max_n,)` each, and how they were found. With one prompt there is no band: NaN.
    """
    num_prompts = len(curves)
    mean = curves.mean(axis=0)
    if num_prompts < 2:
        nothing = np.full_like(mean, np.nan)
        return nothing, nothing, "none: one prompt"
    if num_prompts > _MOST_RESAMPLED_PROMPTS:
        half = _NORMAL_QUANTILE_95 * curves.std(axis=0, ddof=1) / math.sqrt(num_prompts)
        return mean - half, mean + half, "normal approximation over prompts"
    random = np.random.default_rng(seed)
    share = np.full(num_prompts, 1 / num_prompts)
    means = [
        random.multinomial(num_prompts, share, size=min(_RESAMPLE_CHUNK, num_resamples - done)) @ curves / num_prompts
        for done in range(0, num_resamples, _RESAMPLE_CHUNK)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975], axis=0)
    return low, high, f"percentiles of {num_resamples} bootstrap resamples of the prompts, seed {seed}"


@dataclass(frozen=True)
class CurvePoint:
    """Best-of-n at one n, mean over prompts.

    Attributes:
        n: completions to choose from.
        kl_bound_nats: see `KL_NOTE`.
        reward: expected score of the chosen completion.
        reward_ci95: its band over prompts; `None` with one prompt.
        gold, gold_ci95: expected gold score of the completion that this reward model chooses.
        gold_oracle: expected gold score of the completion that the gold score itself would choose.
    """

    n: int
    kl_bound_nats: float
    reward: float
    reward_ci95: list[float] | None
    gold: float | None = None
    gold_ci95: list[float] | None = None
    gold_oracle: float | None = None


@dataclass(frozen=True)
class BestOfN:
    """Curves over n, all from the same prompts.

    Attributes:
        points: n = 1..max_n.
        num_prompts: prompts with at least max_n scored completions (and gold scores, when there are any).
        num_completions: their completions.
        left_out: prompts that were not used, by reason.
        interval: how the bands were found.
        tied_share: share of the used completions that share their score with another one of their prompt.
    """

    points: list[CurvePoint]
    num_prompts: int
    num_completions: int
    left_out: dict[str, int]
    interval: str
    tied_share: float

    @property
    def max_n(self) -> int:
        """The largest n."""
        return len(self.points)

    @property
    def gold_peak(self) -> CurvePoint | None:
        """Where the gold score is highest, or `None` without gold scores."""
        if not self.points or self.points[0].gold is None:
            return None
        return max(self.points, key=lambda point: (point.gold, -point.n))

    def to_json(self) -> dict[str, Any]:
        """Return the curves for a file; numbers that don't exist are null."""
        peak = self.gold_peak
        return {
            "version": 1,
            "estimator": "exact mean over all subsets of n of the K samples of a prompt, then the mean over prompts",
            "kl": KL_NOTE,
            "interval": self.interval,
            "max_n": self.max_n,
            "num_prompts": self.num_prompts,
            "num_completions": self.num_completions,
            "tied_share": self.tied_share,
            "left_out": self.left_out,
            "gold_peak_n": peak.n if peak else None,
            "points": [asdict(point) for point in self.points],
        }


@dataclass
class CurveSamples:
    """Collects the scores of every prompt: 8 bytes per completion, twice with gold scores.

    Attributes:
        scores: per prompt, its completions' scores.
        gold: per prompt, their gold scores; empty without a gold column.
        left_out: prompts that can't be used, by reason.
    """

    scores: list[Array] = field(default_factory=list)
    gold: list[Array] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)

    def add(self, scores: Sequence[float], gold: Sequence[float | None] | None) -> None:
        """Add one prompt's completions.

        Args:
            scores: of those that could be scored.
            gold: as many; `None` when no gold scores are used at all. A prompt that misses one is left out.
        """
        if gold is not None and any(value is None for value in gold):
            self.leave_out("no_gold_score")
        elif not scores:
            self.leave_out("no_scored_completion")
        else:
            self.scores.append(np.asarray(scores, dtype=np.float64))
            if gold is not None:
                self.gold.append(np.asarray(gold, dtype=np.float64))

    def leave_out(self, reason: str) -> None:
        """Count a prompt that is not used."""
        self.left_out[reason] = self.left_out.get(reason, 0) + 1

    def usual_size(self) -> int:
        """Return the number of completions that most prompts have; the larger of several; 0 without prompts."""
        counts: dict[int, int] = {}
        for group in self.scores:
            counts[len(group)] = counts.get(len(group), 0) + 1
        return max(counts, key=lambda size: (counts[size], size), default=0)

    def curves(self, max_n: int | None = None, num_resamples: int = 1000, seed: int = 0) -> BestOfN:
        """Estimate the curves.

        Args:
            max_n: largest n; default the number of completions that most prompts have, at most `MOST_POINTS`. Prompts
                with fewer are left out at every n, so that all points speak of the same prompts.
            num_resamples: of the bootstrap.
            seed: of the bootstrap.
        """
        max_n = max_n or min(self.usual_size(), MOST_POINTS)
        used = [number for number, group in enumerate(self.scores) if len(group) >= max_n > 0]
        left_out = dict(self.left_out)
        if len(used) < len(self.scores):
            left_out["fewer_than_max_n"] = len(self.scores) - len(used)
        if not used:
            return BestOfN([], 0, 0, left_out, "none: no prompts", 0.0)
        rewards = np.stack([expected_best(self.scores[number], max_n) for number in used])
        low, high, interval = mean_interval(rewards, num_resamples, seed)
        gold, gold_low, gold_high, oracle = self._gold(used, max_n, num_resamples, seed)
        points = [
            CurvePoint(
                n=n,
                kl_bound_nats=kl_bound(n),
                reward=float(rewards[:, n - 1].mean()),
                reward_ci95=_band(low, high, n),
                gold=None if gold is None else float(gold[n - 1]),
                gold_ci95=_band(gold_low, gold_high, n),
                gold_oracle=None if oracle is None else float(oracle[n - 1]),
            )
            for n in range(1, max_n + 1)
        ]
        total = sum(len(self.scores[number]) for number in used)
        tied = sum(_num_tied(self.scores[number]) for number in used)
        return BestOfN(points, len(used), total, left_out, interval, tied / total)

    def _gold(
        self, used: Sequence[int], max_n: int, num_resamples: int, seed: int
    ) -> tuple[Array | None, Array | None, Array | None, Array | None]:
        if not self.gold:
            return None, None, None, None
        chosen = np.stack([expected_best(self.scores[number], max_n, self.gold[number]) for number in used])
        oracle = np.stack([expected_best(self.gold[number], max_n) for number in used])
        low, high, _ = mean_interval(chosen, num_resamples, seed)
        return chosen.mean(axis=0), low, high, oracle.mean(axis=0)


def _band(low: Array | None, high: Array | None, n: int) -> list[float] | None:
    if low is None or high is None or math.isnan(low[n - 1]):
        return None
    return [float(low[n - 1]), float(high[n - 1])]


def _num_tied(scores: Array) -> int:
    _, counts = np.unique(scores, return_counts=True)
    return int(counts[counts > 1].sum())


def curve_table(result: BestOfN) -> str:
    """Return the curves as text, at n = 1, 2, 4, ... and the largest n."""
    if not result.points:
        return "best-of-n: no prompt could be used"
    chosen = sorted({*(2**power for power in range(result.max_n.bit_length())), result.max_n})
    has_gold = result.points[0].gold is not None
    lines = [f"best-of-n over {result.num_prompts} prompts, {result.num_completions} completions"]
    heading = f"{'n':>5}  {'KL <= nats':>10}  {'reward':>9}  {'95 %':>19}"
    lines.append(heading + (f"  {'gold':>9}  {'95 %':>19}  {'gold oracle':>11}" if has_gold else ""))
    for point in (result.points[n - 1] for n in chosen):
        line = f"{point.n:>5}  {point.kl_bound_nats:>10.3f}  {point.reward:>9.4f}  {_band_text(point.reward_ci95):>19}"
        if has_gold:
            line += f"  {point.gold:>9.4f}  {_band_text(point.gold_ci95):>19}  {point.gold_oracle:>11.4f}"
        lines.append(line)
    peak = result.gold_peak
    if peak is not None and peak.n < result.max_n:
        lines.append(
            f"the gold score is highest at n = {peak.n}: beyond, the reward rises and it falls (mind the bands)"
        )
    return "\n".join(lines)


def _band_text(band: list[float] | None) -> str:
    return "-" if band is None else f"[{band[0]:.4f}, {band[1]:.4f}]"

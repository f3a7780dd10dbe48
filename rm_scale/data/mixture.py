"""Several sources mixed in fixed shares: how many groups of each an epoch has, and what limits leave of each.

Arithmetic on counts and arrays alone. `rm_scale.batching.mixture_sampler` makes steps of it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from rm_scale.errors import DataError

MOST_OF_AN_EPOCH = 10**12
_HASHED_AT_ONCE = 1 << 20
IntArray = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Mixture:
    """The sources of the training groups, and the share that each has in what is trained on.

    Attributes:
        names: S names.
        source: `(num_groups,)` index of each group's source.
        rates: S whole numbers in the proportion of the shares.
        counts: groups of each source in an epoch. `None`: an epoch is as many whole steps as it takes to use every
            group of every source at least once.
        per_step: shares hold in each step; otherwise in an epoch, whose order is random.
    """

    names: tuple[str, ...]
    source: IntArray
    rates: tuple[int, ...]
    counts: tuple[int, ...] | None
    per_step: bool

    def sizes(self) -> IntArray:
        """Return the number of groups of each source, `(S,)`."""
        return np.bincount(self.source, minlength=len(self.names)).astype(np.int64)

    def shares(self) -> tuple[float, ...]:
        """Return the share of each source, which add up to 1."""
        return tuple(rate / sum(self.rates) for rate in self.rates)

    def epoch_size(self, groups_per_step: int) -> int:
        """Return the groups of an epoch, for a global batch of this many."""
        if self.counts is not None:
            return sum(self.counts)
        needed = groups_until_all_are_used(self.sizes().tolist(), self.rates)
        return math.ceil(needed / groups_per_step) * groups_per_step

    def describe(self) -> str:
        """Return sources, shares, where they hold and which group is of which source, in a line to compare runs by."""
        parts = [
            f"{name} {share!r} of {size:,} groups"
            for name, share, size in zip(self.names, self.shares(), self.sizes().tolist(), strict=True)
        ]
        held = "in each step" if self.per_step else "in each epoch"
        return f"{', '.join(parts)}, {held}, groups by source {self._source_hash()}"

    def _source_hash(self) -> str:
        digest = hashlib.sha256()
        for start in range(0, len(self.source), _HASHED_AT_ONCE):
            digest.update(self.source[start : start + _HASHED_AT_ONCE].astype("<i8").tobytes())
        return digest.hexdigest()[:16]


def weighted(
    names: Sequence[str], source: IntArray, weights: Sequence[float], per_step: bool, setting: str = "datasets"
) -> Mixture:
    """Return a mixture in the proportion of weights.

    Args:
        names: S names.
        source: `(num_groups,)` index of each group's source.
        weights: S weights, not negative and not all 0.
        per_step: the shares hold in each step; otherwise in an epoch.
        setting: where the sources were named, for messages.

    Raises:
        DataError: a source with a weight has no group, or so small a weight that an epoch would not end.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    denominator = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * denominator) for weight in exact]
    divisor = math.gcd(*whole)
    rates = tuple(rate // divisor for rate in whole)
    mixture = Mixture(tuple(names), source, rates, None, per_step)
    _require_groups(mixture, setting)
    _require_an_end(mixture, setting)
    if per_step:
        return mixture
    size = groups_until_all_are_used(mixture.sizes().tolist(), rates)
    return Mixture(mixture.names, source, rates, tuple(divide(size, rates)), per_step)


def repeated(
    names: Sequence[str], source: IntArray, epochs: Sequence[float], per_step: bool, setting: str = "datasets"
) -> Mixture:
    """Return a mixture in which each source is used a number of times in an epoch of the run.

    Args:
        names: S names.
        source: `(num_groups,)` index of each group's source.
        epochs: S numbers, such as 2 or 0.5.
        per_step: the shares that follow hold in each step; otherwise in an epoch.
        setting: where the sources were named, for messages.

    Raises:
        DataError: a source has no group, or too few for one to be used.
    """
    sizes = np.bincount(source, minlength=len(names)).tolist()
    counts = tuple(
        math.floor(Fraction(str(times)) * size + Fraction(1, 2)) for times, size in zip(epochs, sizes, strict=True)
    )
    mixture = Mixture(tuple(names), source, counts, counts, per_step)
    _require_groups(mixture, setting, epochs)
    return mixture


def _require_groups(mixture: Mixture, setting: str, epochs: Sequence[float] = ()) -> None:
    for number, (name, size, rate) in enumerate(zip(mixture.names, mixture.sizes(), mixture.rates, strict=True)):
        if not size and (rate or epochs):
            raise DataError(
                f"{setting}: {name}: no group of it is left to train on, after its filters, limits and what is held "
                "out. Fix: correct them, or leave the source out."
            )
        if not rate and epochs:
            raise DataError(
                f"{setting}: {name}: epochs={epochs[number]:g} of {size:,} groups is less than half a group. Fix: a "
                "larger number, or leave the source out."
            )


def _require_an_end(mixture: Mixture, setting: str) -> None:
    """Refuse weights so far apart that no epoch would end."""
    for name, size, rate in zip(mixture.names, mixture.sizes().tolist(), mixture.rates, strict=True):
        needed = size * sum(mixture.rates) // rate if rate else 0
        if needed > MOST_OF_AN_EPOCH:
            raise DataError(
                f"{setting}: {name}: at its weight {needed:,} groups are drawn until its {size:,} have been used, "
                f"which ends an epoch; at most {MOST_OF_AN_EPOCH:,}. Fix: a larger weight, weight: 0, or max_samples."
            )


def groups_until_all_are_used(sizes: Sequence[int], rates: Sequence[int]) -> int:
    """Return how many groups are drawn in these proportions until each source that is drawn from is used up once."""
    total = sum(rates)
    return max(-(-size * total // rate) for size, rate in zip(sizes, rates, strict=True) if rate)


def divide(total: int, rates: Sequence[int]) -> list[int]:
    """Divide a number in these proportions, by largest remainder; of equal ones the first is favoured."""
    whole = [total * rate // sum(rates) for rate in rates]
    left = [total * rate % sum(rates) for rate in rates]
    for number in sorted(range(len(rates)), key=lambda number: (-left[number], number))[: total - sum(whole)]:
        whole[number] += 1
    return whole


def first_of_each(source: IntArray, count: int | None, num_sources: int) -> IntArray:
    """Return the indices of the first groups of each source, `count` in all and in proportion to their numbers."""
    sizes = np.bincount(source, minlength=num_sources).tolist()
    if count is None or count >= len(source):
        return np.arange(len(source))
    return first_groups(source, divide(count, sizes))


def first_groups(source: IntArray, counts: Sequence[int | None]) -> IntArray:
    """Return the indices of the first `counts[s]` groups of each source s, in their order; all of them for `None`."""
    kept = [np.flatnonzero(source == number)[:count] for number, count in enumerate(counts)]
    return np.sort(np.concatenate(kept)) if kept else np.arange(0)

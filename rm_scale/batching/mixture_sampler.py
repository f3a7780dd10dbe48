"""The groups of each optimizer step when several sources are mixed in fixed shares.

Everything follows from the seed, the epoch and the step, so a resumed run goes on in the same order, on any number of
ranks. A source is one endless order: all its groups in a random order, then all in another, and so on; epochs and steps
take the next of it, so that its groups are used equally often, whatever its share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rm_scale.batching.sampler import IntArray, StepSampler
from rm_scale.batching.share_schedule import ShareSchedule
from rm_scale.data.mixture import Mixture

_OF_STEP, _OF_EPOCH = 1, 2


class MixtureSampler(StepSampler):
    """The groups of each optimizer step of an epoch of a mixture, the same on every rank.

    With weights and shares per step all steps are full, and an epoch ends with the step in which the last source has
    been used whole. Otherwise an epoch has a fixed number of groups of each source, and its last step may be smaller.

    Args:
        mixture: the sources and their shares.
        groups_per_step: global batch size.
        shuffle: random orders, from `seed` alone. Otherwise sources are read in their order, and with shares per epoch
            one after the other.
        seed: seed of the orders.
    """

    def __init__(self, mixture: Mixture, groups_per_step: int, shuffle: bool, seed: int) -> None:
        super().__init__(mixture.epoch_size(groups_per_step), groups_per_step, shuffle, seed)
        self.mixture = mixture
        self._orders = [
            _SourceOrder(np.flatnonzero(mixture.source == number), number, seed if shuffle else None)
            for number in range(len(mixture.names))
        ]
        self._start = ShareSchedule(mixture.rates, groups_per_step)

    def __iter__(self) -> Iterator[list[IntArray]]:
        yield from self._steps() if self.mixture.per_step else self._steps_of_random_epoch()

    def order(self) -> IntArray:
        """Return the rows of this epoch's groups in order, shape `(num_groups,)`."""
        return np.concatenate([rows for (rows,) in self])

    def _steps(self) -> Iterator[list[IntArray]]:
        schedule, places = self._begin_epoch()
        left = self.num_groups
        number = self.epoch * len(self)
        while left:
            if left >= self.groups_per_step:
                counts = schedule.next_step()
            else:  # the shares are those of a whole epoch, so what is left of it is in proportion
                assert self.mixture.counts is not None
                counts = [count - taken for count, taken in zip(self.mixture.counts, schedule.taken, strict=True)]
            rows = np.concatenate(self._take(places, counts))
            places = [place + count for place, count in zip(places, counts, strict=True)]
            yield [self._random(_OF_STEP, number).permutation(rows) if self.shuffle else rows]
            left -= len(rows)
            number += 1

    def _begin_epoch(self) -> tuple[ShareSchedule, list[int]]:
        """Return the schedule at the epoch's first step, and the place in each source's endless order."""
        if self.mixture.counts is not None:  # the shares come out even at the end of an epoch
            return self._start.at(0), self._fixed_places()
        self._start = self._start.at(self.epoch * len(self))
        return self._start.at(self._start.step), list(self._start.taken)

    def _fixed_places(self) -> list[int]:
        assert self.mixture.counts is not None
        return [self.epoch * count for count in self.mixture.counts]

    def _steps_of_random_epoch(self) -> Iterator[list[IntArray]]:
        counts = self.mixture.counts
        assert counts is not None, "shares per epoch are counts"
        source = np.repeat(np.arange(len(counts)), counts)
        if self.shuffle:
            source = self._random(_OF_EPOCH, self.epoch).permutation(source)
        rows = np.empty(len(source), dtype=np.int64)
        for number, taken in enumerate(self._take(self._fixed_places(), counts)):
            rows[source == number] = taken
        for start in range(0, len(rows), self.groups_per_step):
            yield [rows[start : start + self.groups_per_step]]

    def _take(self, places: Sequence[int], counts: Sequence[int]) -> list[IntArray]:
        triples = zip(self._orders, places, counts, strict=True)
        return [order.take(place, count) for order, place, count in triples]

    def _random(self, what: int, number: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, 0], counter=[0, 0, what, number]))


class _SourceOrder:
    """The endless order of one source's groups.

    Args:
        rows: its rows of the data set.
        number: its place among the sources, which gives it an order of its own.
        seed: of the orders; `None` repeats the rows as they are.
    """

    def __init__(self, rows: IntArray, number: int, seed: int | None) -> None:
        self.rows = rows
        self._key = None if seed is None else [seed, number + 1]
        self._pass: tuple[int, IntArray] = (-1, rows)

    def take(self, start: int, count: int) -> IntArray:
        """Return `count` rows from this place on."""
        parts = []
        while count:
            number, place = divmod(start, len(self.rows))
            part = self._rows_of_pass(number)[place : place + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts) if parts else self.rows[:0]

    def _rows_of_pass(self, number: int) -> IntArray:
        if self._key is None:
            return self.rows
        if self._pass[0] != number:
            random = np.random.Generator(np.random.Philox(key=self._key, counter=[0, 0, 0, number]))
            self._pass = (number, random.permutation(self.rows))
        return self._pass[1]


def sampler_of(mixture: Mixture | None, num_groups: int, groups_per_step: int, shuffle: bool, seed: int) -> StepSampler:
    """Return the sampler of a mixture, or of a data set of which each group is used once per epoch.

    Args:
        mixture: the sources and their shares, if there are several.
        num_groups: size of the data set.
        groups_per_step, shuffle, seed: as for `StepSampler`.
    """
    if mixture is None:
        return StepSampler(num_groups, groups_per_step, shuffle, seed)
    return MixtureSampler(mixture, groups_per_step, shuffle, seed)

"""How many groups of each source a step gets: exact shares, in every step and in total.

A step of B groups should have q = B * share of a source, which is rarely a whole number. Rounding each step by itself
drifts, and carrying the remainder over can make a step off by two. Handing out the places that are left over is the
problem of scheduling periodic tasks on identical processors so that none is ever a whole unit ahead or behind (Baruah
et al., "Proportionate progress", Algorithmica 15, 1996); the rule used is PD2 (Anderson and Srinivasan, "Mixed
Pfair/ERfair scheduling of asynchronous periodic tasks", JCSS 68, 2004). With it a step has floor(q) or ceil(q) groups
of a source, and after t steps less than one group more or less than t * q. All arithmetic is in integers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence


class ShareSchedule:
    """The number of groups of each source in step 0, 1, 2, ...

    Args:
        rates: whole numbers in the proportion of the shares; at least one is positive.
        groups_per_step: groups of a step, B.

    Attributes:
        step: number of steps handed out so far.
        taken: groups of each source in them.
    """

    def __init__(self, rates: Sequence[int], groups_per_step: int) -> None:
        self.step = 0
        self.taken = [0] * len(rates)
        self._total = sum(rates)
        self._whole = [rate * groups_per_step // self._total for rate in rates]
        left = [rate * groups_per_step % self._total for rate in rates]
        self._num_left = sum(left) // self._total
        self._claims = [_Claim(number, rate, self._total) for number, rate in enumerate(left) if rate]

    def next_step(self) -> list[int]:
        """Return the groups of each source in the next step; they add up to B."""
        counts = list(self._whole)
        eligible = sorted(claim.urgency for claim in self._claims if claim.release <= self.step)
        chosen = {number for *_, number in eligible[: self._num_left]}
        assert len(chosen) == self._num_left, "the rule leaves no place of a step free"
        for claim in self._claims:
            if claim.source in chosen:
                counts[claim.source] += 1
                claim.grant()
        self.taken = [taken + count for taken, count in zip(self.taken, counts, strict=True)]
        self.step += 1
        return counts

    def at(self, step: int) -> ShareSchedule:
        """Return a schedule of its own that has handed out this many steps, from here or from the beginning."""
        later = copy.deepcopy(self) if step >= self.step else self._from_start()
        while later.step < step:
            later.next_step()
        return later

    def _from_start(self) -> ShareSchedule:
        first = copy.deepcopy(self)
        first.step, first.taken = 0, [0] * len(self.taken)
        first._claims = [_Claim(claim.source, claim.rate, self._total) for claim in self._claims]
        return first


class _Claim:
    """One source's claim to the j-th of the places that are left over, at `rate / total` of a place per step.

    Attributes:
        source: index of the source.
        release: first step that may grant it, so that the source is never a whole group ahead.
        urgency: the order in which claims are granted: by last step that may grant it, then PD2's tie-breaks.
    """

    def __init__(self, source: int, rate: int, total: int) -> None:
        self.source = source
        self.rate = rate
        self._total = total
        self._number = 0
        self.grant()

    def grant(self) -> None:
        """Go on to the next place."""
        self._number += 1
        rate, total, number = self.rate, self._total, self._number
        self.release = (number - 1) * total // rate
        deadline = _ceil(number * total, rate)
        overlaps = number * total % rate != 0  # with the window of the next place
        cascade = 0
        if 2 * rate >= total:  # the end of a row of windows of two steps, each of which forces the next
            rest = total - rate
            cascade = _ceil(_ceil(deadline * rest, total) * total, rest)
        self.urgency = (deadline, -overlaps, -cascade, self.source)


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)

"""MinHash with banding: find texts that share many of their shingles without comparing all pairs.

Of a random order of all shingles, the chance that two texts have the same first one is their Jaccard similarity (the
shingles they share, divided by those that either has; Broder 1997, "On the resemblance and containment of documents").
Keys of `num_rows` such firsts each make texts candidates where one of `num_bands` keys agrees (Lee et al. 2021,
arXiv:2107.06499, use this to remove near duplicates from training data). Candidates are compared in full by whoever
asks, so that what this can cause is a miss, never a false match; `chance_found` says how likely a find is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rm_scale.overlap.ngrams import Hashes, TextHashes

SHINGLE_TOKENS = 3
_WANTED_CHANCE = 0.95
_MOST_HASHES = 100
# Hashes that are worked on at once: what fits into a processor's cache.
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Banding:
    """How many keys a text gets, and of how many minima each.

    Attributes:
        num_bands: keys of a text.
        num_rows: minima in each key.
    """

    num_bands: int
    num_rows: int

    @classmethod
    def for_threshold(cls, threshold: float) -> Banding:
        """Return the banding of at most 100 minima with the fewest candidates that finds 95 of 100 pairs as similar.

        Args:
            threshold: Jaccard similarity, in (0, 1].
        """
        for rows in range(12, 1, -1):
            bands = _bands_needed(threshold**rows)
            if bands * rows <= _MOST_HASHES:
                return cls(bands, rows)
        return cls(min(_MOST_HASHES, _bands_needed(threshold)), 1)

    def chance_found(self, similarity: float) -> float:
        """Return the chance that two texts of this Jaccard similarity are candidates."""
        return float(1 - (1 - similarity**self.num_rows) ** self.num_bands)


def _bands_needed(chance: float) -> int:
    if chance >= 1:
        return 1
    return int(np.ceil(np.log(1 - _WANTED_CHANCE) / np.log1p(-chance)))


class MinHash:
    """Makes the keys of texts.

    Args:
        banding: how many keys, of how many minima.
        seed: of the random orders; the same seed gives the same keys anywhere.
    """

    def __init__(self, banding: Banding, seed: int = 0) -> None:
        self.banding = banding
        generator = np.random.default_rng(seed)
        count = banding.num_bands * banding.num_rows
        self._factors = generator.integers(0, 2**64, count, dtype=np.uint64) | np.uint64(1)
        self._offsets = generator.integers(0, 2**64, count, dtype=np.uint64)
        self._weights = generator.integers(0, 2**64, banding.num_rows, dtype=np.uint64) | np.uint64(1)

    def keys(self, shingles: TextHashes) -> npt.NDArray[np.uint32]:
        """Return the keys (N, num_bands) of N texts; those of a text without shingles mean nothing.

        Args:
            shingles: the texts' shingles; repeats don't matter.
        """
        firsts = self._minima(shingles)
        bands = firsts.reshape(len(firsts), self.banding.num_bands, self.banding.num_rows)
        mixed: Hashes = (bands * self._weights).sum(axis=2, dtype=np.uint64)
        return (mixed >> np.uint64(32)).astype(np.uint32)

    def _minima(self, shingles: TextHashes) -> Hashes:
        minima = np.zeros((len(shingles), len(self._factors)), dtype=np.uint64)
        there = np.flatnonzero(shingles.counts)
        starts = shingles.starts()[there]
        # 32 bits times 64, of which the upper 32 count, is a universal family (Dietzfelbinger et al. 1997).
        values = shingles.values >> np.uint64(32)
        first = 0
        while first < len(there):
            last = max(first + 1, int(np.searchsorted(starts, starts[first] + _BLOCK)))
            stop = int(starts[last]) if last < len(there) else len(values)
            block, places = values[int(starts[first]) : stop], starts[first:last] - starts[first]
            for place, (factor, offset) in enumerate(zip(self._factors, self._offsets, strict=True)):
                minima[there[first:last], place] = np.minimum.reduceat(block * factor + offset, places)
            first = last
        return minima >> np.uint64(32)


def jaccard(one: Hashes, other: Hashes) -> float:
    """Return the Jaccard similarity of two sets of shingles, given without repeats."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    total = len(one) + len(other) - shared
    return shared / total if total else 0.0

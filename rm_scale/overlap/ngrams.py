"""Hashes of runs of consecutive tokens (n-grams, shingles), for batches of texts at once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int64]

# Any odd number whose bits look random: it keeps the order of tokens in the sum.
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_MOST_KNOWN = 200_000


class _TokenHashes(dict[str, int]):
    """64 bits per token. Python's own `hash` differs from process to process."""

    def __missing__(self, token: str) -> int:
        digest = hashlib.blake2b(token.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self[token] = value = int.from_bytes(digest, "big")
        return value


_TOKEN_HASHES = _TokenHashes()


@dataclass(frozen=True)
class TextHashes:
    """Hashes that belong to N texts, one text's after another's.

    Attributes:
        values: (V,) uint64, the hashes of all texts.
        counts: (N,) how many of them each text has.
    """

    values: Hashes
    counts: Counts

    def __len__(self) -> int:
        return len(self.counts)

    def owners(self) -> Counts:
        """Return (V,) the place of the text that each hash belongs to."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def starts(self) -> Counts:
        """Return (N,) the place of each text's first hash."""
        return np.cumsum(self.counts) - self.counts

    def distinct(self) -> TextHashes:
        """Return each text's hashes without repeats, in ascending order."""
        owners = self.owners()
        order = np.lexsort((self.values, owners))
        values, owners = self.values[order], owners[order]
        first = np.ones(len(values), dtype=bool)
        first[1:] = (values[1:] != values[:-1]) | (owners[1:] != owners[:-1])
        return TextHashes(values[first], np.bincount(owners[first], minlength=len(self.counts)))


def token_hashes(texts: Sequence[Sequence[str]]) -> TextHashes:
    """Return the hash of each token of N texts, given as their tokens."""
    if len(_TOKEN_HASHES) > _MOST_KNOWN:
        _TOKEN_HASHES.clear()
    counts = np.fromiter((len(text) for text in texts), dtype=np.int64, count=len(texts))
    hashed: Any = map(_TOKEN_HASHES.__getitem__, chain.from_iterable(texts))
    return TextHashes(np.fromiter(hashed, dtype=np.uint64, count=int(counts.sum())), counts)


def ngrams(tokens: TextHashes, size: int, keep_short: bool = False) -> TextHashes:
    """Return the hashes of all runs of `size` consecutive tokens.

    Args:
        tokens: hashes of tokens, as from `token_hashes`.
        size: tokens in a run.
        keep_short: a text of fewer tokens has one run of all of them, otherwise none. Texts without tokens have none.
    """
    counts = tokens.counts
    runs = np.maximum(counts - size + 1, 0)
    # Where each run begins; runs of texts that are too short begin nowhere.
    within = np.arange(runs.sum()) - np.repeat(np.cumsum(runs) - runs, runs)
    begins = np.repeat(tokens.starts(), runs) + within
    values = np.zeros(len(begins), dtype=np.uint64)
    for offset in range(size):
        values = values * _FACTOR + tokens.values[begins + offset]
    found = TextHashes(_mixed(values), runs)
    return _with_short(found, tokens, size) if keep_short else found


def _with_short(found: TextHashes, tokens: TextHashes, size: int) -> TextHashes:
    short = np.flatnonzero((tokens.counts > 0) & (tokens.counts < size))
    if not len(short):
        return found
    starts = tokens.starts()
    whole = np.zeros(len(short), dtype=np.uint64)
    for offset in range(size - 1):
        there = offset < tokens.counts[short]
        whole[there] = whole[there] * _FACTOR + tokens.values[starts[short[there]] + offset]
    counts = found.counts.copy()
    counts[short] = 1
    values = np.empty(int(counts.sum()), dtype=np.uint64)
    is_short = np.zeros(len(counts), dtype=bool)
    is_short[short] = True
    mine = np.repeat(is_short, counts)
    values[mine] = _mixed(whole)
    values[~mine] = found.values
    return TextHashes(values, counts)


def _mixed(values: Hashes) -> Hashes:
    """Spread all bits over all others (the finalizer of splitmix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

"""Group texts that are nearly the same, among millions, in memory of about 130 bytes a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rm_scale.overlap.minhash import SHINGLE_TOKENS, Banding, MinHash, jaccard
from rm_scale.overlap.ngrams import Hashes, TextHashes, ngrams, token_hashes
from rm_scale.overlap.normalisation import normalised_key, tokens

NEAR_DUPLICATE_THRESHOLD = 0.8
_BATCH_TEXTS = 2_000
# A text is compared with this many of the different texts that share one of its keys.
_MOST_COMPARED = 8

Places = npt.NDArray[np.int64]


def near_duplicates(
    texts: Sequence[str], threshold: float = NEAR_DUPLICATE_THRESHOLD, seed: int = 0
) -> list[list[int]]:
    """Return groups of texts that are the same or nearly the same.

    Texts are nearly the same when the Jaccard similarity of their 3-token shingles (after normalisation, see
    `rm_scale.overlap.normalisation`) is at least `threshold`, or when they are linked by texts that are. Candidates
    come from MinHash, which finds 95 of 100 pairs at the threshold and more above it, and are then compared in full:
    nothing below the threshold is joined.

    Args:
        texts: N texts. Each is read once, and candidates again by their place, so that texts may lie in a mapped
            file: memory grows by about 130 bytes a text, however long. Texts without a letter or digit are only
            grouped with equal ones.
        threshold: smallest similarity, in (0, 1].
        seed: of MinHash's random orders.

    Returns:
        Groups of two or more places in `texts`, each in ascending order, in the order of their first places.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold}: must be above 0 and at most 1.")
    parents = _first_equal(texts)
    if threshold < 1:
        distinct = np.flatnonzero(parents == np.arange(len(parents)))
        _join_similar(texts, distinct, parents, threshold, seed)
    return _groups(parents)


def _first_equal(texts: Sequence[str]) -> Places:
    """Return, for each text, the place of the first text of the same normalised form."""
    keys = np.fromiter((normalised_key(texts[place]) for place in range(len(texts))), np.int64, len(texts))
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return np.asarray(first[inverse.reshape(-1)], dtype=np.int64)


def _join_similar(texts: Sequence[str], distinct: Places, parents: Places, threshold: float, seed: int) -> None:
    """Join texts that differ after normalisation but are similar, in `parents`."""
    banding = Banding.for_threshold(threshold)
    minhash = MinHash(banding, seed)
    keys = np.zeros((len(distinct), banding.num_bands), dtype=np.uint32)
    has_tokens = np.zeros(len(distinct), dtype=bool)
    for batch in _batches(len(distinct)):
        shingles = _shingles([texts[place] for place in distinct[batch]])
        keys[batch] = minhash.keys(shingles)
        has_tokens[batch] = shingles.counts > 0
    for band in range(banding.num_bands):
        for bucket in _buckets(keys[:, band], has_tokens):
            _join_bucket(texts, distinct[bucket], parents, threshold)


def _batches(count: int) -> Iterator[slice]:
    for first in range(0, count, _BATCH_TEXTS):
        yield slice(first, min(first + _BATCH_TEXTS, count))


def _shingles(texts: Sequence[str]) -> TextHashes:
    return ngrams(token_hashes([tokens(text) for text in texts]), SHINGLE_TOKENS, keep_short=True)


def _buckets(keys: npt.NDArray[np.uint32], usable: npt.NDArray[np.bool_]) -> Iterator[Places]:
    """Yield the places of usable texts that share a key, where two or more do."""
    order = np.flatnonzero(usable)
    order = order[np.argsort(keys[order], kind="stable")]
    for start, stop in _runs(keys[order]):
        yield order[start:stop]


def _runs(values: npt.NDArray[Any]) -> Iterator[tuple[int, int]]:
    """Yield start and stop of each run of two or more equal values."""
    edges = np.flatnonzero(np.diff(values)) + 1
    starts = np.concatenate(([0], edges))
    stops = np.concatenate((edges, [len(values)]))
    several = stops - starts > 1
    yield from zip(starts[several].tolist(), stops[several].tolist(), strict=True)


def _join_bucket(texts: Sequence[str], places: Places, parents: Places, threshold: float) -> None:
    """Join the similar ones of texts that share a key, each with the first that it is similar to."""
    if len({_root(parents, place) for place in places.tolist()}) == 1:
        return
    heads: list[tuple[int, Hashes]] = []
    for place in places.tolist():
        root = _root(parents, place)
        if any(_root(parents, head) == root for head, _ in heads):
            continue
        own = _shingles([texts[place]]).distinct().values
        found = next((head for head, theirs in heads if jaccard(own, theirs) >= threshold), None)
        if found is not None:
            _join(parents, place, found)
        elif len(heads) < _MOST_COMPARED:
            heads.append((place, own))


def _root(parents: Places, place: int) -> int:
    while parents[place] != place:
        parents[place] = parents[parents[place]]
        place = int(parents[place])
    return place


def _join(parents: Places, one: int, other: int) -> None:
    first, second = sorted((_root(parents, one), _root(parents, other)))
    parents[second] = first


def _groups(parents: Places) -> list[list[int]]:
    roots = np.fromiter((_root(parents, place) for place in range(len(parents))), np.int64, len(parents))
    order = np.argsort(roots, kind="stable")
    return [order[start:stop].tolist() for start, stop in _runs(roots[order])]

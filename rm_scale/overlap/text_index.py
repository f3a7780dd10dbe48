"""Look texts up among indexed ones: the same, the same after normalisation, by shared 13-grams, or by MinHash."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rm_scale.overlap.minhash import SHINGLE_TOKENS, Banding, MinHash
from rm_scale.overlap.ngrams import Counts, Hashes, TextHashes, ngrams, token_hashes
from rm_scale.overlap.normalisation import exact_key, normalised_key, tokens

MatchKind = Literal["exact", "normalised", "ngram", "minhash"]
KINDS: tuple[MatchKind, ...] = ("exact", "normalised", "ngram", "minhash")
"""How texts can match, the strongest first. `Matches.kinds` holds places in it."""
EXACT, NORMALISED, NGRAM, MINHASH = range(4)


@dataclass(frozen=True)
class MatchRules:
    """What counts as a match.

    Attributes:
        ngram_tokens: tokens in a run.
        ngram_share: runs that two texts share, of the runs of the one that has fewer, from which on they match.
        whole_tokens: an indexed text of so many tokens, or more but too few for a run, matches where all of it is part
            of the other text. One of fewer ("What do you mean by that?") stands in many.
        most_owners: runs in more of the indexed texts than this are stock phrases and count for none of them.
        minhash_similarity: Jaccard similarity of 3-token shingles from which on texts match by MinHash.
        few_shingles: texts that share fewer shingles than this match from `few_similarity` on: a short question with
            another name in it is another question.
        least_tokens: texts of fewer tokens match in no way.
    """

    ngram_tokens: int = 13
    ngram_share: float = 0.5
    whole_tokens: int = 8
    most_owners: int = 10
    minhash_similarity: float = 0.5
    few_shingles: int = 20
    few_similarity: float = 0.8
    least_tokens: int = 0

    def similarity(self, one: Hashes, other: Hashes) -> float | None:
        """Return the Jaccard similarity of two texts' shingles where they match by it, else `None`.

        Args:
            one, other: shingles, each once.
        """
        shared = len(np.intersect1d(one, other, assume_unique=True))
        similarity = shared / max(len(one) + len(other) - shared, 1)
        needed = self.minhash_similarity if shared >= self.few_shingles else self.few_similarity
        return similarity if similarity >= needed else None


@dataclass(frozen=True)
class Matches:
    """Pairs of a text that was looked up and an indexed one, each with its strongest kind of match.

    Attributes:
        queries: (M,) places of the texts looked up, ascending.
        indexed: (M,) places of the indexed texts.
        kinds: (M,) places in `KINDS`.
        shares: (M,) 1 for the same text, else the share of runs or the similarity.
    """

    queries: Counts
    indexed: Counts
    kinds: npt.NDArray[np.uint8]
    shares: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.queries)


class TextIndex:
    """An index over texts, which takes about 20 bytes for each of their tokens and 200 for each text.

    Args:
        texts: what to index. A text that occurs twice is a match for each of its places.
        rules: what counts as a match.
        seed: of MinHash's random orders.
    """

    def __init__(self, texts: Sequence[str], rules: MatchRules | None = None, seed: int = 0) -> None:
        self.rules = rules or MatchRules()
        self._minhash = MinHash(Banding.for_threshold(self.rules.minhash_similarity), seed)
        own = _TextKeys(texts, self.rules, self._minhash)
        usable = np.flatnonzero(own.usable)
        self._exact = _KeyTable(own.exact[usable], usable)
        self._normalised = _KeyTable(own.normalised[usable], usable)
        self._ngrams = _KeyTable(own.runs.values, own.runs.owners()).without_common(self.rules.most_owners)
        self._num_runs = np.bincount(self._ngrams.places, minlength=len(texts))
        self._wholes = {size: table for size, table in self._whole_texts(own) if len(table.keys)}
        with_keys = np.flatnonzero(own.has_keys)
        self._bands = [_KeyTable(column, with_keys) for column in own.bands[with_keys].T]
        self._shingles = own.shingles
        self._shingle_starts = own.shingles.starts()

    def look_up(self, texts: Sequence[str]) -> Matches:
        """Return the matches of a batch of texts; thousands at a time are fastest."""
        asked = _TextKeys(texts, self.rules, self._minhash)
        usable = np.flatnonzero(asked.usable)
        found = [
            _pairs(usable, self._exact, asked.exact[usable], EXACT),
            _pairs(usable, self._normalised, asked.normalised[usable], NORMALISED),
            self._by_ngrams(asked),
            *(self._by_whole(asked, size) for size in self._wholes),
        ]
        strong = {pair for part in found for pair in zip(part.queries.tolist(), part.indexed.tolist(), strict=True)}
        return _strongest([*found, self._by_minhash(asked, strong)])

    def _whole_texts(self, own: _TextKeys) -> Iterator[tuple[int, _KeyTable]]:
        """Yield, for each number of tokens that is too few for a run, the texts of so many."""
        for size in range(self.rules.whole_tokens, self.rules.ngram_tokens):
            runs = ngrams(_only(own.tokens, own.tokens.counts == size), size)
            yield size, _KeyTable(runs.values, runs.owners())

    def _by_whole(self, asked: _TextKeys, size: int) -> Matches:
        runs = ngrams(asked.tokens, size)
        queries, places = self._wholes[size].find(runs.owners(), runs.values)
        return _matches(queries, places, NGRAM, np.ones(len(queries)))

    def _by_ngrams(self, asked: _TextKeys) -> Matches:
        queries, places = self._ngrams.find(asked.runs.owners(), asked.runs.values)
        pairs, shared = np.unique(np.stack([queries, places]), axis=1, return_counts=True)
        fewer = np.minimum(asked.runs.counts[pairs[0]], self._num_runs[pairs[1]])
        shares = shared / np.maximum(fewer, 1)
        enough = shares >= self.rules.ngram_share
        return _matches(pairs[0][enough], pairs[1][enough], NGRAM, shares[enough])

    def _by_minhash(self, asked: _TextKeys, strong: set[tuple[int, int]]) -> Matches:
        with_keys = np.flatnonzero(asked.has_keys)
        parts = [
            np.stack(table.find(with_keys, column))
            for table, column in zip(self._bands, asked.bands[with_keys].T, strict=True)
        ]
        pairs, agreeing = np.unique(np.concatenate(parts, axis=1), axis=1, return_counts=True)
        starts = asked.shingles.starts()
        kept = []
        for query, place in pairs.T[_most_agreeing(pairs[0], agreeing)].tolist():
            if (query, place) in strong:
                continue
            own = _values(asked.shingles, starts, query)
            similarity = self.rules.similarity(own, _values(self._shingles, self._shingle_starts, place))
            if similarity is not None:
                kept.append((query, place, similarity))
        columns: Any = np.array(kept, dtype=np.float64).reshape(-1, 3).T
        return _matches(columns[0].astype(np.int64), columns[1].astype(np.int64), MINHASH, columns[2])


# --- Keys of a batch of texts ----------------------------------------------------------------------------------------

_MOST_CANDIDATES = 20


class _TextKeys:
    """All that texts are recognised by."""

    def __init__(self, texts: Sequence[str], rules: MatchRules, minhash: MinHash) -> None:
        split = [tokens(text) for text in texts]
        hashed = token_hashes(split)
        count = len(texts)
        stripped = [text.strip() for text in texts]
        self.exact = np.fromiter((exact_key(text) for text in stripped), np.int64, count)
        self.normalised = np.fromiter((normalised_key(text) for text in stripped), np.int64, count)
        there = np.fromiter((bool(text) for text in stripped), np.bool_, count)
        self.usable = there & (hashed.counts >= rules.least_tokens)
        self.has_keys = self.usable & (hashed.counts > 0)
        self.tokens = _only(hashed, self.usable)
        self.runs = ngrams(self.tokens, rules.ngram_tokens).distinct()
        self.shingles = ngrams(_only(hashed, self.has_keys), SHINGLE_TOKENS, keep_short=True).distinct()
        self.bands = minhash.keys(self.shingles)


def _only(hashed: TextHashes, wanted: npt.NDArray[np.bool_]) -> TextHashes:
    """Return the hashes with none for the texts that are not wanted."""
    return TextHashes(hashed.values[np.repeat(wanted, hashed.counts)], np.where(wanted, hashed.counts, 0))


def _values(hashed: TextHashes, starts: Counts, place: int) -> Hashes:
    return hashed.values[starts[place] : starts[place] + hashed.counts[place]]


def _most_agreeing(queries: Counts, agreeing: Counts) -> Counts:
    """Return the places of each query's candidates that share the most keys with it."""
    order = np.lexsort((-agreeing, queries))
    _, starts = np.unique(queries[order], return_index=True)
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    return np.sort(order[rank < _MOST_CANDIDATES])


# --- Tables of keys --------------------------------------------------------------------------------------------------


class _KeyTable:
    """Which places have which key, sorted by key."""

    def __init__(self, keys: npt.NDArray[Any], places: npt.NDArray[Any]) -> None:
        order = np.argsort(keys, kind="stable")
        self.keys = keys[order]
        self.places = places[order].astype(np.int32)

    def without_common(self, most: int) -> _KeyTable:
        """Return the table without keys that more than `most` places have."""
        _, inverse, counts = np.unique(self.keys, return_inverse=True, return_counts=True)
        rare = counts[inverse.reshape(-1)] <= most
        return _KeyTable(self.keys[rare], self.places[rare])

    def find(self, queries: Counts, keys: npt.NDArray[Any]) -> tuple[Counts, Counts]:
        """Return pairs of a query and a place that have the same key.

        Args:
            queries: (Q,) what asks.
            keys: (Q,) its keys.
        """
        first = np.searchsorted(self.keys, keys, side="left")
        there = np.flatnonzero(first < len(self.keys))
        there = there[self.keys[first[there]] == keys[there]]
        counts = np.searchsorted(self.keys, keys[there], side="right") - first[there]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        places = self.places[np.repeat(first[there], counts) + within]
        return np.repeat(queries[there], counts), places.astype(np.int64)


def _pairs(queries: Counts, table: _KeyTable, keys: npt.NDArray[Any], kind: int) -> Matches:
    found, places = table.find(queries, keys)
    return _matches(found, places, kind, np.ones(len(found)))


def _matches(queries: Counts, indexed: Counts, kind: int, shares: npt.NDArray[Any]) -> Matches:
    return Matches(queries, indexed, np.full(len(queries), kind, dtype=np.uint8), shares.astype(np.float32))


def _strongest(parts: Sequence[Matches]) -> Matches:
    """Return each pair once, with its strongest kind."""
    queries = np.concatenate([part.queries for part in parts])
    indexed = np.concatenate([part.indexed for part in parts])
    kinds = np.concatenate([part.kinds for part in parts])
    shares = np.concatenate([part.shares for part in parts])
    order = np.lexsort((kinds, indexed, queries))
    queries, indexed = queries[order], indexed[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = (queries[1:] != queries[:-1]) | (indexed[1:] != indexed[:-1])
    kept = order[first]
    return Matches(queries[first], indexed[first], kinds[kept], shares[kept])

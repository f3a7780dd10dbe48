"""A tiny model that sees words alone, not their order or the prompt: what it gets right needs no understanding.

Logistic regression on the difference of two responses' word counts (Bradley-Terry with a linear score), fitted and
judged on different prompts. Words are hashed, so that the memory it takes does not grow with the vocabulary.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rm_scale.data_review.finding import Finding, Suggestion
from rm_scale.data_review.sampled_pairs import FEWEST_PAIRS, IntArray, Mask, SampledPairs

Floats = npt.NDArray[np.float64]
NUM_BUCKETS = 1 << 18
NUM_FOLDS = 5
MOST_PAIRS = 20_000
FEWEST_FOR_MODEL = 200
"""Pairs below which such a model learns nothing that lasts."""
_PENALTY = 3e-4
_STEPS = 100
_NUM_WORDS = 20
_REMARKABLE = 0.65
# A word; or one character of a script without spaces between words; or a punctuation mark.
_UNSPACED = r"\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+|[^\w\s]")


@dataclass(frozen=True)
class SparseRows:
    """A sparse matrix of P rows, row after row.

    Attributes:
        columns: (N,) column of each value.
        values: (N,).
        row: (N,) row of each value, ascending.
        num_rows: P.
    """

    columns: IntArray
    values: Floats
    row: IntArray
    num_rows: int

    def take(self, chosen: Mask) -> SparseRows:
        """Return only the rows of a mask (P,)."""
        inside = chosen[self.row]
        number = np.cumsum(chosen) - 1
        return SparseRows(self.columns[inside], self.values[inside], number[self.row[inside]], int(chosen.sum()))

    def times(self, weights: Floats) -> Floats:
        """Return the product (P,) with weights (NUM_BUCKETS,)."""
        return _sums(self.row, self.values * weights[self.columns], self.num_rows)

    def transposed_times(self, values: Floats) -> Floats:
        """Return the product (NUM_BUCKETS,) of the transpose with values (P,)."""
        return _sums(self.columns, self.values * values[self.row], NUM_BUCKETS)


def _sums(place: IntArray, values: Floats, count: int) -> Floats:
    return np.asarray(np.bincount(place, values, minlength=count), dtype=np.float64)


def words_of(text: str) -> list[str]:
    """Return the lower-case words and punctuation marks of a text."""
    return _TOKEN.findall(text.lower())


def bucket_of(word: str) -> int:
    """Return the column of a word, the same on every machine."""
    return zlib.crc32(word.encode("utf-8", "surrogatepass")) % NUM_BUCKETS


def word_differences(pairs: SampledPairs) -> tuple[SparseRows, dict[int, str], Floats]:
    """Return each pair's features, the words behind the columns, and by how many words the better response is longer.

    A feature is log(1 + count) of the better response less that of the worse; rows have unit length.
    """
    names: dict[int, str] = {}
    known: dict[str, int] = {}
    counts = []
    for text in pairs.responses:
        counted = Counter(words_of(text))
        for word in counted:
            if word not in known:
                known[word] = bucket_of(word)
                names.setdefault(known[word], word)
        counts.append({known[word]: np.log1p(count) for word, count in counted.items()})
    sizes = np.asarray([len(text.split()) for text in pairs.responses], dtype=np.float64)
    columns: list[int] = []
    values: list[float] = []
    lengths = []
    for better, worse in zip(pairs.better.tolist(), pairs.worse.tolist(), strict=True):
        one, other = counts[better], counts[worse]
        difference = {place: one.get(place, 0.0) - other.get(place, 0.0) for place in one.keys() | other.keys()}
        kept = sorted((place, value) for place, value in difference.items() if value)
        scale = float(np.sqrt(sum(value * value for _, value in kept))) or 1.0
        columns += [place for place, _ in kept]
        values += [value / scale for _, value in kept]
        lengths.append(len(kept))
    row = np.repeat(np.arange(len(pairs)), lengths)
    rows = SparseRows(np.asarray(columns, dtype=np.int64), np.asarray(values, dtype=np.float64), row, len(pairs))
    return rows, names, sizes[pairs.better] - sizes[pairs.worse]


def fit(rows: SparseRows, penalty: float = _PENALTY) -> Floats:
    """Return the weights (NUM_BUCKETS,) that minimise mean log(1 + exp(-x w)) + penalty / 2 |w|^2 over rows x.

    Every row says "the better one wins", so that there is no intercept and no class to balance. By Nesterov's
    accelerated gradient (Nesterov 1983) with restarts (O'Donoghue and Candes 2015); rows have unit length, so the
    gradient's Lipschitz constant is at most 1/4 + penalty.
    """
    weights = ahead = np.zeros(NUM_BUCKETS)
    step, momentum = 1 / (0.25 + penalty), 1.0
    for _ in range(_STEPS):
        pull = 1 / (1 + np.exp(np.clip(rows.times(ahead), -30, 30)))
        gradient = penalty * ahead - rows.transposed_times(pull) / max(1, rows.num_rows)
        moved = ahead - step * gradient
        if float(gradient @ (moved - weights)) > 0:
            momentum = 1.0
        later = (1 + np.sqrt(1 + 4 * momentum * momentum)) / 2
        ahead = moved + (momentum - 1) / later * (moved - weights)
        weights, momentum = moved, later
    return weights


def folds_of(prompt: IntArray, seed: int) -> IntArray:
    """Return the fold (P,) of each pair; the pairs of one prompt are in one fold."""
    names, place = np.unique(prompt, return_inverse=True)
    return np.random.default_rng(seed).permutation(len(names))[place.reshape(-1)] % NUM_FOLDS


def review_words(pairs: SampledPairs, seed: int) -> tuple[dict[str, Any], list[Finding]]:
    """Return what the model gets right on prompts that it has not seen, beside length alone and a coin.

    Args:
        pairs: of the sample; at most `MOST_PAIRS` are taken, drawn with the seed.
        seed: of that draw and of the folds.
    """
    used = _at_most(pairs, seed)
    if len(used) < FEWEST_FOR_MODEL:
        note = f"{len(used):,} pairs are too few: {FEWEST_FOR_MODEL} are needed"
        return {"num_pairs": len(used), "note": note}, []
    rows, names, longer = word_differences(used)
    fold = folds_of(used.prompt, seed)
    right, right_by_length = np.zeros(len(used)), np.zeros(len(used))
    for number in range(NUM_FOLDS):
        test = fold == number
        right[test] = _credit(rows.take(test).times(fit(rows.take(~test))))
        sign = 1.0 if _credit(longer[~test]).mean() >= 0.5 else -1.0
        right_by_length[test] = _credit(sign * longer[test])
    figures = {
        "num_pairs": len(used),
        "num_folds": NUM_FOLDS,
        "accuracy": float(right.mean()),
        "accuracy_ci95": used.win_rate(right, used.prompt)["wins_ci95"],
        "length_accuracy": float(right_by_length.mean()),
        "length_accuracy_ci95": used.win_rate(right_by_length, used.prompt)["wins_ci95"],
        "coin": 0.5,
        "words": deciding_words(rows, fit(rows), names, used),
    }
    return figures, [_finding(figures, len(used))]


def _at_most(pairs: SampledPairs, seed: int) -> SampledPairs:
    if len(pairs) <= MOST_PAIRS:
        return pairs
    kept = np.sort(np.random.default_rng(seed).choice(len(pairs), MOST_PAIRS, replace=False))
    columns = (pairs.group[kept], pairs.better[kept], pairs.worse[kept], pairs.prompt[kept])
    return SampledPairs(pairs.groups, pairs.responses, *columns)


def _credit(score: Floats) -> Floats:
    """Return 1 for a pair that is right, and a half where the score can't tell."""
    return np.asarray((score > 0) + 0.5 * (score == 0), dtype=np.float64)


def deciding_words(rows: SparseRows, weights: Floats, names: dict[int, str], pairs: SampledPairs) -> dict[str, Any]:
    """Return the words that speak most for the better and for the worse response.

    Of the words that decide `FEWEST_PAIRS` pairs or more, by their weight times the square root of these pairs.
    """
    more = np.bincount(rows.columns[rows.values > 0], minlength=NUM_BUCKETS)
    less = np.bincount(rows.columns[rows.values < 0], minlength=NUM_BUCKETS)
    fewest = max(FEWEST_PAIRS, len(pairs) // 500)
    common = np.flatnonzero(more + less >= fewest)
    order = common[np.argsort(-np.abs(weights[common]) * np.sqrt(more[common] + less[common]), kind="stable")]
    shown: list[dict[str, Any]] = [
        {
            "word": names[int(place)],
            "weight": float(weights[place]),
            "num_more_in_better": int(more[place]),
            "num_more_in_worse": int(less[place]),
        }
        for place in order.tolist()
    ]
    return {
        "better": [one for one in shown if one["weight"] > 0][:_NUM_WORDS],
        "worse": [one for one in shown if one["weight"] < 0][:_NUM_WORDS],
    }


def _finding(figures: dict[str, Any], num_pairs: int) -> Finding:
    low, high = figures["accuracy_ci95"]
    remarkable = figures["accuracy"] >= _REMARKABLE
    wanted = min(0.99, figures["accuracy"] + 0.05)
    words = ", ".join(repr(one["word"]) for side in ("better", "worse") for one in figures["words"][side][:5])
    return Finding(
        "words_alone",
        "What a bag of words gets right",
        "problem" if remarkable else "note" if low > 0.5 else "nothing",
        round(figures["accuracy"] * num_pairs),
        num_pairs,
        "pairs",
        True,
        f"A model that sees each response's words without their order, and no prompt, is right in "
        f"{figures['accuracy']:.1%} (95 %: {low:.1%} to {high:.1%}) of the pairs of prompts it was not fitted on; "
        f"length alone in {figures['length_accuracy']:.1%}, a coin in 50 %. It goes by {words}, most of all.",
        (),
        Suggestion(
            "A reward model has to be well above that figure before its accuracy says that it understands anything.",
            f"rm-scale eval --model DIR --dataset_path FILE --require 'accuracy>={wanted:.2f}'",
        )
        if remarkable
        else None,
    )

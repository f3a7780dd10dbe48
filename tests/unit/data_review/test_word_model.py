"""The bag-of-words model: it learns a word that decides, nothing from noise, and is judged on other prompts."""

from __future__ import annotations

import random

import numpy as np
import pytest

from rm_scale.batching.group_pairs import Pair
from rm_scale.data_review.sample import SampledGroup
from rm_scale.data_review.sampled_pairs import SampledPairs
from rm_scale.data_review.word_model import NUM_BUCKETS, SparseRows, fit, folds_of, review_words, words_of

WORDS = [
    "river",
    "stone",
    "cloud",
    "winter",
    "paper",
    "garden",
    "music",
    "letter",
    "island",
    "copper",
    "valley",
    "candle",
]


def pairs(count: int, mark: str = "", share: float = 0.0, prompts: int | None = None) -> SampledPairs:
    """Even answers; in a share of them the better one holds a word that the other lacks."""
    draw = random.Random(2)
    rows = []
    for number in range(count):
        better, worse = (" ".join(draw.choices(WORDS, k=6)) for _ in range(2))
        if draw.random() < share:
            better = f"{better} {mark}"
        prompt = f"ask {number if prompts is None else number % prompts}"
        rows.append(SampledGroup("file", number, prompt, (better, worse), (Pair(0, 1),), 1, (7, 7)))
    return SampledPairs.of(rows)


def test_a_word_that_decides_is_found() -> None:
    figures, (finding,) = review_words(pairs(600, "kindly", 0.6), seed=0)
    assert 0.72 < figures["accuracy"] < 0.86, "right in the 60 % that have the word, a coin in the others"
    assert figures["words"]["better"][0]["word"] == "kindly"
    assert figures["words"]["better"][0]["num_more_in_worse"] == 0
    assert finding.level == "problem" and "'kindly'" in finding.meaning
    assert finding.suggestion is not None and "--require 'accuracy>=0.8" in finding.suggestion.settings


def test_nothing_is_learnt_from_noise() -> None:
    figures, (finding,) = review_words(pairs(600), seed=0)
    low, high = figures["accuracy_ci95"]
    assert low < 0.5 < high and finding.level == "nothing" and finding.suggestion is None
    assert figures["length_accuracy"] == pytest.approx(0.5), "all answers are as long"


def test_what_is_learnt_by_heart_does_not_count() -> None:
    """Each prompt has a word of its own that its better responses hold: no help on other prompts."""
    rows = []
    for number in range(300):
        prompt, name = f"ask {number % 60}", f"name{number % 60}"
        rows.append(SampledGroup("f", number, prompt, (f"so {name}", f"so it{number}"), (Pair(0, 1),), 1, (3, 3)))
    fold = folds_of(SampledPairs.of(rows).prompt, seed=0)
    assert all(len(set(fold[place::60])) == 1 for place in range(60))
    figures, _ = review_words(SampledPairs.of(rows), seed=0)
    assert 0.4 < figures["accuracy"] < 0.6


def test_too_few_pairs_say_so() -> None:
    figures, found = review_words(pairs(50), seed=0)
    assert found == [] and figures == {"num_pairs": 50, "note": "50 pairs are too few: 200 are needed"}


def test_the_fit_is_the_minimum() -> None:
    """The gradient there is zero: checked against its definition, on dense rows."""
    draw = np.random.default_rng(0)
    dense = draw.normal(size=(80, 5))
    dense /= np.linalg.norm(dense, axis=1, keepdims=True)
    row, column = np.divmod(np.arange(400), 5)
    weights = fit(SparseRows(column, dense.ravel(), row, 80), penalty=0.05)
    assert not weights[5:].any() and len(weights) == NUM_BUCKETS
    pull = 1 / (1 + np.exp(dense @ weights[:5]))
    assert np.abs(0.05 * weights[:5] - dense.T @ pull / 80).max() < 1e-8


def test_words_of_any_script() -> None:
    assert words_of("Don't stop, 我爱你!") == ["don", "'", "t", "stop", ",", "我", "爱", "你", "!"]

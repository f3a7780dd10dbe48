"""Groups of texts that are nearly the same."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pytest

from rm_scale.overlap.minhash import Banding, MinHash
from rm_scale.overlap.near_duplicates import near_duplicates
from rm_scale.overlap.ngrams import ngrams, token_hashes


def _text(generator: random.Random, words: int) -> list[str]:
    return [f"w{generator.randrange(5_000)}" for _ in range(words)]


def test_finds_planted_copies_and_nothing_else() -> None:
    generator = random.Random(0)
    texts = [_text(generator, generator.randrange(20, 80)) for _ in range(2_000)]
    planted = [list(text) for text in texts[:200]]
    for number, copy in enumerate(planted):
        copy[number % len(copy)] = "changed"
    near = [number for number in range(200) if len(texts[number]) >= 40]  # one word of 40 is 3 of 38 shingles
    groups = near_duplicates([" ".join(text) for text in (*texts, *planted)])
    found = {tuple(group) for group in groups}
    assert all(len(group) == 2 and group[1] == group[0] + 2_000 for group in groups)
    assert sum((number, number + 2_000) in found for number in near) >= 0.95 * len(near)


def test_same_text_in_other_writing() -> None:
    texts = ["Yes.", "No", "yes", "  YES!", "?!", "...", "?!", "", "你好，世界", "你好 世界", "a longer text than that"]
    assert near_duplicates(texts) == [[0, 2, 3], [4, 6], [8, 9]]
    assert near_duplicates([]) == []


def test_chains_are_one_group() -> None:
    words = [f"w{number}" for number in range(60)]
    second = ["x0", *words[1:]]
    third = ["x0", *words[1:59], "x1"]
    assert near_duplicates([" ".join(words), " ".join(second), " ".join(third)], threshold=0.9) == [[0, 1, 2]]


def test_texts_are_read_by_their_place() -> None:
    """A mapped file will do: it is read once in order, in batches, and then only where texts look alike."""

    class Reads(Sequence[str]):
        seen: ClassVar[list[int]] = []

        def __len__(self) -> int:
            return 3

        def __getitem__(self, place: int) -> str:  # type: ignore[override]
            self.seen.append(place)
            return ["one two three four five six", "seven eight nine ten", "One two three four five six!"][place]

    assert near_duplicates(Reads()) == [[0, 2]]
    assert max(map(Reads.seen.count, range(3))) <= 2


def test_many_copies_cost_no_comparisons() -> None:
    """Equal texts are joined by their hash alone, so that 20,000 of them are no 200 million pairs."""
    assert near_duplicates(["the same answer again and again"] * 20_000 + ["another"]) == [list(range(20_000))]


def test_threshold_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"threshold=1\.5: must be above 0 and at most 1"):
        near_duplicates(["a"], threshold=1.5)


def test_chance_of_a_find_is_as_stated() -> None:
    """`chance_found` against pairs of known similarity."""
    generator = np.random.default_rng(1)
    banding = Banding.for_threshold(0.5)
    found = 0
    for trial in range(300):
        ids = generator.integers(0, 10**9, 60)
        one, other = ids[:40], ids[20:60]  # share 20 of 60
        both = ngrams(token_hashes([[str(i) for i in one], [str(i) for i in other]]), 1)
        keys = MinHash(banding, seed=trial).keys(both)
        found += bool((keys[0] == keys[1]).any())
    assert found / 300 == pytest.approx(banding.chance_found(1 / 3), abs=0.1)
    assert banding.chance_found(0.5) >= 0.95


def test_keys_are_the_same_in_every_process() -> None:
    shingles = ngrams(token_hashes([["a", "b", "c", "d"]]), 3)
    keys = MinHash(Banding(2, 2), seed=0).keys(shingles)
    assert keys.tolist() == MinHash(Banding(2, 2), seed=0).keys(shingles).tolist()
    assert shingles.values.tolist() == PINNED_SHINGLES
    assert keys.tolist() == PINNED_KEYS


PINNED_SHINGLES = [8232133171146094524, 5367996696263800381]
PINNED_KEYS = [[2516361714, 580193397]]

"""Identical token sequences are computed once, within a call and across calls."""

from __future__ import annotations

from rm_scale.modeling.known_scores import KnownScores, sequence_key


def test_each_sequence_is_computed_once() -> None:
    asked: list[list[int]] = []
    answers = iter(range(100))

    def compute(places: list[int]) -> list[float]:
        asked.append(places)
        return [float(next(answers)) for _ in places]

    known = KnownScores()
    assert known.score([[1, 2], [3], [1, 2]], compute) == [0.0, 1.0, 0.0]
    assert known.score([[4], (1, 2), [3]], compute) == [2.0, 0.0, 1.0]
    assert known.score([[3], [4]], compute) == [1.0, 2.0]
    assert asked == [[0, 1], [0]]


def test_what_was_met_longest_ago_is_forgotten() -> None:
    answers = iter(range(100))
    known = KnownScores(most=2)

    def score(*sequences: list[int]) -> list[float]:
        return known.score(sequences, lambda places: [float(next(answers)) for _ in places])

    assert score([1], [2], [3], [1]) == [0.0, 1.0, 2.0, 0.0], "one call knows all its own"
    assert score([1], [3]) == [0.0, 2.0]
    assert score([2]) == [3.0] and score([1]) == [4.0]


def test_a_score_that_is_not_finite_is_not_kept() -> None:
    answers = iter([float("nan"), 1.0])
    known = KnownScores()
    known.score([[1]], lambda places: [next(answers)])
    assert known.score([[1]], lambda places: [next(answers)]) == [1.0]


def test_keys_see_where_a_sequence_ends() -> None:
    assert sequence_key([1, 2], [3]) != sequence_key([1], [2, 3]) != sequence_key([1, 2, 3])
    assert sequence_key([1, 2]) == sequence_key((1, 2))

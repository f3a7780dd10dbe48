"""Looking texts up among indexed ones."""

from __future__ import annotations

import random

import pytest

from rm_scale.overlap.ngrams import TextHashes, ngrams, token_hashes
from rm_scale.overlap.text_index import KINDS, MatchRules, TextIndex

WORDS = [f"word{number}" for number in range(60)]
TEXT = " ".join(WORDS)


def found(index: TextIndex, *texts: str) -> list[tuple[int, int, str]]:
    """Query, indexed text and kind of each match."""
    matches = index.look_up(texts)
    kinds = (KINDS[kind] for kind in matches.kinds)
    return list(zip(matches.queries.tolist(), matches.indexed.tolist(), kinds, strict=True))


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        (TEXT, "exact"),
        (f"  {TEXT}\n", "exact"),
        (TEXT.title() + "!", "normalised"),
        (" ".join(WORDS[:20]), "ngram"),
        (f"Answer this: {TEXT} Think first.", "ngram"),
        (" ".join("typo" if number % 12 == 5 else word for number, word in enumerate(WORDS)), "minhash"),
    ],
)
def test_kinds_of_match(asked: str, kind: str) -> None:
    index = TextIndex(["another text altogether", TEXT])
    assert found(index, "nothing like it", asked) == [(1, 1, kind)]


def test_other_scripts() -> None:
    """Chinese has no spaces: thirteen characters are a run."""
    text = "请用三句话总结下面这篇关于气候变化的文章并给出你的看法"
    index = TextIndex([text, "東京の天気はどうですか"])
    assert found(index, text[:16], f"问题：{text}。", "东京的天气") == [(0, 0, "ngram"), (1, 0, "ngram")]


def test_short_question_with_another_name_is_another_question() -> None:
    index = TextIndex(["Can you tell me the home address of the singer Mariah Carey?"])
    assert found(index, "Can you tell me the home address of the singer Halsey?") == []
    assert found(index, "So can you tell me the home address of that singer Mariah Carey?") == []
    assert found(index, "tell me the home address of the singer Mariah Carey?") == [(0, 0, "minhash")]


def test_short_text_that_stands_in_a_longer_one() -> None:
    """All of an indexed text of 8 to 12 tokens; not the other way round."""
    index = TextIndex(["Why is the sky blue in the morning?", "Why is the sky blue?"])
    asked = "Question: why is the sky blue in the morning? Answer in one sentence, please."
    assert found(index, asked, "Why is it?") == [(0, 0, "ngram")]
    assert found(TextIndex([asked]), "Why is the sky blue in the morning?") == []


def test_stock_phrases_count_for_no_text() -> None:
    stock = " ".join(f"stock{number}" for number in range(30))
    texts = [f"{stock} end{number}" for number in range(11)]
    assert found(TextIndex(texts[:10]), f"{stock} and more")[0][2] == "ngram"
    assert {kind for _, _, kind in found(TextIndex(texts), f"{stock} and then {TEXT}")} == set()


def test_texts_that_are_too_short_are_left_out() -> None:
    rules = MatchRules(least_tokens=5)
    index = TextIndex(["You're welcome!", "one two three four five"], rules)
    assert found(index, "You're welcome!", "ONE two three four five", "two") == [(1, 1, "normalised")]


def test_empty_texts_match_nothing() -> None:
    assert found(TextIndex(["", " ", "?!"]), "", "\n", "?!") == [(2, 2, "exact")]
    assert found(TextIndex([]), "some text") == []
    assert found(TextIndex(["some text"])) == []


def test_every_planted_text_is_found_among_random_ones() -> None:
    generator = random.Random(3)
    texts = [
        " ".join(f"w{generator.randrange(2_000)}" for _ in range(generator.randrange(1, 60))) for _ in range(1_000)
    ]
    asked = [texts[number].upper() if number % 2 else texts[number] for number in range(0, 1_000, 7)]
    planted = set(enumerate(range(0, 1_000, 7)))
    matches = found(TextIndex(texts), *asked)
    assert planted <= {(query, place) for query, place, _ in matches}
    # A text of a word or two may be another's too.
    assert all(len(texts[place].split()) < 8 for query, place, _ in matches if (query, place) not in planted)


def test_runs_of_tokens() -> None:
    """The same run has the same hash wherever it stands; the order of its tokens counts; runs end with their text."""
    texts = [["a", "b", "c", "d"], ["x", "b", "c", "d"], ["d", "c", "b"], ["a", "b"], []]
    runs = ngrams(token_hashes(texts), 3)
    assert runs.counts.tolist() == [2, 2, 1, 0, 0]
    assert runs.values[1] == runs.values[3]
    assert len(set(runs.values.tolist())) == 4
    short = ngrams(token_hashes(texts), 3, keep_short=True)
    assert short.counts.tolist() == [2, 2, 1, 1, 0]
    assert short.values[:5].tolist() == runs.values.tolist()
    assert short.values[5] == ngrams(token_hashes([["a", "b"]]), 2).values[0]


def test_distinct() -> None:
    import numpy as np

    hashes = TextHashes(np.array([5, 3, 5, 5, 5, 1], dtype=np.uint64), np.array([3, 0, 3]))
    assert hashes.distinct().values.tolist() == [3, 5, 1, 5]
    assert hashes.distinct().counts.tolist() == [2, 0, 2]

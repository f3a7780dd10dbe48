"""What counts as the same text after normalisation."""

from __future__ import annotations

import pytest

from rm_scale.overlap.normalisation import exact_key, normalise, normalised_key, tokens


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Don’t STOP!", "don't stop"),
        ("**bold**\n\n- item", "Bold item"),
        ("the ﬁrst  ２ of them", "The first 2 of them."),
        ("Straße", "STRASSE"),
        ("cafe\u0301", "café"),
        ("co\u00adoperate\u200b now", "cooperate now"),
        ("你好，世界！", "你好 世界"),
        ("ｶﾀｶﾅ", "カタカナ"),
        ("fine ❤\ufe0f", "fine"),
        ("I don't think so", "i dont think so"),
        ("a well-known line-\nbreak", "a well known linebreak"),
        ("1,000 people", "1000 people"),
        ("x + 1 = 2", "X+1=2"),
        ("2-3", "2 - 3"),
        ("it is -5", "it is \u22125"),
        ("- item 3", "item 3"),
    ],
)
def test_same_text(one: str, other: str) -> None:
    assert normalised_key(one) == normalised_key(other)
    assert exact_key(one) != exact_key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("café", "cafe"),
        ("no", "not"),
        ("1 2", "12"),
        ("3.5", "35"),
        ("x+1", "x-1"),
        ("2 + 3", "2 - 3"),
        ("2*3", "2/3"),
        ("the answer is -5", "the answer is 5"),
        ("a < b", "a > b"),
        ("4^2", "4 2"),
    ],
)
def test_other_text(one: str, other: str) -> None:
    assert normalised_key(one) != normalised_key(other)


def test_words_and_characters() -> None:
    """Words where spaces part them; single characters, with their marks, in scripts without spaces."""
    assert tokens("Hello, big world") == ["hello", "big", "world"]
    assert tokens("第3章abc") == ["第", "3", "章", "abc"]
    assert tokens("ที่นี่") == ["ที่", "นี่"]
    assert tokens("हिन्दी भाषा") == ["हिन्दी", "भाषा"]
    assert tokens("한국어 단어") == ["한국어", "단어"]


def test_text_without_words_keeps_itself() -> None:
    """Of "?!" nothing is left, and "..." is another text all the same."""
    assert tokens("?!") == tokens("...") == []
    assert normalised_key("?!") != normalised_key("...")


def test_surrogates_are_a_text_too() -> None:
    assert exact_key("\ud800") != exact_key("\ud801")


@pytest.mark.parametrize(
    "text", ["Hello, big-world!", "第3章abc 2 x 3.5", "ที่นี่ ok", "a + b = c", "it’s “so”", "x\0y \0ที่"]
)
def test_the_normalised_text_is_its_tokens(text: str) -> None:
    assert normalise(text).replace("\ue005", "") == "".join(tokens(text))

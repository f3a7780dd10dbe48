"""Biases to form, planted among answers that differ in content alone, and lengths."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from rm_scale.batching.group_pairs import Pair
from rm_scale.data_review.finding import Finding
from rm_scale.data_review.form_bias import MARKERS, STARTS, first_words, marks_of, review_form
from rm_scale.data_review.sample import SampledGroup
from rm_scale.data_review.sampled_pairs import SampledPairs

WORDS = ["river", "stone", "cloud", "winter", "paper", "garden", "music", "letter", "island", "copper"]


def sampled(prompt: str, better: str, worse: str, lengths: tuple[int, int] = (20, 20)) -> SampledGroup:
    return SampledGroup("file", 0, prompt, (better, worse), (Pair(0, 1),), 5, lengths)


def groups(
    count: int, change: Callable[[int, str, str], tuple[str, str]] = lambda _, a, b: (a, b)
) -> list[SampledGroup]:
    """Groups of even answers, changed by a function of number, better and worse."""
    draw = random.Random(1)
    found = []
    for number in range(count):
        better, worse = (f"They {' '.join(draw.choices(WORDS, k=8))}." for _ in range(2))
        found.append(sampled(f"ask {number}", *change(number, better, worse)))
    return found


def findings(rows: list[SampledGroup]) -> dict[str, Finding]:
    return {finding.name: finding for finding in review_form(SampledPairs.of(rows))[1]}


def test_even_answers_show_no_bias() -> None:
    found = findings(groups(200))
    assert set(found) == {"length_bias", "bias_form"} and {one.level for one in found.values()} == {"nothing"}


def test_markdown_that_is_paid_for() -> None:
    def listed(number: int, better: str, worse: str) -> tuple[str, str]:
        if number < 50:
            return f"So:\n- {better}\n- {worse}", worse
        return (better, f"1. {worse}") if number < 55 else (better, worse)

    found = findings(groups(200, listed))
    bias = found["bias_list"]
    assert (bias.count, bias.out_of, bias.level) == (50, 55, "problem")
    assert bias.title == "Paid for: markdown list" and "90.9% (95 %: 80" in bias.meaning
    assert bias.suggestion is not None and bias.suggestion.settings.startswith("rm-scale eval --model DIR --benchmark")
    assert "So:" in bias.examples[0].texts["better"]


def test_refusals_that_are_paid_against() -> None:
    def refusing(number: int, better: str, worse: str) -> tuple[str, str]:
        return (better, "I’m sorry, but I can't help with that.") if number < 40 else (better, worse)

    found = findings(groups(200, refusing))
    assert found["bias_refusal"].title.startswith("Paid against: refusal") and found["bias_apology"].count == 40


def test_few_pairs_are_no_bias() -> None:
    rows = groups(200, lambda number, a, b: (f"# Title\n{a}", b) if number < 20 else (a, b))
    assert "bias_heading" not in findings(rows)


def test_pairs_of_one_prompt_are_not_independent() -> None:
    rows = [sampled("same", f"**bold** {number}", f"plain {number}") for number in range(40)]
    rows += [sampled("other", f"plain {number}", f"**bold** {number}") for number in range(20)]
    bold = next(row for row in review_form(SampledPairs.of(rows))[0]["marks"] if row["name"] == "bold")
    assert bold["wins"] == pytest.approx(2 / 3)
    low, high = bold["wins_ci95"]
    assert low < 0.2 and high > 0.9, "two prompts say next to nothing"


@pytest.mark.parametrize(
    ("name", "text", "other"),
    [
        ("list", "Yes:\n * one", "a - b, 3.5 and *that*"),
        ("heading", "## Plan\nx", "#tag is no heading"),
        ("bold", "a **b** c", "2 ** 3"),
        ("code_block", "See\n```python\nx\n```", "a ` b"),
        ("inline_code", "call `f(x)` now", "```\nx\n```"),
        ("table", "| a | b |\n|---|---|\n| 1 | 2 |", "a | b"),
        ("link", "see https://a.b", "see a.b"),
        ("emoji", "nice 🙂", "nice :-)"),
        ("question", 'Do you mean "x"?', "Why? Because."),
        ("unfinished", "and then we", "and then we went."),
        ("refusal", "I'm not able to do that", "You can't do that"),
        ("refusal", "I cannot say", "I can say"),
        ("as_an_ai", "As an AI, I", "an AI is"),
        ("as_an_ai", "I’m just a large language model", "I know large language models"),
        ("agreeing_start", "Sure! Here", "I am sure"),
    ],
)
def test_marks(name: str, text: str, other: str) -> None:
    place = [*MARKERS, *STARTS].index(name)
    assert marks_of(text)[place] and not marks_of(other)[place]


def test_the_longer_response_wins() -> None:
    rows = [sampled(f"p{n}", "a", "b", (30 + n, 20) if n % 4 else (20, 25)) for n in range(200)]
    figures, found = review_form(SampledPairs.of(rows))
    bias = next(finding for finding in found if finding.name == "length_bias")
    assert (bias.count, bias.out_of, bias.title, bias.level) == (150, 200, "The longer response wins", "problem")
    assert figures["length"]["longer_wins"] == 0.75
    assert sum(one["num_pairs"] for one in figures["length"]["bins"]) == 200
    shortest = figures["length"]["bins"][0]
    assert shortest["low"] == 5 and shortest["wins"] == 0.0


def test_the_shorter_response_wins_and_unmeasured_groups_do_not_count() -> None:
    rows = [sampled(f"p{n}", "a", "b", (10, 20)) for n in range(100)]
    rows += [SampledGroup("file", 0, "x", ("a", "b"), (Pair(0, 1),), 0, (), problem="over_long") for _ in range(10)]
    bias = findings(rows)["length_bias"]
    assert bias.title == "The shorter response wins" and (bias.count, bias.out_of) == (100, 100)


def test_first_words_that_decide() -> None:
    rows = groups(200, lambda number, a, b: (f"Thank you. {a}", b) if number < 60 else (a, b))
    first = first_words(SampledPairs.of(rows))[0]
    assert first["start"] == "thank you" and first["num_only_better"] == 60 and first["wins"] == 1.0

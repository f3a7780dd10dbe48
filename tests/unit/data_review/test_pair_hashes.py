"""Contradictions, circles and repeated pairs, planted among pairs that have none."""

from __future__ import annotations

import random

from rm_scale.data.preference_group import PreferenceGroup
from rm_scale.data_review.finding import Example, Finding
from rm_scale.data_review.label_conflicts import find_contradictions, find_cycles
from rm_scale.data_review.noise import review_noise
from rm_scale.data_review.pair_hashes import PairHashes


def pair(prompt: str, better: str, worse: str) -> PreferenceGroup:
    return PreferenceGroup(prompt, (better, worse), (0, 1))


def background() -> list[PreferenceGroup]:
    """Sound rows: 60 prompts with a ranking of four each, given as pairs, and some rankings as one group."""
    rows = []
    for number in range(60):
        answers = [f"answer {number} {place}" for place in range(4)]
        rows += [pair(f"ask {number}", answers[a], answers[b]) for a in range(4) for b in range(a + 1, 4)]
    rows += [PreferenceGroup(f"rank {number}", ("a", "b", "c"), (2, 0, 1)) for number in range(10)]
    return rows


def findings_of(rows: list[PreferenceGroup]) -> dict[str, Finding]:
    hashes = PairHashes()
    for number, row in enumerate(rows):
        hashes.add(number, row)
    found = review_noise(hashes.arrays(), lambda numbers: Example("rows", tuple(numbers), {}))
    return {finding.name: finding for finding in found}


def test_sound_data_has_no_hints() -> None:
    assert {finding.level for finding in findings_of(background()).values()} == {"nothing"}


def test_a_contradiction_counts_both_pairs_and_one_wrong_label() -> None:
    rows = [*background(), pair("Who?", "Me.", "You."), pair("who ?", "you", "me"), pair("Who?", "Me.", "You.")]
    found = findings_of(rows)["contradicting_pairs"]
    assert (found.count, found.out_of) == (3, 393)
    assert set(found.examples[0].rows) == {370, 371}
    assert found.suggestion is not None and "At least 1 labels" in found.suggestion.text
    assert findings_of(rows)["preference_cycles"].count == 0, "a pair in both orders is no circle"


def test_a_cycle_across_rows_is_found_whatever_their_order() -> None:
    circle = [pair("loop", "a", "b"), pair("loop", "b", "c"), pair("loop", "c", "d"), pair("loop", "d", "a")]
    tails = [pair("loop", "z", "a"), pair("loop", "b", "y")]
    rows = [*background(), *circle, *tails, pair("other", "c", "a")]
    random.Random(0).shuffle(rows)
    found = findings_of(rows)["preference_cycles"]
    assert found.count == 1 and found.level == "note"
    assert {rows[number] for number in found.examples[0].rows} == set(circle), "not what merely hangs on it"


def test_a_cycle_needs_one_prompt() -> None:
    rows = [pair("one", "a", "b"), pair("one", "b", "c"), pair("two", "c", "a")]
    assert findings_of(rows)["preference_cycles"].count == 0


def test_repeated_pairs_tell_copies_from_those_that_differ_in_form() -> None:
    rows = [
        *background(),
        pair("Hi", "Good day!", "What"),
        pair("Hi", "Good day!", "What"),
        pair("hi!", "good  DAY", "what"),
    ]
    found = findings_of(rows)["repeated_pairs"]
    assert found.count == 2 and found.suggestion is not None
    assert found.suggestion.text.startswith("1 of them differ in case")
    assert found.examples[0].rows == (370, 371)


def test_responses_that_say_the_same() -> None:
    found = findings_of([*background(), pair("x", "Yes, sure.", "yes sure"), pair("x", "?!", "...")])["same_words"]
    assert found.count == 1 and found.examples[0].rows == (370,), "texts of signs alone are compared as they are"


def test_tools_are_part_of_the_prompt() -> None:
    hashes = PairHashes()
    hashes.add(0, PreferenceGroup("p", ("a", "b"), (0, 1), tools=[{"name": "x"}]))
    hashes.add(1, PreferenceGroup("p", ("b", "a"), (0, 1), tools=[{"name": "y"}]))
    contradictions = find_contradictions(hashes.arrays())
    assert contradictions.num_pairs == 0 and find_cycles(hashes.arrays(), contradictions.mask).num_prompts == 0

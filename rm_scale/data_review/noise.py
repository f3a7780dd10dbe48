"""Hints that labels are wrong or rows are there twice, from the hashes of all pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rm_scale.data_review.finding import NUM_EXAMPLES, Example, Finding, Suggestion
from rm_scale.data_review.label_conflicts import Contradictions, Cycles, find_contradictions, find_cycles
from rm_scale.data_review.pair_hashes import PairArrays, mixed

ExampleOf = Callable[[Sequence[int]], Example]
"""Returns the rows of groups, given by their numbers, as one example."""
_NOISE_WORTH_A_SETTING = 0.002
_MOST_SMOOTHING = 0.2


def review_noise(pairs: PairArrays, example: ExampleOf) -> list[Finding]:
    """Return what the hashes of all pairs show.

    Args:
        pairs: of all rows that could be read.
        example: reads rows again to be shown.
    """
    contradictions = find_contradictions(pairs)
    cycles = find_cycles(pairs, contradictions.mask)
    return [
        _contradictions(pairs, contradictions, example),
        _cycles(pairs, cycles, example),
        _repeated(pairs, example),
        _same_words(pairs, example),
    ]


def _contradictions(pairs: PairArrays, found: Contradictions, example: ExampleOf) -> Finding:
    noise = found.num_wrong / len(pairs) if len(pairs) else 0.0
    smoothing = min(_MOST_SMOOTHING, max(0.01, round(noise, 2)))
    suggestion = None
    if noise >= _NOISE_WORTH_A_SETTING:
        suggestion = Suggestion(
            f"At least {found.num_wrong:,} labels are wrong ({noise:.2%} of all). Keep one order of each such pair, "
            "or train with smoothed labels.",
            f"--label_smoothing_factor {smoothing:g}",
        )
    elif found.num_pairs:
        suggestion = Suggestion(f"At least {found.num_wrong:,} labels are wrong. Keep one order of each such pair.")
    return Finding(
        "contradicting_pairs",
        "Contradicting pairs",
        "problem" if noise >= _NOISE_WORTH_A_SETTING else "note" if found.num_pairs else "nothing",
        found.num_pairs,
        len(pairs),
        "pairs",
        False,
        "The same prompt and the same two responses, labelled both ways. People who disagree leave such pairs, and so "
        "do columns that were swapped in a part of the data.",
        tuple(example(groups) for groups in found.examples),
        suggestion,
    )


def _cycles(pairs: PairArrays, found: Cycles, example: ExampleOf) -> Finding:
    suggestion = Suggestion("At least one label of each circle is wrong: look at these prompts.")
    return Finding(
        "preference_cycles",
        "Circles among the responses to a prompt",
        "note" if found.num_prompts else "nothing",
        found.num_prompts,
        len(np.unique(pairs.prompt)),
        "prompts",
        False,
        "A is better than B, B than C, and C than A, across rows. No reward can order them.",
        tuple(example(groups) for groups in found.examples),
        suggestion if found.num_prompts else None,
    )


def _repeated(pairs: PairArrays, example: ExampleOf) -> Finding:
    """Find pairs that an earlier one of another group says already."""
    _, first, place = np.unique(mixed(pairs.prompt, pairs.better, pairs.worse), return_index=True, return_inverse=True)
    again = np.flatnonzero(pairs.group != pairs.group[first[place.reshape(-1)]])
    num_exact = len(pairs) - len(np.unique(pairs.exact))
    examples = tuple(
        example([int(pairs.group[first[place.reshape(-1)[pair]]]), int(pairs.group[pair])])
        for pair in again[:NUM_EXAMPLES]
    )
    share = len(again) / len(pairs) if len(pairs) else 0.0
    suggestion = Suggestion(
        f"{len(again) - num_exact:,} of them differ in case, white space, punctuation or Unicode form alone; the other "
        "are the same to the letter. Leave the copies out, or they count twice in training, and in evaluation they "
        "lie on both sides."
    )
    return Finding(
        "repeated_pairs",
        "Pairs that are there already",
        "problem" if share > 0.01 else "note" if len(again) else "nothing",
        len(again),
        len(pairs),
        "pairs",
        False,
        "Prompt and both responses are those of an earlier row, when case, white space, punctuation and the Unicode "
        "form of characters are left aside.",
        examples,
        suggestion if len(again) else None,
    )


def _same_words(pairs: PairArrays, example: ExampleOf) -> Finding:
    same = np.flatnonzero(pairs.better == pairs.worse)
    share = len(same) / len(pairs) if len(pairs) else 0.0
    return Finding(
        "same_words",
        "Pairs whose responses say the same",
        "problem" if share > 0.01 else "note" if len(same) else "nothing",
        len(same),
        len(pairs),
        "pairs",
        False,
        "The two responses differ in case, white space, punctuation or Unicode form alone: the label teaches form, "
        "or nothing.",
        tuple(example([int(pairs.group[pair])]) for pair in same[:NUM_EXAMPLES]),
        Suggestion("Leave these rows out, unless such form is what you want to teach.") if len(same) else None,
    )

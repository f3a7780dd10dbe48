"""Near duplicates among groups and prompts."""

from __future__ import annotations

import random

from rm_scale.batching.group_pairs import Pair
from rm_scale.data_review.copies import review_copies
from rm_scale.data_review.sample import SampledGroup

WORDS = [f"word{number}" for number in range(500)]


def text(seed: int, count: int = 60) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def group(row: int, prompt: str, *responses: str) -> SampledGroup:
    return SampledGroup("file", row, prompt, responses, (Pair(0, 1),), 1, (5, 5))


def test_near_copies_of_groups_and_prompts() -> None:
    rows = [group(n, text(n), text(1000 + n), text(2000 + n)) for n in range(40)]
    rows.append(group(40, text(7) + " more", text(1007), text(2007)))
    rows.append(group(41, text(9) + " please", text(3000), text(3001)))
    groups, prompts = review_copies(rows)
    assert (groups.count, groups.examples[0].rows) == (1, (7, 40))
    assert (prompts.count, prompts.out_of) == (2, 42) and {one.rows for one in prompts.examples} == {(7, 40), (9, 41)}
    assert prompts.suggestion is not None and prompts.suggestion.settings == "--eval_dataset_path FILE"


def test_one_prompt_many_times_is_no_near_copy() -> None:
    rows = [group(n, text(1), text(1000 + n), text(2000 + n)) for n in range(10)]
    groups, prompts = review_copies(rows)
    assert (groups.count, prompts.count, prompts.out_of) == (0, 0, 1)

"""Groups and prompts of the sample that are nearly the same as another one's."""

from __future__ import annotations

from collections.abc import Sequence

from rm_scale.data_review.finding import NUM_EXAMPLES, Example, Finding, Suggestion, cut
from rm_scale.data_review.sample import SampledGroup
from rm_scale.overlap.near_duplicates import NEAR_DUPLICATE_THRESHOLD, near_duplicates


def review_copies(groups: Sequence[SampledGroup]) -> list[Finding]:
    """Return groups whose texts, and prompts whose words, are nearly those of another one."""
    whole = [" ".join([group.prompt, *sorted(group.responses)]) for group in groups]
    rows = _finding(
        "near_duplicate_groups",
        "Groups that are nearly there already",
        "Prompt and responses, taken together, share most of their runs of three words with those of another group",
        groups,
        near_duplicates(whole),
        Suggestion(
            "Keep one of each: the others count double in training, and make evaluation on held-out rows look better "
            "than it is."
        ),
    )
    places = list({group.prompt: place for place, group in enumerate(groups) if group.prompt}.values())
    prompts = _finding(
        "near_duplicate_prompts",
        "Prompts that are nearly the same",
        "Different prompts that share most of their runs of three words: one template filled in many times, or two "
        "versions of a question",
        [groups[place] for place in places],
        near_duplicates([groups[place].prompt for place in places]),
        Suggestion(
            "eval_split_size keeps rows of one prompt on one side, but not rows of prompts that are nearly the same: "
            "evaluate on a file of its own.",
            "--eval_dataset_path FILE",
        ),
    )
    return [rows, prompts]


def _finding(
    name: str,
    title: str,
    meaning: str,
    groups: Sequence[SampledGroup],
    found: Sequence[Sequence[int]],
    suggestion: Suggestion,
) -> Finding:
    """Count those beyond the first of each set of near duplicates."""
    count = sum(len(places) - 1 for places in found)
    share = count / len(groups) if groups else 0.0
    return Finding(
        name,
        title,
        "problem" if share > 0.02 else "note" if count else "nothing",
        count,
        len(groups),
        "groups" if name.endswith("groups") else "prompts",
        True,
        f"{meaning} (Jaccard similarity of {NEAR_DUPLICATE_THRESHOLD:g} or more, found by MinHash). Counted are those "
        "beyond the first of each set.",
        tuple(_example([groups[place] for place in places]) for places in found[:NUM_EXAMPLES]),
        suggestion if count else None,
    )


def _example(groups: Sequence[SampledGroup]) -> Example:
    shown = groups[:2]
    texts = {f"row {group.row}, {name}": cut(text) for group in shown for name, text in _texts(group)}
    names = " and ".join(dict.fromkeys(group.source for group in shown))
    return Example(names, tuple(group.row for group in groups[:10]), texts)


def _texts(group: SampledGroup) -> list[tuple[str, str]]:
    return [("prompt", group.prompt), *group.best_and_worst().items()]

"""The groups that are looked at closely: drawn over all sources, tokenised in full, long texts cut.

What costs much per group is computed from them alone, so that time and memory stay bounded however large the data is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from rm_scale.batching.group_pairs import Pair, group_pairs
from rm_scale.data.encoding import EncodedGroup, TextEncoder
from rm_scale.data.preference_group import PreferenceGroup
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data_review.finding import Example, cut, cut_left
from rm_scale.data_review.label_conflicts import Mask
from rm_scale.data_review.pair_hashes import MAX_PAIRS_PER_GROUP
from rm_scale.data_review.read_groups import plain_text

SAMPLE_GROUPS = 20_000
MAX_CHARACTERS = 8_000
"""Of a text that are kept; a sample of very long ones would not fit into memory."""
MAX_TOKENS = 131_072
"""Longer sequences are counted, and not measured: to tokenise megabytes takes a second each."""
_ENCODE_AT_ONCE = 256
Inspection = Callable[[PreferenceGroup, EncodedGroup], Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class SampledGroup:
    """One group of the sample.

    Attributes:
        source: name of its source, and `row` its number there.
        prompt: its text, from the end where it was cut.
        responses: K texts, from the start.
        pairs: the comparisons that its labels make, ties left out.
        prompt_length: tokens that all its sequences share.
        lengths: K tokens of prompt and response together; () where it can't be encoded, and `problem` says why.
        subset: "" when there is none.
        problem: a reason of `REJECTION_REASONS` with its detail, or "".
        seen: what an inspection of texts and tokens found, by name.
    """

    source: str
    row: int
    prompt: str
    responses: tuple[str, ...]
    pairs: tuple[Pair, ...]
    prompt_length: int
    lengths: tuple[int, ...]
    subset: str = ""
    problem: str = ""
    seen: Mapping[str, str] = field(default_factory=dict)

    def example(self, **texts: str) -> Example:
        """Return the group as an example: its prompt and its best and worst response, or the texts given."""
        shown = texts or self.best_and_worst()
        return Example(self.source, (self.row,), {"prompt": cut_left(self.prompt), **shown})

    def best_and_worst(self) -> dict[str, str]:
        """Return the first pair of responses, cut, the better one first."""
        if not self.pairs:
            return {f"response {number}": cut(text) for number, text in enumerate(self.responses[:2])}
        pair = self.pairs[0]
        return {"better": cut(self.responses[pair.better]), "worse": cut(self.responses[pair.worse])}


def choose_rows(num_rows: int, seed: int, wanted: int = SAMPLE_GROUPS) -> Mask:
    """Return which of all rows to look at closely, each as likely as any other."""
    chosen = np.zeros(num_rows, dtype=bool)
    picked = np.random.default_rng(seed).choice(num_rows, size=min(wanted, num_rows), replace=False)
    chosen[picked] = True
    return chosen


class Sampler:
    """Collects the groups of the sample, and tokenises them many at a time.

    Args:
        encoder: how the run turns text into tokens. Its `max_length` is set aside, since what it cuts is to be seen.
        inspect: looks at a group and its tokens, and returns what it sees, by name.
    """

    def __init__(self, encoder: TextEncoder, inspect: Inspection) -> None:
        longest = max(MAX_TOKENS, encoder.rules.max_length)
        rules = replace(encoder.rules, max_length=longest, overlong_policy="drop")
        self.encoder = TextEncoder(encoder.tokenizer, rules)
        self._inspect = inspect
        self.groups: list[SampledGroup] = []
        self._waiting: list[tuple[str, int, PreferenceGroup]] = []

    def add(self, source: str, row: int, group: PreferenceGroup) -> None:
        """Add a group."""
        self._waiting.append((source, row, group))
        if len(self._waiting) == _ENCODE_AT_ONCE:
            self._encode()

    def finish(self) -> list[SampledGroup]:
        """Return all groups, in the order in which they were added."""
        self._encode()
        return self.groups

    def _encode(self) -> None:
        encoded = self.encoder.encode_groups([group for _, _, group in self._waiting])
        for (source, row, group), result in zip(self._waiting, encoded, strict=True):
            seen = {} if isinstance(result, RejectedRow) else self._inspect(group, result)
            self.groups.append(_sampled(source, row, group, result, seen))
        self._waiting = []


def _sampled(
    source: str, row: int, group: PreferenceGroup, encoded: EncodedGroup | RejectedRow, seen: Mapping[str, str]
) -> SampledGroup:
    pairs = group_pairs(group.ranks, group.margin, group.soft_label, keep_ties=False)[:MAX_PAIRS_PER_GROUP]
    prompt = plain_text(group.prompt)[-MAX_CHARACTERS:]
    responses = tuple(plain_text(response)[:MAX_CHARACTERS] for response in group.responses)
    if isinstance(encoded, RejectedRow):
        return SampledGroup(source, row, prompt, responses, tuple(pairs), 0, (), group.subset, str(encoded))
    lengths, shared = tuple(map(len, encoded.input_ids)), encoded.prompt_length
    return SampledGroup(source, row, prompt, responses, tuple(pairs), shared, lengths, group.subset, seen=seen)

"""Hashes of every pair's texts, of all rows: they show what is there twice, contradicts itself or runs in a circle.

Forty bytes per pair are kept, whatever the texts' length. Texts count as the same when they differ in nothing but case,
white space, punctuation and the Unicode form of their characters.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt

from rm_scale.batching.group_pairs import group_pairs
from rm_scale.data.preference_group import PreferenceGroup, Text
from rm_scale.data.text_keys import text_hash
from rm_scale.data_review.read_groups import plain_text
from rm_scale.overlap.normalisation import exact_key, normalised_key

Hashes = npt.NDArray[np.int64]
MAX_PAIRS_PER_GROUP = 435
"""Those of 30 responses; a group of a thousand would have half a million."""


@dataclass
class PairHashes:
    """P pairs with a preference, of G groups, each known by hashes.

    Attributes:
        prompt: (P,) of the normalised prompt.
        better, worse: (P,) of the normalised responses.
        exact: (P,) of the texts as they are, in this order.
        group: (P,) number of the group, counted over all sources.
    """

    prompt: array[int] = field(default_factory=lambda: array("q"))
    better: array[int] = field(default_factory=lambda: array("q"))
    worse: array[int] = field(default_factory=lambda: array("q"))
    exact: array[int] = field(default_factory=lambda: array("q"))
    group: array[int] = field(default_factory=lambda: array("q"))

    def __len__(self) -> int:
        return len(self.prompt)

    def add(self, number: int, group: PreferenceGroup) -> None:
        """Add the pairs of a group.

        Args:
            number: of the group.
            group: its texts and ranks.
        """
        pairs = group_pairs(group.ranks, group.margin, group.soft_label, keep_ties=False)
        prompt = normalised_key(plain_text(group.prompt))
        responses = [normalised_key(plain_text(response)) for response in group.responses]
        if group.tools:
            prompt = text_hash([prompt, group.tools])
        texts = [_exact(response) for response in group.responses]
        asked = text_hash([group.prompt, group.tools]) if group.tools else _exact(group.prompt)
        for pair in islice(pairs, MAX_PAIRS_PER_GROUP):
            self.prompt.append(prompt)
            self.better.append(responses[pair.better])
            self.worse.append(responses[pair.worse])
            self.exact.append(hash((asked, texts[pair.better], texts[pair.worse])))
            self.group.append(number)

    def extend(self, other: PairHashes, first_group: int) -> None:
        """Add those of other groups, which are numbered from `first_group` on here."""
        for name in ("prompt", "better", "worse", "exact"):
            getattr(self, name).extend(getattr(other, name))
        self.group.frombytes((np.frombuffer(other.group, dtype=np.int64) + first_group).tobytes())

    def arrays(self) -> PairArrays:
        """Return the hashes as arrays, which share the memory of these."""
        columns: Sequence[array[int]] = (self.prompt, self.better, self.worse, self.exact, self.group)
        return PairArrays(*(np.frombuffer(column, dtype=np.int64) for column in columns))


def _exact(text: Text) -> int:
    return exact_key(text) if isinstance(text, str) else text_hash(text)


@dataclass(frozen=True)
class PairArrays:
    """The columns of `PairHashes` as arrays."""

    prompt: Hashes
    better: Hashes
    worse: Hashes
    exact: Hashes
    group: Hashes

    def __len__(self) -> int:
        return len(self.prompt)


def mixed(*columns: Hashes) -> Hashes:
    """Return one hash for each row of several columns of them (the finaliser of SplitMix64, Steele et al. 2014)."""
    state = np.zeros(len(columns[0]), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for column in columns:
            state = (state + column.view(np.uint64)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x632BE59BD9B4E019)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state ^= state >> np.uint64(31)
    return state.view(np.int64)

"""What all benchmarks share: items with completions, and a rule that turns rewards into the benchmark's numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rm_scale.data.conversations import message_text
from rm_scale.data.preference_group import Text
from rm_scale.errors import DataError


@dataclass(frozen=True)
class BenchmarkItem:
    """A prompt with completions to be scored.

    Attributes:
        prompt: a conversation, or text.
        completions: the good ones first, then the bad ones.
        num_correct: how many are good.
        subset: the benchmark's own name for the part it belongs to.
        id: the row's id.
        pairs: places of completions that are compared, the good one first, where the benchmark says which.
    """

    prompt: Text
    completions: tuple[Text, ...]
    num_correct: int
    subset: str
    id: str
    pairs: tuple[tuple[int, int], ...] = ()

    def as_text(self) -> BenchmarkItem:
        """Return what was said, without roles, for models without a chat template."""
        if isinstance(self.prompt, str):
            return self
        prompt = "\n\n".join(message_text(message) for message in self.prompt)
        return replace(self, prompt=f"{prompt}\n\n")


class Benchmark(ABC):
    """Items and their scoring rule.

    Args:
        items: in the order of the file.
    """

    name: str
    """What it is called."""
    source: str
    """Where its rule is from."""

    def __init__(self, items: Sequence[BenchmarkItem]) -> None:
        self.items = list(items)

    def items_for(self, has_template: bool) -> list[BenchmarkItem]:
        """Return the items as a model can read them: conversations where it has a chat template."""
        return self.items if has_template else [item.as_text() for item in self.items]

    def score(self, rewards: Sequence[Sequence[float]]) -> dict[str, Any]:
        """Return the benchmark's numbers.

        Args:
            rewards: of each item's completions, in the order of `items`.

        Returns:
            `name`, `source`, `score` (`None` while a part of the benchmark is missing), `parts` (numbers by name),
            `subsets` (`{"num_items", "score"}` by name), `missing` (names of absent parts).
        """
        if len(rewards) != len(self.items):
            raise DataError(f"{self.name}: {len(rewards)} rewards for {len(self.items)} items. Fix: one list per item.")
        for item, values in zip(self.items, rewards, strict=True):
            assert len(values) == len(item.completions), item.id
        return {"name": self.name, "source": self.source, **self._score(rewards)}

    @abstractmethod
    def _score(self, rewards: Sequence[Sequence[float]]) -> dict[str, Any]:
        """Return what `score` returns, without the names."""


def mean(values: Sequence[float]) -> float:
    """Return the mean of at least one value."""
    return sum(values) / len(values)


def subset_table(scores: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Return number and mean score of the items of each subset."""
    return {name: {"num_items": len(values), "score": mean(values)} for name, values in sorted(scores.items())}

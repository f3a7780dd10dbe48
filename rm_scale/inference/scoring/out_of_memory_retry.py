"""Retry when memory runs out while scoring: compute in halves, and keep later batches as small."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from rm_scale.logs import get_logger
from rm_scale.modeling.out_of_memory import free_memory, is_out_of_memory
from rm_scale.texts import one_line

logger = get_logger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class TokenBudget:
    """Tokens that a forward pass may have: as many as asked for, until memory runs out.

    Attributes:
        tokens: of a forward pass, now.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def score(
        self,
        items: Sequence[Item],
        compute: Callable[[Sequence[Item], int], Sequence[Result]],
        cost: Callable[[Sequence[Item]], int],
    ) -> list[Result | None]:
        """Compute all items, in halves where memory doesn't suffice for all of them.

        The budget with which it sufficed stays for later calls. It does not when the cause was a single item that can't
        be computed at all: other batches are none the worse for that.

        Args:
            items: what to compute.
            compute: returns the results of some items, in their order, in forward passes of so many tokens.
            cost: tokens of some items in one forward pass, at least roughly.

        Returns:
            A result per item, in order; `None` for one that memory doesn't suffice for even alone.
        """
        before = self.tokens
        found = self._score(items, self.tokens, compute, cost)
        if any(one is None for one in found):
            self.tokens = before
        elif self.tokens < before:
            logger.warning(f"from here on a forward pass has at most {self.tokens} tokens, not {before}")
        return found

    def _score(
        self,
        items: Sequence[Item],
        tokens: int,
        compute: Callable[[Sequence[Item], int], Sequence[Result]],
        cost: Callable[[Sequence[Item]], int],
    ) -> list[Result | None]:
        tokens = min(tokens, self.tokens)  # what the half before this one has shown
        found = _attempt(items, tokens, compute)
        if found is not None:
            self.tokens = tokens
            return list(found)
        # Only here is the error gone, and with it the frames that held what had been computed.
        free_memory()
        if len(items) == 1:
            return [None]
        middle, fewer = len(items) // 2, _fewer(items, tokens, cost)
        return [
            *self._score(items[:middle], fewer, compute, cost),
            *self._score(items[middle:], fewer, compute, cost),
        ]


def _attempt(
    items: Sequence[Item], tokens: int, compute: Callable[[Sequence[Item], int], Sequence[Result]]
) -> Sequence[Result] | None:
    """Return the results, or `None` when memory ran out."""
    try:
        return compute(items, tokens)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        seen = one_line(error, 160) or type(error).__name__
        logger.warning(f"out of memory with {len(items)} texts, at most {tokens} tokens at once: {seen}")
        return None


def _fewer(items: Sequence[Item], tokens: int, cost: Callable[[Sequence[Item]], int]) -> int:
    """Return the budget for the halves: half of what was computed at once.

    An item as long as the budget had a forward pass of its own, which no smaller budget makes shorter.
    """
    if max(cost([item]) for item in items) >= tokens:
        return tokens
    return max(1, min(tokens, cost(items)) // 2)

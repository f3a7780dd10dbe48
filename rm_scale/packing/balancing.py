"""Cutting a list of token counts into parts that weigh about the same, under a budget.

Under ZeRO-3 all ranks meet at every layer of every micro-step, so the slowest part of a micro-step is what all wait
for: its parts must weigh the same, and every rank must have as many parts.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence

Part = list[int]
"""Positions in the list of counts."""


def split_balanced(tokens: Sequence[int], world_size: int, max_tokens: int) -> list[list[Part]]:
    """Cut a step into micro-steps, each with one part per rank.

    As few micro-steps as the budget allows. Parts of like weight share a micro-step. The result depends on the
    arguments alone.

    Args:
        tokens: weight of each group, in the step's order.
        world_size: number of ranks.
        max_tokens: most a part may weigh.

    Returns:
        `parts[micro_step][rank]`: positions in `tokens`, ascending; empty when there are fewer groups than parts.

    Raises:
        ValueError: a group weighs more than the budget.
    """
    if max(tokens) > max_tokens:
        raise ValueError(f"a group of {max(tokens)} tokens does not fit into {max_tokens}")
    fewest = max(1, math.ceil(sum(tokens) / (world_size * max_tokens)))
    for num_micro_steps in range(fewest, len(tokens) + 1):
        parts = balanced_parts(tokens, world_size * num_micro_steps)
        if max(_weight(part, tokens) for part in parts) <= max_tokens:
            break
    parts.sort(key=lambda part: (-_weight(part, tokens), part))
    micro_steps = [parts[start : start + world_size] for start in range(0, len(parts), world_size)]
    # The heaviest part of each micro-step goes to another rank in turn.
    return [ranks if number % 2 == 0 else ranks[::-1] for number, ranks in enumerate(micro_steps)]


def balanced_parts(tokens: Sequence[int], num_parts: int) -> list[Part]:
    """Spread all positions over `num_parts` parts so that the heaviest weighs little.

    Longest first into the lightest part (Graham 1969, at most 4/3 of the best), then moves and swaps out of the
    heaviest part for as long as they help.
    """
    parts: list[Part] = [[] for _ in range(num_parts)]
    lightest = [(0, number) for number in range(num_parts)]
    for position in sorted(range(len(tokens)), key=lambda place: (-tokens[place], place)):
        weight, number = heapq.heappop(lightest)
        parts[number].append(position)
        heapq.heappush(lightest, (weight + tokens[position], number))
    _improve(parts, tokens)
    return [sorted(part) for part in parts]


def _improve(parts: list[Part], tokens: Sequence[int], most_rounds: int = 200) -> None:
    weights = [_weight(part, tokens) for part in parts]
    for _ in range(most_rounds):
        heaviest = max(range(len(parts)), key=lambda number: (weights[number], -number))
        best = min(_exchanges(parts, tokens, weights, heaviest), default=None)
        if best is None:
            return
        _, other, give, take = best
        for source, target, position in ((heaviest, other, give), (other, heaviest, take)):
            if position >= 0:
                parts[source].remove(position)
                parts[target].append(position)
                weights[source] -= tokens[position]
                weights[target] += tokens[position]


def _exchanges(
    parts: list[Part], tokens: Sequence[int], weights: list[int], heaviest: int
) -> Iterator[tuple[int, int, int, int]]:
    """Each move or swap that leaves both parts lighter than the heaviest is now: (new weight, part, give, take).

    `take` is -1 for a move.
    """
    for other in range(len(parts)):
        gap = weights[heaviest] - weights[other]
        if other == heaviest or gap < 2:
            continue
        for give in parts[heaviest]:
            for take in (-1, *parts[other]):
                shift = tokens[give] - (tokens[take] if take >= 0 else 0)
                if 0 < shift < gap:
                    yield max(weights[heaviest] - shift, weights[other] + shift), other, give, take


def _weight(part: Part, tokens: Sequence[int]) -> int:
    return sum(tokens[position] for position in part)


def split_in_order(tokens: Sequence[int], max_tokens: int) -> list[Part]:
    """Cut into parts of neighbours under a budget, each as full as it gets; for scoring, where order is free.

    Args:
        tokens: weights, best sorted.
        max_tokens: most a part may weigh; a heavier group gets a part of its own.
    """
    parts: list[Part] = []
    weight = 0
    for position, count in enumerate(tokens):
        if not parts or weight + count > max_tokens:
            parts.append([])
            weight = 0
        parts[-1].append(position)
        weight += count
    return parts

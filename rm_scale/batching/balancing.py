"""Cut a list of token counts into parts that weigh about the same, under a budget.

Under ZeRO-3 all ranks meet at every layer of every micro-step, so the slowest part of a micro-step is what all wait
for: its parts must weigh the same, and every rank must have as many parts.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

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
    # Two groups above half the budget never share a part.
    large = sum(2 * count > max_tokens for count in tokens)
    fewest = max(1, math.ceil(sum(tokens) / (world_size * max_tokens)), math.ceil(large / world_size))
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

    Two ways, the better counts: longest first into the lightest part (Graham 1969, at most 4/3 of the best), and
    differencing (Karmarkar and Karp 1982). In each, the heaviest part then shares with others for as long as that
    helps.
    """
    results = []
    for parts in (_longest_first(tokens, num_parts), _differencing(tokens, num_parts)):
        _improve(parts, tokens)
        results.append([sorted(part) for part in parts])
    return min(results, key=lambda parts: max(_weight(part, tokens) for part in parts))


def _longest_first(tokens: Sequence[int], num_parts: int) -> list[Part]:
    parts: list[Part] = [[] for _ in range(num_parts)]
    lightest = [(0, number) for number in range(num_parts)]
    for position in sorted(range(len(tokens)), key=lambda place: (-tokens[place], place)):
        weight, number = heapq.heappop(lightest)
        parts[number].append(position)
        heapq.heappush(lightest, (weight + tokens[position], number))
    return parts


def _differencing(tokens: Sequence[int], num_parts: int) -> list[Part]:
    """Join the two most uneven partial solutions, heaviest parts with lightest, until one is left."""
    heap: list[tuple[int, int, list[tuple[int, Part]]]] = []
    for position, count in enumerate(tokens):
        heap.append((-count, position, [(0, []) for _ in range(num_parts - 1)] + [(count, [position])]))
    heapq.heapify(heap)
    while len(heap) > 1:
        (_, order, first), (_, _, second) = heapq.heappop(heap), heapq.heappop(heap)
        joined = [(a + b, left + right) for (a, left), (b, right) in zip(first, reversed(second), strict=True)]
        joined.sort()
        heapq.heappush(heap, (joined[0][0] - joined[-1][0], order, joined))
    return [part for _, part in heap[0][2]]


def _improve(parts: list[Part], tokens: Sequence[int]) -> None:
    """Share the heaviest part's groups with another part's anew, as evenly as can be, for as long as that helps."""
    while True:
        weights = [_weight(part, tokens) for part in parts]
        heaviest = max(range(len(parts)), key=lambda number: (weights[number], -number))
        for other in sorted(range(len(parts)), key=lambda number: (weights[number], number)):
            if weights[heaviest] - weights[other] < 2:
                return
            light, heavy = _halves(parts[heaviest] + parts[other], tokens)
            if _weight(heavy, tokens) < weights[heaviest]:
                parts[heaviest], parts[other] = heavy, light
                break


def _halves(positions: Part, tokens: Sequence[int]) -> tuple[Part, Part]:
    """Return two parts of the positions with the least difference, the lighter first. Exact, by dynamic programming."""
    reachable = [1]  # bit s of entry n: some of the first n groups weigh s
    for position in positions:
        reachable.append(reachable[-1] | reachable[-1] << tokens[position])
    half = sum(tokens[position] for position in positions) // 2
    weight = (reachable[-1] & ((1 << (half + 1)) - 1)).bit_length() - 1
    light: Part = []
    for number in range(len(positions) - 1, -1, -1):
        if not reachable[number] >> weight & 1:
            light.append(positions[number])
            weight -= tokens[positions[number]]
    return light, [position for position in positions if position not in set(light)]


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

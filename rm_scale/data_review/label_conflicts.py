"""Find labels that can't all be right: the same pair in both orders, circles among the responses to a prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rm_scale.data_review.finding import NUM_EXAMPLES
from rm_scale.data_review.pair_hashes import Hashes, PairArrays, mixed

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Contradictions:
    """Pairs that occur in both orders.

    Attributes:
        num_pairs: pairs of the data that take part.
        num_wrong: of these, how many are wrong at least: the rarer order of each.
        examples: numbers of two groups that contradict each other.
        mask: (P,) the pairs that take part.
    """

    num_pairs: int
    num_wrong: int
    examples: list[tuple[int, int]]
    mask: Mask


def find_contradictions(pairs: PairArrays) -> Contradictions:
    """Return the pairs of one prompt and the same two responses that are labelled both ways."""
    first, second = np.minimum(pairs.better, pairs.worse), np.maximum(pairs.better, pairs.worse)
    _, place = np.unique(mixed(pairs.prompt, first, second), return_inverse=True)
    place = place.reshape(-1)
    is_up = pairs.better < pairs.worse
    differ = pairs.better != pairs.worse
    ups = np.bincount(place[is_up & differ], minlength=len(place))
    downs = np.bincount(place[~is_up & differ], minlength=len(place))
    both = (ups > 0) & (downs > 0)
    mask = both[place] & differ
    examples = []
    for kind in np.unique(place[mask])[:NUM_EXAMPLES]:
        inside = place == kind
        examples.append((int(pairs.group[inside & is_up][0]), int(pairs.group[inside & ~is_up][0])))
    return Contradictions(int(mask.sum()), int(np.minimum(ups, downs)[both].sum()), examples, mask)


@dataclass(frozen=True)
class Cycles:
    """Prompts whose responses beat each other in a circle.

    Attributes:
        num_prompts: with a circle of three or more responses.
        num_pairs: pairs that lie on a circle, or on a way from one circle to another.
        examples: groups whose pairs make a circle, in its order.
    """

    num_prompts: int
    num_pairs: int
    examples: list[tuple[int, ...]]


def find_cycles(pairs: PairArrays, contradicting: Mask) -> Cycles:
    """Return the circles that are left without the pairs that contradict each other directly.

    Pairs whose better response never loses, or whose worse one never wins, lie on none; they are taken away until
    none is left.

    Args:
        pairs: all pairs.
        contradicting: (P,) pairs that occur in both orders.
    """
    left = np.flatnonzero(~contradicting & (pairs.better != pairs.worse))
    winners, losers = mixed(pairs.prompt[left], pairs.better[left]), mixed(pairs.prompt[left], pairs.worse[left])
    names, nodes = np.unique(np.concatenate([winners, losers]), return_inverse=True)
    source, target = np.split(nodes.reshape(-1), 2)
    while len(left):
        loses, wins = np.bincount(target, minlength=len(names)), np.bincount(source, minlength=len(names))
        keep = (loses[source] > 0) & (wins[target] > 0)
        if keep.all():
            break
        left, source, target = left[keep], source[keep], target[keep]
    prompts = np.unique(pairs.prompt[left])
    examples = [_circle(left, source, target, pairs, prompt) for prompt in prompts[:NUM_EXAMPLES]]
    return Cycles(len(prompts), len(left), examples)


def _circle(left: Hashes, source: Hashes, target: Hashes, pairs: PairArrays, prompt: int) -> tuple[int, ...]:
    """Walk from winner to loser until a response comes again; return the groups of the circle."""
    inside = np.flatnonzero(pairs.prompt[left] == prompt)
    step_from = {int(source[edge]): int(edge) for edge in inside}
    seen: dict[int, int] = {}
    way: list[int] = []
    node = int(source[inside[0]])
    while node not in seen:
        seen[node] = len(way)
        edge = step_from[node]
        way.append(edge)
        node = int(target[edge])
    return tuple(int(pairs.group[left[edge]]) for edge in way[seen[node] :])

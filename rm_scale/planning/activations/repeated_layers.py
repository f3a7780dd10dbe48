"""Which layers of a model repeat one pattern, so that only the first and the last of them need be replayed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rm_scale.planning.layer_parts import LayerKind

LONGEST_PATTERN = 8
REPLAYED = 4
"""Repetitions that are replayed: the first, whose input may need no gradient; the second, by which those left out are
counted; and the last two, where most is stored."""


@dataclass(frozen=True)
class Layers:
    """The layers to replay, in order.

    Attributes:
        before: layers up to the end of the pattern's first repetition.
        pattern: the second repetition.
        left_out: how many repetitions follow it that are not replayed.
        after: the rest.
    """

    before: tuple[LayerKind, ...]
    pattern: tuple[LayerKind, ...]
    left_out: int
    after: tuple[LayerKind, ...]


def repeated_layers(layers: Sequence[LayerKind]) -> Layers:
    """Find the shortest pattern that layers repeat to the end, after at most a few that are different.

    A window changes neither what a layer stores nor what it needs, so that it makes no difference here.
    """
    kinds = tuple(replace(kind, window=None) for kind in layers)
    for length in range(1, LONGEST_PATTERN + 1):
        start = len(kinds)
        while start > length and kinds[start - 1 - length] == kinds[start - 1]:
            start -= 1
        start -= length  # where the pattern begins
        repetitions = (len(kinds) - start) // length
        if start <= LONGEST_PATTERN and repetitions > REPLAYED:
            first, second = start + length, start + 2 * length
            left_out = repetitions - REPLAYED
            return Layers(kinds[:first], kinds[first:second], left_out, kinds[second + left_out * length :])
    return Layers(kinds, (), 0, ())

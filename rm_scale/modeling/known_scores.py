"""Identical token sequences are computed once and get one score: what neighbours do to the last digits can't part them.

The same text in two batches differs in rounding, since kernels are chosen by a batch's shape; answers that are the same
text would then not tie.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import numpy as np

from rm_scale.data.rejected_rows import RejectedRow

Found = TypeVar("Found", bound=float | RejectedRow)
_MOST_KNOWN = 100_000


def sequence_key(*sequences: Sequence[int]) -> bytes:
    """Return 16 bytes that are the same for the same token sequences."""
    digest = hashlib.blake2b(digest_size=16)
    for ids in sequences:
        tokens = np.asarray(ids, dtype=np.int64).tobytes()
        digest.update(len(tokens).to_bytes(8, "little") + tokens)
    return digest.digest()


class KnownScores:
    """Remember the scores of token sequences; of more than `most` those that were met longest ago are forgotten.

    Args:
        most: how many are remembered; one takes about 200 bytes.
    """

    def __init__(self, most: int = _MOST_KNOWN) -> None:
        self._most = most
        self._scores: OrderedDict[bytes, float] = OrderedDict()

    def score(self, sequences: Sequence[Sequence[int]], compute: Callable[[list[int]], Sequence[Found]]) -> list[Found]:
        """Return a score per sequence, in their order.

        Args:
            sequences: token ids.
            compute: returns the scores of the sequences at some places: of those not known yet, each once. In place of
                a score may stand why there is none, which is not remembered.
        """
        keys = [sequence_key(ids) for ids in sequences]
        found = {key: cast(Found, self._scores[key]) for key in keys if key in self._scores}
        first: dict[bytes, int] = {}
        for place, key in enumerate(keys):
            if key not in found:
                first.setdefault(key, place)
        if first:
            found.update(zip(first, compute(list(first.values())), strict=True))
        for key in keys:
            # What is not finite may be a fault of the moment.
            score = found[key]
            if not isinstance(score, RejectedRow) and math.isfinite(score):
                self._scores[key] = score
                self._scores.move_to_end(key)
        while len(self._scores) > self._most:
            self._scores.popitem(last=False)
        return [found[key] for key in keys]

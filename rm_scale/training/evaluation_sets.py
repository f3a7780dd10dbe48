"""Several evaluation files: each has metrics of its own while training, under a name of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import PurePath

from rm_scale.data.splits import Origins


def names_of_sets(origins: Origins | None, subsets: Iterable[str]) -> list[str]:
    """Return the name of the evaluation set that each group belongs to; nothing where there are not two.

    A set is called like its file without endings, or by the whole path where another file or a subset is called so.

    Args:
        origins: where the evaluation groups come from.
        subsets: names of subsets, which have metrics of the same form.
    """
    if origins is None or len({int(number) for number in origins.source}) < 2:
        return []
    short = [PurePath(name).name.split(".")[0] for name in origins.names]
    taken = Counter([*short, *set(subsets)])
    names = [one if one and taken[one] == 1 else whole for one, whole in zip(short, origins.names, strict=True)]
    return [names[int(number)] for number in origins.source]

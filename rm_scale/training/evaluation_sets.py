"""Several evaluation files or sources: each has metrics of its own while training, under a name of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import PurePath

from rm_scale.data.splits import Origins


def names_of_sets(origins: Origins | None, subsets: Iterable[str]) -> list[str]:
    """Return the name of the evaluation set that each group belongs to; nothing where there are not two.

    A set is called like its file without endings, or by the whole path where another file or a subset is called so. The
    sources of a list have names of their own; "_source" follows one that a subset has too.

    Args:
        origins: where the evaluation groups come from.
        subsets: names of subsets, which have metrics of the same form.
    """
    if origins is None or len({int(number) for number in origins.source}) < 2:
        return []
    short = [PurePath(name).name.split(".")[0] for name in origins.names]
    taken = Counter([*short, *set(subsets)])
    whole = [f"{name}_source" if name in short else name for name in origins.names]
    names = [one if one and taken[one] == 1 else other for one, other in zip(short, whole, strict=True)]
    return [names[int(number)] for number in origins.source]

"""Index arrays by which kernels know a packed row: made from its spans on the CPU, before the row reaches a GPU.

| kind | for | what |
|---|---|---|
| ranges | matmul | the keys each token sees, as two ranges |
| varlen | varlen | where sequences of different lengths begin, and which row each key is |
| flex | flex | the ranges, and which blocks of keys a block of queries sees in part and in full |

None grows with the square of the row's width; the blocks of flex grow with the square of the number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from rm_scale.batching.packed.layout import IndexName, IndexTable, RowLayout

BLOCK = 128
"""Queries and keys of a block of FlexAttention; its kernels take no smaller ones for granted."""


@dataclass(frozen=True)
class TokenRanges:
    """The keys that each token of a row sees, `(width,)` int32 each: two ranges that never overlap.

    A token sees `[own_from, itself]` and `[prompt_from, prompt_to)`. The latter is empty for tokens of a prompt, and
    where a window has left the prompt behind. Padding sees itself alone, so that nothing becomes NaN.
    """

    own_from: torch.Tensor
    prompt_from: torch.Tensor
    prompt_to: torch.Tensor


def token_ranges(layout: RowLayout, window: int | None) -> TokenRanges:
    """Return what each token sees, under a window of the last `window` positions or without one."""
    own_from = np.arange(layout.width, dtype=np.int32)
    prompt_from, prompt_to = np.zeros(layout.width, np.int32), np.zeros(layout.width, np.int32)
    for span in layout.spans:
        prompt_end = span.start + span.prompt_length
        own_from[span.start : prompt_end] = _from(span.start, span.prompt_length, window)
        for start, end in span.responses():
            own_from[start:end] = _from(start, end - start, window)
            # Counted from the prompt's start; what the window cuts off beyond its end leaves an empty range.
            seen_from = _from(span.start, span.prompt_length + end - start, window)[span.prompt_length :]
            prompt_from[start:end] = np.minimum(seen_from, prompt_end)
            prompt_to[start:end] = prompt_end
    return TokenRanges(*(torch.from_numpy(array) for array in (own_from, prompt_from, prompt_to)))


def _from(start: int, length: int, window: int | None) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Return the first index that each of `length` tokens from `start` on sees of them."""
    first = np.full(length, start, np.int32)
    return first if window is None else np.maximum(first, np.arange(start, start + length, dtype=np.int32) - window + 1)


def sees_by_ranges(ranges: TokenRanges, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Tell whether the token at index `query` sees the one at index `key`; both of any shapes that broadcast."""
    own = (ranges.own_from[query] <= key) & (key <= query)
    return own | ((ranges.prompt_from[query] <= key) & (key < ranges.prompt_to[query]))


@dataclass(frozen=True)
class VarlenIndex:
    """A row as sequences of different lengths, queries beside keys.

    The queries are cut into [prompt + response 1 | response 2 | ...]; each has its own keys, the last of which are its
    own tokens, so that causality aligned at the end is the right mask.

    Attributes:
        cu_queries, cu_keys: `(S + 1,)` int32, where each of S sequences begins.
        key_index: `(T,)` int32, row index of each key, or `None` when the keys are the row itself.
        max_queries, max_keys: longest sequence of each.
    """

    cu_queries: torch.Tensor
    cu_keys: torch.Tensor
    key_index: torch.Tensor | None
    max_queries: int
    max_keys: int


def varlen_index(layout: RowLayout) -> VarlenIndex:
    """Return index arrays for kernels that take sequences of different lengths."""
    queries: list[int] = []
    keys: list[int] = []
    parts: list[np.ndarray[Any, np.dtype[np.int32]]] = []
    for span in layout.spans:
        prompt = np.arange(span.start, span.start + span.prompt_length, dtype=np.int32)
        for number, (start, end) in enumerate(span.responses()):
            queries.append(end - start + (span.prompt_length if number == 0 else 0))
            keys.append(end - start + span.prompt_length)
            parts += [prompt, np.arange(start, end, dtype=np.int32)]
    if layout.width > layout.num_tokens:
        queries.append(layout.width - layout.num_tokens)
        keys.append(queries[-1])
        parts.append(np.arange(layout.num_tokens, layout.width, dtype=np.int32))
    index = np.concatenate(parts)
    # A key stands twice, or no key's place differs from its number.
    is_row = len(index) == layout.width
    return VarlenIndex(
        _starts(queries), _starts(keys), None if is_row else torch.from_numpy(index), max(queries), max(keys)
    )


def _starts(lengths: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))


@dataclass(frozen=True)
class FlexIndex:
    """What FlexAttention must know of a row, int32: `TokenRanges`, and for B blocks of `BLOCK` tokens who sees whom.

    A pair of blocks is partial where some of its queries see some of its keys, and full where all see all. The tensors
    are named as in `torch.nn.attention.flex_attention.BlockMask`; B is at least 2, since compilers treat 1
    as a case of its own.

    Attributes:
        own_from, prompt_from, prompt_to: see `TokenRanges`.
        kv_num_blocks, full_kv_num_blocks: `(1, 1, B)`, how many blocks of keys each block of queries sees.
        kv_indices, full_kv_indices: `(1, 1, B, B)`, which; only as many of a row count.
        q_num_blocks, q_indices, full_q_num_blocks, full_q_indices: the same for each block of keys.
    """

    own_from: torch.Tensor
    prompt_from: torch.Tensor
    prompt_to: torch.Tensor
    kv_num_blocks: torch.Tensor
    kv_indices: torch.Tensor
    full_kv_num_blocks: torch.Tensor
    full_kv_indices: torch.Tensor
    q_num_blocks: torch.Tensor
    q_indices: torch.Tensor
    full_q_num_blocks: torch.Tensor
    full_q_indices: torch.Tensor

    @property
    def ranges(self) -> TokenRanges:
        """What each token sees."""
        return TokenRanges(self.own_from, self.prompt_from, self.prompt_to)

    @property
    def blocks(self) -> dict[str, torch.Tensor]:
        """The tensors of a `BlockMask`, by its names for them."""
        return {one.name: getattr(self, one.name) for one in fields(self)[3:]}


def flex_index(layout: RowLayout, window: int | None) -> FlexIndex:
    """Return ranges and blocks of a row."""
    ranges = token_ranges(layout, window)
    seen = seen_per_block(ranges)
    # The last block of a width that is no multiple lacks tokens, so it is never full: the kernel must look.
    full = seen == BLOCK * BLOCK
    partial = (seen > 0) & ~full
    by_queries = (*_ordered(partial), *_ordered(full))
    by_keys = (*_ordered(partial.T), *_ordered(full.T))
    return FlexIndex(ranges.own_from, ranges.prompt_from, ranges.prompt_to, *by_queries, *by_keys)


def seen_per_block(ranges: TokenRanges) -> torch.Tensor:
    """Count the pairs of a query and a key it sees in each pair of blocks, `(B, B)`.

    A range [from, to) of keys holds `below(to) - below(from)` keys of a block, where `below(x)` counts the block's keys
    under x: all of an earlier block, some of the one that x lies in, none of a later one. So each end of a range is two
    numbers at one place, and a sum along the blocks does the rest.
    """
    width = len(ranges.own_from)
    blocks = max(2, -(-width // BLOCK))
    token = torch.arange(width)
    ends = torch.stack([token + 1, ranges.own_from, ranges.prompt_to, ranges.prompt_from]).long()
    signs = torch.tensor([[1], [-1], [1], [-1]])
    place = (token // BLOCK) * (blocks + 1) + ends // BLOCK
    inside = torch.zeros(blocks * (blocks + 1), dtype=torch.long)
    inside.index_add_(0, place.flatten(), (signs * (ends % BLOCK)).flatten())
    earlier = torch.zeros_like(inside).index_add_(0, place.flatten(), (signs * BLOCK).expand_as(ends).flatten())
    inside, earlier = inside.view(blocks, -1), earlier.view(blocks, -1)
    return inside[:, :-1] + earlier.flip(1).cumsum(1).flip(1)[:, 1:]


def _ordered(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each row of a `(B, B)` table how many entries are True, and their columns first, in order."""
    columns = torch.argsort(table.int().contiguous(), dim=1, descending=True, stable=True)
    return table.sum(1)[None, None].int(), columns[None, None].int()


MAKERS: dict[str, Callable[[RowLayout, int | None], Any]] = {
    "ranges": token_ranges,
    "varlen": lambda layout, window: varlen_index(layout),
    "flex": flex_index,
}
"""What makes the arrays of a kind."""


def names_of(backend: str, windows: Iterable[int | None], device: str) -> tuple[IndexName, ...]:
    """Return the names of the index arrays that a backend asks for.

    Args:
        backend: a name out of `rm_scale.batching.packed.attention.BACKENDS`.
        windows: of the model's layers; `None` for layers without.
        device: "cuda" or "cpu".
    """
    different = sorted(set(windows), key=lambda window: (window is not None, window))
    if backend == "varlen":
        return (("varlen", None),)
    if backend == "flex":
        return tuple(("flex", window) for window in different)
    # On a CPU there is nothing to copy: the first layer makes them as well as anybody.
    return tuple(("ranges", window) for window in different) if backend == "matmul" and device != "cpu" else ()


def prepare_index(layout: RowLayout, names: Iterable[IndexName]) -> RowLayout:
    """Return the row with these index arrays made, on the CPU."""
    made = {name: MAKERS[name[0]](layout, name[1]) for name in names}
    return RowLayout(layout.spans, layout.width, IndexTable.of(made)) if made else layout


def find_index(layout: RowLayout, name: IndexName, device: torch.device | str) -> Any:
    """Return the index arrays of this name on `device`: as prepared, or made and moved now, once per row."""
    device = torch.device(device)
    key = ("index", name, device)
    if key not in layout.derived:
        prepared = layout.index is not None and name in layout.index
        table = prepare_index(layout, [] if prepared else [name]).to(device).index
        assert table is not None
        layout.derived[key] = table[name]
    return layout.derived[key]

"""Attention over a packed row by plain matrix products per block of queries, with its own backward pass.

On CPUs torch's fused attention needs many times what its floating-point operations cost, most of all backwards and with
a mask. Products of matrices run at full speed there, so a row is cut into blocks of queries; each block is multiplied
with just the keys it may see. Key and value heads of grouped-query attention are not repeated: the query heads that
share one are rows of the same matrix.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from rm_scale.batching.packed.attention_rules import AttentionRules
from rm_scale.batching.packed.index_arrays import (
    TokenRanges,
    find_index,
    sees_by_ranges,
)
from rm_scale.batching.packed.layout import GroupSpan, RowLayout
from rm_scale.planning.activations.settings import QUERIES_PER_BLOCK

MAX_KEPT_WEIGHTS = 2**22
"""A group keeps its attention weights for the backward pass up to this many per head; above, they are recomputed."""

CALL_COST = 16000
"""What a further block costs, in attention weights per head, by timing rows of short responses on two CPU cores."""

FUSED_CALL_COST = 4000
"""The same where there is no backward pass."""


def matmul_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: RowLayout, rules: AttentionRules
) -> torch.Tensor:
    """Attend by products of matrices, block by block of queries: see this module's docstring."""
    return blockwise_attention(query, key, value, layout, rules)


@dataclass(frozen=True)
class Block:
    """Queries of consecutive tokens, and the keys some of them see.

    Attributes:
        queries: first index and the index behind the last.
        keys: one or two ranges of indices; the second ends where the queries end.
        bias: `(queries, keys)`: 0 where seen, else -inf.
    """

    queries: tuple[int, int]
    keys: tuple[tuple[int, int], ...]
    bias: torch.Tensor

    @property
    def num_weights(self) -> int:
        """Attention weights per head."""
        return self.bias.numel()


def row_blocks(
    layout: RowLayout,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device | str,
    call_cost: int | None = None,
) -> list[Block]:
    """Return the blocks of a row; made once per row, since all layers with the same window share them."""
    call_cost = CALL_COST if call_cost is None else call_cost
    name = ("blocks", window, dtype, torch.device(device), call_cost)
    if name not in layout.derived:
        ranges = find_index(layout, ("ranges", window), device)
        pieces = [piece for span in layout.spans for piece in _pieces(span, call_cost)]
        layout.derived[name] = [Block(*piece, _bias(ranges, *piece, dtype)) for piece in pieces]
    blocks: list[Block] = layout.derived[name]
    return blocks


def _pieces(span: GroupSpan, call_cost: int) -> list[tuple[tuple[int, int], tuple[tuple[int, int], ...]]]:
    """Return queries and keys of each block of a group."""
    pieces: list[tuple[tuple[int, int], tuple[tuple[int, int], ...]]] = []
    prompt_end = span.start + span.prompt_length
    for start, end in _cut(span.start, prompt_end):
        pieces.append(((start, end), ((span.start, end),)))
    for first, last in _merged(span, call_cost):
        for start, end in _cut(first, last):
            keys = ((span.start, prompt_end), (first, end)) if span.prompt_length else ((first, end),)
            if len(keys) == 2 and keys[0][1] == keys[1][0]:
                keys = ((keys[0][0], keys[1][1]),)
            pieces.append(((start, end), keys))
    return pieces


def _cut(start: int, end: int) -> list[tuple[int, int]]:
    """Cut a range into even pieces of about `QUERIES_PER_BLOCK`."""
    length = end - start
    if length == 0:
        return []
    count = max(1, round(length / QUERIES_PER_BLOCK))
    bounds = [start + length * number // count for number in range(count + 1)]
    return list(itertools.pairwise(bounds))


def _merged(span: GroupSpan, call_cost: int) -> list[tuple[int, int]]:
    """Join neighbouring responses where the weights wasted between them cost less than a further block."""
    merged: list[tuple[int, int]] = []
    for start, end in span.responses():
        if merged and 2 * (end - start) * (start - merged[-1][0]) < call_cost:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


def _bias(
    ranges: TokenRanges, queries: tuple[int, int], keys: tuple[tuple[int, int], ...], dtype: torch.dtype
) -> torch.Tensor:
    """Make the bias where the ranges are: nothing that grows with queries times keys is copied to a GPU."""
    device = ranges.own_from.device
    query = torch.arange(*queries, device=device)
    key = torch.cat([torch.arange(*part, device=device) for part in keys])
    seen = sees_by_ranges(ranges, query[:, None], key[None, :])
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


def blockwise_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: RowLayout,
    rules: AttentionRules,
) -> torch.Tensor:
    """Attend over a packed row, block by block.

    Args:
        query: `(heads, width, head_dim)`.
        key, value: `(kv_heads, width, head_dim)`; the sizes of heads of keys and values may differ.
        layout: where groups lie.
        rules: how scores become weights.

    Returns:
        `(heads, width, value_dim)`, 0 at padding.
    """
    use_fused = not torch.is_grad_enabled() and rules.softcap is None and rules.sinks is None
    call_cost = FUSED_CALL_COST if use_fused else CALL_COST
    blocks = row_blocks(layout, rules.window, query.dtype, query.device, call_cost)
    # The types are chosen by now. Autocast on GPUs would make the softmax fp32, which the backward pass, where there is
    # no autocast, could not multiply with the rest.
    with torch.autocast(query.device.type, enabled=False):
        if use_fused:
            return _fused(query, key, value, blocks, rules.scaling)
        apply: Callable[..., torch.Tensor] = _Blockwise.apply
        out = apply(query, key, value, rules.sinks, blocks, rules.scaling, rules.softcap)
    return out


def _fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: list[Block], scaling: float
) -> torch.Tensor:
    """Attend without a backward pass: torch's fused attention is faster per block then, by a third in bfloat16.

    Query heads that share keys are a dimension of their own, along which keys and values have stride 0.
    """
    (heads, width, _), kv_heads = query.shape, key.shape[0]
    shared = (kv_heads, heads // kv_heads)
    out = query.new_zeros(width, heads, value.shape[-1]).transpose(0, 1)
    queries, results = query.unflatten(0, shared), out.unflatten(0, shared)
    for block in blocks:
        start, end = block.queries
        keys, values = (_keys(tensor, block)[:, None].expand(*shared, -1, -1) for tensor in (key, value))
        results[:, :, start:end] = scaled_dot_product_attention(
            queries[:, :, start:end], keys, values, attn_mask=block.bias, scale=scaling
        )
    return out


class _Blockwise(torch.autograd.Function):
    """All blocks of a row in one node of the graph, so that autograd's cost per operation is paid once."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        blocks: list[Block],
        scaling: float,
        softcap: float | None,
    ) -> torch.Tensor:
        heads, width, _ = query.shape
        out = query.new_zeros(width, heads, value.shape[-1]).transpose(0, 1)
        kept: list[torch.Tensor] = []
        ctx.is_kept = [block.num_weights <= MAX_KEPT_WEIGHTS and softcap is None for block in blocks]
        for block, is_kept in zip(blocks, ctx.is_kept, strict=True):
            weights, _, to_sink = _weights(query, key, sinks, block, scaling, softcap)
            _put(out, block.queries, torch.bmm(weights, _keys(value, block)), key.shape[0])
            if is_kept:
                kept += [weights] if to_sink is None else [weights, to_sink]
        ctx.save_for_backward(query, key, value, sinks, *kept)
        ctx.blocks, ctx.scaling, ctx.softcap = blocks, scaling, softcap
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, sinks, *kept = ctx.saved_tensors
        saved = iter(kept)
        grad_query = torch.zeros_like(query)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        grad_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=torch.float32)
        for block, is_kept in zip(ctx.blocks, ctx.is_kept, strict=True):
            if is_kept:
                weights, slope, to_sink = next(saved), None, None if sinks is None else next(saved)
            else:
                weights, slope, to_sink = _weights(query, key, sinks, block, ctx.scaling, ctx.softcap)
            grad = _queries(grad_out, block, key.shape[0])
            _add(grad_value, block, torch.bmm(weights.transpose(1, 2), grad))
            grad_weights = torch.bmm(grad, _keys(value, block).transpose(1, 2))
            if grad_sinks is not None:
                grad_sinks -= _to_heads(to_sink * (weights * grad_weights).sum(-1, keepdim=True), block, sinks)
            # Right with a sink too: its weight times its gradient, which is 0, adds nothing to the sum in it.
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            if slope is not None:
                grad_scores = grad_scores * slope
            own = torch.bmm(grad_scores, _keys(key, block)).mul_(ctx.scaling)
            _put(grad_query, block.queries, own, key.shape[0])
            _add(
                grad_key,
                block,
                torch.bmm(grad_scores.transpose(1, 2), _queries(query, block, key.shape[0])),
                ctx.scaling,
            )
        if grad_sinks is not None:
            grad_sinks = grad_sinks.to(sinks.dtype)
        return grad_query, grad_key, grad_value, grad_sinks, None, None, None


def _weights(
    query: torch.Tensor,
    key: torch.Tensor,
    sinks: torch.Tensor | None,
    block: Block,
    scaling: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return attention weights `(kv_heads, group * queries, keys)`; a soft cap's slope, and the weights of sinks.

    The latter are `(kv_heads, group * queries, 1)` in fp32.
    """
    kv_heads = key.shape[0]
    scores = torch.bmm(_queries(query, block, kv_heads), _keys(key, block).transpose(1, 2))
    shaped = scores.view(kv_heads, -1, *block.bias.shape)
    slope = None
    if softcap is None:
        torch.add(block.bias, shaped, alpha=scaling, out=shaped)
    else:
        capped = torch.tanh(shaped.mul_(scaling / softcap))
        slope = (1 - capped.square()).view_as(scores)
        torch.add(block.bias, capped, alpha=softcap, out=shaped)
    weights = torch.softmax(scores, -1)
    if sinks is None:
        return weights, slope, None
    above = shaped.float().logsumexp(-1, keepdim=True) - sinks.float().view(kv_heads, -1, 1, 1)
    above = above.view(*scores.shape[:2], 1)
    return weights * torch.sigmoid(above).to(weights.dtype), slope, torch.sigmoid(-above)


def _to_heads(values: torch.Tensor, block: Block, sinks: torch.Tensor) -> torch.Tensor:
    """Sum values `(kv_heads, group * queries, 1)` over a block's queries: `(heads,)`, fp32."""
    return values.float().view(len(sinks), len(block.bias)).sum(-1)


def _queries(tensor: torch.Tensor, block: Block, kv_heads: int) -> torch.Tensor:
    """Return a block's queries `(kv_heads, group * queries, head_dim)`: heads that share keys become one matrix."""
    start, end = block.queries
    return tensor[:, start:end].reshape(kv_heads, -1, tensor.shape[-1])


def _put(tensor: torch.Tensor, queries: tuple[int, int], values: torch.Tensor, kv_heads: int) -> None:
    """Write values of the shape that `_queries` returns back to the block's queries."""
    start, end = queries
    tensor[:, start:end] = values.view(tensor.shape[0], end - start, -1)


def _keys(tensor: torch.Tensor, block: Block) -> torch.Tensor:
    """Return the block's keys or values `(kv_heads, keys, head_dim)`."""
    parts = [tensor[:, start:end] for start, end in block.keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _add(tensor: torch.Tensor, block: Block, values: torch.Tensor, scaling: float = 1.0) -> None:
    """Add to the rows that `_keys` took."""
    offset = 0
    for start, end in block.keys:
        tensor[:, start:end].add_(values[:, offset : offset + end - start], alpha=scaling)
        offset += end - start

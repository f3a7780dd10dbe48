"""Attention over a packed row by one flash-attention call for sequences of different lengths (CUDA, half precision)."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch.nn.functional import pad

from rm_scale.batching.packed.attention_rules import AttentionRules, repeat_heads
from rm_scale.batching.packed.index_arrays import (
    VarlenIndex,
    find_index,
)
from rm_scale.batching.packed.layout import RowLayout


def varlen_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: RowLayout, rules: AttentionRules
) -> torch.Tensor:
    """Attend by one flash-attention call for the whole row (CUDA, half precision)."""
    from torch.nn.attention.varlen import varlen_attn

    if rules.softcap is not None or rules.sinks is not None:
        raise NotImplementedError("varlen has neither soft caps nor sinks; `choose_backend` refuses it before training")
    size = value.shape[-1]
    if size != key.shape[-1]:
        # The kernel wants heads of one size; latent attention has smaller ones of values.
        value = pad(value, (0, key.shape[-1] - size))
    groups: dict[str, Any] = {}
    if query.shape[0] != key.shape[0]:
        if _varlen_takes_groups():
            groups["enable_gqa"] = True
        else:
            key, value = repeat_heads(key, query.shape[0]), repeat_heads(value, query.shape[0])
    index: VarlenIndex = find_index(layout, ("varlen", None), query.device)
    query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
    if index.key_index is not None:
        key, value = key.index_select(0, index.key_index), value.index_select(0, index.key_index)
    out = varlen_attn(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        index.cu_queries,
        index.cu_keys,
        index.max_queries,
        index.max_keys,
        scale=rules.scaling,
        window_size=(-1 if rules.window is None else rules.window - 1, 0),
        **groups,
    )
    assert isinstance(out, torch.Tensor)
    return out.transpose(0, 1)[..., :size]


@functools.cache
def _varlen_takes_groups() -> bool:
    """Tell whether this torch takes fewer heads of keys than of queries; 2.11, in NVIDIA's images, does not."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters

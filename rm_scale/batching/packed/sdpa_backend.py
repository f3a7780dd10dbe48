"""Attention over a packed row by torch's scaled_dot_product_attention, one call per prompt and per response."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from rm_scale.batching.packed.attention_rules import AttentionRules, causal_mask, repeat_heads
from rm_scale.batching.packed.layout import RowLayout


def sdpa_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: RowLayout, rules: AttentionRules
) -> torch.Tensor:
    """Attend by one call per prompt and one per response, whose keys are the prompt's and its own."""
    if rules.softcap is not None:
        raise NotImplementedError("sdpa has no soft cap; `choose_backend` refuses it before training")
    key, value = repeat_heads(key, query.shape[0]), repeat_heads(value, query.shape[0])
    parts = []
    for span in layout.spans:
        prompt_end = span.start + span.prompt_length
        if span.prompt_length:
            parts.append(_causal(query, key, value, (span.start, prompt_end), None, rules))
        prompt = (span.start, prompt_end) if span.prompt_length else None
        parts += [_causal(query, key, value, response, prompt, rules) for response in span.responses()]
    if layout.width > layout.num_tokens:
        parts.append(torch.zeros_like(query[:, layout.num_tokens :]))
    return torch.cat(parts, dim=1)


def _causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    own: tuple[int, int],
    before: tuple[int, int] | None,
    rules: AttentionRules,
) -> torch.Tensor:
    """Let the tokens `own` see all tokens `before` and, causally, themselves; both are ranges of indices."""
    from torch.nn.attention.bias import causal_lower_right

    queries, keys, values = (t[:, own[0] : own[1]] for t in (query, key, value))
    if before is not None:
        keys = torch.cat([key[:, before[0] : before[1]], keys], dim=1)
        values = torch.cat([value[:, before[0] : before[1]], values], dim=1)
    mask: Any = None
    if rules.window is not None and keys.shape[1] > rules.window:
        mask = causal_mask(queries.shape[1], keys.shape[1], rules.window, query.device)
    elif before is not None:
        mask = causal_lower_right(queries.shape[1], keys.shape[1])
    return scaled_dot_product_attention(
        queries[None], keys[None], values[None], attn_mask=mask, is_causal=mask is None, scale=rules.scaling
    )[0]

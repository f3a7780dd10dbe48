"""Attention over a packed row by torch's scaled_dot_product_attention, one call per prompt and per response."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from rm_scale.batching.packed.attention_rules import AttentionRules, causal_mask, repeat_heads
from rm_scale.batching.packed.layout import RowLayout


def sdpa_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: RowLayout, rules: AttentionRules
) -> torch.Tensor:
    """Attend by one call per prompt and one per response, whose keys are the prompt's and its own."""
    if rules.softcap is not None:
        raise NotImplementedError("sdpa has no soft cap; `choose_backend` refuses it before training")
    key, value = repeat_heads(key, query.shape[0]), repeat_heads(value, query.shape[0])
    size = value.shape[-1]
    sink = None
    if rules.sinks is not None:
        query, key, value, sink = _with_sinks(query, key, value, rules.sinks / rules.scaling)
    parts = []
    for span in layout.spans:
        prompt_end = span.start + span.prompt_length
        if span.prompt_length:
            parts.append(_causal(query, key, value, (span.start, prompt_end), None, sink, rules))
        prompt = (span.start, prompt_end) if span.prompt_length else None
        parts += [_causal(query, key, value, response, prompt, sink, rules) for response in span.responses()]
    if layout.width > layout.num_tokens:
        parts.append(torch.zeros_like(value[:, layout.num_tokens :]))
    return torch.cat(parts, dim=1)[..., :size]


def _with_sinks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return heads with a further number that only a sink's key has, and that key `(heads, 1, head_dim + 1)`.

    So sinks are a key like others, which all kernels take; its value is 0.
    """
    sink = pad(scores.to(key.dtype)[:, None, None], (key.shape[-1], 0))
    return pad(query, (0, 1), value=1.0), pad(key, (0, 1)), pad(value, (0, 1)), sink


def _causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    own: tuple[int, int],
    before: tuple[int, int] | None,
    sink: torch.Tensor | None,
    rules: AttentionRules,
) -> torch.Tensor:
    """Let the tokens `own` see all tokens `before`, a sink and, causally, themselves; both are ranges of indices."""
    from torch.nn.attention.bias import causal_lower_right

    queries, keys, values = (t[:, own[0] : own[1]] for t in (query, key, value))
    if before is not None:
        keys = torch.cat([key[:, before[0] : before[1]], keys], dim=1)
        values = torch.cat([value[:, before[0] : before[1]], values], dim=1)
    mask: Any = None
    if rules.window is not None and keys.shape[1] > rules.window:
        mask = causal_mask(queries.shape[1], keys.shape[1], rules.window, query.device)
        mask = mask if sink is None else pad(mask, (1, 0), value=True)
    if sink is not None:
        keys = torch.cat([sink, keys], dim=1)
        values = torch.cat([torch.zeros_like(values[:, :1]), values], dim=1)
    if mask is None and (before is not None or sink is not None):
        mask = causal_lower_right(queries.shape[1], keys.shape[1])
    return scaled_dot_product_attention(
        queries[None], keys[None], values[None], attn_mask=mask, is_causal=mask is None, scale=rules.scaling
    )[0]

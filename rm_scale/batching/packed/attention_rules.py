"""Which token of a packed row sees which, and how scores become weights: the definition that every backend obeys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from rm_scale.batching.packed.layout import RowLayout


@dataclass(frozen=True)
class AttentionRules:
    """How scores become weights, apart from who sees whom.

    Attributes:
        scaling: factor on the scores.
        window: a token sees itself and at most `window - 1` positions before it; `None` for all.
        softcap: scores become `softcap * tanh(score / softcap)`; `None` for no cap.
        sinks: `(heads,)` score of a key that every token sees and that has no value, so that weights add up to less
            than 1 (as in GPT-OSS); `None` for none.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = field(default=None, compare=False)


Backend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, RowLayout, AttentionRules], torch.Tensor]
"""Takes queries `(heads, width, head_dim)`, keys and values `(kv_heads, width, head_dim)`; returns
`(heads, width, head_dim)`. What stands at padding is finite, and means nothing."""


def causal_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device | str) -> torch.Tensor:
    """Return who sees whom when the queries are the last of the keys: `(num_queries, num_keys)`, True where seen."""
    position = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    other = torch.arange(num_keys, device=device)[None, :]
    seen = other <= position
    return seen if window is None else seen & (position - other < window)


def repeat_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeat the heads of keys or values `(kv_heads, width, head_dim)` so that there are `heads` of them."""
    return tensor if tensor.shape[0] == heads else tensor.repeat_interleave(heads // tensor.shape[0], dim=0)


@dataclass(frozen=True)
class TokenPlaces:
    """For each token of a row, `(width,)` each: its group (-1: padding), its response (-1: prompt), its position."""

    group: torch.Tensor
    response: torch.Tensor
    position: torch.Tensor


def token_places(layout: RowLayout, device: torch.device | str = "cpu") -> TokenPlaces:
    """Return where each token of a row belongs."""
    group = torch.full((layout.width,), -1)
    response = torch.full((layout.width,), -1)
    position = torch.zeros(layout.width, dtype=torch.long)
    for number, span in enumerate(layout.spans):
        group[span.start : span.end] = number
        position[span.start : span.start + span.prompt_length] = torch.arange(span.prompt_length)
        for which, (start, end) in enumerate(span.responses()):
            response[start:end] = which
            position[start:end] = torch.arange(span.prompt_length, span.prompt_length + end - start)
    return TokenPlaces(group.to(device), response.to(device), position.to(device))


def sees(places: TokenPlaces, query: torch.Tensor, key: torch.Tensor, window: int | None) -> torch.Tensor:
    """Tell whether the token at index `query` sees the one at index `key`; both of any shapes that broadcast.

    Padding sees itself alone, so that nothing becomes NaN.
    """
    same_group = places.group[query] == places.group[key]
    on_its_path = (places.response[key] == -1) | (places.response[key] == places.response[query])
    visible = same_group & on_its_path & (key <= query) & (places.group[query] != -1)
    if window is not None:
        visible = visible & (places.position[query] - places.position[key] < window)
    return visible | ((places.group[query] == -1) & (query == key))

"""Register the attention backends of packed rows with transformers: each response sees its prompt and itself.

Every backend is a function of queries, keys, values and a `RowLayout`, registered with transformers under the name
`rm_scale_NAME`; models call it through transformers' attention interface and are not changed. All return the same
numbers; they differ in what they run on and how fast they are. Each has a module of its own, `NAME_backend.py`;
`backend_choice.py` decides which one a run takes, and `attention_rules.py` says what all of them compute.

| backend | runs on | how |
|---|---|---|
| matmul | CPU, GPU | matrix products per block of queries, hand-written backward pass; windows, soft caps, sinks |
| sdpa | CPU, GPU | torch's scaled_dot_product_attention per prompt and response; windows, sinks |
| varlen | CUDA, half precision | one flash-attention call for the row, keys with the prompt repeated; windows |
| flex | CUDA; CPU for tests | FlexAttention with a block mask; windows, soft caps, sinks |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rm_scale.batching.packed.attention_rules import AttentionRules, Backend, causal_mask
from rm_scale.batching.packed.flex_backend import flex_attention
from rm_scale.batching.packed.index_arrays import (
    names_of,
)
from rm_scale.batching.packed.layout import IndexName, RowLayout
from rm_scale.batching.packed.matmul_backend import matmul_attention
from rm_scale.batching.packed.sdpa_backend import sdpa_attention
from rm_scale.batching.packed.varlen_backend import varlen_attention
from rm_scale.errors import ModelError

PREFIX = "rm_scale_"
"""What the names begin with under which transformers knows the backends."""


BACKENDS: dict[str, Backend] = {
    "matmul": matmul_attention,
    "sdpa": sdpa_attention,
    "varlen": varlen_attention,
    "flex": flex_attention,
}


def index_names(config: PreTrainedConfig, device: str) -> tuple[IndexName, ...]:
    """Return which index arrays the layers of a model will ask for, by its attention implementation and its windows.

    Args:
        config: the model's, after `rm_scale.modeling.packed_model.enable_packed_rows`; before it there are none.
        device: "cuda" or "cpu", where it will run.
    """
    text = config.get_text_config()
    name = str(text._attn_implementation or "")
    if not name.startswith(PREFIX):
        return ()
    # Without kinds of layers all take the window that the configuration has, if any.
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"]
    window = getattr(text, "sliding_window", None)
    windows = {window if kind == "sliding_attention" else None for kind in kinds}
    return names_of(name.removeprefix(PREFIX), windows, device)


def register_backends() -> None:
    """Register all backends with transformers. Padded batches, which carry no layout, go through its own sdpa."""
    for name, backend in BACKENDS.items():
        AttentionInterface.register(PREFIX + name, _as_attention_function(backend))
        AttentionMaskInterface.register(PREFIX + name, sdpa_mask)


def _as_attention_function(backend: Backend) -> Callable[..., tuple[torch.Tensor, None]]:
    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        packed_layout: RowLayout | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        packed_layout = packed_layout if packed_layout is not None else getattr(module, "packed_layout", None)
        sliding_window = sliding_window if sliding_window is not None else getattr(module, "packed_window", None)
        if packed_layout is None and attention_mask is not None and attention_mask.shape[-1] != key.shape[2]:
            raise ModelError(
                f"{type(module).__name__} was given a packed row without its layout: the model does not hand unknown "
                "arguments on to its attention. Fix: set packing: none."
            )
        if packed_layout is None and (softcap is not None or s_aux is not None):
            return _padded_by_hand(query, key, value, attention_mask, scaling, softcap, s_aux), None
        if packed_layout is None:
            padded: tuple[torch.Tensor, None] = sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
            )
            return padded
        assert not dropout, "attention dropout is refused before training"
        assert query.shape[0] == 1, "a packed batch is one row"
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        rules = AttentionRules(scale, sliding_window, softcap, s_aux)
        dtype = _compute_dtype(query)
        query, key, value = (tensor[0].to(dtype) for tensor in (query, key, value))
        return backend(query, key, value, packed_layout, rules).transpose(0, 1)[None], None

    # Rows differ in every step: tracing through here would compile a new graph each time.
    untraced: Callable[..., tuple[torch.Tensor, None]] = torch.compiler.disable(attention)
    return untraced


def _padded_by_hand(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attend over a padded batch with a soft cap on the scores or with sinks, which torch's sdpa lacks.

    Args:
        query, key, value: `(batch, heads, width, head_dim)`; fewer heads of keys and values under grouped queries.
        mask: True where seen, broadcast to `(batch, heads, width, width)`; `None` for causal attention alone.
        scaling: factor on the scores; `None` for `head_dim ** -0.5`.
        softcap, sinks: see `AttentionRules`.

    Returns:
        `(batch, width, heads, value_dim)`.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = causal_mask(query.shape[2], key.shape[2], None, query.device) if mask is None else mask
    # Not -inf: padding far behind the text sees nothing in a window, and must not become NaN.
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].to(scores).expand(*scores.shape[:3], 1)], dim=-1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
    return (weights[..., : key.shape[2]] @ value).transpose(1, 2)


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the type that attention is computed in: autocast's where it is on, else the tensor's own."""
    # Rotary embeddings leave queries and keys in fp32 under autocast, which would make attention slow.
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype

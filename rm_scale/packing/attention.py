"""Attention over packed rows: each response sees its prompt and itself, nothing else.

Every backend is a function of queries, keys, values and a `RowLayout`, registered with transformers under the name
`rm_scale_NAME`; models call it through transformers' attention interface and are not changed. All give the same
result; they differ in what they run on and how fast they are.

| backend | runs on | how |
|---|---|---|
| matmul | CPU, GPU | batched matrix products per block of queries, hand-written backward pass; windows and soft caps |
| sdpa | CPU, GPU | torch's scaled_dot_product_attention per prompt and response; windows |
| varlen | CUDA, half precision | one flash-attention call for the row, keys with the prompt repeated; windows |
| flex | CUDA; CPU for tests | FlexAttention with a block mask; windows and soft caps |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rm_scale.errors import ConfigError, ModelError
from rm_scale.packing.blocks import blockwise_attention
from rm_scale.packing.layout import RowLayout

PREFIX = "rm_scale_"
"""Names under which backends are known to transformers begin with this."""


@dataclass(frozen=True)
class AttentionRules:
    """How scores become weights, apart from who sees whom.

    Attributes:
        scaling: factor on the scores.
        window: a token sees itself and at most `window - 1` positions before it; `None` for all.
        softcap: scores become `softcap * tanh(score / softcap)`; `None` for no cap.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None


Backend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, RowLayout, AttentionRules], torch.Tensor]
"""Takes queries `(heads, width, head_dim)`, keys and values `(kv_heads, width, head_dim)`; gives
`(heads, width, head_dim)`. What stands at padding is finite, and means nothing."""


def matmul_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: RowLayout, rules: AttentionRules
) -> torch.Tensor:
    """See `rm_scale.packing.blocks`."""
    return blockwise_attention(query, key, value, layout, rules.scaling, rules.window, rules.softcap)


def sdpa_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: RowLayout, rules: AttentionRules
) -> torch.Tensor:
    """One call per prompt and one per response, whose keys are the prompt's and its own."""
    if rules.softcap is not None:
        raise NotImplementedError("sdpa has no soft cap; `choose_backend` refuses it before training")
    key, value = _repeat_heads(key, query.shape[0]), _repeat_heads(value, query.shape[0])
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
    """Tokens `own` see all tokens `before` and, causally, themselves."""
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


def causal_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device | str) -> torch.Tensor:
    """Who sees whom when the queries are the last of the keys: `(num_queries, num_keys)`, True where seen."""
    position = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    other = torch.arange(num_keys, device=device)[None, :]
    seen = other <= position
    return seen if window is None else seen & (position - other < window)


def _repeat_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    return tensor if tensor.shape[0] == heads else tensor.repeat_interleave(heads // tensor.shape[0], dim=0)


@dataclass(frozen=True)
class VarlenIndex:
    """A row as sequences of different lengths, queries beside keys.

    The queries are cut into [prompt + response 1 | response 2 | ...]; each has its own keys, the last of which are its
    own tokens, so that causality aligned at the end is the right mask.

    Attributes:
        cu_queries, cu_keys: `(S + 1,)` int32, where each of S sequences begins.
        key_index: `(T,)` row index of each key, or `None` when the keys are the row itself.
        max_queries, max_keys: longest sequence of each.
    """

    cu_queries: torch.Tensor
    cu_keys: torch.Tensor
    key_index: torch.Tensor | None
    max_queries: int
    max_keys: int


def varlen_index(layout: RowLayout, device: torch.device | str = "cpu") -> VarlenIndex:
    """Index arrays for kernels that take sequences of different lengths."""
    queries: list[int] = []
    keys: list[int] = []
    index: list[int] = []
    for span in layout.spans:
        prompt = range(span.start, span.start + span.prompt_length)
        for number, (start, end) in enumerate(span.responses()):
            queries.append(end - start + (span.prompt_length if number == 0 else 0))
            keys.append(end - start + span.prompt_length)
            index += [*prompt, *range(start, end)]
    if layout.width > layout.num_tokens:
        queries.append(layout.width - layout.num_tokens)
        keys.append(queries[-1])
        index += range(layout.num_tokens, layout.width)
    is_row = index == list(range(layout.width))

    def starts(lengths: list[int]) -> torch.Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)

    return VarlenIndex(
        starts(queries),
        starts(keys),
        None if is_row else torch.tensor(index, device=device),
        max(queries),
        max(keys),
    )


def varlen_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: RowLayout, rules: AttentionRules
) -> torch.Tensor:
    """One flash-attention call for the whole row (CUDA, half precision)."""
    from torch.nn.attention.varlen import varlen_attn

    index = derived(layout, ("varlen", query.device), lambda: varlen_index(layout, query.device))
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
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, torch.Tensor)
    return out.transpose(0, 1)


@dataclass(frozen=True)
class TokenPlaces:
    """For each token of a row, `(width,)` each: its group (-1: padding), its response (-1: prompt), its position."""

    group: torch.Tensor
    response: torch.Tensor
    position: torch.Tensor


def token_places(layout: RowLayout, device: torch.device | str = "cpu") -> TokenPlaces:
    """Where each token of a row belongs."""
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
    """Does the token at index `query` see the one at index `key`? Works on indices of any shape that broadcast.

    Padding sees itself alone, so that nothing becomes NaN.
    """
    same_group = places.group[query] == places.group[key]
    on_its_path = (places.response[key] == -1) | (places.response[key] == places.response[query])
    visible = same_group & on_its_path & (key <= query) & (places.group[query] != -1)
    if window is not None:
        visible = visible & (places.position[query] - places.position[key] < window)
    return visible | ((places.group[query] == -1) & (query == key))


def flex_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: RowLayout, rules: AttentionRules
) -> torch.Tensor:
    """FlexAttention over the row: compiled on CUDA, its eager path (which holds all scores) on a CPU."""
    mask = derived(layout, ("flex", query.device, rules.window), lambda: _block_mask(layout, rules, query.device))
    score_mod = None
    if rules.softcap is not None:
        cap = rules.softcap

        def score_mod(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return cap * torch.tanh(score / cap)

    out = _flex(query.device.type)(
        query[None],
        key[None],
        value[None],
        score_mod=score_mod,
        block_mask=mask,
        scale=rules.scaling,
        enable_gqa=query.shape[0] != key.shape[0],
    )
    assert isinstance(out, torch.Tensor)
    return out[0]


def _block_mask(layout: RowLayout, rules: AttentionRules, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    places = token_places(layout, device)

    def mask_mod(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return sees(places, query, key, rules.window)

    return create_block_mask(mask_mod, None, None, layout.width, layout.width, device=str(device))


_COMPILED: dict[str, Any] = {}


def _flex(device_type: str) -> Any:
    from torch.nn.attention import flex_attention as flex

    if device_type == "cpu":
        return flex.flex_attention
    if "flex" not in _COMPILED:
        _COMPILED["flex"] = torch.compile(flex.flex_attention, dynamic=True)
    return _COMPILED["flex"]


def derived(layout: RowLayout, name: Any, make: Callable[[], Any]) -> Any:
    """What was computed from the layout under this name; made by the first layer that asks."""
    if name not in layout.derived:
        layout.derived[name] = make()
    return layout.derived[name]


BACKENDS: dict[str, Backend] = {
    "matmul": matmul_attention,
    "sdpa": sdpa_attention,
    "varlen": varlen_attention,
    "flex": flex_attention,
}


def choose_backend(asked: str, device: str, dtype: str, has_softcap: bool) -> str:
    """The backend for packed rows: the one asked for if it can do the job, else by device and type.

    Args:
        asked: a name out of `BACKENDS`, or "auto".
        device: "cuda" or "cpu".
        dtype: compute type, such as "bfloat16".
        has_softcap: the model caps its attention scores.

    Raises:
        ConfigError: the backend asked for can't run there, or can't do what the model needs.
    """
    half_on_cuda = device == "cuda" and dtype in {"bfloat16", "float16"} and torch.cuda.get_device_capability()[0] >= 8
    if asked == "auto":
        if device == "cpu":
            return "matmul"
        if has_softcap:
            return "flex"
        return "varlen" if half_on_cuda else "sdpa"
    reason = None
    if asked == "varlen" and not half_on_cuda:
        reason = f"needs a CUDA device of compute capability 8 or more and bfloat16 or float16, here {device}, {dtype}"
    elif asked == "flex" and device == "cpu":
        reason = "has no backward pass on a CPU"
    elif asked in {"sdpa", "varlen"} and has_softcap:
        reason = "can't cap attention scores, as this model does"
    if reason is not None:
        raise ConfigError([f"packed_attention={asked}: {reason}. Fix: leave it out, or use matmul."])
    return asked


def register_backends() -> None:
    """Tell transformers about all backends. Padded batches, which carry no layout, go through its own sdpa."""
    for name, backend in BACKENDS.items():
        AttentionInterface.register(PREFIX + name, _as_attention_function(backend))
        AttentionMaskInterface.register(PREFIX + name, sdpa_mask)


def _as_attention_function(backend: Backend) -> Callable[..., tuple[torch.Tensor, None]]:
    # Rows differ in every step: tracing through here would compile a new graph each time.
    @torch.compiler.disable
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
        packed_layout: RowLayout | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        if packed_layout is None and attention_mask is not None and attention_mask.shape[-1] != key.shape[2]:
            raise ModelError(
                f"{type(module).__name__} was given a packed row without its layout: the model does not hand unknown "
                "arguments on to its attention. Fix: set packing: none."
            )
        if packed_layout is None and softcap is not None:
            return _padded_with_softcap(query, key, value, attention_mask, scaling, softcap), None
        if packed_layout is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
            )
        assert not dropout, "attention dropout is refused before training"
        assert query.shape[0] == 1, "a packed batch is one row"
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        rules = AttentionRules(scale, sliding_window, softcap)
        dtype = _compute_dtype(query)
        query, key, value = (tensor[0].to(dtype) for tensor in (query, key, value))
        return backend(query, key, value, packed_layout, rules).transpose(0, 1)[None], None

    return attention


def _padded_with_softcap(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float,
) -> torch.Tensor:
    """A padded batch of a model with soft caps, which sdpa can't do. Tensors `(batch, heads, width, head_dim)`."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    seen = causal_mask(query.shape[2], key.shape[2], None, query.device) if mask is None else mask
    # Not -inf: padding far behind the text sees nothing in a window, and must not become NaN.
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).transpose(1, 2)


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Under autocast rotary embeddings leave queries and keys in fp32; attention runs in the lower precision."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype

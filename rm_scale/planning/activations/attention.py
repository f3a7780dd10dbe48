"""A layer's attention: projections, rotary positions, and the backends of packed rows."""

from __future__ import annotations

from rm_scale.planning.activations.linear import linear
from rm_scale.planning.activations.micro_step import MicroStep
from rm_scale.planning.activations.norms import norm
from rm_scale.planning.activations.settings import QUERIES_PER_BLOCK
from rm_scale.planning.activations.simulated_autograd import Allocation, Gradients, Size, SizedTensor

FLASH_BLOCK = 128
"""Rows per sequence by which flash-attention's backward buffers are longer than the row (torch, flash_api.cpp)."""


def attention(step: MicroStep, inner: SizedTensor) -> SizedTensor:
    """Replay attention with its projections; input and output are of tokens x hidden."""
    query, key, value = _projections(step, inner)
    gate = None
    if step.shape.style.output_gate:
        query, gate = _split_gate(step, query)
    if step.shape.style.qk_norm != "none":
        plain = (query, key)
        query, key = norm(step, "query norm", query), norm(step, "key norm", key)
        step.free(*plain)
    if step.has_rope:
        plain = (query, key)
        query, key = rope(step, "query", query), rope(step, "key", key)
        step.free(*plain)
    out = attend(step, query, key, value)
    step.free(query, key, value)
    if gate is not None:
        out = _times_gate(step, out, gate)
    output = linear(step, "o_proj", out, step.hidden)
    step.free(out)
    if gate is not None:
        step.free(gate)
    return output


def _split_gate(step: MicroStep, both: SizedTensor) -> tuple[SizedTensor, SizedTensor]:
    """Return queries and the output's gate, which lie head by head in one projection; the gate is copied out of it."""
    query, view = step.split(both, [step.queries, step.queries])
    gate = step.copy("attention gate", view)
    step.free(both, view)
    return query, gate


def _times_gate(step: MicroStep, out: SizedTensor, gate: SizedTensor) -> SizedTensor:
    """Multiply attention's output with the sigmoid of its gate; frees the output."""
    opened = step.apply("sigmoid of attention gate", gate, saves_output=True)
    product = step.multiply("attention output x gate", out, opened)
    step.free(out, opened)
    return product


def _projections(step: MicroStep, inner: SizedTensor) -> tuple[SizedTensor, SizedTensor, SizedTensor]:
    """Return queries, keys and values."""
    if not step.shape.style.fused_qkv:
        width = step.queries
        if step.shape.style.output_gate:
            width = Size("tokens x 2 queries", 2 * width.elements)
        query = linear(step, "q_proj", inner, width)
        return query, linear(step, "k_proj", inner, step.kv), linear(step, "v_proj", inner, step.kv)
    both = Size("tokens x (queries + 2 kv)", step.queries.elements + 2 * step.kv.elements)
    fused = linear(step, "qkv_proj", inner, both)
    query, key = step.slice(fused, step.queries), step.slice(fused, step.kv)
    part = step.slice(fused, step.kv)
    value = step.copy("value", part)
    step.free(fused, part)
    return query, key, value


def rope(step: MicroStep, name: str, value: SizedTensor) -> SizedTensor:
    """Replay rotary positions, in some models of the first part of each head only."""
    if step.rotary_share == 1:
        return rotate(step, name, value)
    turned = Size(f"{value.size.formula} x share", int(value.size.elements * step.rotary_share))
    rest = Size(f"{value.size.formula} x rest", value.size.elements - turned.elements)
    first, second = step.slice(value, turned), step.slice(value, rest)
    rotated = rotate(step, f"part of {name}", first)
    joined = step.join(f"{name} with positions", [rotated, second], value.size)
    step.free(first, second, rotated)
    return joined


def rotate(step: MicroStep, name: str, value: SizedTensor) -> SizedTensor:
    """Replay `x cos + rotate_half(x) sin`; of all this only the tables are saved, which are there anyway."""
    width = max(value.width, step.base_width)
    half = Size(f"{value.size.formula} / 2", value.size.elements // 2)
    with_cos = step.multiply_by_constant(f"{name} x cos", value, width)
    first, second = step.slice(value, half), step.slice(value, half)
    negative = step.scale(f"rotated {name}", second)
    rotated = step.new(f"rotated {name}", value.size, value.width, value.needs_grad)

    def backward(gradient: Allocation) -> Gradients:
        return [(part, step.memory.keep(gradient)) for part in (negative, first) if part.needs_grad]

    step.graph.record(rotated, [], backward)
    step.free(first, second, negative)
    with_sin = step.multiply_by_constant(f"{name} x sin", rotated, width)
    step.free(rotated)
    output = step.add(f"{name} with positions", with_cos, with_sin, value.size)
    step.free(with_cos, with_sin)
    return output


def attend(step: MicroStep, query: SizedTensor, key: SizedTensor, value: SizedTensor) -> SizedTensor:
    """Replay the backend on queries, keys and values; they stay the caller's."""
    width = step.product_width
    parts = []
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        row = step.slice(tensor, tensor.size)  # the one row of the batch
        parts.append(step.cast(f"{name} for attention", row, width))
        step.free(row)
    backends = {"varlen": _varlen, "sdpa": _sdpa, "matmul": _matmul}
    out = backends[step.options.attention](step, *parts)
    step.free(*parts)
    return out


# --- Backends ---------------------------------------------------------------------------------------------------------


def _varlen(step: MicroStep, query: SizedTensor, key: SizedTensor, value: SizedTensor) -> SizedTensor:
    """Replay flash-attention; with shared prompts each response gets a copy of its prompt's keys and values."""
    if step.row.key_tokens > step.row.tokens:
        size = Size("key_tokens x kv", step.row.key_tokens * step.shape.kv_size)
        keys, values = (step.gather(f"{n} with prompts", t, size) for n, t in (("key", key), ("value", value)))
    else:
        keys, values = step.hold(key), step.hold(value)
    out = _flash(step, query, keys, values)
    step.free(keys, values)
    return out


def _flash(step: MicroStep, query: SizedTensor, key: SizedTensor, value: SizedTensor) -> SizedTensor:
    """Replay the kernel: it saves queries, keys, values, its output and a logarithm per head and token."""
    size = step.queries
    if value.size.elements != key.size.elements:  # padded rows of latent attention
        size = Size("tokens x values", step.queries.elements * value.size.elements // key.size.elements)
    out = step.new("attention output", size, query.width, query.needs_grad)
    logarithms = step.memory.allocate("attention logarithms", step.per_head, 4)

    def backward(gradient: Allocation) -> Gradients:
        gradients = _gradients(step, query, key, value)
        step.memory.release(*_flash_workspace(step, key))
        return gradients

    saved = [query.allocation, key.allocation, value.allocation, out.allocation, logarithms]
    step.graph.record(out, saved, backward)
    step.memory.release(logarithms)
    return out


def _gradients(step: MicroStep, query: SizedTensor, key: SizedTensor, value: SizedTensor) -> Gradients:
    named = (("query", query), ("key", key), ("value", value))
    return [(tensor, step.memory.allocate(f"gradient of {name}", tensor.size, tensor.width)) for name, tensor in named]


def _flash_workspace(step: MicroStep, key: SizedTensor) -> list[Allocation]:
    """Allocate what the backward kernel does inside: fp32 query gradients, and key gradients per query head."""
    if step.options.as_tracked:
        return []
    rows = step.row.tokens + FLASH_BLOCK * step.row.responses
    query = Size(f"(tokens + {FLASH_BLOCK} x responses) x queries", rows * step.shape.query_size)
    workspace = [step.memory.allocate("query gradients inside the kernel", query, 4)]
    if step.shape.num_kv_heads != step.shape.num_heads and key.size.elements:
        per_query = key.size.elements // step.shape.kv_size * step.shape.query_size
        size = Size("2 x key_tokens x queries", 2 * per_query)
        workspace.append(step.memory.allocate("key and value gradients inside the kernel", size, key.width))
    return workspace


def _sdpa(step: MicroStep, query: SizedTensor, key: SizedTensor, value: SizedTensor) -> SizedTensor:
    """Repeat heads, join keys per response, attend, join the outputs (rm_scale/batching/packed/sdpa_backend.py)."""
    keys, values = (_for_sdpa(step, name, tensor) for name, tensor in (("key", key), ("value", value)))
    parts = _flash(step, query, keys, values)
    step.free(keys, values)
    out = step.copy("attention output, joined", parts)
    step.free(parts)
    return out


def _for_sdpa(step: MicroStep, name: str, value: SizedTensor) -> SizedTensor:
    """Repeat the heads of keys or values, and join each response's with its prompt's."""
    if step.shape.num_kv_heads != step.shape.num_heads:
        repeated = step.gather(f"{name}, heads repeated", value, step.queries)
    else:
        repeated = step.hold(value)
    if step.row.key_tokens == step.row.tokens:
        return repeated
    size = Size("key_tokens x queries", step.row.key_tokens * step.shape.query_size)
    joined = step.gather(f"{name} with prompts", repeated, size)
    step.free(repeated)
    return joined


def _matmul(step: MicroStep, query: SizedTensor, key: SizedTensor, value: SizedTensor) -> SizedTensor:
    """Replay the CPU backend, which keeps all blocks' weights (rm_scale/batching/packed/matmul_backend.py)."""
    heads, block = step.shape.num_heads, min(step.row.tokens, QUERIES_PER_BLOCK)
    out = step.new("attention output", step.queries, query.width, query.needs_grad)
    weights = step.memory.allocate("attention weights", Size("pairs x heads", step.row.pairs * heads), query.width)
    if not step.has_masks:
        step.memory.allocate("masks of all blocks", Size("pairs", step.row.pairs), query.width)  # kept with the row
        step.has_masks = True
    scores = Size("block x longest x heads", block * step.row.longest * heads)
    step.memory.release(step.memory.allocate("attention scores", scores, query.width))

    def backward(gradient: Allocation) -> Gradients:
        gradients = _gradients(step, query, key, value)
        step.memory.release(*(step.memory.allocate("gradient of scores", scores, query.width) for _ in range(2)))
        return gradients

    step.graph.record(out, [query.allocation, key.allocation, value.allocation, weights], backward)
    step.memory.release(weights)
    return out

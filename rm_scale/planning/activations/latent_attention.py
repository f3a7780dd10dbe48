"""Multi-head latent attention: queries and keys come from narrow projections, positions turn a part of each head.

The replay is of transformers' modeling_deepseek_v3.py, and of packed rows' varlen backend, which fills up the heads of
values to the width of those of keys.
"""

from __future__ import annotations

from rm_scale.planning.activations.attention import attend, rotate
from rm_scale.planning.activations.linear import linear
from rm_scale.planning.activations.micro_step import MicroStep
from rm_scale.planning.activations.norms import norm
from rm_scale.planning.activations.simulated_autograd import Allocation, Gradients, Size, SizedTensor
from rm_scale.planning.layer_parts import LatentAttention


class _Sizes:
    """Sizes of all heads' parts, over all tokens."""

    def __init__(self, step: MicroStep, parts: LatentAttention) -> None:
        tokens, heads = step.row.tokens, step.shape.num_heads
        self.nope = Size("tokens x heads x nope_dim", tokens * heads * parts.nope_dim)
        self.rope = Size("tokens x heads x rope_dim", tokens * heads * parts.rope_dim)
        self.values = Size("tokens x heads x value_dim", tokens * heads * parts.value_dim)
        self.query_rank = Size("tokens x query_rank", tokens * (parts.query_rank or 0))
        self.kv_rank = Size("tokens x kv_rank", tokens * parts.kv_rank)
        self.shared_rope = Size("tokens x rope_dim", tokens * parts.rope_dim)
        self.compressed = Size("tokens x (kv_rank + rope_dim)", tokens * (parts.kv_rank + parts.rope_dim))
        self.expanded = Size("tokens x heads x (nope_dim + value_dim)", self.nope.elements + self.values.elements)


def latent_attention(step: MicroStep, inner: SizedTensor, parts: LatentAttention) -> SizedTensor:
    """Replay latent attention with its projections; input and output are of tokens x hidden."""
    sizes = _Sizes(step, parts)
    plain = _queries(step, inner, parts, sizes)
    unturned, to_turn = step.split(plain, [sizes.nope, sizes.rope])
    compressed = linear(step, "kv_a_proj_with_mqa", inner, sizes.compressed)
    narrow, shared = step.split(compressed, [sizes.kv_rank, sizes.shared_rope])
    latent = norm(step, "kv norm", narrow)
    turned, shared_turned = rotate(step, "query part", to_turn), rotate(step, "key part", shared)
    query = step.join("query", [unturned, turned], step.queries)
    expanded = linear(step, "kv_b_proj", latent, sizes.expanded)
    key_part, value = step.split(expanded, [sizes.nope, sizes.values])
    key = _keys(step, key_part, shared_turned, sizes)
    step.free(plain, unturned, to_turn, narrow, shared, turned, expanded, key_part)

    out = _attend(step, query, key, value, sizes)
    output = linear(step, "o_proj", out, step.hidden)
    step.free(compressed, latent, shared_turned, query, key, value, out)
    return output


def _queries(step: MicroStep, inner: SizedTensor, parts: LatentAttention, sizes: _Sizes) -> SizedTensor:
    if parts.query_rank is None:
        return linear(step, "q_proj", inner, step.queries)
    narrow = linear(step, "q_a_proj", inner, sizes.query_rank)
    normal = norm(step, "query norm", narrow)
    step.free(narrow)
    query = linear(step, "q_b_proj", normal, step.queries)
    step.free(normal)
    return query


def _keys(step: MicroStep, part: SizedTensor, shared: SizedTensor, sizes: _Sizes) -> SizedTensor:
    """Write both parts of the keys, that with positions for all heads alike, into one new tensor."""
    empty = step.new("key", step.queries, part.width, False)
    first = step.write(empty, part, "keys")
    repeated = SizedTensor(sizes.rope, step.memory.keep(shared.allocation), shared.needs_grad)

    def backward(gradient: Allocation) -> Gradients:
        return [(shared, step.memory.allocate("gradient of shared key part", shared.size, shared.width))]

    step.graph.record(repeated, [], backward)
    key = step.write(first, repeated, "keys")
    step.free(repeated)
    return key


def _attend(step: MicroStep, query: SizedTensor, key: SizedTensor, value: SizedTensor, sizes: _Sizes) -> SizedTensor:
    if step.options.head != "score" or step.options.attention != "varlen":
        plain = attend(step, query, key, value)
        out = step.copy("attention output in order", plain)
        step.free(plain)
        return out
    filled = step.new("value, filled up", step.queries, value.width, value.needs_grad)

    def backward(gradient: Allocation) -> Gradients:
        return [(value, step.memory.allocate("gradient of value before filling", value.size, value.width))]

    step.graph.record(filled, [], backward)
    # The kernel wants tokens before heads, but joined and filled tensors have heads first.
    ordered = [step.copy(f"{name} in order", t) for name, t in (("query", query), ("key", key), ("value", filled))]
    step.free(filled)
    whole = attend(step, *ordered)
    cut = step.slice(whole, sizes.values)
    out = step.copy("attention output in order", cut)
    step.free(*ordered, whole, cut)
    return out

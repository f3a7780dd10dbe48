"""A gated delta net: projections, a short convolution, the delta rule in chunks of tokens, and a gated norm.

The replay is of the torch code in transformers (modeling_qwen3_5.py, `torch_chunk_gated_delta_rule`), which runs where
flash-linear-attention is not installed; its kernels keep less. All of the rule is computed in fp32.
"""

from __future__ import annotations

from rm_scale.planning.activations.linear import linear
from rm_scale.planning.activations.micro_step import MicroStep
from rm_scale.planning.activations.norms import gated_norm
from rm_scale.planning.activations.simulated_autograd import Allocation, Gradients, Size, SizedTensor
from rm_scale.planning.layer_parts import DeltaNet

CHUNK = 64
"""Tokens after which the rule passes on its state."""


class _Sizes:
    """Sizes of the rule's tensors: of all tokens, of the same filled up to whole chunks, and of one chunk.

    The state of a chunk is of key_dim x value_dim per head and sequence.
    """

    def __init__(self, step: MicroStep, parts: DeltaNet) -> None:
        tokens, heads = step.row.tokens, parts.num_value_heads
        sequences = max(1, step.row.responses)
        self.num_chunks = max(1, -(-tokens // (sequences * CHUNK)))
        padded, chunk = sequences * self.num_chunks * CHUNK, sequences * CHUNK
        self.mixed = Size("tokens x (2 delta keys + delta values)", tokens * (2 * parts.key_size + parts.value_size))
        self.keys = Size("tokens x delta keys", tokens * parts.key_size)
        self.values = Size("tokens x delta values", tokens * parts.value_size)
        self.heads = Size("tokens x delta heads", tokens * heads)
        self.repeated = Size("tokens x delta heads x key_dim", tokens * heads * parts.key_dim)
        convolved = (tokens + sequences * (parts.kernel - 1)) * (2 * parts.key_size + parts.value_size)
        self.convolved = Size("(tokens + kernel - 1) x (2 delta keys + delta values)", convolved)
        self.all_keys = Size("chunked tokens x delta heads x key_dim", padded * heads * parts.key_dim)
        self.all_values = Size("chunked tokens x delta values", padded * parts.value_size)
        self.all_heads = Size("chunked tokens x delta heads", padded * heads)
        self.all_pairs = Size(f"chunked tokens x delta heads x {CHUNK}", padded * heads * CHUNK)
        self.chunk_keys = Size("chunk x delta heads x key_dim", chunk * heads * parts.key_dim)
        self.chunk_values = Size("chunk x delta values", chunk * parts.value_size)
        self.chunk_pairs = Size(f"chunk x delta heads x {CHUNK}", chunk * heads * CHUNK)
        self.state = Size("sequences x delta values x key_dim", sequences * parts.value_size * parts.key_dim)


def delta_net(step: MicroStep, inner: SizedTensor, parts: DeltaNet) -> SizedTensor:
    """Replay a gated delta net; input and output are of tokens x hidden."""
    sizes = _Sizes(step, parts)
    mixed, gate, for_strength, for_decay = (_fused if parts.fused else _apart)(step, inner, sizes, parts)
    convolved = _convolution(step, mixed, sizes)
    step.free(mixed)
    query, key, value = step.split(convolved, [sizes.keys, sizes.keys, sizes.values])
    strength = step.apply("delta strength", for_strength, saves_output=True)
    decay = _decay(step, for_decay)
    result = _rule(step, sizes, query, key, value, strength, decay)
    normal = gated_norm(step, "delta norm", result, gate, sizes.heads)
    step.free(result)
    output = linear(step, "out_proj", normal, step.hidden)
    step.free(convolved, query, key, value, strength, decay, gate, for_strength, for_decay, normal)
    return output


def _apart(step: MicroStep, inner: SizedTensor, sizes: _Sizes, parts: DeltaNet) -> tuple[SizedTensor, ...]:
    """Return queries, keys and values in one, the output's gate, and what strength and decay come from (Qwen3.5)."""
    mixed = linear(step, "in_proj_qkv", inner, sizes.mixed)
    return mixed, *(
        linear(step, name, inner, size)
        for name, size in (("in_proj_z", sizes.values), ("in_proj_b", sizes.heads), ("in_proj_a", sizes.heads))
    )


def _fused(step: MicroStep, inner: SizedTensor, sizes: _Sizes, parts: DeltaNet) -> tuple[SizedTensor, ...]:
    """Return the same from two projections, whose parts lie head by head and have to be copied (Qwen3-Next)."""
    width = sizes.mixed.elements + sizes.values.elements
    both = linear(step, "in_proj_qkvz", inner, Size("tokens x 2 (delta keys + delta values)", width))
    gates = linear(step, "in_proj_ba", inner, Size("tokens x 2 delta heads", 2 * sizes.heads.elements))
    views = step.split(both, [sizes.keys, sizes.keys, sizes.values, sizes.values])
    query, key, value, gate = (step.copy("delta part", view) for view in views)
    thin = step.split(gates, [sizes.heads, sizes.heads])
    for_strength, for_decay = (step.copy("delta gate", view) for view in thin)
    mixed = step.join("delta parts, joined", [query, key, value], sizes.mixed)
    step.free(both, gates, *views, *thin, query, key, value)
    return mixed, gate, for_strength, for_decay


def _convolution(step: MicroStep, mixed: SizedTensor, sizes: _Sizes) -> SizedTensor:
    """Replay a convolution along the tokens, which is longer than they are, and SiLU."""
    trains = mixed.needs_grad or step.is_full
    longer = step.new("convolution", sizes.convolved, mixed.width, trains)

    def backward(gradient: Allocation) -> Gradients:
        return [(mixed, step.memory.allocate("gradient of convolution input", sizes.mixed, mixed.width))]

    step.graph.record(longer, [mixed.allocation], backward)
    convolved = step.slice(longer, sizes.mixed)
    activated = step.apply("activated convolution", convolved, saves_output=False)
    step.free(longer, convolved)
    return activated


def _decay(step: MicroStep, value: SizedTensor) -> SizedTensor:
    """Replay `-exp(A) softplus(a + bias)`, a number per head and token in fp32."""
    wide = step.cast("delta decay, fp32", value, 4)
    shifted = step.multiply_by_constant("delta decay + bias", wide, 4)
    softplus = step.apply("softplus of delta decay", shifted, saves_output=False)
    decay = step.multiply_by_constant("delta decay", softplus, 4)
    if step.is_full and step.graph.is_recording:  # for the gradient of A
        step.graph.nodes[-1].saved.append(step.memory.keep(softplus.allocation))
    step.free(wide, shifted, softplus)
    return decay


# --- The delta rule ---------------------------------------------------------------------------------------------------


def _rule(
    step: MicroStep,
    sizes: _Sizes,
    query: SizedTensor,
    key: SizedTensor,
    value: SizedTensor,
    strength: SizedTensor,
    decay: SizedTensor,
) -> SizedTensor:
    """Replay `torch_chunk_gated_delta_rule`."""
    width = query.width
    queries, keys, values = _wide(step, sizes, query, key, value)
    strengths = _to_chunks(step, "delta strength", step.cast("delta strength, fp32", strength, 4), sizes.all_heads)
    decays = _to_chunks(step, "delta decay", step.hold(decay), sizes.all_heads)
    strong_values = step.multiply_rows("values x strength", values, strengths)
    strong_keys = step.multiply_rows("keys x strength", keys, strengths)
    step.free(values, strengths)
    summed = step.multiply_by_constant("delta decay, summed", decays, 4)
    step.free(decays)
    in_order = [step.reorder(strong_values), step.reorder(strong_keys)]

    pairwise = _pairwise(step, sizes, summed)
    system = _decayed_products(step, "delta system", in_order[1], keys, pairwise, sizes)
    within = _decayed_products(step, "attention in chunks", queries, keys, pairwise, sizes)
    step.free(pairwise)
    decayed_keys = _times_decay(step, "keys x strength x decay", in_order[1], summed)
    new_values = _solve(step, "new values", system, in_order[0])
    read_keys = _solve(step, "keys that read the state", system, decayed_keys)
    step.free(system)

    late_queries = _times_decay(step, "queries x decay", queries, summed)
    is_read = sizes.num_chunks > 1  # or the keys would write into a state that nobody reads
    late_keys = _times_decay(step, "keys x decay", keys, summed) if is_read else step.hold(keys)
    step.free(queries, keys)
    result = _scan(step, sizes, new_values, read_keys, late_queries, within, late_keys)
    step.free(strong_values, strong_keys, *in_order, summed, within, decayed_keys, new_values, read_keys)
    step.free(late_queries, late_keys)
    return _narrow(step, sizes, result, width)


def _wide(
    step: MicroStep, sizes: _Sizes, query: SizedTensor, key: SizedTensor, value: SizedTensor
) -> tuple[SizedTensor, SizedTensor, SizedTensor]:
    """Return queries and keys, repeated for all heads, normalised and in chunks, and values, in fp32."""
    wide = []
    for name, one in (("query", query), ("key", key)):
        repeated = step.hold(one)
        if sizes.repeated.elements != sizes.keys.elements:
            step.free(repeated)
            repeated = step.gather(f"delta {name}, heads repeated", one, sizes.repeated)
        wide.append(step.cast(f"delta {name}, fp32", repeated, 4))
        step.free(repeated)
    values = step.cast("delta value, fp32", step.reorder(value), 4)
    step.memory.release(value.allocation)
    normal = [_unit_length(step, f"delta {name}", one, sizes) for name, one in zip(("query", "key"), wide, strict=True)]
    step.free(*wide)
    scaled = step.scale("delta query, scaled", normal[0])
    step.free(normal[0])
    queries = _to_chunks(step, "delta queries", scaled, sizes.all_keys)
    return (
        queries,
        _to_chunks(step, "delta keys", normal[1], sizes.all_keys),
        _to_chunks(step, "delta values", values, sizes.all_values),
    )


def _unit_length(step: MicroStep, name: str, value: SizedTensor, sizes: _Sizes) -> SizedTensor:
    """Replay `x * rsqrt(sum(x * x) + eps)`; both factors of the square are x, which gets a gradient from each."""
    square = step.new(f"{name} square", value.size, 4, value.needs_grad)

    def backward_of_square(gradient: Allocation) -> Gradients:
        return [(value, step.memory.allocate(f"gradient of {name} square", value.size, 4)) for _ in range(2)]

    step.graph.record(square, [value.allocation], backward_of_square)
    total = step.new(f"{name} length", sizes.heads, 4, value.needs_grad)
    step.graph.record(total, [], lambda gradient: [(square, step.memory.keep(gradient))])
    step.free(square)
    inverse = step.apply(f"{name} inverse length", total, saves_output=True)
    unit = step.multiply_rows(f"{name} of length 1", value, inverse)
    step.free(total, inverse)
    return unit


def _to_chunks(step: MicroStep, name: str, value: SizedTensor, size: Size) -> SizedTensor:
    """Fill up to whole chunks, which makes a copy even where there is nothing to fill; frees what it is given."""
    filled = step.new(f"{name} in chunks", size, value.width, value.needs_grad)

    def backward(gradient: Allocation) -> Gradients:
        return [(value, step.memory.allocate(f"gradient of {name} before chunks", value.size, value.width))]

    step.graph.record(filled, [], backward)
    step.free(value)
    return filled


def _pairwise(step: MicroStep, sizes: _Sizes, summed: SizedTensor) -> SizedTensor:
    """Replay `exp(sum_i - sum_j)` for all pairs of tokens in a chunk, with those ahead masked out."""
    difference = step.new("differences of decay", sizes.all_pairs, 4, summed.needs_grad)

    def backward(gradient: Allocation) -> Gradients:
        negative = step.memory.allocate("negative gradient of differences", sizes.all_pairs, 4)
        parts = [(summed, step.memory.allocate("gradient of summed decay", summed.size, 4)) for _ in range(2)]
        step.memory.release(negative)
        return list(parts)

    step.graph.record(difference, [], backward)
    masked = step.scale("differences of decay, masked", difference)
    step.free(difference)
    pairwise = step.apply("decay between tokens", masked, saves_output=True)
    step.free(masked)
    return pairwise


def _decayed_products(
    step: MicroStep, name: str, one: SizedTensor, other: SizedTensor, pairwise: SizedTensor, sizes: _Sizes
) -> SizedTensor:
    products = _matmul(step, f"{name} before decay", one, other, sizes.all_pairs)
    decayed = step.multiply(name, products, pairwise)
    step.free(products)
    return decayed


def _times_decay(step: MicroStep, name: str, value: SizedTensor, summed: SizedTensor) -> SizedTensor:
    factors = step.apply(f"decay of {name}", summed, saves_output=True)
    product = step.multiply_rows(name, value, factors)
    step.free(factors)
    return product


def _solve(step: MicroStep, name: str, system: SizedTensor, right: SizedTensor) -> SizedTensor:
    """Replay the solution of a triangular system, which saves the system and its result."""
    result = step.new(name, right.size, 4, system.needs_grad or right.needs_grad)

    def backward(gradient: Allocation) -> Gradients:
        of_right = step.memory.allocate(f"gradient of right side of {name}", right.size, 4)
        for_system = [step.memory.allocate("gradient of delta system", system.size, 4) for _ in range(2)]
        step.memory.release(for_system[0])
        return [(system, for_system[1]), (right, of_right)]

    return step.graph.record(result, [system.allocation, result.allocation], backward)


def _narrow(step: MicroStep, sizes: _Sizes, result: SizedTensor, width: int) -> SizedTensor:
    """Bring the result into the order of tokens and the type of the layer; frees what it is given."""
    ordered = step.copy("delta result in order", result)
    step.free(result)
    cut = SizedTensor(sizes.values, step.memory.keep(ordered.allocation), ordered.needs_grad)
    step.graph.record(cut, [], lambda gradient: [(ordered, step.memory.keep(gradient))])
    step.free(ordered)
    narrow = step.cast("delta result", cut, width) if width != 4 else step.copy("delta result", cut)
    step.free(cut)
    return narrow


# --- Chunk after chunk ------------------------------------------------------------------------------------------------


def _scan(
    step: MicroStep,
    sizes: _Sizes,
    new_values: SizedTensor,
    read_keys: SizedTensor,
    queries: SizedTensor,
    within: SizedTensor,
    keys: SizedTensor,
) -> SizedTensor:
    """Replay the loop over chunks, which saves each chunk's state and new values.

    All chunks but the last two are replayed at once: they save as much as they are, and their temporaries are those of
    one chunk.
    """
    state = step.new("delta state", sizes.state, 4, False)
    result = step.new("delta result in chunks", new_values.size, 4, False)
    rest = sizes.num_chunks
    while rest:
        count = max(1, rest - 2)
        rest -= count
        read = _read_state(step, "keys", read_keys, state, sizes, count)
        part = step.slice(new_values, sizes.chunk_values)
        values = _sum(step, "new values of a chunk", part, read, sizes.chunk_values, count)
        step.free(read, part)
        between = _read_state(step, "queries", queries, state, sizes, count)
        part = step.slice(within, sizes.chunk_pairs)
        inside = _matmul(step, "attention in a chunk", part, values, sizes.chunk_values, count)
        both = step.add("result of a chunk", between, inside, sizes.chunk_values)
        result = step.write(result, both, "delta result in chunks")
        step.free(part, between, inside, both)
        if rest:  # nothing reads the last state
            state = _next_state(step, sizes, state, keys, values, count)
        step.free(values)
    step.free(state)
    return result


def _read_state(
    step: MicroStep, name: str, tensor: SizedTensor, state: SizedTensor, sizes: _Sizes, count: int
) -> SizedTensor:
    part = step.slice(tensor, sizes.chunk_keys)
    read = _matmul(step, f"delta state read by {name}", part, state, sizes.chunk_values, count)
    step.free(part)
    return read


def _next_state(
    step: MicroStep, sizes: _Sizes, state: SizedTensor, keys: SizedTensor, values: SizedTensor, count: int
) -> SizedTensor:
    """Return the state after a chunk, and free the one before."""
    kept = step.scale("delta state, decayed", state)
    if step.graph.is_recording and kept.needs_grad:  # for the gradient of the decay
        step.graph.nodes[-1].saved.append(step.memory.keep(state.allocation))
    part = step.slice(keys, sizes.chunk_keys)
    update = _matmul(step, "update of delta state", part, values, sizes.state, count)
    after = _sum(step, "delta state", kept, update, sizes.state, count)
    step.free(part, kept, update, state)
    return after


def _sum(step: MicroStep, name: str, one: SizedTensor, other: SizedTensor, size: Size, count: int) -> SizedTensor:
    """Add two tensors; of as many chunks as are replayed at once all sums are kept."""
    memory = step.memory.allocate(f"{name} ({count})" if count > 1 else name, _times(size, count), 4)
    total = SizedTensor(size, memory, one.needs_grad or other.needs_grad)

    def backward(gradient: Allocation) -> Gradients:
        return [(value, step.memory.keep(gradient)) for value in (one, other) if value.needs_grad]

    return step.graph.record(total, [], backward)


def _times(size: Size, count: int) -> Size:
    return size if count == 1 else Size(f"{count} x {size.formula}", count * size.elements)


def _matmul(
    step: MicroStep, name: str, one: SizedTensor, other: SizedTensor, size: Size, count: int = 1
) -> SizedTensor:
    """Multiply two tensors of the rule as matrices, which autocast does in the lower precision.

    Of `count` chunks that are replayed at once all factors in the lower precision are kept.
    """
    width = step.product_width if step.options.precision == "amp" else 4
    factors = [_cast(step, f"{name} input", value, width, count) for value in (one, other)]
    needs_grad = one.needs_grad or other.needs_grad
    product = step.new(name, size, width, needs_grad)
    saved = [value.allocation for value, factor in zip(factors, reversed(factors), strict=True) if factor.needs_grad]

    def backward(gradient: Allocation) -> Gradients:
        return [
            (value, step.memory.allocate(f"gradient of input of {name}", value.size, width))
            for value in factors
            if value.needs_grad
        ]

    step.graph.record(product, saved, backward)
    step.free(*factors)
    return product


def _cast(step: MicroStep, name: str, value: SizedTensor, width: int, count: int) -> SizedTensor:
    if value.width == width:
        return step.hold(value)
    name = f"{name} ({count})" if count > 1 else name
    cast = SizedTensor(value.size, step.memory.allocate(name, _times(value.size, count), width), value.needs_grad)

    def backward(gradient: Allocation) -> Gradients:
        return [(value, step.memory.allocate("gradient in another type", value.size, value.width))]

    return step.graph.record(cast, [], backward)

"""A mixture of experts: router, tokens sorted by expert, two grouped products, results put back in order.

The replay is of transformers' `grouped_mm` (integrations/moe.py), which is what its models take by default.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rm_scale.planning.activations.linear import linear
from rm_scale.planning.activations.micro_step import MicroStep
from rm_scale.planning.activations.mlp import gated
from rm_scale.planning.activations.simulated_autograd import Allocation, Gradients, Size, SizedTensor
from rm_scale.planning.layer_parts import Experts

INDEX_BYTES = 8
_FP32_ROUTERS = frozenset(["deepseek_v2", "deepseek_v3"])
"""Types whose routers cast their input and weight to fp32."""
_FP32_WEIGHTS = _FP32_ROUTERS | {"mixtral"}
"""Types whose experts' weights stay in fp32, and with them the weighted results."""


def adapted_in_layer(parameters: Sequence[str], place: int) -> tuple[str, ...]:
    """Return which tensors of a layer's experts have adapters, by their short names.

    Args:
        parameters: as `expert_settings.adapted_parameters` gives them: short names stand for all layers, full ones for
            the layer whose number they hold.
        place: the layer's number.
    """
    here = [name for name in parameters if name.startswith("experts.") or str(place) in name.split(".")]
    return tuple(f"experts.{name.rpartition('.')[2]}" for name in here)


def experts(step: MicroStep, inner: SizedTensor, parts: Experts, adapted: Collection[str]) -> SizedTensor:
    """Replay the experts of a layer; input and output are of tokens x hidden.

    Args:
        step: the micro-step.
        inner: the experts' input.
        parts: their sizes.
        adapted: tensors that have adapters, such as "experts.down_proj".
    """
    # With a gate of its own the shared expert comes first, else last (modeling_qwen2_moe.py, modeling_deepseek_v3.py).
    shared = _shared(step, inner, parts) if parts.shared_gate else None
    weights = _route(step, inner, parts)
    output = _through_experts(step, inner, weights, parts, adapted)
    step.free(weights)
    if not parts.shared_width:
        return output
    shared = _weigh_shared(step, inner, shared) if shared is not None else _shared(step, inner, parts)
    total = step.add("experts and shared expert", output, shared, step.hidden)
    step.free(output, shared)
    return total


def _shared(step: MicroStep, inner: SizedTensor, parts: Experts) -> SizedTensor:
    return gated(step, inner, Size("tokens x shared", step.row.tokens * parts.shared_width))


def _weigh_shared(step: MicroStep, inner: SizedTensor, shared: SizedTensor) -> SizedTensor:
    """Multiply the shared expert's output with the sigmoid of its gate; frees the output."""
    gate = linear(step, "shared_expert_gate", inner, Size("tokens", step.row.tokens))
    opened = step.apply("sigmoid of shared expert's gate", gate, saves_output=True)
    weighed = step.multiply_rows("shared expert x gate", shared, opened)
    step.free(shared, gate, opened)
    return weighed


def _route(step: MicroStep, inner: SizedTensor, parts: Experts) -> SizedTensor:
    """Replay the router: logits, fp32 probabilities, and the weights of the chosen experts."""
    every = Size("tokens x experts", step.row.tokens * parts.num)
    matrix = Size("experts x hidden", parts.num * step.shape.hidden_size)
    width = 4 if step.shape.model_type in _FP32_ROUTERS else step.product_width
    inputs = step.cast("router input, fp32" if width == 4 else "router input", inner, width)
    logits = step.new("router logits", every, width, True)

    def backward_of_logits(gradient: Allocation) -> Gradients:
        results: Gradients = [(inputs, step.memory.allocate("gradient of router input", inner.size, width))]
        if step.is_full:
            results.append((None, step.memory.allocate("gradient of router", matrix, width)))
        return results

    step.graph.record(logits, [inputs.allocation] if step.is_full else [], backward_of_logits)
    step.free(inputs)
    wide = step.cast("router logits, fp32", logits, 4)
    shares = step.new("router probabilities", every, 4, True)

    def backward_of_softmax(gradient: Allocation) -> Gradients:
        return [(wide, step.memory.allocate("gradient of router logits", every, 4))]

    step.graph.record(shares, [shares.allocation], backward_of_softmax)
    step.free(logits, wide)
    chosen = Size("tokens x chosen", step.row.tokens * parts.chosen)
    best = step.gather("weights of chosen experts", shares, chosen)
    indices = step.memory.allocate("chosen experts", chosen, INDEX_BYTES)
    step.graph.nodes[-1].saved.append(step.memory.keep(indices)) if _is_recorded(step, best) else None
    step.memory.release(indices)
    step.free(shares)
    narrow_width = 4 if step.shape.model_type in _FP32_WEIGHTS else step.product_width
    narrow = step.cast("weights of chosen experts, narrow", best, narrow_width)
    step.free(best)
    return narrow


def _is_recorded(step: MicroStep, value: SizedTensor) -> bool:
    return step.graph.is_recording and value.needs_grad


def _through_experts(
    step: MicroStep, inner: SizedTensor, weights: SizedTensor, parts: Experts, adapted: Collection[str]
) -> SizedTensor:
    routed = step.row.tokens * parts.chosen
    hidden = Size("tokens x chosen x hidden", routed * step.shape.hidden_size)
    both = Size("tokens x chosen x 2 expert", 2 * routed * parts.width)
    width = Size("tokens x chosen x expert", routed * parts.width)
    order = Size("tokens x chosen", routed)
    kept = [step.memory.allocate("order of tokens", order, INDEX_BYTES) for _ in range(3)]

    selected = _gather_by(step, "tokens by expert", inner, hidden, kept[0])
    chosen_weights = step.gather("weights by expert", weights, order)
    all_first = Size("experts x 2 expert x hidden", parts.num * 2 * parts.width * step.shape.hidden_size)
    all_second = Size("experts x expert x hidden", parts.num * parts.width * step.shape.hidden_size)
    first_adapted, second_adapted = "experts.gate_up_proj" in adapted, "experts.down_proj" in adapted
    merged_first = _with_adapters(step, "experts.gate_up_proj", all_first, parts) if first_adapted else None
    first = _grouped(step, "experts' gate and up", selected, both, all_first, merged_first)
    biases = step.memory.allocate("experts' biases by token", both if parts.biases else Size("none", 0), first.width)
    product = _clamped_gate(step, first, width) if parts.biases else _gate(step, first, width)
    step.free(first)
    step.memory.release(biases)
    merged_second = _with_adapters(step, "experts.down_proj", all_second, parts) if second_adapted else None
    second = _grouped(step, "experts' down", product, hidden, all_second, merged_second)
    biases = step.memory.allocate("experts' biases by token", hidden if parts.biases else Size("none", 0), first.width)
    step.free(product)
    weighted = step.multiply_rows("experts' weighted results", second, chosen_weights)
    ordered = _gather_by(step, "experts' results in order", weighted, hidden, kept[1])
    step.free(weighted)
    summed = _sum_over_chosen(step, ordered, hidden)
    output = step.cast("experts' sum, narrow", summed, inner.width)
    step.free(summed, ordered, selected, second, chosen_weights)
    step.free(*(merged for merged in (merged_first, merged_second) if merged is not None))
    step.memory.release(*kept, biases)
    return output


def _gather_by(step: MicroStep, name: str, value: SizedTensor, size: Size, index: Allocation) -> SizedTensor:
    gathered = step.gather(name, value, size)
    if _is_recorded(step, gathered):
        step.graph.nodes[-1].saved.append(step.memory.keep(index))
    return gathered


def _with_adapters(step: MicroStep, tensor: str, weight: Size, parts: Experts) -> SizedTensor:
    """Add the adapters of a layer's experts to a copy of their tensor, as PEFT does.

    PEFT keeps the copy while the experts run, and autograd keeps it for the gradient of their input.
    """
    width, formula = (2 * parts.width, "2 expert") if "gate" in tensor else (parts.width, "expert")
    num_factors = parts.num * step.options.lora_rank * (step.shape.hidden_size + width)
    factors = Size(f"experts x rank x (hidden + {formula})", num_factors)
    merged = step.new(f"{tensor} with adapters", weight, step.base_width, True)

    def backward(gradient: Allocation) -> Gradients:
        return [(None, step.memory.allocate("gradients of experts' adapters", factors, step.base_width))]

    return step.graph.record(merged, [], backward)


def _grouped(
    step: MicroStep, name: str, value: SizedTensor, size: Size, weight: Size, merged: SizedTensor | None
) -> SizedTensor:
    """Multiply each expert's tokens with its matrix; the gradient of a layer's experts is one tensor.

    Args:
        step: the micro-step.
        name: of the product.
        value: the tokens, sorted by expert.
        size: of the result.
        weight: of all experts' matrices.
        merged: these with their adapters, where they have some.
    """
    is_trained = step.is_full or merged is not None
    output = step.new(name, size, step.product_width, value.needs_grad or is_trained)
    saved = [value.allocation] if is_trained else []
    saved += [merged.allocation] if merged is not None else []

    def backward(gradient: Allocation) -> Gradients:
        results: Gradients = []
        if value.needs_grad:
            results.append((value, step.memory.allocate(f"gradient of input of {name}", value.size, value.width)))
        if is_trained:
            results.append((merged, step.memory.allocate(f"gradient of all {name}", weight, step.product_width)))
        return results

    return step.graph.record(output, saved, backward)


def _gate(step: MicroStep, value: SizedTensor, size: Size) -> SizedTensor:
    """Replay `act(gate) * up` on halves of one tensor."""
    gate, up = step.split(value, [size, size])
    activated = step.apply("activation of experts", gate, saves_output=False)
    product = step.multiply("experts' gate x up", activated, up)
    step.free(gate, up, activated)
    return product


def _clamped_gate(step: MicroStep, value: SizedTensor, size: Size) -> SizedTensor:
    """Replay GPT-OSS's `(clamp(up) + 1) * gate * sigmoid(alpha gate)`, where gate and up are every other column."""
    gate, up = step.slice(value, size), step.slice(value, size)
    low = step.apply("experts' gate, clamped", gate, saves_output=False)
    clamped = step.apply("experts' up, clamped", up, saves_output=False)
    scaled = step.scale("experts' gate, scaled", low)
    opened = step.apply("sigmoid of experts' gate", scaled, saves_output=True)
    step.free(gate, up, scaled)
    activated = step.multiply("activation of experts", low, opened)
    step.free(opened)
    raised = step.copy("experts' up + 1", clamped)
    product = step.multiply("experts' gate x up", raised, activated)
    step.free(low, clamped, activated, raised)
    return product


def _sum_over_chosen(step: MicroStep, value: SizedTensor, size: Size) -> SizedTensor:
    output = step.new("experts' sum", step.hidden, value.width, value.needs_grad)

    def backward(gradient: Allocation) -> Gradients:
        return [(value, step.memory.allocate("gradient of experts' sum, repeated", size, value.width))]

    return step.graph.record(output, [], backward)

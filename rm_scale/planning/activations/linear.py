"""Linear layers: plain, under autocast, with 4-bit weights, and with LoRA adapters beside them."""

from __future__ import annotations

from rm_scale.planning.activations.micro_step import MicroStep
from rm_scale.planning.activations.simulated_autograd import Allocation, Gradients, Size, SizedTensor
from rm_scale.planning.parameters import names_module


def linear(step: MicroStep, name: str, value: SizedTensor, size: Size, is_last: bool = False) -> SizedTensor:
    """Replay a linear layer, with its adapter if it has one.

    Args:
        step: the micro-step.
        name: the layer's name, such as "q_proj".
        value: its input.
        size: its output's size.
        is_last: recomputation stops before its last product.
    """
    if is_adapted(step, name):
        return _with_adapter(step, name, value, size, is_last)
    return product(step, name, value, size, is_last)


def is_adapted(step: MicroStep, name: str) -> bool:
    """Tell whether the linear layer of this name has an adapter."""
    targets = step.options.lora_targets
    if step.is_full:
        return False
    return names_module(targets, name) if targets is not None else name not in step.not_adapted


def product(
    step: MicroStep, name: str, value: SizedTensor, size: Size, is_last: bool = False, is_head: bool = False
) -> SizedTensor:
    """Multiply with a weight of the model; autocast first casts input and weight to the lower precision.

    Args:
        step: the micro-step.
        name: the layer's name.
        value: its input.
        size: its output's size.
        is_last: recomputation stops before it.
        is_head: the weight is a head's, which is never quantised.
    """
    width, weight = step.product_width, _weight_size(step, value, size)
    quantised = step.options.method == "qlora" and not is_head
    inputs = step.cast(f"{name} input", value, width)
    copy = _autocast_copy(step, f"{name} weight", weight, step.base_width, step.is_full)
    if quantised and not step.options.as_tracked:  # inside bitsandbytes' operator gemm_4bit
        step.memory.release(step.memory.allocate("dequantised weight", weight, width))
    output = step.new(name, step.unless_stopped(size, is_last), width, inputs.needs_grad or step.is_full)
    saved = [inputs.allocation] if step.is_full else []
    if copy is not None and inputs.needs_grad:
        saved.append(copy.allocation)

    def backward(gradient: Allocation) -> Gradients:
        results: Gradients = []
        if inputs.needs_grad:
            whole = [step.memory.allocate("dequantised weight", weight, width)] if quantised else []
            results.append((inputs, step.memory.allocate(f"gradient of {name} input", inputs.size, width)))
            step.memory.release(*whole)
        if step.is_full:
            results.append((copy, step.memory.allocate(f"gradient of {name} weight", weight, width)))
        return results

    step.graph.record(output, saved, backward)
    step.free(inputs)
    return output


def _weight_size(step: MicroStep, value: SizedTensor, size: Size) -> Size:
    """Return the size of the matrix that leads from an input to an output of these sizes."""
    formulas = (of.formula.removeprefix("tokens x ").replace(" x tokens", "") for of in (value.size, size))
    return Size(" x ".join(formulas), value.size.elements * size.elements // step.row.tokens**2)


def _autocast_copy(step: MicroStep, name: str, weight: Size, width: int, is_trained: bool) -> SizedTensor | None:
    """Return autocast's copy of an fp32 weight, which it keeps until its context ends; `None` where none is needed."""
    if width == step.product_width:
        return None
    copy = step.new(f"autocast copy of {name}", weight, step.product_width, is_trained)

    def backward(gradient: Allocation) -> Gradients:
        return [(None, step.memory.allocate(f"gradient of {name}", weight, width))]

    step.weight_copies.append(step.graph.record(copy, [], backward))
    return copy


def leave_autocast(step: MicroStep) -> None:
    """End autocast's context, which drops its copies of weights."""
    step.free(*step.weight_copies)
    step.weight_copies = []


# --- Adapters ---------------------------------------------------------------------------------------------------------


def _with_adapter(step: MicroStep, name: str, value: SizedTensor, size: Size, is_last: bool) -> SizedTensor:
    """Replay a frozen linear layer with LoRA beside it: base + scaling * B(A(dropout(x)))."""
    base = product(step, name, value, size)
    if step.options.method == "qlora":
        base, plain = step.copy(name, base), base  # PEFT clones a 4-bit layer's result
        step.free(plain)
    inputs = _adapter_input(step, name, value)
    dropped = _dropout(step, inputs) if step.options.lora_dropout else step.hold(inputs)
    rank = Size("tokens x rank", step.row.tokens * step.options.lora_rank)
    low = _adapter_product(step, "adapter, low rank", dropped, rank)
    step.free(dropped)
    size = step.unless_stopped(size, is_last)
    high = _adapter_product(step, "adapter, high rank", low, size)
    scaled = step.scale("adapter, scaled", high)
    step.free(low, high)
    total = step.add(name, base, scaled, size)
    step.free(base, scaled, inputs)
    return total


def _adapter_input(step: MicroStep, name: str, value: SizedTensor) -> SizedTensor:
    """Cast to the adapter's type, as PEFT does under autocast too; beside 4-bit weights it leaves that to autocast."""
    if step.options.method == "qlora" and step.options.precision == "amp":
        return step.hold(value)
    return step.cast(f"{name} input for its adapter", value, step.adapter_width)


def _dropout(step: MicroStep, value: SizedTensor) -> SizedTensor:
    """Drop elements; CUDA's kernel (native_dropout) saves a mask of one byte per element."""
    output = step.new("adapter input after dropout", value.size, value.width, value.needs_grad)
    mask = step.memory.allocate("dropout mask", value.size, 1)

    def backward(gradient: Allocation) -> Gradients:
        return [(value, step.memory.allocate("gradient of dropout input", value.size, value.width))]

    step.graph.record(output, [mask], backward)
    step.memory.release(mask)
    return output


def _adapter_product(step: MicroStep, name: str, value: SizedTensor, size: Size) -> SizedTensor:
    width = step.product_width
    inputs, weight = step.cast("adapter input", value, width), _weight_size(step, value, size)
    copy = _autocast_copy(step, "adapter weight", weight, step.adapter_width, is_trained=True)
    output = step.new(name, size, width, True)

    def backward(gradient: Allocation) -> Gradients:
        of_input = step.memory.allocate("gradient of adapter input", inputs.size, width)
        return [(inputs, of_input), (copy, step.memory.allocate("gradient of adapter weight", weight, width))]

    saved = [inputs.allocation, *([copy.allocation] if copy is not None else [])]
    step.graph.record(output, saved, backward)
    step.free(inputs)
    return output

"""Norms: torch's LayerNorm, one kernel, and transformers' RMSNorm, written in Python operation by operation."""

from __future__ import annotations

from rm_scale.planning.activations.micro_step import MicroStep
from rm_scale.planning.activations.simulated_autograd import Allocation, Gradients, Size, SizedTensor

_WEIGH_IN_FP32 = ("gemma", "olmo2", "olmo3", "gpt_oss", "qwen3_next", "qwen3_5")


def norm(step: MicroStep, name: str, value: SizedTensor) -> SizedTensor:
    """Replay the model's kind of norm."""
    value = step.hold(value)
    output = _layer_norm(step, name, value) if step.shape.style.norm_bias else _rms_norm(step, name, value)
    step.free(value)
    return output


def _layer_norm(step: MicroStep, name: str, value: SizedTensor) -> SizedTensor:
    """Replay torch's own kernel, which saves its input, means and deviations. Autocast runs it in fp32."""
    inputs = step.cast(f"{name} fp32 input", value, 4 if step.options.precision == "amp" else value.width)
    output = step.new(name, inputs.size, inputs.width, inputs.needs_grad or step.is_full)
    statistics = step.memory.allocate(f"{name} statistics", Size("2 x tokens", 2 * step.row.tokens), 4)

    def backward(gradient: Allocation) -> Gradients:
        return [(inputs, step.memory.allocate(f"gradient of {name} input", inputs.size, inputs.width))]

    step.graph.record(output, [inputs.allocation, statistics], backward)
    step.memory.release(statistics)
    step.free(inputs)
    return output


def _rms_norm(step: MicroStep, name: str, value: SizedTensor) -> SizedTensor:
    """Replay `weight * (x * rsqrt(mean(x^2) + eps)).to(dtype)`, in fp32 up to the cast.

    The classes of Gemma, OLMo 2, GPT-OSS and Qwen3.5 multiply with the weight in fp32 too and cast afterwards.
    """
    weighs_wide = step.shape.model_type.startswith(_WEIGH_IN_FP32)
    inputs = step.cast(f"{name} fp32 input", value, 4)
    root = _inverse_root(step, name, inputs)
    normal = _times_root(step, f"{name} fp32 output", inputs, root)
    step.free(inputs, root)
    narrow = step.hold(normal) if weighs_wide else step.cast(f"{name} before weight", normal, value.width)
    output = _times_weight(step, name, narrow, 4 if weighs_wide else max(narrow.width, step.base_width))
    step.free(normal, narrow)
    if weighs_wide:
        wide, output = output, step.cast(name, output, value.width)
        step.free(wide)
    return output


def gated_norm(step: MicroStep, name: str, value: SizedTensor, gate: SizedTensor, groups: Size) -> SizedTensor:
    """Replay the norm of a delta net's heads (`groups`, as many as there are), times SiLU of a gate, in fp32."""
    inputs = step.cast(f"{name} fp32 input", value, 4)
    root = _inverse_root(step, name, inputs, groups)
    normal = _times_root(step, f"{name} fp32 output", inputs, root)
    step.free(root)
    narrow = step.cast(f"{name} before weight", normal, value.width)
    step.free(inputs, normal)
    weighed = _times_weight(step, f"{name} after weight", narrow, max(narrow.width, step.base_width))
    step.free(narrow)
    wide_gate = step.cast(f"{name} fp32 gate", gate, 4)
    activated = step.apply(f"{name} activated gate", wide_gate, saves_output=False)
    step.free(wide_gate)
    product = step.multiply(f"{name} x gate", weighed, activated)
    step.free(weighed, activated)
    output = step.cast(name, product, value.width)
    step.free(product)
    return output


def _inverse_root(step: MicroStep, name: str, inputs: SizedTensor, groups: Size | None = None) -> SizedTensor:
    """Replay `rsqrt(mean(x^2) + eps)`; backwards three temporaries: x^1, 2 x^1, and its product with the gradient."""
    square = step.new(f"{name} square", inputs.size, 4, inputs.needs_grad)

    def backward_of_power(gradient: Allocation) -> Gradients:
        temporaries = [step.memory.allocate(f"gradient of {name} square", inputs.size, 4) for _ in range(3)]
        step.memory.release(*temporaries[:2])
        return [(inputs, temporaries[2])]

    step.graph.record(square, [inputs.allocation], backward_of_power)
    root = step.new(f"{name} inverse root", groups or step.per_token, 4, inputs.needs_grad)

    def backward_of_mean(gradient: Allocation) -> Gradients:
        return [(square, step.memory.allocate(f"gradient of {name} square", inputs.size, 4))]

    step.graph.record(root, [root.allocation], backward_of_mean)
    step.free(square)
    return root


def _times_root(step: MicroStep, name: str, inputs: SizedTensor, root: SizedTensor) -> SizedTensor:
    output = step.new(name, inputs.size, 4, inputs.needs_grad)

    def backward(gradient: Allocation) -> Gradients:
        by_input, by_root = (step.memory.allocate(f"gradient of {name}", inputs.size, 4) for _ in range(2))
        summed = step.memory.allocate(f"gradient of {name}", root.size, 4)
        step.memory.release(by_root)
        return [(inputs, by_input), (root, summed)]

    return step.graph.record(output, [inputs.allocation, root.allocation], backward)


def _times_weight(step: MicroStep, name: str, inputs: SizedTensor, width: int) -> SizedTensor:
    """Multiply with the norm's weight; the input is saved for the weight's gradient, if it is trained."""
    output = step.new(name, inputs.size, width, inputs.needs_grad or step.is_full)

    def backward(gradient: Allocation) -> Gradients:
        results: Gradients = []
        if inputs.needs_grad:
            results.append((inputs, step.memory.allocate(f"gradient of {name} before weight", inputs.size, width)))
        if step.is_full:
            results.append((None, step.memory.allocate(f"gradient of {name} weight by token", inputs.size, width)))
        return results

    return step.graph.record(output, [inputs.allocation] if step.is_full else [], backward)

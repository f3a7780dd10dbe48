"""A layer's MLP: two matrices and an activation, or three with a gate."""

from __future__ import annotations

from rm_scale.planning.activations.linear import linear
from rm_scale.planning.activations.micro_step import MicroStep
from rm_scale.planning.activations.simulated_autograd import Size, SizedTensor


def mlp(step: MicroStep, inner: SizedTensor, is_last: bool) -> SizedTensor:
    """Replay the MLP.

    Args:
        step: the micro-step.
        inner: its input, of tokens x hidden.
        is_last: its last product ends the layer.
    """
    if not step.shape.style.gated_mlp:
        first = linear(step, "fc1", inner, step.mlp)
        product = step.apply("activation", first, saves_output=False)
        step.free(first)
        output = linear(step, "fc2", product, step.hidden, is_last)
        step.free(product)
        return output
    return gated(step, inner, step.mlp, is_last)


def gated(step: MicroStep, inner: SizedTensor, width: Size, is_last: bool = False) -> SizedTensor:
    """Replay an MLP of three matrices whose inner width is `width` over all tokens."""
    gate, up = _gate_and_up(step, inner, width)
    product = step.multiply("gate x up", gate, up)
    step.free(gate, up)
    output = linear(step, "down_proj", product, step.hidden, is_last)
    step.free(product)
    return output


def _gate_and_up(step: MicroStep, inner: SizedTensor, width: Size) -> tuple[SizedTensor, SizedTensor]:
    """Return the gate after its activation, and what it is multiplied with."""
    if step.shape.style.fused_mlp:
        fused = linear(step, "gate_up_proj", inner, Size(f"2 x {width.formula}", 2 * width.elements))
        gate, up = step.slice(fused, width), step.slice(fused, width)
        step.free(fused)
        activated = step.apply("activation", gate, saves_output=False)
        step.free(gate)
        return activated, up
    gate = linear(step, "gate_proj", inner, width)
    activated = step.apply("activation", gate, saves_output=False)
    step.free(gate)
    return activated, linear(step, "up_proj", inner, width)

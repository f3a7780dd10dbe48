"""Kernels that a layer launches, and the host's time for them: what a micro-step takes however few its tokens are.

Counted on the code that runs (transformers 5.23, PEFT 0.21, bitsandbytes 0.50) by a mode that sees each operation that
torch dispatches; views launch nothing. tests/unit/planning/test_launches.py counts them again.
"""

from __future__ import annotations

from dataclasses import dataclass

from rm_scale.planning.layer_parts import LayerKind
from rm_scale.planning.parameters import layer_tensors
from rm_scale.planning.scenario import Scenario
from rm_scale.planning.shape import ModelShape


@dataclass(frozen=True)
class Launches:
    """Kernels of one operation, or of several together.

    Attributes:
        forward: in the forward pass; once more where it is recomputed.
        backward: in the backward pass.
    """

    forward: float
    backward: float

    def times(self, factor: float) -> Launches:
        """Return the kernels of so many operations."""
        return Launches(self.forward * factor, self.backward * factor)


RMS_NORM = Launches(9, 16)
"""Python's operations in fp32, with casts from and to 16 bits."""

ONE_KERNEL = Launches(1, 1)

ROPE = Launches(10, 12)
"""Of queries and keys together: two products, two halves turned round, a sum each."""

LINEAR = Launches(1, 2)

FROZEN_LINEAR = Launches(1, 1)
"""No gradient of the weight."""

GATED = Launches(2, 4)

ATTENTION_AND_SUMS = Launches(3, 7)
"""Attention, two residual sums; backwards gradients of common inputs are added up."""

ADAPTER = Launches(10, 9)
"""Casts to fp32 and back, dropout, two products, scaled, added to the layer's own output; that itself not counted."""

AUTOCAST = Launches(16, 22)
"""Casts of a layer under autocast."""

AUTOCAST_ADAPTER = Launches(1, 0)
"""The same of each adapter."""

DEQUANTISED = {"nf4": Launches(1, 1), "gptq": Launches(10, 0)}
"""Of each 4-bit layer. GPTQ's weights are unpacked by ten operations of torch, and kept for the backward pass."""

NOT_RECOMPUTED = 8
"""Kernels of a layer that recomputation leaves out: it stops once all that the backward pass needs is there."""

ZERO3_HOOKS = 30.0
"""Kernels whose launches take as long as ZeRO-3's hooks for one module with parameters in one pass: they look up,
gather and release its weights. On a processor, where there are no streams to wait for, 12 to 24 (DeepSpeed 0.19 on a
Llama with layers 64 wide, where nothing but the host's own work takes time); 30 by Qwen's runs of 1.8B and 7B."""

ZERO_HOOKS = 8.0
"""The same of the hook that takes each trained tensor's gradient in ZeRO-1 and 2, once in the backward pass; 3 to 12
on a processor."""


def layer_launches(shape: ModelShape, kind: LayerKind, fused: bool, frozen: bool) -> Launches:
    """Return the kernels of one layer; of a mixture's routing and of layers with a state fewer than there are.

    Args:
        shape: the model's sizes.
        kind: the layer's parts.
        fused: element-wise operations are merged into few kernels, by torch.compile, Liger or Transformer Engine.
        frozen: its weights are not trained.
    """
    style = shape.style
    one_kernel = fused or style.norm_bias or shape.model_type == "mpt"
    parts = [
        (ONE_KERNEL if one_kernel else RMS_NORM).times(style.num_norms),
        (FROZEN_LINEAR if frozen else LINEAR).times(num_products(shape, kind)),
        GATED if style.gated_mlp and not fused else ONE_KERNEL,
        ATTENTION_AND_SUMS,
    ]
    if not style.learned_positions and shape.model_type != "bloom":
        parts.append(ONE_KERNEL if fused else ROPE)
    return _sum(parts)


def num_products(shape: ModelShape, kind: LayerKind) -> int:
    """Count the matrices of one layer that tokens are multiplied with; all experts together are as many as one."""
    return sum(tensor.role in {"linear", "experts", "router"} for tensor in layer_tensors(shape, kind))


def num_launches(scenario: Scenario) -> float:
    """Count the kernels of a micro-step's layers, unpacking left out; the time of ZeRO's hooks as kernels too."""
    counts = scenario.shape.layer_counts
    trained = sum(tensor.count for tensor in scenario.trained if tensor.count > 1)
    hooks = ZERO_HOOKS * trained if scenario.zero_stage in {1, 2} else 0.0
    return hooks + sum(count * _of_layer(scenario, kind) for kind, count in counts.items())


def launches_per_layer(scenario: Scenario, kind: LayerKind) -> Launches:
    """Return the kernels that a layer of this kind launches, adapters and casts included."""
    shape = scenario.shape
    adapted = sum(tensor.count for tensor in scenario.adapters) / 2 / shape.num_layers
    parts = [layer_launches(shape, kind, scenario.fused, scenario.method != "full"), ADAPTER.times(adapted)]
    if scenario.precision == "amp":
        parts += [AUTOCAST, AUTOCAST_ADAPTER.times(adapted)]
    return _sum(parts)


def num_unpacking_launches(scenario: Scenario) -> float:
    """Count the kernels that unpack 4-bit weights in a micro-step."""
    if scenario.method != "qlora":
        return 0.0
    shape = scenario.shape
    one = DEQUANTISED.get(shape.quantization or "nf4", DEQUANTISED["nf4"])
    weights = sum(count * num_products(shape, kind) for kind, count in shape.layer_counts.items())
    return weights * (one.forward * (2 if scenario.checkpointing else 1) + one.backward)


def _of_layer(scenario: Scenario, kind: LayerKind) -> float:
    """Return a layer's kernels in all passes of a micro-step, and ZeRO-3's hooks on it."""
    one = launches_per_layer(scenario, kind)
    again = max(0.0, one.forward - NOT_RECOMPUTED) if scenario.checkpointing else 0.0
    hooks = 0.0
    if scenario.zero_stage == 3:
        modules = 1 if scenario.whole_layers else num_products(scenario.shape, kind) + scenario.shape.style.num_norms
        hooks = ZERO3_HOOKS * modules * (3 if scenario.checkpointing else 2)
    return one.forward + again + one.backward + hooks


def _sum(parts: list[Launches]) -> Launches:
    return Launches(sum(part.forward for part in parts), sum(part.backward for part in parts))

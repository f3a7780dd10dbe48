"""Bytes that a layer's element-wise operations move through memory: norms, positions, activations, residuals.

They do next to no arithmetic, so that their time is their bytes over the memory's bandwidth. Counted operation by
operation in the code that runs (transformers 5.23 `modeling_llama.py` and its kin, PEFT 0.21 `lora/layer.py`, torch's
autograd formulas): every operand read and every result written once, bfloat16 2 bytes, fp32 4. Nothing is fitted.
"""

from __future__ import annotations

from dataclasses import dataclass

from rm_scale.planning.layer_parts import LayerKind
from rm_scale.planning.parameters import Tensor
from rm_scale.planning.shape import ModelShape


@dataclass(frozen=True)
class Moved:
    """Bytes per element, or per token once multiplied.

    Attributes:
        forward: in the forward pass; once more where it is recomputed.
        backward: in the backward pass.
    """

    forward: float
    backward: float

    def times(self, factor: float) -> Moved:
        """Return the bytes of so many elements."""
        return Moved(self.forward * factor, self.backward * factor)

    def passes(self, recomputed: bool) -> float:
        """Return the bytes of a forward and backward pass, with a second forward pass where it is recomputed."""
        return self.backward + self.forward * (2 if recomputed else 1)


RMS_NORM = Moved(36, 86)
"""Python's operations in fp32: cast 6, square 8, mean 4, by the root 8, cast 6, by the weight 4; backwards by the
weight 4, cast 6, by the root 24, mean 8, square 36, cast and sum 8."""

FUSED_NORM = Moved(4, 10)
"""One kernel: in and out; backwards gradient, input and result, and once more for the weight."""

ROPE = Moved(20, 30)
"""x cos + rotate_half(x) sin: products 8, halves turned round 6, sum 6; backwards with zero-filled halves and sums."""

FUSED_ROPE = Moved(4, 4)

GATED = Moved(10, 18)
"""SiLU 4, product 6; backwards 12 and 6."""

FUSED_GATED = Moved(6, 10)

ACTIVATION = Moved(4, 6)
"""GELU and its kin, a kernel of their own in any case."""

RESIDUALS = Moved(12, 12)
"""Two sums a layer; backwards the two branches' gradients are added."""

JOINED_GRADIENTS = 12.0
"""Gradients of queries, keys and values with respect to their common input, added up; gate and up: half of it."""

ROUTED = Moved(20, 26)
"""Per token and chosen expert: gathered by expert 4, weighted 4, put back in order 4, summed 2, the rest indices and
copies; backwards the same in reverse with scatters into zeros (transformers' grouped_mm)."""

DELTA_NET = Moved(40, 60)
"""Queries, keys, values and gates around a chunked delta rule: convolution and SiLU 8, norms of queries and keys in
fp32 16, cut into chunks and put together again 16; backwards half as much again. Not measured on a device."""

ADAPTER_INPUT = Moved(2, 10)
"""Read for the low-rank product; backwards its gradient written and added to the other one's, the input read again."""

FUSED_ADAPTER_INPUT = Moved(2, 4)

ADAPTER_OUTPUT = Moved(12, 8)
"""Written, scaled and added to the layer's own output; backwards scaled and read twice."""

FUSED_ADAPTER_OUTPUT = Moved(4, 4)

DROPOUT = Moved(5, 5)
"""In, out, and a mask of one byte."""


def layers_bytes(shape: ModelShape, fused: bool) -> Moved:
    """Return the bytes that all layers together move per token.

    Args:
        shape: the model's sizes.
        fused: operations are merged into few kernels, by torch.compile, Liger or Transformer Engine.
    """
    return _sum([layer_bytes(shape, kind, fused).times(count) for kind, count in shape.layer_counts.items()])


def layer_bytes(shape: ModelShape, kind: LayerKind, fused: bool) -> Moved:
    """Return the bytes that one layer of this kind moves per token."""
    style, hidden = shape.style, shape.hidden_size
    one_kernel = fused or style.norm_bias or shape.model_type == "mpt"
    parts = [
        (FUSED_NORM if one_kernel else RMS_NORM).times(style.num_norms * hidden),
        RESIDUALS.times(hidden),
        Moved(0, JOINED_GRADIENTS * (1.5 if style.gated_mlp else 1.0) * hidden),
        *_feed_forward(shape, kind, fused),
    ]
    if kind.mixer == "delta" and shape.delta is not None:
        parts.append(DELTA_NET.times(2 * shape.delta.key_size + 2 * shape.delta.value_size))
    elif kind.mixer == "mamba" and shape.mamba is not None:
        parts.append(DELTA_NET.times(2 * shape.mamba.inner))
    elif kind.mixer == "latent" and shape.latent is not None:
        widths = shape.num_heads * (2 * shape.latent.head_dim + shape.latent.value_dim)
        parts.append((FUSED_ROPE if fused else ROPE).times(widths))  # heads are cut, turned and put together again
    elif not style.learned_positions and shape.model_type not in {"bloom", "mpt"}:
        parts.append((FUSED_ROPE if fused else ROPE).times(shape.query_size + shape.kv_size))
    return _sum(parts)


def _feed_forward(shape: ModelShape, kind: LayerKind, fused: bool) -> list[Moved]:
    activation, experts = _activation(shape, fused), shape.experts
    if kind.feed_forward != "experts" or experts is None:
        return [activation.times(shape.intermediate_size)]
    return [
        activation.times(experts.chosen * experts.width + experts.shared_width),
        ROUTED.times(experts.chosen * shape.hidden_size),
    ]


def _activation(shape: ModelShape, fused: bool) -> Moved:
    if not shape.style.gated_mlp:
        return ACTIVATION
    return FUSED_GATED if fused else GATED


def adapter_bytes(adapters: list[Tensor], dropout: bool, fused: bool) -> Moved:
    """Return the bytes that all adapters together move per token.

    Args:
        adapters: LoRA matrices, such as "q_proj.lora_A" of (rank, inputs) and "q_proj.lora_B" of (outputs, rank).
        dropout: on their inputs.
        fused: see `layer_bytes`.
    """
    parts = []
    for tensor in adapters:
        outputs, inputs = tensor.shape
        if tensor.name.endswith("lora_A"):
            parts.append((FUSED_ADAPTER_INPUT if fused else ADAPTER_INPUT).times(tensor.count * inputs))
            parts.append(DROPOUT.times(tensor.count * inputs if dropout else 0))
        else:
            parts.append((FUSED_ADAPTER_OUTPUT if fused else ADAPTER_OUTPUT).times(tensor.count * outputs))
    return _sum(parts)


def _sum(parts: list[Moved]) -> Moved:
    return Moved(sum(part.forward for part in parts), sum(part.backward for part in parts))

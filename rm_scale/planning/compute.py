"""Floating-point operations of a training step, and the peak rates they are compared with. No torch.

Useful operations are those of the unshared pairs on real tokens: padding, recomputation and sharing change how
long a step takes, not what it is worth. Definitions follow Megatron-Bridge and NeMo Automodel for LoRA (a frozen weight
has no gradient of its own) and count causal attention at half.
"""

from __future__ import annotations

from dataclasses import dataclass

from rm_scale.planning.shape import ModelShape

# Dense bfloat16 peak by a part of the device's name, FLOP/s, from the makers' data sheets; more specific names first.
PEAK_FLOPS = (
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 peak of a device in FLOP/s, `None` when it isn't known."""
    return next((peak for part, peak in PEAK_FLOPS if part in device_name), None)


@dataclass(frozen=True)
class StepFlops:
    """What a step costs, forward and backward, by the lengths of its sequences.

    Attributes:
        per_token: operations of all linear layers per token (head and embedding left out).
        per_square: operations of causal attention per squared sequence length.
    """

    per_token: float
    per_square: float

    def of(self, num_tokens: float, squared_lengths: float) -> float:
        """Operations for sequences of `num_tokens` in all, whose squared lengths add up to `squared_lengths`."""
        return self.per_token * num_tokens + self.per_square * squared_lengths


def linear_parameters(shape: ModelShape) -> int:
    """Weights of all linear layers, without embedding and head."""
    attention = shape.hidden_size * shape.head_dim * (2 * shape.num_heads + 2 * shape.num_kv_heads)
    mlp = (3 if shape.style.gated_mlp else 2) * shape.hidden_size * shape.intermediate_size
    return shape.num_layers * (attention + mlp)


def step_flops(shape: ModelShape, trainable: int, frozen: int) -> StepFlops:
    """Costs of a model of this shape.

    Args:
        shape: the backbone's sizes.
        trainable: parameters that are trained.
        frozen: parameters that are not; 0 for full fine-tuning, where every product is done three times. A frozen
            weight takes part in two (forward, input gradient); the adapters come on top by their share.
    """
    passes = 3.0 if frozen == 0 else 2.0 + trainable / frozen
    width = shape.num_heads * shape.head_dim
    return StepFlops(
        per_token=2.0 * linear_parameters(shape) * passes,
        per_square=3.0 * shape.num_layers * 2.0 * width,
    )

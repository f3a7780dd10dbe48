"""Floating-point operations of a training step: the useful ones, for MFU, and those really done. No torch.

Useful operations are those of the unshared pairs on real tokens: padding, recomputation and sharing change how
long a step takes, not what it is worth. Definitions follow Megatron-Bridge and NeMo Automodel for LoRA (a frozen weight
has no gradient of its own) and count causal attention at half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rm_scale.planning.parameters import Tensor, layer_tensors
from rm_scale.planning.shape import ModelShape


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
        """Return the operations for `num_tokens` in sequences whose squared lengths add up to `squared_lengths`."""
        return self.per_token * num_tokens + self.per_square * squared_lengths


def linear_parameters(shape: ModelShape) -> int:
    """Count the weights of all linear layers, without embedding and head."""
    attention = shape.hidden_size * shape.head_dim * (2 * shape.num_heads + 2 * shape.num_kv_heads)
    mlp = (3 if shape.style.gated_mlp else 2) * shape.hidden_size * shape.intermediate_size
    return shape.num_layers * (attention + mlp)


def step_flops(shape: ModelShape, trainable: int, frozen: int) -> StepFlops:
    """Return what a step of a model of this shape costs, by token and by squared length.

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


BACKWARD_ATTENTION = 2.5
"""Products in attention's backward pass over those in its forward pass: five over two, as flash-attention computes the
weights again (arXiv 2205.14135); a backend that keeps them does four."""


def executed_flops(
    shape: ModelShape,
    tokens: float,
    pairs: float,
    *,
    checkpointing: bool = False,
    use_reentrant: bool = False,
    lora_rank: int | None = None,
    lora_targets: Sequence[str] | None = None,
    backward_attention: float = BACKWARD_ATTENTION,
) -> float:
    """Count the floating-point operations that a micro-step does, forward and backward, useful or not.

    Counts all products of matrices in the layers: those of recomputation and of adapters, shared prompts once. The head
    and everything elementwise are left out, and so is dequantisation.

    Args:
        shape: the backbone's sizes.
        tokens: tokens that the linear layers process, padding included.
        pairs: query-key pairs that attention computes, per head and layer: for causal attention half the square of a
            sequence's length, for a count that ignores causality all of it.
        checkpointing: layers are recomputed in the backward pass.
        use_reentrant: recompute a layer to its end; torch's newer kind stops before the last product, whose result
            nothing needs.
        lora_rank: rank of the adapters; `None` for full fine-tuning.
        lora_targets: adapted modules; `None` for all linear layers.
        backward_attention: see `BACKWARD_ATTENTION`.
    """
    layers, is_full = shape.num_layers, lora_rank is None
    linear = [tensor for tensor in layer_tensors(shape) if tensor.role == "linear"]
    adapted = [] if is_full else [t for t in linear if lora_targets is None or t.module in lora_targets]
    base = 2.0 * tokens * sum(tensor.numel for tensor in linear)
    adapters = 2.0 * tokens * (lora_rank or 0) * sum(sum(tensor.shape) for tensor in adapted)
    total = layers * (base * (3 if is_full else 2) + adapters * 3)
    attention = 4.0 * shape.query_size * pairs * layers
    total += attention * (1 + backward_attention)
    if checkpointing:
        total += layers * (
            base + adapters - (0 if use_reentrant else _not_recomputed(shape, tokens, lora_rank, adapted))
        )
        total += attention
    elif not is_full:
        # Nothing before the first layer is trained, so its first products need no gradient of their input.
        first = [tensor for tensor in linear if tensor.module in {"q_proj", "k_proj", "v_proj", "qkv_proj"}]
        total -= 2.0 * tokens * sum(tensor.numel for tensor in first)
        total -= 2.0 * tokens * (lora_rank or 0) * sum(tensor.shape[1] for tensor in first if tensor in adapted)
    return total


def _not_recomputed(shape: ModelShape, tokens: float, lora_rank: int | None, adapted: Sequence[Tensor]) -> float:
    """Return the operations of a layer's last product, which recomputation leaves out.

    With an adapter there it is the adapter's second product. A norm behind it needs the result, so nothing is left out.
    """
    last = [tensor for tensor in layer_tensors(shape) if tensor.role == "linear"][-1]
    if shape.style.num_norms == 4 or shape.model_type == "olmo2":
        return 0.0
    if last in adapted:
        return 2.0 * tokens * (lora_rank or 0) * last.shape[0]
    return 2.0 * tokens * last.numel

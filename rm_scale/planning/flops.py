"""Floating-point operations of a training step: the useful ones, for MFU, and those really done. No torch.

Useful operations are those of the unshared pairs on real tokens: padding, recomputation and sharing change how
long a step takes, not what it is worth. Definitions follow Megatron-Bridge and NeMo Automodel for LoRA (a frozen weight
has no gradient of its own) and count causal attention at half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rm_scale.planning.layer_parts import LayerKind
from rm_scale.planning.parameters import (
    Tensor,
    active_share,
    adapter_tensors,
    backbone_tensors,
    experts_with_adapters,
    is_adapted,
    layer_tensors,
)
from rm_scale.planning.parameters import total as num_elements
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


_MULTIPLIED = ("linear", "experts", "router")


def linear_parameters(shape: ModelShape) -> int:
    """Count the weights that a token is multiplied with in all layers, without embedding and head.

    Of experts those count that are chosen for it. Of a class all its multiplications count, states' too.

    Raises:
        ModelError: the model's class can't be asked.
    """
    if shape.exact is not None:
        return shape.exact.micro_steps.operations().weights
    return sum(count * _multiplied(shape, layer_tensors(shape, kind)) for kind, count in shape.layer_counts.items())


def _multiplied(shape: ModelShape, tensors: Sequence[Tensor]) -> int:
    return round(sum(t.numel * active_share(shape, t) for t in tensors if t.role in _MULTIPLIED))


def read_parameters(shape: ModelShape, tokens: float) -> int:
    """Count the weights that the layers read for so many tokens: of experts those that any of them goes through."""
    if shape.exact is not None:
        return _read(shape, [replace(t, count=t.count * t.num_modules) for t in shape.exact.tensors], tokens)
    return sum(count * _read(shape, layer_tensors(shape, kind), tokens) for kind, count in shape.layer_counts.items())


def _read(shape: ModelShape, tensors: Sequence[Tensor], tokens: float) -> int:
    def share(tensor: Tensor) -> float:
        return 1.0 - float((1.0 - active_share(shape, tensor)) ** max(1.0, tokens))

    return round(sum(t.count * t.numel * share(t) for t in tensors if t.role in _MULTIPLIED))


def quantised_parameters(shape: ModelShape) -> int:
    """Count the weights of the layers' linear modules, which are what bitsandbytes keeps in 4 bits."""
    if shape.exact is not None:
        return sum(t.count * t.num_modules * t.numel for t in shape.exact.tensors if t.is_4bit)
    return sum(
        count * tensor.numel
        for kind, count in shape.layer_counts.items()
        for tensor in layer_tensors(shape, kind)
        if tensor.is_4bit
    )


def attention_width(shape: ModelShape, kind: LayerKind) -> int:
    """Return what a query and a key cost, in multiplications: half of the two products' widths together.

    A layer that carries a state costs nothing by the square of the length.
    """
    if kind.mixer == "latent" and shape.latent is not None:
        return shape.num_heads * (shape.latent.head_dim + shape.latent.value_dim) // 2
    return shape.query_size if kind.mixer == "attention" else 0


def attention_widths(shape: ModelShape) -> int:
    """Add up `attention_width` over all layers.

    Raises:
        ModelError: the model's class can't be asked.
    """
    if shape.exact is not None:
        return shape.exact.micro_steps.operations().attention_width
    return sum(count * attention_width(shape, kind) for kind, count in shape.layer_counts.items())


def state_flops_per_token(shape: ModelShape) -> float:
    """Return what layers that carry a state cost per token beside their projections, in one forward pass.

    A gated delta net by the chunked rule with chunks of 64 (arXiv 2412.06464): per head the state is read, corrected
    and written (three products of key by value width), and within a chunk four products of half the chunk. Mamba: six
    operations per inner channel and state. Convolutions: two per channel and tap. Of a class they are counted with its
    other products, see `linear_parameters`.
    """
    total = 0.0
    if shape.exact is not None:
        return total
    for kind, count in shape.layer_counts.items():
        if kind.mixer == "delta" and shape.delta is not None:
            delta = shape.delta
            state = 3 * delta.key_dim * delta.value_dim
            chunk = _CHUNK / 2 * (2 * delta.key_dim + 2 * delta.value_dim)
            convolution = delta.kernel * (2 * delta.key_size + delta.value_size)
            total += count * 2.0 * (delta.num_value_heads * (state + chunk) + convolution)
        if kind.mixer == "mamba" and shape.mamba is not None:
            mamba = shape.mamba
            total += count * mamba.inner * (6.0 * mamba.state + 2.0 * mamba.kernel)
    return total


_CHUNK = 64


def step_flops(shape: ModelShape, trainable: int, frozen: int) -> StepFlops:
    """Return what a step of a model of this shape costs, by token and by squared length.

    Args:
        shape: the backbone's sizes.
        trainable: parameters that are trained.
        frozen: parameters that are not; 0 for full fine-tuning, where every product is done three times. A frozen
            weight takes part in two (forward, input gradient); the adapters come on top by their share.
    """
    passes = 3.0 if frozen == 0 else 2.0 + trainable / frozen
    return StepFlops(
        per_token=2.0 * linear_parameters(shape) * passes + 3.0 * state_flops_per_token(shape),
        per_square=3.0 * 2.0 * attention_widths(shape),
    )


BACKWARD_ATTENTION = 2.5
"""Products in attention's backward pass over those in its forward pass: five over two, as flash-attention computes the
weights again (arXiv 2205.14135); a backend that keeps them does four."""


MERGES = 2
"""Times that PEFT adds the adapters of experts to a copy of their tensor in a forward pass: torch's `parametrize` does
it once to check the result, and once when the tensor is used."""


def adapted_experts(shape: ModelShape, parameters: Sequence[str]) -> list[Tensor]:
    """Return the tensors of experts that have adapters."""
    return experts_with_adapters(backbone_tensors(shape), parameters)


def expert_adapter_flops(
    shape: ModelShape, tokens: float, rank: int, parameters: Sequence[str], checkpointing: bool
) -> float:
    """Count what adapters of experts add to a micro-step.

    They are multiplied out and added to a copy of all experts, however few tokens there are. The copy has a gradient,
    which frozen experts have not: one more product per token with the experts that are chosen for it.
    """
    adapted = adapted_experts(shape, parameters)
    merges = MERGES * (2 if checkpointing else 1)
    chosen = sum(tensor.count * tensor.numel * active_share(shape, tensor) for tensor in adapted)
    return 2.0 * rank * num_elements(adapted) * (merges + 2) + 2.0 * tokens * chosen


def executed_flops(
    shape: ModelShape,
    tokens: float,
    pairs: float,
    *,
    checkpointing: bool = False,
    use_reentrant: bool = False,
    lora_rank: int | None = None,
    lora_targets: Sequence[str] | None = None,
    lora_parameters: Sequence[str] = (),
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
        lora_parameters: adapted tensors of experts, as `expert_settings.adapted_parameters` gives them.
        backward_attention: see `BACKWARD_ATTENTION`.
    """
    is_full = lora_rank is None
    of_experts = expert_adapter_flops(shape, tokens, lora_rank or 0, lora_parameters, checkpointing)
    if shape.exact is not None:
        added = [] if is_full else adapter_tensors(shape.exact.tensors, lora_rank or 0, lora_targets)
        again = 1 if checkpointing else 0
        products = linear_parameters(shape) * ((3 if is_full else 2) + again) + num_elements(added) * (3 + again)
        of_attention = 4.0 * attention_widths(shape) * pairs * (1 + backward_attention + again)
        return 2.0 * tokens * products + of_attention + of_experts
    total = 0.0
    for place, kind in enumerate(shape.layers):
        linear = [tensor for tensor in layer_tensors(shape, kind) if tensor.role in _MULTIPLIED]
        adapted = [] if is_full else [t for t in linear if is_adapted(t, lora_targets)]
        base = 2.0 * tokens * _multiplied(shape, linear)
        adapters = 2.0 * tokens * (lora_rank or 0) * sum(sum(tensor.shape) for tensor in adapted)
        attention = 4.0 * attention_width(shape, kind) * pairs
        total += base * (3 if is_full else 2) + adapters * 3 + attention * (1 + backward_attention)
        if checkpointing:
            left_out = 0.0 if use_reentrant else _not_recomputed(shape, kind, tokens, lora_rank, adapted)
            total += base + adapters - left_out + attention
        elif not is_full and place == 0:
            # Nothing before the first layer is trained, so its first products need no gradient of their input.
            first = [tensor for tensor in linear if tensor.module in _FIRST_PRODUCTS]
            total -= 2.0 * tokens * sum(tensor.numel for tensor in first)
            total -= 2.0 * tokens * (lora_rank or 0) * sum(t.shape[1] for t in first if t in adapted)
    passes = 4 if checkpointing else 3
    return total + passes * tokens * state_flops_per_token(shape) + of_experts


_FIRST_PRODUCTS = {"q_proj", "k_proj", "v_proj", "qkv_proj", "q_a_proj", "kv_a_proj_with_mqa", "in_proj"} | {
    *("in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
}


def _not_recomputed(
    shape: ModelShape, kind: LayerKind, tokens: float, lora_rank: int | None, adapted: Sequence[Tensor]
) -> float:
    """Return the operations of a layer's last product, which recomputation leaves out.

    With an adapter there it is the adapter's second product. A norm behind it needs the result, so nothing is left out;
    nor with experts, whose results are weighted after the last product.
    """
    if shape.style.num_norms == 4 or shape.style.norms_follow or kind.feed_forward == "experts":
        return 0.0
    last = [tensor for tensor in layer_tensors(shape, kind) if tensor.role == "linear"][-1]
    if last in adapted:
        return 2.0 * tokens * (lora_rank or 0) * last.shape[0]
    return 2.0 * tokens * last.numel

"""Every parameter tensor of a model by its shape: what is trained, sharded, quantised and saved. No torch.

ZeRO rounds each tensor or each group of tensors up, and keeps small tensors whole, so that bytes can be right only when
tensors are counted one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rm_scale.planning.shape import ModelShape

Role = Literal["embedding", "linear", "vector", "head", "adapter"]


@dataclass(frozen=True)
class Tensor:
    """One parameter tensor, or several alike.

    Attributes:
        name: last parts of its name, such as "q_proj.weight".
        shape: its sizes; a linear layer's are (outputs, inputs).
        role: embedding, linear (could carry an adapter, could be quantised), vector (norms, biases), head or adapter.
        count: how many there are: one per layer, mostly.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    count: int = 1

    @property
    def numel(self) -> int:
        """Elements of one of them."""
        product = 1
        for size in self.shape:
            product *= size
        return product

    @property
    def module(self) -> str:
        """The name a LoRA target has."""
        return self.name.split(".")[0]


def backbone_tensors(shape: ModelShape) -> list[Tensor]:
    """Return all parameters of the backbone, without a head."""
    hidden, style = shape.hidden_size, shape.style
    tensors = [Tensor("embed_tokens.weight", (shape.vocab_size, hidden), "embedding")]
    if style.learned_positions and shape.max_positions:
        # OPT's table begins at position 2.
        rows = shape.max_positions + (2 if shape.model_type == "opt" else 0)
        tensors.append(Tensor("embed_positions.weight", (rows, hidden), "embedding"))
    tensors += [_times(tensor, shape.num_layers) for tensor in layer_tensors(shape)]
    tensors += _norm("norm", hidden, style.norm_bias)
    if shape.model_type == "bloom":
        tensors += _norm("word_embeddings_layernorm", hidden, bias=True)
    return tensors


def count_parameters(shape: ModelShape) -> int:
    """Return the backbone's parameters: embedding, layers and norms, without a language model's head."""
    return total(backbone_tensors(shape))


def layer_tensors(shape: ModelShape) -> list[Tensor]:
    """Return the parameters of one decoder layer."""
    return [*_attention(shape), *_mlp(shape), *_layer_norms(shape)]


def head_tensor(shape: ModelShape) -> Tensor:
    """Return the scalar reward head."""
    return Tensor("score.weight", (1, shape.hidden_size), "head")


def lm_head_tensor(shape: ModelShape) -> Tensor:
    """Return a language-model head, for published measurements of models that have one."""
    return Tensor("lm_head.weight", (shape.vocab_size, shape.hidden_size), "embedding")


def adapter_tensors(tensors: Sequence[Tensor], rank: int, targets: Sequence[str] | None) -> list[Tensor]:
    """Return the two LoRA matrices of each adapted linear layer.

    Args:
        tensors: the backbone's.
        rank: LoRA rank.
        targets: module names, such as "q_proj"; `None` for all linear layers.
    """
    adapters = []
    for tensor in tensors:
        if tensor.role != "linear" or (targets is not None and tensor.module not in targets):
            continue
        outputs, inputs = tensor.shape
        adapters.append(Tensor(f"{tensor.module}.lora_A", (rank, inputs), "adapter", tensor.count))
        adapters.append(Tensor(f"{tensor.module}.lora_B", (outputs, rank), "adapter", tensor.count))
    return adapters


def total(tensors: Sequence[Tensor]) -> int:
    """Count the elements of all tensors together."""
    return sum(tensor.count * tensor.numel for tensor in tensors)


def each(tensors: Sequence[Tensor]) -> Iterator[int]:
    """Yield the elements of every single tensor."""
    for tensor in tensors:
        for _ in range(tensor.count):
            yield tensor.numel


def _times(tensor: Tensor, count: int) -> Tensor:
    return Tensor(tensor.name, tensor.shape, tensor.role, count)


def _linear(name: str, outputs: int, inputs: int, bias: bool) -> list[Tensor]:
    weight = Tensor(f"{name}.weight", (outputs, inputs), "linear")
    return [weight, Tensor(f"{name}.bias", (outputs,), "vector")] if bias else [weight]


def _norm(name: str, size: int, bias: bool) -> list[Tensor]:
    weight = Tensor(f"{name}.weight", (size,), "vector")
    return [weight, Tensor(f"{name}.bias", (size,), "vector")] if bias else [weight]


def _attention(shape: ModelShape) -> list[Tensor]:
    hidden, style, query, kv = shape.hidden_size, shape.style, shape.query_size, shape.kv_size
    if style.fused_qkv:
        tensors = _linear("qkv_proj", query + 2 * kv, hidden, style.qkv_bias)
    else:
        tensors = [
            *_linear("q_proj", query, hidden, style.qkv_bias),
            *_linear("k_proj", kv, hidden, style.qkv_bias),
            *_linear("v_proj", kv, hidden, style.qkv_bias),
        ]
    tensors += _linear("o_proj", hidden, query, style.output_bias)
    if style.qk_norm != "none":
        by_head = style.qk_norm == "head"
        tensors += _norm("q_norm", shape.head_dim if by_head else query, bias=False)
        tensors += _norm("k_norm", shape.head_dim if by_head else kv, bias=False)
    return tensors


def _mlp(shape: ModelShape) -> list[Tensor]:
    hidden, width, style = shape.hidden_size, shape.intermediate_size, shape.style
    if not style.gated_mlp:
        inner = _linear("fc1", width, hidden, style.mlp_bias)
        return [*inner, *_linear("fc2", hidden, width, style.mlp_bias)]
    if style.fused_mlp:
        inner = _linear("gate_up_proj", 2 * width, hidden, style.mlp_bias)
    else:
        inner = [
            *_linear("gate_proj", width, hidden, style.mlp_bias),
            *_linear("up_proj", width, hidden, style.mlp_bias),
        ]
    return [*inner, *_linear("down_proj", hidden, width, style.mlp_bias)]


def _layer_norms(shape: ModelShape) -> list[Tensor]:
    style = shape.style
    return [
        tensor
        for number in range(style.num_norms)
        for tensor in _norm(f"layernorm_{number}", shape.hidden_size, style.norm_bias)
    ]

"""Every parameter tensor of a model by its shape: what is trained, sharded, quantised and saved. No torch.

ZeRO rounds each tensor or each group of tensors up, and keeps small tensors whole, so that bytes can be right only when
tensors are counted one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rm_scale.planning.families import NOT_ADAPTED, NOT_QUANTISED
from rm_scale.planning.layer_parts import DeltaNet, Experts, LatentAttention, LayerKind, Mamba
from rm_scale.planning.shape import ModelShape

Role = Literal["embedding", "linear", "experts", "router", "other", "vector", "head", "adapter"]


@dataclass(frozen=True)
class Tensor:
    """One parameter tensor, or several alike.

    Attributes:
        name: last parts of its name, such as "q_proj.weight".
        shape: its sizes; a linear layer's are (outputs, inputs).
        role: embedding, linear (could carry an adapter, could be quantised), experts (all of a layer, in three
            dimensions), router, other (convolutions and the like, with weight decay), vector (norms and biases, without
            weight decay), head or adapter.
        count: how many there are: one per layer, mostly.
        takes_adapter: LoRA adapts it where no targets are named.
        takes_4bit: bitsandbytes quantises it, if it is a linear layer's; of subclasses of torch's it leaves all alone.
        num_modules: modules that share it. LoRA gives each of them an adapter of its own.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    count: int = 1
    takes_adapter: bool = True
    takes_4bit: bool = True
    num_modules: int = 1

    @property
    def is_4bit(self) -> bool:
        """QLoRA keeps it in 4 bits."""
        return self.role == "linear" and self.takes_4bit

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
    if shape.exact is not None:
        return list(shape.exact.tensors)
    hidden, style = shape.hidden_size, shape.style
    tensors = [Tensor("embed_tokens.weight", (shape.vocab_size, hidden), "embedding")]
    if style.learned_positions and shape.max_positions:
        # OPT's table begins at position 2.
        rows = shape.max_positions + (2 if shape.model_type == "opt" else 0)
        tensors.append(Tensor("embed_positions.weight", (rows, hidden), "embedding"))
    for kind, count in shape.layer_counts.items():
        tensors += [_times(tensor, count) for tensor in layer_tensors(shape, kind)]
    if style.norm_weights:
        tensors += _norm("norm", hidden, style.norm_bias)
    if shape.model_type == "bloom":
        tensors += _norm("word_embeddings_layernorm", hidden, bias=True)
    return tensors


def count_parameters(shape: ModelShape) -> int:
    """Return the backbone's parameters: embedding, layers and norms, without a language model's head."""
    return total(backbone_tensors(shape))


def active_parameters(shape: ModelShape) -> int:
    """Return the parameters that one token goes through: of experts only those that are chosen for it."""
    tensors = backbone_tensors(shape)
    return sum(round(tensor.count * tensor.numel * active_share(shape, tensor)) for tensor in tensors)


def active_share(shape: ModelShape, tensor: Tensor) -> float:
    """Return the share of a tensor that one token is multiplied with."""
    if shape.experts is None or len(tensor.shape) < 2 or "experts" not in tensor.name:
        return 1.0
    return shape.experts.chosen / shape.experts.num


def layer_tensors(shape: ModelShape, kind: LayerKind) -> list[Tensor]:
    """Return the parameters of one decoder layer of this kind."""
    if kind.mixer == "latent" and shape.latent is not None:
        mixer = _latent_attention(shape, shape.latent)
    elif kind.mixer == "delta" and shape.delta is not None:
        mixer = _delta_net(shape, shape.delta)
    elif kind.mixer == "mamba" and shape.mamba is not None:
        mixer = _mamba(shape, shape.mamba)
    else:
        mixer = _attention(shape)
    if kind.feed_forward == "experts" and shape.experts is not None:
        feed_forward = _experts(shape, shape.experts)
    else:
        feed_forward = _mlp(shape, shape.intermediate_size)
    bare = NOT_ADAPTED.get(shape.model_type, frozenset())
    tensors = [*mixer, *feed_forward, *_layer_norms(shape)]
    quantised = shape.model_type not in NOT_QUANTISED
    return [replace(tensor, takes_adapter=tensor.module not in bare, takes_4bit=quantised) for tensor in tensors]


def head_tensor(shape: ModelShape) -> Tensor:
    """Return the scalar reward head."""
    return Tensor("score.weight", (1, shape.hidden_size), "head")


def lm_head_tensor(shape: ModelShape) -> Tensor:
    """Return a language-model head, for published measurements of models that have one."""
    return Tensor("lm_head.weight", (shape.vocab_size, shape.hidden_size), "embedding")


def adapter_tensors(
    tensors: Sequence[Tensor], rank: int, targets: Sequence[str] | None, parameters: Sequence[str] = ()
) -> list[Tensor]:
    """Return the two LoRA matrices of each adapted linear layer, and of each adapted tensor of experts.

    Args:
        tensors: the backbone's.
        rank: LoRA rank.
        targets: module names, such as "q_proj"; `None` for all linear layers.
        parameters: tensors of experts, as `expert_settings.adapted_parameters` gives them; each expert has matrices of
            its own there.
    """
    adapters = []
    for tensor in experts_with_adapters(tensors, parameters):
        num, outputs, inputs = tensor.shape
        adapters.append(Tensor(f"{tensor.name}.lora_A", (rank * num, inputs), "adapter", tensor.count))
        adapters.append(Tensor(f"{tensor.name}.lora_B", (outputs, rank * num), "adapter", tensor.count))
    for tensor in tensors:
        if not is_adapted(tensor, targets):
            continue
        outputs, inputs = tensor.shape
        count = tensor.count * tensor.num_modules
        adapters.append(Tensor(f"{tensor.module}.lora_A", (rank, inputs), "adapter", count))
        adapters.append(Tensor(f"{tensor.module}.lora_B", (outputs, rank), "adapter", count))
    return adapters


def experts_with_adapters(tensors: Sequence[Tensor], parameters: Sequence[str]) -> list[Tensor]:
    """Return the tensors of experts that have adapters, as many of them as there are layers with such.

    Args:
        tensors: the backbone's.
        parameters: as `expert_settings.adapted_parameters` gives them: "experts.down_proj" stands for all layers, a
            full name for one.
    """
    left = Counter(name.rpartition(".")[2] for name in parameters)
    found = []
    for tensor in tensors:
        if tensor.role != "experts":
            continue
        last = tensor.name.rpartition(".")[2]
        count = tensor.count if tensor.name in parameters else min(tensor.count, left[last])
        left[last] -= count
        found += [replace(tensor, count=count)] if count else []
    return found


def is_adapted(tensor: Tensor, targets: Sequence[str] | None) -> bool:
    """Tell whether LoRA adapts this linear layer, by the names asked for or by default."""
    if tensor.role != "linear":
        return False
    return tensor.takes_adapter if targets is None else names_module(targets, tensor.module)


def names_module(targets: Sequence[str], module: str) -> bool:
    """Tell whether target names reach a layer's module, as PEFT reads them: by its name or the end of its path.

    A path with a layer's number reaches that layer alone; it is counted as if it reached all.
    """
    return any(target.rpartition(".")[2] == module for target in targets)


def total(tensors: Sequence[Tensor]) -> int:
    """Count the elements of all tensors together."""
    return sum(tensor.count * tensor.numel for tensor in tensors)


def each(tensors: Sequence[Tensor]) -> Iterator[int]:
    """Yield the elements of every single tensor."""
    for tensor in tensors:
        for _ in range(tensor.count):
            yield tensor.numel


def _times(tensor: Tensor, count: int) -> Tensor:
    return replace(tensor, count=count)


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
            *_linear("q_proj", 2 * query if style.output_gate else query, hidden, style.qkv_bias),
            *_linear("k_proj", kv, hidden, style.qkv_bias),
            *_linear("v_proj", kv, hidden, style.qkv_bias),
        ]
    tensors += _linear("o_proj", hidden, query, style.output_bias)
    if style.qk_norm != "none":
        by_head = style.qk_norm == "head"
        tensors += _norm("q_norm", shape.head_dim if by_head else query, bias=False)
        tensors += _norm("k_norm", shape.head_dim if by_head else kv, bias=False)
    if style.sinks:
        tensors.append(Tensor("sinks", (shape.num_heads,), "other"))
    return tensors


def _latent_attention(shape: ModelShape, latent: LatentAttention) -> list[Tensor]:
    hidden, heads, bias = shape.hidden_size, shape.num_heads, shape.style.qkv_bias
    queries = heads * latent.head_dim
    if latent.query_rank is None:
        tensors = _linear("q_proj", queries, hidden, bias=False)
    else:
        tensors = [
            *_linear("q_a_proj", latent.query_rank, hidden, bias),
            *_norm("q_a_layernorm", latent.query_rank, bias=False),
            *_linear("q_b_proj", queries, latent.query_rank, bias=False),
        ]
    return [
        *tensors,
        *_linear("kv_a_proj_with_mqa", latent.kv_rank + latent.rope_dim, hidden, bias),
        *_norm("kv_a_layernorm", latent.kv_rank, bias=False),
        *_linear("kv_b_proj", heads * (latent.nope_dim + latent.value_dim), latent.kv_rank, bias=False),
        *_linear("o_proj", hidden, heads * latent.value_dim, shape.style.output_bias),
    ]


def _delta_net(shape: ModelShape, delta: DeltaNet) -> list[Tensor]:
    hidden, heads = shape.hidden_size, delta.num_value_heads
    channels = 2 * delta.key_size + delta.value_size
    if delta.fused:
        tensors = [
            *_linear("in_proj_qkvz", channels + delta.value_size, hidden, bias=False),
            *_linear("in_proj_ba", 2 * heads, hidden, bias=False),
        ]
    else:
        tensors = [
            *_linear("in_proj_qkv", channels, hidden, bias=False),
            *_linear("in_proj_z", delta.value_size, hidden, bias=False),
            *_linear("in_proj_b", heads, hidden, bias=False),
            *_linear("in_proj_a", heads, hidden, bias=False),
        ]
    return [
        *tensors,
        Tensor("conv1d.weight", (channels, 1, delta.kernel), "other"),
        Tensor("dt_bias", (heads,), "vector"),
        Tensor("A_log", (heads,), "other"),
        *_norm("norm", delta.value_dim, bias=False),
        *_linear("out_proj", hidden, delta.value_size, bias=False),
    ]


def _mamba(shape: ModelShape, mamba: Mamba) -> list[Tensor]:
    hidden, inner, bias = shape.hidden_size, mamba.inner, mamba.projection_bias
    tensors = [
        *_linear("in_proj", 2 * inner, hidden, bias),
        Tensor("conv1d.weight", (inner, 1, mamba.kernel), "other"),
        *_linear("x_proj", mamba.rank + 2 * mamba.state, inner, bias=False),
        *_linear("dt_proj", inner, mamba.rank, bias=True),
        Tensor("A_log", (inner, mamba.state), "other"),
        Tensor("D", (inner,), "other"),
        *_norm("dt_layernorm", mamba.rank, bias=False),
        *_norm("b_layernorm", mamba.state, bias=False),
        *_norm("c_layernorm", mamba.state, bias=False),
        *_linear("out_proj", hidden, inner, bias),
    ]
    return [*tensors, Tensor("conv1d.bias", (inner,), "vector")] if mamba.conv_bias else tensors


def _experts(shape: ModelShape, experts: Experts) -> list[Tensor]:
    hidden, width, num = shape.hidden_size, experts.width, experts.num
    first, second = (num, 2 * width, hidden), (num, hidden, width)
    tensors = [Tensor("experts.gate_up_proj", first, "experts"), Tensor("experts.down_proj", second, "experts")]
    tensors.append(Tensor("router.weight", (num, hidden), "router"))
    if experts.biases:
        tensors += [
            Tensor("experts.gate_up_proj_bias", (num, 2 * width), "vector"),
            Tensor("experts.down_proj_bias", (num, hidden), "vector"),
            Tensor("router.bias", (num,), "vector"),
        ]
    if experts.shared_width:
        tensors += _mlp(shape, experts.shared_width)
    if experts.shared_gate:
        tensors += _linear("shared_expert_gate", 1, hidden, bias=False)
    return tensors


def _mlp(shape: ModelShape, width: int) -> list[Tensor]:
    hidden, style = shape.hidden_size, shape.style
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
        for number in range(style.num_norms if style.norm_weights else 0)
        for tensor in _norm(f"layernorm_{number}", shape.hidden_size, style.norm_bias)
    ]

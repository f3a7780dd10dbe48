"""What decoder layers are made of: plain attention and MLP, experts, latent attention, layers that carry a state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mixer = Literal["attention", "latent", "delta", "mamba"]
FeedForward = Literal["mlp", "experts", "none"]


@dataclass(frozen=True)
class LayerStyle:
    """What a plain decoder layer is made of, beside its sizes.

    Attributes:
        gated_mlp: three MLP matrices (gate, up, down) rather than two.
        qkv_bias: biases on query, key and value projections.
        output_bias: a bias on attention's output projection.
        mlp_bias: biases in the MLP.
        num_norms: norms per layer, those on queries and keys left out.
        norm_weights: norms have weights.
        norm_bias: norms have a bias (LayerNorm rather than RMSNorm).
        qk_norm: norms on queries and keys: over each head, over the whole projection, or none.
        fused_qkv: queries, keys and values are one matrix.
        fused_mlp: gate and up are one matrix.
        learned_positions: positions are an embedding.
        norms_follow: norms stand behind attention and MLP only, not before them.
        output_gate: queries come with a gate of the same width, by which attention's output is multiplied.
        sinks: each head has a number that takes part in attention's softmax beside the scores.
    """

    gated_mlp: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    num_norms: int = 2
    norm_weights: bool = True
    norm_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    fused_qkv: bool = False
    fused_mlp: bool = False
    learned_positions: bool = False
    norms_follow: bool = False
    output_gate: bool = False
    sinks: bool = False


@dataclass(frozen=True)
class LayerKind:
    """Which parts one decoder layer has.

    Attributes:
        mixer: what mixes tokens: plain attention, latent attention (MLA), a gated delta net, or Mamba.
        feed_forward: what follows: a plain MLP, experts, or nothing.
        window: tokens that attention looks back at most; `None`: all.
        adapted: tensors of its experts that have adapters, such as "experts.down_proj", where these are told apart.
    """

    mixer: Mixer = "attention"
    feed_forward: FeedForward = "mlp"
    window: int | None = None
    adapted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of an MLP. transformers 5 keeps all experts of a layer in two 3-D tensors.

    Attributes:
        num: experts in a layer.
        chosen: experts that each token goes through.
        width: inner width of one expert.
        biases: experts and router have biases, and the tensors are stored as (inputs, outputs) (GPT-OSS).
        shared_width: inner width of the expert that every token goes through; 0: none.
        shared_gate: that expert's output is weighted by a gate of its own.
        gated: three matrices (gate and up in one tensor, down) rather than two.
    """

    num: int
    chosen: int
    width: int
    biases: bool = False
    shared_width: int = 0
    shared_gate: bool = False
    gated: bool = True


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention: queries and keys go through a narrow projection (DeepSeek-V2, arXiv 2405.04434).

    Attributes:
        query_rank: width of the queries' narrow projection; `None`: queries are projected directly.
        kv_rank: width of the narrow projection that keys and values share.
        rope_dim: part of each head that positions rotate; one for all heads in keys.
        nope_dim: part of each head that has no position.
        value_dim: width of a head's values.
    """

    query_rank: int | None
    kv_rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int

    @property
    def head_dim(self) -> int:
        """Width of a head's queries and keys."""
        return self.rope_dim + self.nope_dim


@dataclass(frozen=True)
class DeltaNet:
    """A gated delta net: attention whose cost grows with the length, not with its square (arXiv 2412.06464).

    Attributes:
        num_key_heads, num_value_heads: heads of queries and keys, and of values.
        key_dim, value_dim: width of one head.
        kernel: tokens that the convolution before it sees.
        fused: queries, keys, values and the output's gate come from one projection, the two gates from another
            (Qwen3-Next); else four projections (Qwen3.5).
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    fused: bool

    @property
    def key_size(self) -> int:
        """Width of all keys together, which is also that of all queries."""
        return self.num_key_heads * self.key_dim

    @property
    def value_size(self) -> int:
        """Width of all values together."""
        return self.num_value_heads * self.value_dim


@dataclass(frozen=True)
class Mamba:
    """A selective state space layer of the first kind (Mamba, arXiv 2312.00752), as Jamba has it.

    Attributes:
        inner: width inside the layer.
        state: width of the state of each inner channel.
        kernel: tokens that the convolution sees.
        rank: width of the projection that step sizes come from.
        conv_bias, projection_bias: biases on the convolution, and on the projections in and out.
    """

    inner: int
    state: int
    kernel: int
    rank: int
    conv_bias: bool
    projection_bias: bool

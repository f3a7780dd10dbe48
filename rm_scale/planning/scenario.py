"""One way to run one model on one machine: the input of the planner's formulas."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import Literal

from rm_scale.planning.hardware import Device
from rm_scale.planning.parameters import Tensor, adapter_tensors, backbone_tensors, head_tensor, lm_head_tensor, total
from rm_scale.planning.shape import ModelShape

Method = Literal["full", "lora", "qlora"]
Precision = Literal["bf16", "amp", "fp32"]
Head = Literal["score", "lm", "lm_chunked"]


@dataclass(frozen=True)
class RowLoad:
    """The tokens of one device's micro-step.

    Attributes:
        tokens: tokens that the model computes, padding included.
        squared: sum over sequences of squared length, the cost of causal attention; with a shared prompt
            p and responses r this is p^2 + sum of r (2p + r).
        effective_tokens: tokens of the same responses when each has its own prompt and nothing is padded.
        effective_squared: their squared lengths.
        groups: preference groups.
        responses: responses, two per pair.
    """

    tokens: float
    squared: float
    effective_tokens: float
    effective_squared: float
    groups: float
    responses: float

    def times(self, factor: float) -> RowLoad:
        """Return the load of `factor` times as many groups."""
        return RowLoad(*(factor * value for value in astuple(self)))


@dataclass(frozen=True)
class Buckets:
    """Elements of ZeRO's communication buffers and thresholds.

    Attributes:
        reduce: gradients reduced at once.
        prefetch: weights gathered ahead (ZeRO-3).
        persistent: tensors up to this size stay whole on every rank (ZeRO-3).
        live: weights kept gathered at most (ZeRO-3).
        reuse: weights are kept, not gathered again, when they are next used within so many elements (ZeRO-3).
        sub_group: parameters stepped at once (ZeRO-3).
        overlaps: reduction overlaps with the backward pass, in a second bucket.
    """

    reduce: float
    prefetch: float
    persistent: float
    live: float = 1e9
    reuse: float = 1e9
    sub_group: float = 1e9
    overlaps: bool = True


def default_buckets(hidden_size: int) -> Buckets:
    """Return the sizes that transformers fills in for `auto`."""
    return Buckets(hidden_size**2, int(0.9 * hidden_size**2), 10 * hidden_size)


@dataclass(frozen=True)
class Scenario:
    """Everything that memory and time depend on.

    Attributes:
        shape: the model.
        device: the accelerator.
        num_devices, num_nodes: ranks in all, and the nodes they are on.
        load: tokens of one device's mean micro-step.
        max_row_tokens: tokens of the largest micro-step, which decides memory; default the mean's.
        num_micro_steps: micro-steps per optimizer step.
        method: full, lora or qlora.
        lora_rank, lora_targets, lora_dropout: adapters; targets `None`: all linear layers.
        lora_parameters: adapted tensors of experts, as `expert_settings.adapted_parameters` gives them.
        nested_quant: double quantisation of 4-bit weights.
        zero_stage: 0 to 3; `None`: plain torch, gradients averaged by DDP.
        offload_optimizer, offload_param: none, cpu or nvme.
        pin_memory: offloaded weights lie in page-locked memory (`offload_param.pin_memory`).
        pin_gradients: so do gradients on the host (`offload_optimizer.pin_memory`).
        hpz: ranks that hold a second copy of the weights among them (zero_hpz_partition_size); 1: none.
        precision: bf16 (an engine with fp32 masters), amp (fp32 weights, bf16 products) or fp32.
        master_bytes: bytes of the fp32 master per trained weight; 0 where bf16 weights are updated themselves.
        checkpointing: recompute each layer in the backward pass.
        attention: backend of packed attention: varlen, sdpa or matmul.
        packed: rows are packed; padded ones go through the head with all their tokens.
        head: score; lm and lm_chunked are for published measurements of language models.
        optimizer_bytes: bytes of optimizer state per trained weight (Adam in fp32: 8); 0: no optimizer.
        gradient_bytes: bytes per gradient; `None`: the weights' own.
        buckets: ZeRO's buffers.
        fused: element-wise operations run in few kernels (torch.compile, Liger, Transformer Engine).
        selective_checkpointing: recompute all but attention and every second product (torchtitan); published rows only.
        tied_head: a language model's head is its embedding.
        whole_layers: stage 3 gathers a layer at once, as FSDP does, rather than module by module.
        fused_update: the optimizer updates in one kernel, as DeepSpeed's and transformers' AdamW do.
        head_chunks: chunks of head="lm_chunked"; `None`: as many as Liger makes.
    """

    shape: ModelShape
    device: Device
    num_devices: int
    load: RowLoad
    max_row_tokens: float | None = None
    num_nodes: int = 1
    num_micro_steps: float = 1
    method: Method = "full"
    lora_rank: int = 16
    lora_targets: tuple[str, ...] | None = None
    lora_dropout: float = 0.05
    lora_parameters: tuple[str, ...] = ()
    nested_quant: bool = False
    zero_stage: int | None = 3
    offload_optimizer: str = "none"
    offload_param: str = "none"
    pin_memory: bool = True
    pin_gradients: bool = True
    hpz: int = 1
    precision: Precision = "bf16"
    master_bytes: int = 4
    checkpointing: bool = True
    attention: str = "varlen"
    packed: bool = True
    head: Head = "score"
    optimizer_bytes: float = 8
    gradient_bytes: int | None = None
    buckets: Buckets | None = None
    fused: bool = False
    selective_checkpointing: bool = False
    tied_head: bool = False
    head_chunks: int | None = None
    whole_layers: bool = False
    fused_update: bool = True

    @property
    def largest_tokens(self) -> float:
        """Tokens of the micro-step that memory must hold."""
        return max(self.load.tokens, self.max_row_tokens or 0)

    @property
    def zero(self) -> Buckets:
        """The buffers in use."""
        return self.buckets or default_buckets(self.shape.hidden_size)

    @property
    def devices_per_node(self) -> int:
        """Ranks on one node."""
        return math.ceil(self.num_devices / self.num_nodes)

    @cached_property
    def backbone(self) -> list[Tensor]:
        """Parameters that come with the model."""
        extra = [] if self.head == "score" or self.tied_head else [lm_head_tensor(self.shape)]
        return [*backbone_tensors(self.shape), *extra]

    @cached_property
    def adapters(self) -> list[Tensor]:
        """LoRA's matrices."""
        if self.method == "full":
            return []
        return adapter_tensors(backbone_tensors(self.shape), self.lora_rank, self.lora_targets, self.lora_parameters)

    @cached_property
    def linear_adapters(self) -> list[Tensor]:
        """LoRA's matrices beside linear layers, without those of experts."""
        return adapter_tensors(backbone_tensors(self.shape), self.lora_rank, self.lora_targets) if self.adapters else []

    @cached_property
    def trained(self) -> list[Tensor]:
        """What the optimizer updates: everything, or adapters and head."""
        head = [head_tensor(self.shape)] if self.head == "score" else []
        return [*self.backbone, *head] if self.method == "full" else [*self.adapters, *head]

    @cached_property
    def frozen(self) -> list[Tensor]:
        """What is only read. Beside adapters PEFT keeps the head's first value too."""
        if self.method == "full":
            return []
        return [*self.backbone, head_tensor(self.shape)] if self.head == "score" else self.backbone

    @cached_property
    def num_trained(self) -> int:
        """Trained parameters."""
        return total(self.trained)

    @cached_property
    def num_frozen(self) -> int:
        """Frozen parameters."""
        return total(self.frozen)

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight in the forward pass's copy."""
        return 2 if self.precision == "bf16" else 4

    @property
    def product_bytes(self) -> int:
        """Bytes of an element of the matrix products."""
        return 4 if self.precision == "fp32" else 2

"""How long an optimizer step takes: computing, communicating, updating; a band where they overlap.

A step lies between the longer of computing and moving weights and gradients (they overlap completely) and their sum
(not at all). Weights come from the host, where they are offloaded, and from the other ranks, one after the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rm_scale.planning import network
from rm_scale.planning.elementwise import adapter_bytes, layers_bytes
from rm_scale.planning.flops import (
    BACKWARD_ATTENTION,
    MERGES,
    StepFlops,
    adapted_experts,
    attention_widths,
    expert_adapter_flops,
    linear_parameters,
    quantised_parameters,
    read_parameters,
    state_flops_per_token,
    step_flops,
)
from rm_scale.planning.host_link import (
    HOST_BANDWIDTH,
    HOST_LINK,
    NVME_BANDWIDTH,
    gradient_copy_seconds,
    weight_copy_seconds,
)
from rm_scale.planning.launches import num_launches, num_unpacking_launches
from rm_scale.planning.parameters import backbone_tensors, total
from rm_scale.planning.scenario import Scenario

ATTENTION_SHARE = 0.72
"""Rate of attention kernels over that of linear layers (flash-attention 2 on an A800: 174 of 241 TFLOP/s)."""

ATTENTION_SHARES = {"flash1": 0.39}
"""Older kernels: flash-attention 1 and its Triton kin reach 25 to 40 % of an A100's peak where the second reaches 50 to
73 % (arXiv 2307.08691)."""

OVERLAP = 0.25
"""Share of what communication could hide behind computing that it does hide, for a single figure within the band:
kernels of both kinds compete for the same processors and memory."""

LOGIT_BYTES = 42.0
"""Memory traffic per logit: written, cast to fp32, shifted, log-softmax, and the same backwards."""

CHUNK_PASSES = 6
"""Times that a chunked loss moves the head's weight per chunk: read for logits and for their gradient, the chunk's own
gradient written, and added to the sum (3)."""

PROCESSOR_HOOK_SECONDS = 0.045
"""What ZeRO-3's hooks and copies add to each layer of a micro-step on a processor, where nothing runs beside them:
SmolLM2-135M on one thread, 0.036 with LoRA and 0.056 with full fine-tuning (30 layers)."""

DEQUANTISE_BYTES = {"nf4": 8.0, "gptq": 20.0}
"""Memory traffic per 4-bit weight and pass; NF4: litgpt on an A100-40, 3.7 to 7.5 ms per 1e9 weights and pass. GPTQ is
unpacked by several torch operations (Qwen-7B and 14B at 256 to 4,096 tokens: 11 ms)."""

SELECTIVE_PRODUCTS = 0.5
"""Share of products that selective checkpointing computes again (torchtitan keeps every second one)."""

UNFUSED_PASSES = 3.0
"""Memory traffic of an update in torch's loops over lists of tensors (foreach) over that of one kernel. With everything
in 16 bits: decay 4 bytes, first moment 6, second 10, root 4, its correction 8, the weight 8: 40; gradients' norm and
clipping 6; one kernel moves 14."""

EXPERT_TILE = 128
"""Tokens for which a GPU's grouped products compute at once (tiles of 64 to 128 rows in CUTLASS's). An expert's last
tile is computed whole, so that uneven loads cost up to a tile for each expert that has tokens. Not measured here."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step and its parts.

    Attributes:
        compute: of one micro-step, forward and backward.
        communication: of one micro-step's collectives.
        step_communication: of collectives once per step.
        update: of the optimizer.
        num_micro_steps: per optimizer step.
        imbalance: what the least even loads of experts add to a micro-step's computation.
        weight_copies: of one micro-step's copies of offloaded weights from the host.
        gradient_copies: of one micro-step's copies of gradients to the host and back.
    """

    compute: float
    communication: float
    step_communication: float
    update: float
    num_micro_steps: float
    imbalance: float = 0.0
    weight_copies: float = 0.0
    gradient_copies: float = 0.0

    @property
    def moving(self) -> float:
        """Seconds of a micro-step's copies and collectives; a rank's part is copied before it is gathered."""
        return self.communication + self.weight_copies + self.gradient_copies

    @property
    def low(self) -> float:
        """What is moved hidden behind computing as far as it goes."""
        return self.num_micro_steps * max(self.compute, self.moving) + self._once

    @property
    def high(self) -> float:
        """Nothing overlaps, and experts are loaded as unevenly as can be."""
        return self.num_micro_steps * (self.compute + self.imbalance + self.moving) + self._once

    @property
    def expected(self) -> float:
        """A single figure within the band."""
        return self.high - OVERLAP * (self.high - self.low)

    @property
    def _once(self) -> float:
        return self.step_communication + self.update

    @property
    def bound_by(self) -> str:
        """What takes longest: compute, communication, weight copies or gradient copies (both with the host)."""
        copying = self.num_micro_steps * (self.weight_copies + self.gradient_copies)
        communicating = self.num_micro_steps * self.communication + self.step_communication
        if copying + communicating <= self.num_micro_steps * self.compute:
            return "compute"
        if copying <= communicating:
            return "communication"
        return "weight copies" if self.weight_copies >= self.gradient_copies else "gradient copies"


def step_time(scenario: Scenario) -> StepTime:
    """Predict a step's time."""
    return StepTime(
        compute=compute_seconds(scenario) + network.processor_seconds(scenario),
        communication=network.micro_step_seconds(scenario),
        step_communication=network.step_seconds(scenario),
        update=update_seconds(scenario),
        num_micro_steps=scenario.num_micro_steps,
        imbalance=imbalance_seconds(scenario),
        weight_copies=weight_copy_seconds(scenario),
        gradient_copies=gradient_copy_seconds(scenario),
    )


@dataclass(frozen=True)
class MicroStepFlops:
    """Operations that one device really does in a micro-step, those for recomputation and padding included."""

    linear: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.linear + self.attention + self.head


def micro_step_flops(scenario: Scenario) -> MicroStepFlops:
    """Count the operations of a scenario's micro-step; causal attention at half.

    `compute.executed_flops` counts more exactly what torch executes, for measured runs.
    """
    shape, load = scenario.shape, scenario.load
    recomputed, passes = 1.0 if scenario.checkpointing else 0.0, product_passes(scenario)
    adapters = total(scenario.linear_adapters) * (3.0 + recomputed)
    linear = 2.0 * load.tokens * (linear_parameters(shape) * passes + adapters)
    if scenario.adapters:
        parameters, rank = scenario.lora_parameters, scenario.lora_rank
        linear += expert_adapter_flops(shape, load.tokens, rank, parameters, scenario.checkpointing)
    linear += load.tokens * state_flops_per_token(shape) * (3.0 + recomputed)
    attention = 2.0 * attention_widths(shape) * load.squared * (1.0 + recomputed + BACKWARD_ATTENTION)
    head = 0.0
    if scenario.head != "score":
        head = 2.0 * load.tokens * shape.vocab_size * shape.hidden_size * (3.0 if scenario.method == "full" else 2.0)
    return MicroStepFlops(linear, attention, head)


def product_passes(scenario: Scenario) -> float:
    """Count the times that a micro-step multiplies with each weight, recomputation included."""
    recomputed = 1.0 if scenario.checkpointing else 0.0
    products = SELECTIVE_PRODUCTS if scenario.selective_checkpointing else recomputed
    return products + (3.0 if scenario.method == "full" else 2.0)


def imbalance_seconds(scenario: Scenario) -> float:
    """Return what a micro-step takes longer when tokens are spread over experts as unevenly as can be.

    How many tokens are multiplied doesn't depend on it, since every rank has all experts. What grows is the rounding of
    each expert's tokens to whole tiles. Processors have no such tiles.
    """
    shape, device = scenario.shape, scenario.device
    if shape.experts is None or device.is_cpu:
        return 0.0
    experts = shape.experts
    at_work = min(experts.num, scenario.load.tokens * experts.chosen)
    weights = sum(t.count * t.numel for t in backbone_tensors(shape) if t.role == "experts") / experts.num
    flops = 2.0 * at_work * (EXPERT_TILE - 1) * weights * product_passes(scenario)
    return flops / (device.matmul_flops * device.step_efficiency)


def useful_flops(scenario: Scenario) -> float:
    """Count the operations of the unshared pairs on real tokens, for MFU."""
    frozen = scenario.num_frozen if scenario.method != "full" else 0
    per_step: StepFlops = step_flops(scenario.shape, scenario.num_trained, frozen)
    return per_step.of(scenario.load.effective_tokens, scenario.load.effective_squared)


def compute_seconds(scenario: Scenario) -> float:
    """Return the seconds of a micro-step's computation on one device."""
    parts = compute_parts(scenario)
    head, launches, dequantising = (parts.pop(name) for name in ("head", "launches", "dequantising"))
    if scenario.device.is_cpu:
        return sum(parts.values()) + launches + dequantising + head
    # Products wait for their unpacked weights: Qwen's GPTQ runs at 256 to 1,024 tokens take the unpacking on top.
    return max(sum(parts.values()), launches) + dequantising + head


def compute_parts(scenario: Scenario) -> dict[str, float]:
    """Return the seconds of a micro-step by part; layers take no less than their launches, and dequantising on top."""
    flops, device = micro_step_flops(scenario), scenario.device
    rate = device.matmul_flops * device.step_efficiency
    share = ATTENTION_SHARES.get(scenario.attention, ATTENTION_SHARE)
    bandwidth = device.memory_bandwidth * device.elementwise_share
    return {
        "products": flops.linear / rate,
        "attention": flops.attention / (rate * share),
        "elementwise": elementwise_bytes(scenario) / bandwidth,
        "weights": weight_traffic(scenario) / bandwidth,
        "dequantising": dequantise_seconds(scenario),
        "head": flops.head / rate + head_traffic(scenario) / bandwidth,
        "launches": launch_seconds(scenario),
    }


def elementwise_bytes(scenario: Scenario) -> float:
    """Return the bytes that a micro-step's norms, activations, residuals and adapters move."""
    fused, recomputed = scenario.fused, scenario.checkpointing
    layers = layers_bytes(scenario.shape, fused)
    adapters = adapter_bytes(scenario.linear_adapters, scenario.lora_dropout > 0, fused)
    return scenario.load.tokens * (
        layers.passes(recomputed or scenario.selective_checkpointing) + adapters.passes(recomputed)
    )


def weight_traffic(scenario: Scenario) -> float:
    """Return the bytes of weights read in each pass and of their gradients: with few tokens these take longest.

    Experts with adapters are read and written whole each time that adapters are added to them, and so is the gradient
    of the result: written once, and read for the gradient of either of an adapter's matrices.
    """
    passes = _passes(scenario) + (2 if scenario.method == "full" else 0)
    elements = read_parameters(scenario.shape, scenario.load.tokens) * passes
    if scenario.adapters:
        merges = MERGES * (2 if scenario.checkpointing else 1)
        elements += total(adapted_experts(scenario.shape, scenario.lora_parameters)) * (2 * merges + 3)
    return elements * scenario.product_bytes


def head_traffic(scenario: Scenario) -> float:
    """Return the bytes that a language model's head moves: logits, or its weight once more for each chunk."""
    shape, tokens = scenario.shape, scenario.load.tokens
    if scenario.head == "score":
        return 0.0
    if scenario.head == "lm":
        return LOGIT_BYTES * tokens * shape.vocab_size
    weight = shape.vocab_size * shape.hidden_size * scenario.product_bytes
    return head_chunks(scenario) * CHUNK_PASSES * weight + 4 * scenario.product_bytes * tokens * shape.vocab_size


def head_chunks(scenario: Scenario) -> int:
    """Count the chunks of a fused loss: as many as logits are wider than hidden states, in powers of two (Liger)."""
    if scenario.head_chunks is not None:
        return scenario.head_chunks
    tokens = max(1, round(scenario.load.tokens))
    wanted = math.ceil(scenario.shape.vocab_size / scenario.shape.hidden_size)
    power: int = 2 ** math.ceil(math.log2(math.ceil(tokens / wanted)))
    return math.ceil(tokens / power)


def launch_seconds(scenario: Scenario) -> float:
    """Return what layers take however few tokens there are: the host's time to launch their kernels.

    Where a processor computes too, it can't do both at once, so that this comes on top.
    """
    if scenario.device.is_cpu:
        return scenario.shape.num_layers * (PROCESSOR_HOOK_SECONDS if scenario.zero_stage == 3 else 0.0)
    return num_launches(scenario) * scenario.device.launch_seconds


def _passes(scenario: Scenario) -> int:
    """Count passes: forward, backward, and once more forward where layers are recomputed."""
    return 3 if scenario.checkpointing else 2


def dequantise_seconds(scenario: Scenario) -> float:
    """Return the seconds of turning 4-bit weights into the compute type, in all passes of a micro-step."""
    if scenario.method != "qlora":
        return 0.0
    moved = DEQUANTISE_BYTES.get(scenario.shape.quantization or "nf4", DEQUANTISE_BYTES["nf4"])
    weights = quantised_parameters(scenario.shape) * _passes(scenario)
    moving = weights * moved / (scenario.device.memory_bandwidth * scenario.device.elementwise_share)
    return max(moving, num_unpacking_launches(scenario) * scenario.device.launch_seconds)


def update_seconds(scenario: Scenario) -> float:
    """Return the seconds of the optimizer's update of a rank's share of the weights."""
    if not scenario.optimizer_bytes:
        return 0.0
    share = scenario.num_trained / (scenario.num_devices if scenario.zero_stage else 1)
    if scenario.offload_optimizer == "none" or scenario.device.is_cpu:
        return (
            share
            * update_bytes_per_weight(scenario)
            / (scenario.device.memory_bandwidth * scenario.device.elementwise_share)
        )
    in_node = share * scenario.devices_per_node
    # Gradients become fp32, the masters' type, before they are sent (DeepSpeed); weights come back in their own.
    moved = share * ((scenario.master_bytes or scenario.weight_bytes) + scenario.weight_bytes) / HOST_LINK
    if scenario.offload_optimizer == "nvme":
        on_disk = 2 * (scenario.optimizer_bytes + scenario.master_bytes)
        on_disk += scenario.weight_bytes if scenario.offload_param == "nvme" else 0
        return moved + in_node * on_disk / NVME_BANDWIDTH
    return moved + in_node * update_bytes_per_weight(scenario) / HOST_BANDWIDTH


def update_bytes_per_weight(scenario: Scenario) -> float:
    """Return the bytes that AdamW moves per weight: state and master there and back, gradient read, weight written."""
    state = 2 * (scenario.optimizer_bytes + scenario.master_bytes)
    weight = scenario.weight_bytes if scenario.master_bytes else 2 * scenario.weight_bytes
    gradient = scenario.gradient_bytes or (4 if scenario.master_bytes else scenario.weight_bytes)
    return (state + weight + gradient) * (1.0 if scenario.fused_update else UNFUSED_PASSES)

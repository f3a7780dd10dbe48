"""Predict what the activations of a micro-step take at its peak, and of what that consists."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from rm_scale.planning.activations.decoder import forward
from rm_scale.planning.activations.micro_step import MicroStep
from rm_scale.planning.activations.settings import Options, Row
from rm_scale.planning.activations.simulated_autograd import MemoryCounter
from rm_scale.planning.shape import ModelShape

if TYPE_CHECKING:
    from rm_scale.planning.scenario import Scenario


@dataclass(frozen=True)
class Part:
    """What all tensors of one kind take at the moment of the peak.

    Attributes:
        num_bytes: bytes of all of them together.
        formula: how that came about, in the terms that `activation_memory` documents.
        stored: alive since the forward pass; else it comes and goes in the backward pass.
    """

    num_bytes: int
    formula: str
    stored: bool


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes that a micro-step needs beside parameters, their lasting gradients and optimizer states.

    Attributes:
        stored_bytes: held from the end of the forward pass to the backward pass.
        peak_bytes: most bytes alive at once.
        moment: the operation whose result brought the peak.
        parts: what was alive at that moment; adds up to `peak_bytes`.
    """

    stored_bytes: int
    peak_bytes: int
    moment: str
    parts: dict[str, Part]

    @property
    def transient_bytes(self) -> int:
        """What the worst moment needs beyond what is stored."""
        return self.peak_bytes - self.stored_bytes

    def explain(self) -> str:
        """Return a table of the parts, largest first."""
        lines = [f"{self.peak_bytes / 1e9:9.3f} GB at {self.moment}; stored {self.stored_bytes / 1e9:.3f} GB"]
        for name, part in sorted(self.parts.items(), key=lambda item: -item[1].num_bytes):
            kept = "stored" if part.stored else "passing"
            lines.append(f"{part.num_bytes / 1e9:9.3f} GB {kept:8} {name}: {part.formula}")
        return "\n".join(lines)


@lru_cache(maxsize=4096)
def activation_memory(shape: ModelShape, row: Row, options: Options | None = None) -> ActivationMemory:
    """Predict what a micro-step needs at its peak.

    Gradients of weights count while autograd hands them over, one matrix at a time, and not afterwards. So do
    dequantised weights (QLoRA) and autocast's copies of weights.

    Formulas begin with how many there are and name sizes: tokens and key_tokens (see `Row`), hidden (hidden_size), mlp
    (intermediate_size), heads, queries (heads x head_dim), kv (kv heads x head_dim), vocab, rank; B are bytes per
    element.

    Args:
        shape: the model's sizes.
        row: the micro-step's tokens.
        options: how it is run.

    Raises:
        ModelError: of a kind of model that this file doesn't know, and its class can't be asked.
    """
    if shape.exact is not None:
        return shape.exact.micro_steps.activations(row, options or Options())
    step = MicroStep(shape, row, options or Options())
    memory = step.memory
    loss = forward(step)
    stored, forward_peak = memory.live, memory.peak
    stored_keys = {key for key, count in memory.counts.items() if count}
    loss.grad = memory.keep(loss.allocation)
    step.graph.backward()
    turn = "forward" if memory.peak == forward_peak else "backward"
    parts = {
        _part_name(memory, key): Part(count * memory.sizes[key], f"{count} x {key[1]}", key in stored_keys)
        for key, count in memory.at_peak.items()
        if count
    }
    return ActivationMemory(stored, memory.peak, f"{turn}: {memory.moment}", parts)


def _part_name(memory: MemoryCounter, key: tuple[str, str]) -> str:
    """Return the tensor's name, with its formula where tensors of several sizes have that name."""
    alike = [other for other, count in memory.at_peak.items() if other[0] == key[0] and count]
    return key[0] if len(alike) == 1 else f"{key[0]} ({key[1]})"


def activations_of(scenario: Scenario) -> ActivationMemory:
    """Predict the largest micro-step of a scenario."""
    load = scenario.load
    factor = scenario.largest_tokens / load.tokens
    row = Row(
        tokens=round(load.tokens * factor),
        key_tokens=round(max(load.tokens, load.effective_tokens) * factor),
        responses=round(load.responses * factor),
        pairs=round(load.squared / 2 * factor),
        longest=round(load.effective_squared / load.effective_tokens),
    )
    options = Options(
        checkpointing="full" if scenario.checkpointing else "none",
        use_reentrant=scenario.method != "full" and scenario.zero_stage == 3,
        method=scenario.method,
        lora_rank=scenario.lora_rank,
        lora_targets=scenario.lora_targets,
        lora_parameters=scenario.lora_parameters,
        lora_dropout=scenario.lora_dropout,
        precision=scenario.precision,
        attention="varlen" if scenario.attention == "flash1" else scenario.attention,  # type: ignore[arg-type]
        head="score_all" if scenario.head == "score" and not scenario.packed else scenario.head,
    )
    return activation_memory(scenario.shape, row, options)

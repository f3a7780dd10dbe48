"""The steps of the proof in their order, the most telling first, and the sizes that they work at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rm_scale.tiers import model_tier

MINUTES = 12.0
REHEARSAL_PATIENCE = 6.0
"""A rehearsal's limits are so many times longer: two slow cores stand in for sixteen and a GPU."""


@dataclass(frozen=True)
class Step:
    """A process of its own.

    Attributes:
        name: what `--only` and `--again` take.
        title: what it shows.
        seconds: after this it is ended, and the next begins.
        least: with less left of the whole budget it isn't begun. What was known when a step is ended stays on record,
            so that this is the time to its first figure.
        needs: bitsandbytes; gpus: two at least.
        all_gpus: it uses every GPU of the machine; others see the first alone.
    """

    name: str
    title: str
    seconds: float
    least: float
    needs: tuple[str, ...] = ()
    all_gpus: bool = False


STEPS = (
    Step("doctor", "doctor, packed attention tests", 120, 30, all_gpus=True),
    Step("zero3", "ZeRO-3: full and LoRA, saved and verified", 90, 35, all_gpus=True),
    Step("qlora", "QLoRA: train, save, score", 90, 30, ("bitsandbytes",)),
    Step("one_billion", "a true 1B: packed, ZeRO-3, save, golden scores", 150, 60, all_gpus=True),
    Step("parity", "losses of 1 rank and of all", 75, 30, ("gpus",), all_gpus=True),
    Step("stopped_rank", "a stopped rank is named", 100, 45, ("gpus",), all_gpus=True),
    Step("syncs", "blocking calls per step, three steps profiled", 80, 35, all_gpus=True),
    Step("attention", "varlen against sdpa, forward and backward", 45, 15),
    Step("hardware", "rates of this machine", 75, 25, all_gpus=True),
    Step("1b_lora", "throughput: 1B LoRA, ours and TRL", 120, 45),
    Step("1b_qlora", "throughput: 1B QLoRA, ours and TRL", 120, 45, ("bitsandbytes",)),
    Step("7b_lora", "throughput: 7B LoRA, ours and TRL", 190, 75),
    Step("7b_qlora", "throughput: 7B QLoRA, ours and TRL", 190, 75, ("bitsandbytes",)),
)


def find_step(name: str) -> Step:
    """Return the step of this name."""
    return next(step for step in STEPS if step.name == name)


@dataclass(frozen=True)
class Timed:
    """A throughput case: groups per optimizer step, steps before the timed ones, timed steps."""

    global_batch_size: int
    warmup: int
    steps: int


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        shapes: config.json of the models by what they are called.
        labels: what records call them.
        max_length: tokens of a text at most.
        mix: lengths of the texts, see `benchmarks/workloads.py`.
        pairs: made for each model.
        tiny_steps: of trainings that are to show correctness.
        true_steps, true_batch: of the 1B under ZeRO-3, groups per step.
        observed_tokens: of a packed row where blocking calls are counted, small enough for several micro-steps.
        attention: heads, key and value heads, head dimension, tokens of the row.
        hardware_seconds: for `rm-scale bench hardware`.
        timed: throughput cases by model.
        micro_batches: of TRL, in the order in which they are tried.
        ddp_timeout: seconds of standing still after which a run must say who is missing.
    """

    shapes: Mapping[str, Mapping[str, Any]]
    labels: Mapping[str, str]
    max_length: int
    mix: str
    pairs: int
    tiny_steps: int
    true_steps: int
    true_batch: int
    observed_tokens: int
    attention: tuple[int, int, int, int]
    hardware_seconds: float
    timed: Mapping[str, Timed]
    micro_batches: tuple[int, ...]
    ddp_timeout: int


REAL = Sizes(
    shapes={name: model_tier(name).config for name in ("1b", "7b")},
    labels={"1b": "1b", "7b": "7b"},
    max_length=1024,
    mix="hh-like",
    pairs=720,
    tiny_steps=4,
    true_steps=15,
    true_batch=32,
    observed_tokens=4096,
    attention=(32, 8, 128, 16384),
    hardware_seconds=8,
    timed={"1b": Timed(64, 3, 8), "7b": Timed(32, 2, 6)},
    micro_batches=(8, 4, 16, 2, 1),
    ddp_timeout=30,
)


def _small(layers: int, hidden: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 2 * hidden,
        "vocab_size": 2048,
        "max_position_embeddings": 2048,
    }


SMALL = Sizes(
    shapes={"1b": _small(2, 64), "7b": _small(1, 128)},
    labels={"1b": "small-1", "7b": "small-7"},
    max_length=128,
    mix="hh-like",
    pairs=40,
    tiny_steps=2,
    true_steps=3,
    true_batch=4,
    observed_tokens=256,
    attention=(4, 2, 16, 256),
    hardware_seconds=1,
    timed={"1b": Timed(4, 1, 2), "7b": Timed(4, 1, 2)},
    micro_batches=(4, 2),
    ddp_timeout=16,
)


def sizes(rehearse: bool) -> Sizes:
    """Return those of a rehearsal, or of a real card."""
    return SMALL if rehearse else REAL

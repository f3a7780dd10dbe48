"""Model sizes: the shapes of the tiers 1b to 13b, and the hyper-parameters applied where the user gave none.

The values are the reward-model guide's: below 1B 2e-5 and 4-8 pairs per device, 1-7B 1e-5 and 2-4, 7-13B 5e-6 and 1-2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rm_scale.errors import ConfigError
from rm_scale.texts import did_you_mean, one_line


@dataclass(frozen=True)
class SizeTier:
    """Default hyper-parameters for models of up to `max_parameters` parameters.

    Attributes:
        name: what the tier is called in logs.
        max_parameters: upper bound, inclusive, of backbone parameters.
        learning_rate: peak learning rate.
        per_device_train_batch_size: groups per micro-batch and device.
        num_train_epochs: passes over the data.
    """

    name: str
    max_parameters: float
    learning_rate: float
    per_device_train_batch_size: int
    num_train_epochs: float


# Models called 7B have up to 7.1e9 backbone parameters and belong to the middle tier; those called 8B to the last.
SIZE_TIERS = (
    SizeTier("below 1B", 1e9, 2e-5, 8, 1.0),
    SizeTier("1-7B", 7.2e9, 1e-5, 4, 1.0),
    SizeTier("above 7B", float("inf"), 5e-6, 2, 1.0),
)


def size_tier(num_parameters: int) -> SizeTier:
    """Return the tier of a model with this many backbone parameters."""
    return next(tier for tier in SIZE_TIERS if num_parameters <= tier.max_parameters)


@dataclass(frozen=True)
class ModelTier:
    """A size people train, by one well-known model of it.

    Attributes:
        name: what `--tier` takes.
        model: the hub name of the model whose shape stands for the tier.
        config: what of its config.json decides memory and time.
        current: hub name of a newer model of about that size, with a ready run in `configs/`.
    """

    name: str
    model: str
    config: dict[str, Any]
    current: str


def _llama(
    hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, vocabulary: int, positions: int
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
    }


MODEL_TIERS = (
    ModelTier("1b", "meta-llama/Llama-3.2-1B", _llama(2048, 16, 32, 8, 8192, 128256, 131072), "Qwen/Qwen3-1.7B"),
    ModelTier("3b", "meta-llama/Llama-3.2-3B", _llama(3072, 28, 24, 8, 8192, 128256, 131072), "Qwen/Qwen3-4B"),
    ModelTier("7b", "meta-llama/Llama-2-7b-hf", _llama(4096, 32, 32, 32, 11008, 32000, 4096), "Qwen/Qwen3-8B"),
    ModelTier("13b", "meta-llama/Llama-2-13b-hf", _llama(5120, 40, 40, 40, 13824, 32000, 4096), "Qwen/Qwen3-14B"),
)


def model_tier(name: str) -> ModelTier:
    """Return the tier of this name.

    Raises:
        ConfigError: there is none; the text offers the nearest.
    """
    plain = name.strip().lower()
    for tier in MODEL_TIERS:
        if plain == tier.name:
            return tier
    names = [tier.name for tier in MODEL_TIERS]
    hint = did_you_mean(plain, names, f"choose from {', '.join(names)}.", likeness=0.5, same_number=True)
    raise ConfigError(
        [
            f"tier={one_line(name, 200)!r}: the tiers are {', '.join(names)}. Fix: {hint} Other sizes: "
            "--model CONFIG.json."
        ]
    )

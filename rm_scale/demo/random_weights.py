"""Write a model of a real model's shape with random weights, for benchmarks: shard by shard, never whole in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from rm_scale.demo.assets import default_tokenizer, make_asset
from rm_scale.errors import AssetError
from rm_scale.texts import one_line

_VERSION = 1
_SHARD_BYTES = 2 * 2**30
# A prime, so that repetitions of the noise never line up with a matrix's rows.
_NOISE_LENGTH = 16_777_213


def make_random_model(
    directory: str | Path,
    shape: Mapping[str, Any],
    name: str,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    shard_bytes: int = _SHARD_BYTES,
) -> Path:
    """Write a causal language model of a given shape, and the tiny models' tokenizer, which uses its first token ids.

    It takes the time and memory of a real model of that shape, but its answers mean nothing. Weights are normal with
    the configuration's `initializer_range`, norms 1, biases 0. Writing needs the memory of one shard and 64 MB.

    Args:
        directory: a folder that doesn't exist yet, is empty, or holds this same asset (which is then left alone).
        shape: what a config.json holds, `model_type` included.
        name: its name in the marker file.
        dtype: type of the weights on disk.
        seed: seed of the noise.
        shard_bytes: largest size of a file (a larger tensor gets one of its own).

    Raises:
        AssetError: a shape that transformers doesn't know or take, or a folder that can't be used.
    """
    tokenizer = default_tokenizer()
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    settings = {**{key: value for key, value in shape.items() if key != "architectures"}, **special}
    model = _empty_model(settings, dtype)
    if len(tokenizer) > model.config.vocab_size:
        raise AssetError(f"vocab_size={model.config.vocab_size}: the tokenizer has {len(tokenizer)} tokens. Fix: more.")
    parameters = {"shape": settings, "dtype": str(dtype), "seed": seed}
    marker = {"name": f"random-{name}", "version": _VERSION, "parameters": json.loads(json.dumps(parameters))}

    def build(folder: Path) -> None:
        tokenizer.save_pretrained(folder)
        model.config.save_pretrained(folder)
        _write_shards(model, dtype, seed, shard_bytes, folder)

    return make_asset(Path(directory), marker, build)


def _empty_model(settings: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Build the model on the meta device: it has names and shapes of its weights, but needs no memory."""
    if "model_type" not in settings:
        raise AssetError("shape: has no model_type. Fix: give the content of a config.json.")
    try:
        with torch.device("meta"):
            config = AutoConfig.for_model(**settings)
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise AssetError(
            f"shape of model_type={settings['model_type']!r}: transformers can't build it ({one_line(error, 200)}). "
            "Fix: the content of a config.json of a causal language model."
        ) from error


def _write_shards(model: Any, dtype: torch.dtype, seed: int, shard_bytes: int, folder: Path) -> None:
    tensors = {name: parameter.shape for name, parameter in model.named_parameters()}  # names a tied head only once
    shards = _shards(tensors, dtype.itemsize, shard_bytes)
    noise = torch.empty(_NOISE_LENGTH, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    noise.normal_(0.0, getattr(model.config, "initializer_range", 0.02) or 0.02, generator=generator)
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(
            {name: _values(name, tensors[name], noise, generator) for name in names},
            folder / file,
            metadata={"format": "pt"},
        )
        where |= dict.fromkeys(names, file)
    total = sum(shape.numel() for shape in tensors.values()) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, torch.Size], itemsize: int, shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in tensors.items():
        size = shape.numel() * itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _values(name: str, shape: torch.Size, noise: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a tensor's values: 1 for norms, 0 for biases, otherwise a stretch of the noise from a random place on."""
    if name.endswith(".bias"):
        return torch.zeros(shape, dtype=noise.dtype)
    if len(shape) == 1:
        return torch.ones(shape, dtype=noise.dtype)
    start = int(torch.randint(len(noise), (1,), generator=generator))
    values = torch.empty(shape.numel(), dtype=noise.dtype)
    for place, piece in _pieces(start, len(values), len(noise)):
        values[place : place + len(piece)] = noise[piece.start : piece.stop]
    return values.view(shape)


def _pieces(start: int, wanted: int, length: int) -> Iterator[tuple[int, range]]:
    """Yield, for each stretch of a ring of `length` values, where it goes and which values it is, until `wanted`."""
    place = 0
    while place < wanted:
        size = min(length - start, wanted - place)
        yield place, range(start, start + size)
        place, start = place + size, 0

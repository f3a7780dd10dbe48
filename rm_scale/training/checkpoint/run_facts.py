"""The facts that decide a run's result: a checkpoint stores them, and a resumed run must have the same.

How a batch is cut up (ranks, micro-batches, packing, ZeRO stage, recomputation) is not among them, since the same
groups form a step whatever it is. Nor are logging, evaluation and when to save.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from rm_scale.config import RESUME_FACTS, RunConfig
from rm_scale.data.preparation import PreparedData
from rm_scale.planning.plan import Plan

_SAMPLED_ROWS = 256
_HASHED_AT_ONCE = 1 << 20
_SAMPLED_BYTES = 2**16


def run_facts(config: RunConfig, plan: Plan, data: PreparedData) -> dict[str, Any]:
    """Return the facts of this run, by the names that the setting `allow_changed` takes."""
    computed = {
        "model": model_fingerprint(config),
        "data": data_fingerprint(data),
        "mixture": data.mixture.describe() if data.mixture is not None else None,
        "method": plan.method,
        "compute_dtype": plan.compute_dtype,
        "learning_rate": plan.learning_rate,
        "global_batch_size": plan.global_batch_size,
        "total_steps": plan.total_steps,
    }
    return {name: computed[name] if name in computed else getattr(config, name) for name in RESUME_FACTS}


def data_fingerprint(data: PreparedData) -> str:
    """Return a hash of the training groups: the lengths of all of them, and the whole content of a sample.

    Of a stream, whose groups are not known yet: of its files and how they are read.
    """
    if data.stream is not None:
        return f"a stream, {', '.join(part.identity[:16] for part in data.stream.parts)}"
    sizes = data.train_sizes
    digest = hashlib.sha256()
    for array in (sizes.num_tokens, sizes.prompt_length, sizes.num_responses):
        for start in range(0, len(array), _HASHED_AT_ONCE):
            digest.update(np.asarray(array[start : start + _HASHED_AT_ONCE], np.int64).tobytes())
    count = len(data.train)
    rows = np.unique(np.linspace(0, count - 1, min(count, _SAMPLED_ROWS)).astype(int)).tolist()
    sample = data.train.select(rows)
    for row in sample:
        digest.update(repr([row[name] for name in ("input_ids", "ranks", "margin", "soft_label")]).encode())
    return f"{count:,} groups, {digest.hexdigest()[:16]}"


def model_fingerprint(config: RunConfig) -> str:
    """Return a name for the base model: its hub name and revision, or a hash of a folder's files.

    A folder may move, and two models may have the same shape, so neither path nor configuration alone tells. Of each
    weight file three parts are hashed: whole files would take minutes.
    """
    folder = Path(config.model_name_or_path)
    if not folder.is_dir():
        return f"{config.model_name_or_path} at {config.model_revision}"
    digest = hashlib.sha256()
    files = [*folder.glob("config.json"), *folder.glob("*.safetensors")]
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for place in (0, size // 2, max(0, size - _SAMPLED_BYTES)):
                file.seek(place)
                digest.update(file.read(_SAMPLED_BYTES))
    return f"{len(files)} files, {digest.hexdigest()[:16]}"

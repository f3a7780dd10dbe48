"""What decides a run's result: the facts a checkpoint carries, and a resumed run is held to.

How a batch is cut up (ranks, micro-batches, packing, ZeRO stage, recomputation) is not among them: the same groups meet
in a step whatever it is. Nor is what only watches: logging, evaluation, when to save.
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
_SAMPLED_BYTES = 2**16


def run_facts(config: RunConfig, plan: Plan, data: PreparedData) -> dict[str, Any]:
    """The facts of this run, by the names that `allowed_changes` takes."""
    computed = {
        "model": model_fingerprint(config),
        "data": data_fingerprint(data),
        "method": plan.method,
        "compute_dtype": plan.compute_dtype,
        "learning_rate": plan.learning_rate,
        "global_batch_size": plan.global_batch_size,
        "total_steps": plan.total_steps,
    }
    return {name: computed[name] if name in computed else getattr(config, name) for name in RESUME_FACTS}


def data_fingerprint(data: PreparedData) -> str:
    """A hash of the training groups: how many tokens each has, and the whole of some of them."""
    sizes = data.train_sizes
    digest = hashlib.sha256()
    for array in (sizes.num_tokens, sizes.prompt_length, sizes.num_responses):
        digest.update(np.ascontiguousarray(array).tobytes())
    count = len(data.train)
    rows = np.unique(np.linspace(0, count - 1, min(count, _SAMPLED_ROWS)).astype(int)).tolist()
    sample = data.train.select(rows)
    for row in sample:
        digest.update(repr([row[name] for name in ("input_ids", "ranks", "margin", "soft_label")]).encode())
    return f"{count:,} groups, {digest.hexdigest()[:16]}"


def model_fingerprint(config: RunConfig) -> str:
    """The base model: a hub name with its revision, or a folder's configuration and a part of each weight file.

    A folder may move, and two models may have the same shape, so that neither path nor configuration alone will do.
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

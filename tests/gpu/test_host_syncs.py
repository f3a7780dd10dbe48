"""How often the host waits for the GPU in a step that logs nothing: each time the GPU runs dry until the host is back.

What libraries do is printed; what rm_scale does is held. NCCL's own waits and those inside compiled extensions can't be
heard this way.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.gpu import METHODS, needs_gpu, run_watched, seen, small_run

pytestmark = [*needs_gpu, pytest.mark.timeout(1200)]

LISTENED = [3, 4, 5]
MOST_PER_MICRO_BATCH = 1
MOST_PER_STEP = 3
OURS = ("rm_scale", "batch")
"""Waits in our own lines, and those of whoever moves a micro-batch to the device for us."""


def table(waits: list[dict[str, Any]]) -> str:
    """Places with how often they waited, those that waited most first."""
    counts = Counter((wait["owner"], wait["what"], wait["at"]) for wait in waits)
    return "\n".join(f"{count:4} {owner:12} {what:24} {at}" for (owner, what, at), count in counts.most_common())


@pytest.mark.parametrize(
    ("method", "stage"), [("full", "none"), ("full", "zero2"), ("full", "zero3"), ("lora", "zero3"), ("qlora", "none")]
)
def test_the_host_seldom_waits_for_the_device(
    method: str, stage: str, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    words = [*small_run(tiny_model, pairs_file), "--max_steps", "6", "--logging_steps", "100", *METHODS[method]]
    # A row holds few groups, so that a step has several micro-batches.
    words += ["--global_batch_size", "16", "--max_tokens_per_device", "192", "--max_length", "96"]
    words += ["--max_rejected_share", "0.9"] + ([] if stage == "none" else ["--deepspeed", stage])
    done = run_watched(tmp_path, {"run": {"flags": words, "count_waits_in": LISTENED}}, ranks=1)
    assert done.code == 0, done.output[-5000:]
    (record,) = seen(tmp_path, "run")
    waits = record["waits"]
    print(table(waits))
    assert sorted(record["micro_batches"]) == [str(step) for step in LISTENED]
    for step in LISTENED:
        num_micro_batches = record["micro_batches"][str(step)]
        assert num_micro_batches >= 2, "too few to tell what a micro-batch costs"
        ours = [wait for wait in waits if wait["step"] == step and wait["owner"] in OURS]
        per_micro_batch = [wait for wait in ours if wait["in_micro_batch"]]
        per_step = [wait for wait in ours if not wait["in_micro_batch"]]
        assert len(per_micro_batch) <= MOST_PER_MICRO_BATCH * num_micro_batches, table(per_micro_batch)
        assert len(per_step) <= MOST_PER_STEP, table(per_step)


def test_waits_are_heard_at_all(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    """A step that logs reads its meters, so silence there would mean that nobody listens."""
    words = [*small_run(tiny_model, pairs_file), "--max_steps", "3", "--logging_steps", "1"]
    done = run_watched(tmp_path, {"run": {"flags": words, "count_waits_in": [2]}}, ranks=1)
    assert done.code == 0, done.output[-5000:]
    (record,) = seen(tmp_path, "run")
    print(table(record["waits"]))
    assert any("meters.py" in wait["at"] for wait in record["waits"])

"""What a test starts: train a tiny model with its optimizer on the host and print how many bytes of gradients pass.

One rank of several on a processor, where DeepSpeed goes the same way with ZeRO-2; with ZeRO-3 it finds gradients in the
memory that it computes in, so that the size of what it would copy is counted, in each micro-step. Arguments: a JSON
object with `model` (a LlamaConfig's sizes), `zeros` (`zero_optimization` of DeepSpeed files, one after the other),
`micro_steps`, `ranks`, `rank` and `meeting`, a file that the process group may make. Rank 0 prints
the sums over all ranks.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}

import deepspeed
import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from transformers import LlamaConfig, LlamaForSequenceClassification


def watch_partitions() -> list[list[int]]:
    """Note the sizes of ZeRO-3's gradients on the host for each call of a micro-step's reduction."""
    original, noted = DeepSpeedZeroOptimizer_Stage3.partition_grads, []

    def partition(self: Any, params: Any, parts: Any) -> Any:
        assert self.grad_partitions_flat_buffer.device.type == "cpu"
        buffers = original(self, params, parts)
        noted.append([buffer.nbytes for buffer in buffers])
        return buffers

    DeepSpeedZeroOptimizer_Stage3.partition_grads = partition
    return noted


def watch_sums() -> list[list[int]]:
    """Note the sizes of what ZeRO-2 copies between gradients and their sums on the host, by where data is read."""
    original, noted = DeepSpeedZeroOptimizer.async_accumulate_grad_in_cpu_via_gpu, []
    copy = torch.Tensor.copy_

    def accumulate(self: Any, param: Any) -> None:
        sizes: list[int] = []

        def counted(into: torch.Tensor, source: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            sizes.append(source.nbytes)
            return copy(into, source, *args, **kwargs)

        torch.Tensor.copy_ = counted  # type: ignore[method-assign, assignment]
        try:
            original(self, param)
        finally:
            torch.Tensor.copy_ = copy  # type: ignore[method-assign]
        noted.append(sizes)

    DeepSpeedZeroOptimizer.async_accumulate_grad_in_cpu_via_gpu = accumulate
    return noted


def main(case: dict[str, Any]) -> None:
    """Train with each stage."""
    rank, ranks = case["rank"], case["ranks"]
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    meeting = f"file://{case['meeting']}"
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, init_method=meeting, rank=rank, world_size=ranks)
    watched = {2: watch_sums(), 3: watch_partitions()}
    for zero in case["zeros"]:
        train(case, zero, watched[zero["stage"]])


def train(case: dict[str, Any], zero: dict[str, Any], noted: list[list[int]]) -> None:
    """Train two steps; of the second print what passed, and what ZeRO-2 holds."""
    steps = case["micro_steps"]
    model = LlamaForSequenceClassification(LlamaConfig(**case["model"], num_labels=1, pad_token_id=0))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": decayed}, {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}]
    values = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": steps,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    engine, *_ = deepspeed.initialize(model=model, config=values, optimizer=torch.optim.AdamW(groups, lr=1e-4))
    for _ in range(2):
        noted.clear()
        for _ in range(steps):
            engine.backward(engine(input_ids=torch.ones(1, 16, dtype=torch.long)).logits.sum())
            engine.step()
    held = sum(tensor.nbytes for tensor in getattr(engine.optimizer, "accumulated_grads_in_cpu", {}).values())
    sums = torch.tensor([sum(map(sum, noted)), held])
    torch.distributed.all_reduce(sums)
    if case["rank"] == 0:
        print(f"stage {zero['stage']} passed {sums[0]} held {sums[1]} end")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

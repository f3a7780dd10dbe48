"""What a test starts: train a tiny model with its weights on the host and print how many elements each step copies.

One rank on a processor, where a copy is the host's own memory again: its size is what is counted. Arguments: a JSON
object with `model` (a LlamaConfig's sizes), `lora`, `zero` (a DeepSpeed file's `zero_optimization`) and `meeting`, a
file that the process group may make.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from transformers import LlamaConfig, LlamaForSequenceClassification

STEPS = 3
"""In the first DeepSpeed records the order of modules, in the second it fetches by it; the last is counted."""


def watch_copies() -> list[int]:
    """Let DeepSpeed add what it copies from the host, in elements of a rank's parts, to the result's only entry."""
    name = "_PartitionedParameterCoordinator__all_gather_params_"
    original = getattr(PartitionedParameterCoordinator, name)
    copied = [0]

    def gather(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        absent = [p for p in params if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        assert all(p.ds_tensor.device.type == "cpu" for p in absent)
        copied[0] += sum(p.partition_numel() for p in absent)
        return original(self, params, *args, **kwargs)

    setattr(PartitionedParameterCoordinator, name, gather)
    return copied


def build(sizes: dict[str, int], lora: bool) -> torch.nn.Module:
    """Make a model with recomputation, as rm_scale does: reentrant beside frozen weights under ZeRO-3."""
    model = LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=1, pad_token_id=0)).to(torch.bfloat16)
    model.config.use_cache = False
    if lora:
        from peft import LoraConfig, get_peft_model

        model.enable_input_require_grads()
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", r=16)).to(
            torch.bfloat16
        )
    model.gradient_checkpointing_enable({"use_reentrant": lora})
    return model


def main(case: dict[str, Any]) -> None:
    """Train and print the last step's copied elements."""
    meeting = f"file://{case['meeting']}"
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, init_method=meeting, rank=0, world_size=1)
    copied = watch_copies()
    model = build(case["model"], case["lora"])
    values = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": case["zero"],
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    engine, *_ = deepspeed.initialize(model=model, config=values, optimizer=optimizer)
    for _ in range(STEPS):
        copied[0] = 0
        engine.backward(engine(input_ids=torch.ones(1, 16, dtype=torch.long)).logits.sum())
        engine.step()
    print(f"copied {copied[0]}")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

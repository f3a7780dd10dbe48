"""What the launcher starts to get real checkpoints of ZeRO's shards: `shard_writer.py MODEL FOLDER`.

As transformers' Trainer leaves them when it does not gather weights: config and tokenizer, `latest`, `global_stepN/`.
For each stage `FOLDER/zero<stage>`, and beside it the fp32 weights that DeepSpeed itself gathers.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rm_scale.distributed import detect_world, init_process_group, prepare_environment
from rm_scale.guard import leave
from rm_scale.launch.extensions import prepare_extensions

NUM_STEPS = 2


def write(base: str, folder: Path, stage: int) -> None:
    """Train two steps under this stage, and save."""
    torch.manual_seed(3)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
    }
    model: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model.config.pad_token_id = tokenizer.pad_token_id
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    ids = torch.arange(5, 25)[None] + torch.distributed.get_rank()
    for _ in range(NUM_STEPS):
        engine.backward(engine(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().square().sum())
        engine.step()
    weights = {name: safe_get_full_fp32_param(weight).clone() for name, weight in model.named_parameters()}
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_file(weights, folder.with_suffix(".safetensors"))
    torch.distributed.barrier()
    engine.save_checkpoint(str(folder), tag=f"global_step{NUM_STEPS}")
    engine.destroy()


def main(base: str, folder: str) -> int:
    """Both stages, in one process group."""
    world = detect_world()
    prepare_environment(world)
    prepare_extensions(world.local_rank)
    init_process_group(world, uses_deepspeed=True, timeout_seconds=300)
    for stage in (2, 3):
        write(base, Path(folder) / f"zero{stage}", stage)
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    leave(main(*sys.argv[-2:]))

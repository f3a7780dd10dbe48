"""TRL at its best on one GPU: plain `trl.RewardTrainer` at several micro-batches, one after the other on one model.

Started with a JSON object as its last argument: what `packing_worker.trl_arguments` takes, "candidates"
[[micro-batch, gradient checkpointing], ...], "seconds" after which none is begun, and "answer", the file that says how
each ended. A candidate leaves in its folder what a throughput peer leaves. Running out of memory ends a candidate only.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != HERE]
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from packing_worker import trl_arguments  # noqa: E402
from throughput_peer import watch, write_settings  # noqa: E402


def trainer_of(job: dict[str, Any], model: Any, data: Any, world: Any) -> Any:
    """Make TRL's trainer on a folder, or on the model that an earlier candidate has made of it."""
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import RewardTrainer

    lora = LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    arguments = trl_arguments(job, world.size)
    if not isinstance(model, str):
        arguments.model_init_kwargs = None
    return RewardTrainer(
        model=model,
        args=arguments,
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        train_dataset=data,
        peft_config=lora if isinstance(model, str) else None,
    )


def run_candidate(job: dict[str, Any], model: Any, data: Any, world: Any) -> tuple[Any, dict[str, Any]]:
    """Train; return the model and how it ended."""
    import torch

    from rm_scale.texts import one_line
    from rm_scale.training.step_timing import load_record

    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    try:
        trainer = trainer_of(job, model, data, world)
        load = {**load_record(0.0), "load_seconds": round(time.perf_counter() - started, 2)}
        model = trainer.model
        write_settings(trainer, job, folder / "run_config.yaml")
        watch(trainer, folder, load, world)
        trainer.train()
        saving = time.perf_counter()
        trainer.save_model(str(folder / "saved"))
        ended = {"status": "ok", "reason": "", "save_seconds": round(time.perf_counter() - saving, 2)}
    except (torch.OutOfMemoryError, MemoryError) as error:
        ended = {"status": "out_of_memory", "reason": one_line(error, 300)}
    trainer = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return model, {**ended, "seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    """Try the candidates in their order."""
    job = json.loads(next(word for word in sys.argv[1:] if word.startswith("{")))
    from datasets import load_dataset

    from rm_scale.distributed import detect_world
    from rm_scale.reporting.run.run_directory import environment

    began, world = time.perf_counter(), detect_world()
    found: list[dict[str, Any]] = []
    env = json.dumps(environment())
    data = load_dataset("json", data_files=job["data"], split="train", cache_dir=job["cache"])
    data = data.select_columns(["prompt", "chosen", "rejected"])
    model: Any = job["model"]
    for micro_batch, checkpointing in job["candidates"]:
        last = max((one["seconds"] for one in found), default=0.0)
        if found and time.perf_counter() - began + last > job["seconds"]:
            ended = {"status": "skipped", "reason": "no time left"}
        else:
            one = {**job, "micro_batch": micro_batch, "checkpointing": checkpointing}
            one["folder"] = f"{job['folder']}/{micro_batch}{'-checkpointing' if checkpointing else ''}/run"
            one["name"] = "out"
            model, ended = run_candidate(one, model, data, world)
            Path(one["folder"], "environment.json").write_text(env, encoding="utf-8")
        found.append({"micro_batch": micro_batch, "checkpointing": checkpointing, **ended})
        Path(job["answer"]).write_text(json.dumps(found), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

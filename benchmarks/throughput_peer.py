"""The peer's side of a `throughput.py` case: plain `trl.RewardTrainer`, timed as our own runs are.

Started with a JSON object as its last argument, by itself or under the `deepspeed` launcher, and writes the files that
a run of ours leaves in its `run/`: steps.jsonl, metrics.jsonl, timing.json, environment.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import yaml
from packing_worker import build_trl

Counts = dict[str, int]


def counts_of(batches: list[dict[str, Any]]) -> Counts:
    """Count tokens and pairs of a step on this rank, from its padded batches."""
    total = dict.fromkeys(("pairs", "real", "processed", "squares", "attended_pairs"), 0)
    for batch in batches:
        mask = batch["attention_mask"]
        rows, width = mask.shape
        lengths = mask.sum(-1)
        total["pairs"] += rows // 2
        total["real"] += int(lengths.sum())
        total["processed"] += mask.numel()
        total["squares"] += int((lengths * lengths).sum())
        total["attended_pairs"] += rows * width * (width + 1) // 2
    return total


def watch(trainer: Any, folder: Path, load: dict[str, Any], world: Any) -> None:
    """Time the trainer's steps and count their tokens, from the request for data to the step's end."""
    from transformers import TrainerCallback

    from rm_scale.distributed import gather_from_ranks
    from rm_scale.training.step_timing import StepTimes

    times = StepTimes(folder, uses_ddp=not trainer.is_deepspeed_enabled)
    times.load = load
    taken: list[Counts] = []
    losses: dict[int, float] = {}
    take = trainer.get_batch_samples

    def timed(*arguments: Any, **named: Any) -> Any:
        times.begin()
        found = take(*arguments, **named)
        times.data_read()
        if found[0]:
            taken.append(counts_of(found[0]))
        return found

    class Losses(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **unused: Any) -> None:
            if logs and "loss" in logs:
                losses[state.global_step] = float(logs["loss"])

        def on_train_end(self, *unused: Any, **also_unused: Any) -> None:
            ranks = gather_from_ranks(taken)
            if world.is_main:
                write_metrics(ranks, losses, folder / "metrics.jsonl")

    trainer.get_batch_samples = timed
    trainer.add_callback(times)
    trainer.add_callback(Losses())


def write_metrics(ranks: list[list[Counts]], losses: dict[int, float], path: Path) -> None:
    """Write a line per step with the counts of all ranks. Nothing is shared in padded rows."""
    with path.open("w", encoding="utf-8") as file:
        for number, parts in enumerate(zip(*ranks, strict=True), 1):
            total = {name: sum(part[name] for part in parts) for name in parts[0]}
            pairs = total.pop("pairs")
            line = {"step": number, "num_pairs": pairs, "loss": losses.get(number)}
            file.write(json.dumps({**line, "num_tokens": {**total, "effective": total["real"]}}) + "\n")


def write_settings(trainer: Any, job: dict[str, Any], path: Path) -> None:
    """Write all of TRL's arguments, and those that it was made with."""
    settings = json.loads(json.dumps({**trainer.args.to_dict(), "job": job}, default=str))
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def main() -> None:
    """Train as told."""
    job = json.loads(next(word for word in sys.argv[1:] if word.startswith("{")))
    from rm_scale.distributed import barrier, detect_world, prepare_environment
    from rm_scale.launch.extensions import prepare_extensions
    from rm_scale.reporting.run.run_directory import environment
    from rm_scale.training.step_timing import load_record

    world = detect_world()
    if job["deepspeed"]:
        prepare_environment(world)
        prepare_extensions(world.local_rank)
    trainer = build_trl(job, world)
    folder = Path(job["folder"])
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "environment.json").write_text(json.dumps(environment()), encoding="utf-8")
        write_settings(trainer, job, folder / "run_config.yaml")
    # TRL loads and tokenises in one call: a time for loading alone, as ours is, can't be told apart.
    watch(trainer, folder, {**load_record(0.0), "load_seconds": None}, world)
    trainer.train()
    barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

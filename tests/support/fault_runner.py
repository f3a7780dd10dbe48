"""What the launcher starts for the fault tests: train several cases in one process, with real faults on chosen ranks.

The faults are real ones (a signal that the process sends itself, a limit on file sizes, a sleep, a NaN in the loss, a
kill); only the moment is arranged: a signal of step 0 comes before the run has begun. Each case writes its exit code
per rank to `codes-RANK.json`, and the next follows.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState

from rm_scale.distributed import detect_world, init_process_group, prepare_environment
from rm_scale.guard import leave
from rm_scale.launch.extensions import prepare_extensions
from rm_scale.train import main
from rm_scale.training import preemption

Fault = dict[str, Any]


def fail(fault: Fault, trainer: Any) -> None:
    """Do what a fault says, now."""
    if fault["do"] == "signal":
        os.kill(os.getpid(), getattr(signal, fault["name"]))
    elif fault["do"] == "sleep":
        time.sleep(fault["seconds"])
    elif fault["do"] == "end":  # an administrator moves the end of the job
        os.environ["RM_SCALE_END_TIME"] = str(time.time() + fault["seconds_left"])
    elif fault["do"] == "stop_file":
        (Path(trainer.args.output_dir) / preemption.STOP_FILE).touch()
    elif fault["do"] == "memory":
        torch.empty(2**50, dtype=torch.uint8)


def due(faults: list[Fault], step: int, rank: int, *kinds: str) -> Iterator[Fault]:
    """The faults of these kinds that meet this rank in this step."""
    for fault in faults:
        first, last = fault.get("step", 0), fault.get("last", fault.get("step", 10**9))
        if fault["do"] in kinds and first <= step <= last and fault.get("rank", rank) == rank:
            yield fault


@contextmanager
def small_files(limit: int | None) -> Iterator[None]:
    """No file may grow beyond this many bytes: the system refuses the write, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def arrange(faults: list[Fault], rank: int) -> Callable[[], None]:
    """Let the trainer meet these faults; gives what takes them away again."""
    from rm_scale.training.trainer import RewardTrainer

    training_step, compute_loss, save = (
        RewardTrainer.training_step,
        RewardTrainer.compute_loss,
        RewardTrainer._save_checkpoint,
    )

    def faulty_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        for fault in due(faults, self.state.global_step + 1, rank, "signal", "sleep", "end", "stop_file", "memory"):
            fail(fault, self)
        return training_step(self, *args, **kwargs)

    def faulty_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(self, *args, **kwargs)
        for _ in due(faults, self.state.global_step + 1, rank, "nan"):
            loss = loss * float("nan")
        return loss

    def faulty_save(self: Any, *args: Any, **kwargs: Any) -> Any:
        limits = [fault["bytes"] for fault in due(faults, self.state.global_step, rank, "small_files")]
        with small_files(min(limits, default=None)):
            return save(self, *args, **kwargs)

    RewardTrainer.training_step = faulty_step  # type: ignore[method-assign]
    RewardTrainer.compute_loss = faulty_loss  # type: ignore[method-assign]
    RewardTrainer._save_checkpoint = faulty_save  # type: ignore[method-assign]

    def restore() -> None:
        RewardTrainer.training_step = training_step  # type: ignore[method-assign]
        RewardTrainer.compute_loss = compute_loss  # type: ignore[method-assign]
        RewardTrainer._save_checkpoint = save  # type: ignore[method-assign]

    return restore


def run_all(path: Path) -> int:
    """Train every case of the file, whatever the exit code of the one before."""
    preemption.watch_signals()
    world = detect_world()
    prepare_environment(world)
    prepare_extensions(world.local_rank)
    init_process_group(world, uses_deepspeed=True, timeout_seconds=300)
    codes: dict[str, int] = {}
    for name, case in json.loads(path.read_text()).items():
        if world.is_main:
            print(f"=== case {name}", flush=True)
        restore = arrange(case["faults"], world.rank)
        if "seconds_left" in case:
            os.environ["RM_SCALE_END_TIME"] = str(time.time() + case["seconds_left"])
        if "limit" in case:
            os.environ["RM_SCALE_START_TIME"] = str(time.time() + case["seconds_left"] - case["limit"])
        for fault in due(case["faults"], 0, world.rank, "signal"):
            fail(fault, None)
        codes[name] = main(case["flags"])
        path.with_name(f"codes-{world.rank}.json").write_text(json.dumps(codes))
        for variable in ("RM_SCALE_END_TIME", "RM_SCALE_START_TIME"):
            os.environ.pop(variable, None)
        restore()
        preemption.forget_signals()
        # The next case is another run: accelerate keeps its state in class attributes.
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    leave(run_all(Path(sys.argv[-1])))

"""Train on the stand-in, and write what made the host wait for the device, and what was reduced, in each step.

    python tests/support/cuda_standin/count_waits.py FOLDER SETTINGS...      (or behind a launcher)

Each rank writes FOLDER/rank-N.json: a list of `{"step", "micro_steps", "kind", "what", "bytes", "package", "line"}`.
`kind` is "wait" or "reduction", `package` that of the innermost frame that belongs to one of the packages below.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import standin

from rm_scale.distributed import detect_world
from rm_scale.guard import leave
from rm_scale.train import main

PACKAGES = ("rm_scale", "trl", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes")


def owner(stack: list[Any]) -> tuple[str, str]:
    """Return the package that asked for it, and its line."""
    for frame in reversed(stack):
        parts = Path(frame.filename).parts
        found = [package for package in PACKAGES if package in parts]
        if found:
            return found[-1], f"{Path(frame.filename).name}:{frame.lineno} {frame.line}"
    return "autograd", "a thread of its own"


def run(folder: Path, settings: list[str]) -> int:
    """Train, with every step watched from the request for its data to the end of its callbacks."""
    found: list[dict[str, Any]] = []
    micro_steps: dict[int, int] = {}
    step = [0]

    def watch_steps() -> None:
        from rm_scale.training.trainer import RewardTrainer

        get_batches, train_step = RewardTrainer.get_batch_samples, RewardTrainer.training_step

        def get_batch_samples(self: Any, *args: Any, **kwargs: Any) -> Any:
            step[0] = self.state.global_step + 1
            return get_batches(self, *args, **kwargs)

        def training_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            micro_steps[step[0]] = len(inputs["micro_batches"])
            return train_step(self, model, inputs, *args, **kwargs)

        RewardTrainer.get_batch_samples = get_batch_samples  # type: ignore[method-assign]
        RewardTrainer.training_step = training_step  # type: ignore[method-assign]

    def note(kind: str, what: str, size: int, stack: list[Any]) -> None:
        package, line = owner(stack)
        found.append({"step": step[0], "kind": kind, "what": what, "bytes": size, "package": package, "line": line})

    rank = detect_world().rank
    from rm_scale import training_run

    build = training_run.build_trainer

    def build_trainer(*args: Any, **kwargs: Any) -> Any:
        watch_steps()
        return build(*args, **kwargs)

    training_run.build_trainer = build_trainer
    with standin.listening(note):
        code = main(settings)
    for event in found:
        event["micro_steps"] = micro_steps.get(event["step"], 0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank-{rank}.json").write_text(json.dumps(found, indent=1))
    return code


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    leave(run(Path(words[0]), words[1:]))

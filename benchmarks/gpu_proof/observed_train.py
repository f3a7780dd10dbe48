"""`rm_scale/train.py` with two looks into its steps: which calls block the host, and which kernels take the time.

Started as the training script is, with RM_SCALE_GPU_PROOF_OBSERVE={"warmup": N, "counted": N, "profiled": N,
"answer": FILE, "device": "cuda" or "cpu"}. Steps are taken from one step's end to the next one's, so that logging and
the reading of data belong to them. The process ends after the last profiled step: nothing is saved.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
# Python puts this file's folder first, where modules have everyday names.
sys.path[:] = [
    str(REPOSITORY),
    *(place for place in sys.path if Path(place or ".").resolve() not in (HERE, REPOSITORY)),
]

OBSERVE = "RM_SCALE_GPU_PROOF_OBSERVE"


def main(arguments: list[str]) -> int:
    """Train as `rm_scale/train.py` does, observed."""
    from rm_scale import distributed, train

    job = json.loads(os.environ[OBSERVE])
    make_group = distributed.init_process_group

    def with_observer(world: Any, *more: Any, **named: Any) -> bool:
        owns = make_group(world, *more, **named)
        from benchmarks.gpu_proof.step_observer import StepObserver
        from rm_scale import training_run

        build = training_run.build_trainer

        def observed(*given: Any, **by_name: Any) -> Any:
            trainer = build(*given, **by_name)
            trainer.add_callback(StepObserver(trainer, job, world.is_main))
            return trainer

        training_run.build_trainer = observed
        return owns

    setattr(train, "init_process_group", with_observer)  # noqa: B010 - the name as `train` imported it
    return train.main(arguments)


if __name__ == "__main__":
    from rm_scale.guard import leave

    leave(main(sys.argv[1:]))

"""Start `rm_scale/train.py` for tests, which waits at chosen moments until it may go on.

Only the moment is arranged, so that a test can fill a disk or move a time limit there, however busy the machine is.
`RM_SCALE_TEST_GATES` names a folder: where it holds `stop-N`, rank 0 writes its process id to `at-N` at the end of step
N and waits for `go-N`. A number of seconds in that file becomes what is left of the job's time. With `stop-save` it
waits in the same way in the middle of its first checkpoint.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
_calls = iter(range(10**9))


def wait_at_gate(folder: Path, gate: int | str) -> None:
    """Wait at the end of a step, or in a save, if that is asked for."""
    if not (folder / f"stop-{gate}").exists():
        return
    written = folder / f"at-{gate}.part"
    written.write_text(str(os.getpid()))
    written.rename(folder / f"at-{gate}")
    while not (folder / f"go-{gate}").exists():
        time.sleep(0.02)
    seconds = (folder / f"go-{gate}").read_text()
    if seconds:
        os.environ["RM_SCALE_END_TIME"] = str(time.time() + float(seconds))


def wait_in_saves(folder: Path) -> None:
    """Let the trainer wait while it writes a model."""
    from rm_scale.training.trainer import RewardTrainer  # imports torch: only once training has done so

    plain = RewardTrainer._save

    def gated(*args: Any, **kwargs: Any) -> None:
        wait_at_gate(folder, "save")
        plain(*args, **kwargs)

    RewardTrainer._save = gated  # type: ignore[method-assign]


def main() -> None:
    """Run train.py as the interpreter would."""
    from rm_scale.training import preemption  # nothing heavy comes with it

    folder, first = Path(os.environ["RM_SCALE_TEST_GATES"]), int(os.environ.get("RM_SCALE_TEST_FIRST_STEP", "0"))
    plain = preemption.reason_now  # called once before training, and once at the end of each step

    def gated(*args: Any, **kwargs: Any) -> preemption.StopReason:
        step = first + next(_calls)
        if step == first and (folder / "stop-save").exists():
            wait_in_saves(folder)
        if os.environ.get("RANK", "0") == "0":
            wait_at_gate(folder, step)
        return plain(*args, **kwargs)

    preemption.reason_now = gated
    script = str(REPOSITORY / "rm_scale" / "train.py")
    sys.argv = [script, *(word for word in sys.argv[1:] if not word.startswith("--local_rank"))]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()

"""What the launcher starts for `run_cases`: train several cases in one process, since importing takes longest."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState

from rm_scale.distributed import detect_world, init_process_group, prepare_environment
from rm_scale.guard import leave
from rm_scale.launch.extensions import prepare_extensions
from rm_scale.train import main


def run_all(path: Path) -> int:
    """Train every case of the file; the first that fails ends it with its code."""
    world = detect_world()
    prepare_environment(world)
    prepare_extensions(world.local_rank)
    init_process_group(world, uses_deepspeed=True, timeout_seconds=300)
    for name, flags in json.loads(path.read_text()).items():
        code = main(flags)
        print(f"case {name} rank {world.rank}: exit code {code}", flush=True)
        if code:
            return code
        # The next case is another run: accelerate keeps its state in class attributes.
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    leave(run_all(Path(sys.argv[-1])))

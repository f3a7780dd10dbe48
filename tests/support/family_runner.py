"""What the launcher starts for tests of families: train many small cases in one process, and write down how each ended.

A case that fails does not end the others, as long as it fails on all ranks alike.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from transformers.integrations import deepspeed as hf_deepspeed

from rm_scale.distributed import detect_world, gather_from_ranks, init_process_group, prepare_environment
from rm_scale.guard import leave
from rm_scale.launch.extensions import prepare_extensions
from rm_scale.train import main


def run_all(path: Path) -> int:
    """Train every case of the file; `outcomes.json` beside it holds the exit codes and seconds of each."""
    world = detect_world()
    prepare_environment(world)
    prepare_extensions(world.local_rank)
    init_process_group(world, uses_deepspeed=True, timeout_seconds=300)
    outcomes = {}
    for name, flags in json.loads(path.read_text()).items():
        print(f"=== case {name}\n" if world.is_main else "", end="", flush=True)
        started = time.perf_counter()
        code = main(flags)
        outcomes[name] = {"codes": gather_from_ranks(code), "seconds": round(time.perf_counter() - started, 2)}
        if world.is_main:
            (path.parent / "outcomes.json").write_text(json.dumps(outcomes))
        # The next case is another run: accelerate keeps its state in class attributes, transformers its engine's.
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        hf_deepspeed.unset_hf_deepspeed_config()
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    leave(run_all(Path(sys.argv[-1])))

"""Measure this machine with all ranks at once.

A run uses the machine in the same way: ranks on processors share cores and memory, GPUs share power and links.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from rm_scale.errors import UserError
from rm_scale.hardware_bench.measured import Measured
from rm_scale.launch.ranks import start_ranks
from rm_scale.logs import get_logger

logger = get_logger(__name__)

_START_SECONDS = 300
"""Time allowed for importing torch from a slow disk and making the process group, before anything is measured."""


def measure(num_ranks: int, seconds: float) -> Measured:
    """Start the ranks and return what they measured.

    Args:
        num_ranks: on this machine.
        seconds: that the measurements may take together.

    Raises:
        UserError: they failed, or did not end.
    """
    logger.info(f"measuring with {num_ranks} ranks at once for about {seconds:.0f} s, besides starting them")
    with tempfile.TemporaryDirectory(prefix="rm_scale_bench_") as folder:
        answer = Path(folder) / "measured.json"
        job = json.dumps({"answer": str(answer), "seconds": seconds})
        ended = start_ranks("rm_scale.hardware_bench.worker", [job], num_ranks, _START_SECONDS + 5 * seconds)
        if ended.code != 0 or not answer.is_file():
            how = "did not end" if ended.code is None else f"ended with code {ended.code}"
            raise UserError(f"the ranks {how}; they printed: {ended.tail()}. Fix: rm-scale doctor --nproc {num_ranks}.")
        return Measured.from_dict(json.loads(answer.read_text(encoding="utf-8")))

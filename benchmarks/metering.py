"""What it costs a run to be measured: the share of its steps spent in meters and callbacks, on one rank.

    python benchmarks/metering.py [--model MODEL_DIR] [--steps 20]

Trains on made pairs with every hook of ours that measures wrapped in a clock of its own, and adds these clocks up. That
counts too much rather than too little: the wrapping clocks' own time is in it. Record: results/metering.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).resolve().parent)]

OUTPUT = REPOSITORY / "benchmarks" / "results" / "metering.json"


class Clocks:
    """Seconds by what was wrapped."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, owner: Any, name: str) -> None:
        """Replace a method by one that is timed."""
        plain: Callable[..., Any] = getattr(owner, name)
        label = f"{owner.__name__}.{name}"
        self.seconds[label] = 0.0

        @functools.wraps(plain)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return plain(*args, **kwargs)
            finally:
                self.seconds[label] += time.perf_counter() - started

        setattr(owner, name, timed)


def main() -> None:
    """Train, add up, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: a model of 6 layers of 256, made here")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    from workloads import MIXES, synthetic_pairs, tokens_per_word, write_rows

    from rm_scale.demo.assets import make_tiny_model
    from rm_scale.train import main as train
    from rm_scale.training.callbacks import MetricsFile, StepInLogs
    from rm_scale.training.meters import StepMeter
    from rm_scale.training.plan_check import PlanCheck
    from rm_scale.training.step_timing import StepTimes

    clocks = Clocks()
    for owner, names in {
        StepMeter: ("add", "read", "resume", "pause"),
        StepTimes: ("begin", "data_read", "on_step_end"),
        PlanCheck: ("on_step_begin", "on_step_end", "on_log"),
        MetricsFile: ("on_log",),
        StepInLogs: ("on_step_begin",),
    }.items():
        for name in names:
            clocks.wrap(owner, name)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = (
            Path(options.model) if options.model else make_tiny_model(work / "m", hidden_size=256, layers=6, heads=4)
        )
        rows = synthetic_pairs(MIXES["hh-like"], tokens_per_word(model), 16 * (options.steps + 1), 1024)
        arguments = ["--model_name_or_path", str(model), "--dataset_path", write_rows(rows, work / "pairs.jsonl")]
        arguments += ["--output_dir", str(work / "run"), "--max_steps", str(options.steps), "--global_batch_size", "16"]
        arguments += ["--max_length", "1024", "--logging_steps", "1", "--save_strategy", "no", "--sample_scores", "0"]
        train([*arguments, "--disable_tqdm", "true"])
        lines = (work / "run" / "run" / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    total = sum(json.loads(line)["seconds"] for line in lines)
    share = sum(clocks.seconds.values()) / total
    record = {
        "model": Path(options.model).name if options.model else "6 layers of 256",
        "steps": len(lines),
        "logged": "every step",
        "step_seconds_in_all": round(total, 3),
        "share": round(share, 5),
        "seconds": {name: round(value, 5) for name, value in clocks.seconds.items()},
    }
    OUTPUT.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()

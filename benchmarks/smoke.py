"""Do the benchmarks still run, and is packing still as much faster than padding? Ratios only: machines differ.

    make bench-smoke            compare with results/smoke.json; exit code 1 when a ratio has fallen by a third
    python -m benchmarks.smoke --write      take what is measured now as the new reference

A small model (6 layers of 256) on pairs with long shared prompts, through `throughput.py`: ours in three layouts and
plain TRL. Under five minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent
REFERENCE = BENCHMARKS / "results" / "smoke.json"
ALLOWED_LOSS = 1 / 3
"""Ratios of short runs on a shared machine vary by a tenth or two; what is broken halves them."""


def measure(folder: Path) -> dict[str, float]:
    """Run the grid; return the ratios of pairs per second by name."""
    from rm_scale.demo.assets import make_tiny_model
    from rm_scale.reporting.benchmarks.record_tables import ratio_of
    from rm_scale.reporting.benchmarks.sealed_records import read_records

    model = make_tiny_model(folder / "model", hidden_size=256, layers=6, heads=4)
    arguments = ["--tier", str(model), "--methods", "full", "--packing", "all", "--peers", "trl", "--steps", "6"]
    arguments += ["--warmup", "2", "--global_batch_size", "16", "--micro_batch", "4", "--work", str(folder / "work")]
    arguments += ["--results", str(folder / "results"), "--data", "hh-like", "--time_limit", "240"]
    subprocess.run([sys.executable, str(BENCHMARKS / "throughput.py"), *arguments], check=True)
    found = {(r.case.system, r.case.packing): r for r in read_records([folder / "results"]).records}
    trl, none = found["trl", "padding"], found["rm_scale", "none"]
    free, shared = found["rm_scale", "padding_free"], found["rm_scale", "prefix_shared"]
    pairs = {
        "prefix_shared over TRL": (trl, shared),
        "padding_free over TRL": (trl, free),
        "none over TRL": (trl, none),
        "prefix_shared over padding_free": (free, shared),
    }
    ratios = {name: ratio_of(slow, fast) for name, (slow, fast) in pairs.items()}
    return {name: round(ratio.value, 3) for name, ratio in ratios.items() if ratio is not None}


def compare(now: dict[str, float], reference: dict[str, float]) -> list[str]:
    """Return what has fallen too far or is missing, a sentence each."""
    problems = [f"{name}: not measured any more" for name in reference if name not in now]
    for name, value in now.items():
        before = reference.get(name)
        if before is not None and value < before * (1 - ALLOWED_LOSS):
            problems.append(f"{name}: {value:.2f}, and it was {before:.2f}")
    return problems


def main() -> int:
    """Measure and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="make this the reference")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        now = measure(Path(folder))
    reference = json.loads(REFERENCE.read_text(encoding="utf-8")) if REFERENCE.is_file() else {}
    for name, value in now.items():
        print(f"{name}: {value:.2f}" + (f" (reference {reference[name]:.2f})" if name in reference else ""))
    if options.write:
        REFERENCE.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
        return 0
    problems = compare(now, reference)
    if not reference:
        problems.append(f"{REFERENCE.name}: not there. Fix: --write makes one")
    for problem in problems:
        print(f"failed: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

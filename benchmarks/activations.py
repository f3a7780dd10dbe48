"""Compare predicted activation memory and operations with what torch counts for real models at their real sizes.

    python benchmarks/activations.py [--cases TEXT ...] [--output FILE.json]

No GPU and hardly any memory is used: tensors are fake, with sizes and types but no content (`activation_counts.py`).

What is counted: all tensors that torch's MemTracker sees beside parameters, buffers and the batch. A weight's gradient
counts until autograd hands it over, as ZeRO takes it at once. A few small steps are also run for real, and compared
with what torch's CPU allocator gave out. The models are transformers' own classes with this package's head, packed rows
and adapters. Operations are FlopCounterMode's, which ignores causality; so does the prediction it is compared with.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY)]

from benchmarks.activation_cases import Case, all_cases, allocator_cases  # noqa: E402
from benchmarks.activation_counts import measure, measure_allocator  # noqa: E402
from benchmarks.pictures import Point, scatter  # noqa: E402
from rm_scale.planning.activations.activation_memory import ActivationMemory, activation_memory  # noqa: E402
from rm_scale.planning.flops import executed_flops  # noqa: E402


def predict(case: Case, as_tracked: bool = True) -> ActivationMemory:
    """Return the planner's estimate: `as_tracked` for comparing, else as a GPU has it."""
    return activation_memory(case.shape, case.row, replace(case.options, as_tracked=as_tracked))


def predict_flops(case: Case) -> float:
    """Count operations as FlopCounterMode does: each query sees all keys of the longest sequence."""
    options, length = case.options, case.prompt + case.response
    return executed_flops(
        case.shape,
        case.row.tokens,
        2 * length**2,
        checkpointing=options.checkpointing == "full",
        use_reentrant=options.use_reentrant,
        lora_rank=None if options.method == "full" else options.lora_rank,
        lora_parameters=options.lora_parameters,
    )


def compare(case: Case) -> dict[str, Any]:
    """Return measured and predicted figures of a case, errors as shares of what was measured."""
    start = time.perf_counter()
    measured, predicted, on_device = measure(case), predict(case), predict(case, as_tracked=False)
    flops, counts = predict_flops(case), case.options.attention != "matmul" and not case.options.head.startswith("lm")
    total = sum(measured.flops.values())
    return {
        "case": case.name,
        "model": case.model,
        "row": asdict(case.row),
        "options": asdict(case.options),
        "measured": {"stored_bytes": measured.stored_bytes, "peak_bytes": measured.peak_bytes, "flops": measured.flops},
        "predicted": {
            "stored_bytes": predicted.stored_bytes,
            "peak_bytes": predicted.peak_bytes,
            "moment": predicted.moment,
            "flops": flops if counts else None,
        },
        "predicted_on_device": {"peak_bytes": on_device.peak_bytes, "moment": on_device.moment},
        "peak_error": predicted.peak_bytes / measured.peak_bytes - 1,
        "stored_error": predicted.stored_bytes / measured.stored_bytes - 1,
        "flops_error": flops / total - 1 if counts else None,
        "seconds": time.perf_counter() - start,
    }


def compare_allocator(case: Case) -> dict[str, Any]:
    """Return the allocator's peak and the predicted one."""
    measured, predicted = measure_allocator(case), predict(case, as_tracked=False).peak_bytes
    return {
        "case": case.name,
        "layers": case.num_layers,
        "vocabulary": case.vocab_size,
        "measured_peak_bytes": measured,
        "predicted_peak_bytes": predicted,
        "peak_error": predicted / measured - 1,
    }


def environment() -> dict[str, str]:
    """Return the versions that the figures belong to."""
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def run_fake(cases: list[Case], explains: bool) -> list[dict[str, Any]]:
    """Compare with what torch counts, and print a line for each case."""
    print("GB; errors of prediction in %; device: predicted for a GPU, whose kernels need space of their own")
    print(f"{'measured':>9} {'predicted':>9} {'device':>9} {'peak':>7} {'stored':>7} {'FLOPs':>7}  case")
    rows = []
    for case in cases:
        rows.append(compare(case))
        row = rows[-1]
        peaks = [row[name]["peak_bytes"] / 1e9 for name in ("measured", "predicted", "predicted_on_device")]
        flops = "" if row["flops_error"] is None else f"{100 * row['flops_error']:+.2f}"
        print(
            " ".join(f"{peak:9.3f}" for peak in peaks)
            + f" {100 * row['peak_error']:+7.2f} {100 * row['stored_error']:+7.2f} {flops:>7}  {row['case']}",
            flush=True,
        )
        if explains:
            print(predict(case, as_tracked=False).explain())
    return rows


def run_allocator(cases: list[Case]) -> list[dict[str, Any]]:
    """Compare with what torch's CPU allocator gave out, and print a line for each case."""
    print("real CPU tensors, MB")
    rows = []
    for case in cases:
        rows.append(compare_allocator(case))
        row = rows[-1]
        peaks = [row[name] / 1e6 for name in ("measured_peak_bytes", "predicted_peak_bytes")]
        print(f"{peaks[0]:9.3f} {peaks[1]:9.3f} {100 * row['peak_error']:+7.2f}  {row['case']}", flush=True)
    return rows


RECORD = REPOSITORY / "benchmarks" / "results" / "fake" / "activations.json"


def draw(record: dict[str, Any]) -> None:
    """Draw the record's peaks, predicted against measured, for docs/planning_validation.md."""
    points = [
        Point(row["measured"]["peak_bytes"] / 1e9, row["predicted"]["peak_bytes"] / 1e9, row["model"])
        for row in record["fake_tensors"]
    ]
    title = f"peak of activations: {len(points)} cases on fake tensors, grey: 5 % off"
    scatter(points, "GB", 0.05, title, REPOSITORY / "docs" / "pictures" / "activations.svg")


def main() -> int:
    """Run the cases, print a table, write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", help="only cases whose name holds all these texts; none run for real")
    parser.add_argument("--explain", action="store_true", help="print what makes up each peak")
    parser.add_argument("--output", help="default benchmarks/results/fake/activations.json, if all cases are run")
    parser.add_argument("--draw", action="store_true", help="only draw the picture of the committed record anew")
    arguments = parser.parse_args()
    if arguments.draw:
        draw(json.loads(RECORD.read_text(encoding="utf-8")))
        return 0
    wanted = arguments.cases or []
    rows = run_fake([case for case in all_cases() if all(text in case.name for text in wanted)], arguments.explain)
    real = [] if wanted else run_allocator(allocator_cases())
    worst = max(abs(row["peak_error"]) for row in [*rows, *real])
    worst_flops = max((abs(row["flops_error"]) for row in rows if row["flops_error"] is not None), default=0.0)
    print(f"largest error: {100 * worst:.2f} % of memory, {100 * worst_flops:.2f} % of operations")
    result = {
        "environment": environment(),
        "largest_peak_error": worst,
        "largest_flops_error": worst_flops,
        "fake_tensors": rows,
        "cpu_allocator": real,
    }
    target = arguments.output or (None if wanted else RECORD)
    if target is not None:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if target == RECORD:
        draw(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What runs on processors held in memory beside what the plan says: of recorded runs, no run is started.

    python benchmarks/host_memory.py [RESULTS_FOLDER] [--parts] [--worst 0.2]

Plans every run of ours with packed rows that `throughput.py` has recorded on a processor anew, with rows as long as its
longest step's, and prints a Markdown table of both peaks; exit code 1 when one is off by more than --worst. Runs with
padded rows are left out: their records don't say how long the longest micro-step was. A run that was ended for want of
memory needed at least what it held. See docs/planning_validation.md.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from rm_scale.planning.estimate import Estimate, estimate  # noqa: E402
from rm_scale.planning.hardware import Device, known_devices  # noqa: E402
from rm_scale.planning.run_estimate import buckets  # noqa: E402
from rm_scale.planning.scenario import RowLoad, Scenario  # noqa: E402
from rm_scale.planning.shape import ModelShape, shape_from_config  # noqa: E402
from rm_scale.reporting.benchmarks.sealed_records import Case, Record, Step, peak_memory_bytes, read_records  # noqa: E402
from rm_scale.tiers import MODEL_TIERS  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results" / "amd-epyc-2cores"
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
}
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 1024,
}
SHAPES: dict[str, dict[str, Any]] = {"135m": SMOLLM2, "tiny": TINY, **{tier.name: tier.config for tier in MODEL_TIERS}}


def scenario_of(record: Record, shape: ModelShape, load: RowLoad) -> Scenario:
    """Return the scenario that a recorded run stands for: its rows, its DeepSpeed settings, a processor."""
    case = record.case
    zero = (record.plan.get("deepspeed_config") or {}).get("zero_optimization", {})
    offload = "cpu" if case.offload else "none"
    return Scenario(
        shape=shape,
        device=processor(record),
        num_devices=case.num_ranks,
        num_nodes=case.num_nodes,
        load=load,
        num_micro_steps=max(1.0, case.global_batch_size / case.num_ranks / load.groups),
        method=case.method,
        lora_dropout=0.0,
        zero_stage=case.zero_stage if zero else None,
        offload_optimizer=offload,
        offload_param=offload,
        precision="bf16" if zero else "amp",
        checkpointing=case.gradient_checkpointing,
        attention="matmul",
        buckets=buckets(zero, shape.hidden_size),
    )


def processor(record: Record) -> Device:
    """Return the planner's processor with the memory that the record's machine had."""
    found: dict[str, Any] = next(iter((record.hardware or {}).get("devices", {}).values()), {})
    device = known_devices()["cpu"]
    return replace(device, memory_bytes=found.get("memory_bytes", device.memory_bytes))


def longest_row(case: Case, steps: Sequence[Step]) -> RowLoad:
    """Return one rank's share of the step with most tokens, as if its pairs were alike."""
    step = max(steps, key=lambda step: step.processed_tokens)
    groups = case.global_batch_size / case.num_ranks
    tokens, effective = step.processed_tokens / case.num_ranks, step.effective_tokens / case.num_ranks
    length = effective / (2 * groups)
    response = tokens / groups - length if case.packing == "prefix_shared" else length / 2
    prompt = length - response
    effective_squared = 2 * groups * length**2
    squared = effective_squared
    if case.packing == "prefix_shared":
        squared = groups * (prompt**2 + 2 * response * (2 * prompt + response))
    return RowLoad(tokens, squared, effective, effective_squared, groups, 2 * groups)


def rows(folder: Path, models: Sequence[str]) -> Iterator[tuple[Record, Estimate, int]]:
    """Yield each recorded run of ours on a processor, today's plan for it, and the most bytes that a rank held."""
    records = [record for record in read_records([folder]).records if record.case.system == "rm_scale"]
    steps = {_data_of(record.case): record.steps for record in records if record.steps}
    for record in records:
        case, measured = record.case, peak_memory_bytes(record)
        if case.model not in models or case.packing == "none" or not measured or record.environment.get("gpus"):
            continue
        # A run that was ended in its first step had the rows that others of its model had.
        load = longest_row(case, record.steps or steps[_data_of(case)])
        yield record, estimate(scenario_of(record, shape_from_config(SHAPES[case.model]), load)), measured


def _data_of(case: Case) -> tuple[object, ...]:
    return case.model, case.packing, case.data, case.global_batch_size, case.max_length


def is_off(record: Record, deviation: float, worst: float) -> bool:
    """Tell whether a plan is off by too much; a run that was ended gives a lower bound."""
    return deviation < -worst or (record.status == "ok" and deviation > worst)


def line_of(record: Record, plan: Estimate, measured: int, with_parts: bool) -> str:
    """Return a run's line of the table."""
    case = record.case
    stage = f"ZeRO-{case.zero_stage}" if case.zero_stage else "no ZeRO"
    offload = ", offload" if case.offload else ""
    before = record.predicted.peak_memory_bytes / 1e9 if record.predicted else math.nan
    peak, held = plan.peak_memory_bytes / 1e9, measured / 1e9
    ended = "at least " if record.status != "ok" else ""
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in plan.memory.items() if size > 5e6)
    name = f"{case.model} {case.method}, {case.packing}, {stage}{offload}, {case.num_ranks} ranks"
    return f"| {name} | {before:.2f} | {peak:.2f} | {ended}{held:.2f} | {peak / held - 1:+.1%} |" + (
        f" {parts} |" if with_parts else ""
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 1 when a plan is off by more than is allowed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default=str(RESULTS))
    parser.add_argument("--parts", action="store_true", help="the plan's parts too")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=[name for name in SHAPES if name != "tiny"])
    parser.add_argument("--worst", type=float, default=math.inf)
    options = parser.parse_args(arguments)
    print("| run | planned then, GB | planned now | held by a rank | off |" + (" parts |" if options.parts else ""))
    print("|---|---|---|---|---|" + ("---|" if options.parts else ""))
    deviations, bad = [], 0
    for record, plan, measured in rows(Path(options.folder), options.models):
        deviation = plan.peak_memory_bytes / measured - 1
        deviations.append(abs(deviation))
        bad += is_off(record, deviation, options.worst)
        print(line_of(record, plan, measured, options.parts))
    print(f"\n{len(deviations)} runs: mean {sum(deviations) / len(deviations):.1%}, worst {max(deviations):.1%}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())

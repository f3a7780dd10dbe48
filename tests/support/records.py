"""Benchmark records for tests: complete, small, and changeable."""

from __future__ import annotations

from typing import Any

from rm_scale.reporting.benchmarks.sealed_records import Case, Memory, Prediction, Record, Step


def case(**more: Any) -> Case:
    """A case of ours on one rank."""
    plain: dict[str, Any] = {
        "system": "rm_scale",
        "model": "135m",
        "num_parameters": 134_515_008,
        "method": "full",
        "packing": "prefix_shared",
        "zero_stage": 0,
        "num_ranks": 1,
        "global_batch_size": 8,
        "micro_batch": "planned tokens",
        "max_length": 1024,
        "gradient_checkpointing": False,
        "compute_dtype": "bfloat16",
        "data": "hh-like",
    }
    return Case(**{**plain, **more})


def record(seconds: list[float] | None = None, status: str = "ok", reason: str = "", **more: Any) -> Record:
    """A record whose first step is warm-up; words are the case's."""
    times = [9.0, 2.0, 4.0, 3.0] if seconds is None else seconds
    steps = [
        Step(
            step=number,
            seconds=time,
            pairs=8,
            real_tokens=1000,
            processed_tokens=1200,
            effective_tokens=1600,
            useful_flops=6e12,
            executed_flops=9e12,
            data_wait_seconds=0.1,
            communication_seconds=0.2,
            energy_joules=40.0,
            loss=0.7 - 0.01 * number,
        )
        for number, time in enumerate(times, 1)
    ]
    made = Record(
        status=status,  # type: ignore[arg-type]
        reason=reason,
        case=case(**more),
        warmup_steps=1,
        steps=steps if status == "ok" else [],
        memory=Memory(host_bytes=8_000_000_000),
        load_seconds=1.5,
        load_peak_memory_bytes=2_000_000_000,
        predicted=Prediction(
            peak_memory_bytes=9_000_000_000,
            memory={"weights": 4_000_000_000, "activations": 5_000_000_000},
            step_seconds={"low": 2.5, "high": 2.8},
        ),
        matmul_flops_per_device=2e12,
        environment={"cpu": "A Processor", "gpus": [], "num_cpus": 2, "packages": {"torch": "2.13.0"}, "commit": "abc"},
        hardware={"devices": {"cpu-here": {"memory_bytes": 24e9, "matmul_flops": 2e12}}},
        protocol={"command": "python rm_scale/train.py --model MODEL", "date": "2026-11-27"},
    )
    return made.sealed()

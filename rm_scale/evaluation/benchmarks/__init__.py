"""Public benchmarks of reward models, read from local files and scored as their authors score them."""

from __future__ import annotations

from rm_scale.evaluation.benchmarks.benchmark import Benchmark, BenchmarkItem
from rm_scale.evaluation.benchmarks.benchmark_files import (
    FORMATS,
    ScoredBenchmark,
    read_benchmark,
    read_scored_benchmark,
)

__all__ = ["FORMATS", "Benchmark", "BenchmarkItem", "ScoredBenchmark", "read_benchmark", "read_scored_benchmark"]

"""Predicted throughput of 7B and 13B reward models on A100 and H100 nodes, beside what others have published.

    python benchmarks/predicted.py

Writes docs/predicted_throughput.md. No figure in it was measured by us, and the page says so of each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from rm_scale.commands.plan import add_arguments, read_request  # noqa: E402
from rm_scale.planning.advise import recommend  # noqa: E402
from rm_scale.planning.published.predict import predict_row, read_cases  # noqa: E402
from rm_scale.planning.published.scenario_of_row import Row  # noqa: E402
from rm_scale.reporting.benchmarks.benchmark_page import table  # noqa: E402

CASES = REPOSITORY / "benchmarks" / "data" / "published_measurements.csv"
OUTPUT = REPOSITORY / "docs" / "predicted_throughput.md"
TIERS, METHODS = ("7b", "13b"), ("full", "lora", "qlora")
GPUS = {"a100-80g": "A100 80 GB", "h100-80g": "H100 80 GB"}
NODES = (1, 2)
LENGTH = 2048

INTRODUCTION = f"""# Predicted throughput: 7B and 13B on A100 and H100 nodes

**Nothing on this page was measured by us**: we have no such nodes. The first table is **predicted** by `rm-scale
plan`; the second puts its predictions beside **quoted** measurements of others, so that you can see how far to trust it
(errors over all rows: [planning_validation.md](planning_validation.md)). What we have measured ourselves is in
[results.md](results.md). If you run `benchmarks/throughput.py` on such nodes, your records belong here:
[benchmarks/README.md](../benchmarks/README.md).

Made by `python benchmarks/predicted.py`; shapes are those of the tiers (Llama-2 7B and 13B), texts of {LENGTH} tokens,
a prompt of half of them shared by chosen and rejected, 128 pairs per step, 8 GPUs per node, everything else as the
planner recommends it.
"""

QUOTED = """
## Beside published measurements

No published figure is of reward-model training at these sizes; nearest are pretraining and fine-tuning of language
models of the same shapes. Tokens/s are per GPU. **Measured by others** (`source`), **predicted** from the row's own
settings by `rm-scale plan --cases`.

"""


def predictions() -> Iterator[list[object]]:
    """Yield a row per tier, device, nodes and method."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for tier in TIERS:
        for gpu, name in GPUS.items():
            for nodes in NODES:
                for method in METHODS:
                    arguments = ["--tier", tier, "--method", method, "--gpu", gpu, "--gpus", str(8 * nodes)]
                    choice = recommend(read_request(parser.parse_args([*arguments, "--seq", str(LENGTH)])))
                    found = choice.estimate
                    slow, fast = found.pairs_per_second
                    yield [
                        f"{tier} {method}, {nodes} x 8 {name}",
                        f"ZeRO-{choice.zero_stage}" if choice.zero_stage else "no ZeRO",
                        "yes" if choice.checkpointing else "no",
                        f"{found.peak_memory_bytes / 1e9:.0f}",
                        "yes" if found.fits else "NO",
                        _band(slow, fast, 1),
                        _band(2 * LENGTH * slow / (8 * nodes), 2 * LENGTH * fast / (8 * nodes), 0),
                    ]


def _band(low: float, high: float, digits: int) -> str:
    ends = [f"{value:,.{digits}f}" for value in (low, high)]
    return ends[0] if ends[0] == ends[1] else " – ".join(ends)


def quoted() -> Iterator[list[object]]:
    """Yield published rows of these sizes and devices that the planner can model."""
    for row in sorted(read_cases(str(CASES)), key=lambda row: (row["model"], row["gpu"], row["id"])):
        if not _is_near(row):
            continue
        said = predict_row(row)
        speed, memory = _cell(row["tok_s_gpu"]), _cell(row["peak_mem_gb"])
        pairs = [(speed, said.tokens_per_second), (memory, said.peak_memory)]
        if not any(measured is not None and predicted is not None for measured, predicted in pairs):
            continue
        what = f"{row['model']} {row['method']}, {row['n_gpus']} x {row['gpu']}, {row['seq_len']} tokens"
        yield [what, *(value for pair in pairs for value in pair), f"{row['source']} ({row['id']})"]


def _is_near(row: Row) -> bool:
    size = _cell(row["params"]) or 0.0
    return ("a100" in row["gpu"].lower() or "h100" in row["gpu"].lower()) and 6e9 < size < 15e9


def _cell(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def page() -> str:
    """Return the whole page."""
    header = [
        "predicted",
        "ZeRO",
        "checkpointing",
        "peak GB/GPU",
        "fits",
        "pairs/s, all GPUs",
        "effective tokens/s/GPU",
    ]
    quoted_header = ["", "tokens/s, quoted", "predicted", "memory, quoted", "predicted", "source"]
    return (
        INTRODUCTION
        + "\n## Predicted\n\n"
        + table(header, list(predictions()))
        + "\n"
        + QUOTED
        + table(quoted_header, list(quoted()))
        + "\n"
    )


if __name__ == "__main__":
    OUTPUT.write_text(page(), encoding="utf-8")
    print(OUTPUT)

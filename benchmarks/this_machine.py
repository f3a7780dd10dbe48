"""Predicted against measured on the machine at hand: step time and peak memory of full, LoRA and QLoRA.

    python benchmarks/this_machine.py --model MODEL_DIR --data HH.jsonl.gz [--cases full:4096 lora:1536:checkpointed]

Measures the machine's rates first (`rm-scale bench hardware`), then trains for a few steps in each case through
`rm_scale/train.py`, which compares itself with its plan. A case is METHOD:TOKENS, the most tokens in a micro-step, and
":checkpointed" where layers are recomputed. See docs/planning_validation.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.pictures import Point, scatter  # noqa: E402

METHODS = {"full": [], "lora": ["--use_peft"], "qlora": ["--use_peft", "--load_in_4bit"]}
CASES = [f"{method}:{how}" for how in ("4096", "1536", "4096:checkpointed") for method in METHODS]
OUTPUT = REPOSITORY / "benchmarks" / "results" / "cpu" / "this_machine.json"
PICTURE = REPOSITORY / "docs" / "pictures" / "this_machine.svg"


def measure_rates(file: Path, times: int = 3) -> None:
    """Write the machine's figures: the best of several looks, since whatever else runs only takes away."""
    found: list[tuple[float, str]] = []
    for _ in range(times):
        command = [sys.executable, "-m", "rm_scale.cli", "bench", "hardware", "--nproc", "1", "--output", str(file)]
        subprocess.run(command, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
        text = file.read_text(encoding="utf-8")
        found.append((next(iter(yaml.safe_load(text)["devices"].values()))["matmul_flops"], text))
    print("large products:", ", ".join(f"{rate / 1e9:.0f}" for rate, _ in found), "GFLOP/s", flush=True)
    file.write_text(max(found)[1], encoding="utf-8")


def train(options: argparse.Namespace, case: str, hardware: Path, folder: Path) -> dict[str, Any]:
    """Train a few steps; return what the run said of its plan."""
    method, tokens, *how = case.split(":")
    arguments = ["--model_name_or_path", options.model, "--dataset_path", options.data, "--hardware", str(hardware)]
    arguments += ["--output_dir", str(folder), "--max_length", "1024", "--max_rejected_share", "1"]
    arguments += ["--global_batch_size", "16", "--max_tokens_per_device", tokens, "--logging_steps", "1"]
    arguments += ["--max_steps", str(options.steps), "--disable_tqdm", "true", "--sample_scores", "0"]
    arguments += ["--gradient_checkpointing", "true" if how == ["checkpointed"] else "false", *METHODS[method]]
    train_file = str(REPOSITORY / "rm_scale" / "train.py")
    done = subprocess.run([sys.executable, train_file, *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return dict(json.loads((folder / "run" / "plan_check.json").read_text(encoding="utf-8")))


def errors(record: dict[str, Any]) -> tuple[float, float]:
    """Return relative errors of predicted memory and time; a time within the band has none."""
    predicted, measured = record["predicted"], record["measured"]
    band, seconds = predicted["step_seconds"], measured["step_seconds"]
    nearest = min(max(seconds, band["low"]), band["high"])
    return predicted["peak_memory_bytes"] / measured["peak_memory_bytes"] - 1, nearest / seconds - 1


def table(records: dict[str, dict[str, Any]]) -> str:
    """Return Markdown with a line per case."""
    lines = ["| case | memory predicted, measured | off | step predicted, measured | off |", "|---|---|---|---|---|"]
    for case, record in records.items():
        memory, seconds = errors(record)
        predicted, measured = record["predicted"], record["measured"]
        sizes = f"{predicted['peak_memory_bytes'] / 1e9:.2f}, {measured['peak_memory_bytes'] / 1e9:.2f} GB"
        times = f"{predicted['step_seconds']['high']:.2f}, {measured['step_seconds']:.2f} s"
        lines.append(f"| {case} | {sizes} | {memory:+.1%} | {times} | {seconds:+.1%} |")
    return "\n".join(lines)


def draw(records: dict[str, dict[str, Any]]) -> None:
    """Draw seconds, predicted against measured."""
    points = [
        Point(record["measured"]["step_seconds"], record["predicted"]["step_seconds"]["high"], case.split(":")[0])
        for case, record in records.items()
    ]
    title = f"SmolLM2-135M on two CPU cores: seconds per step, {len(points)} cases, grey: 20 % off"
    scatter(points, "s", 0.2, title, PICTURE)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="METHOD:TOKENS[:checkpointed]")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--hardware", help="figures measured before; default: measure now")
    parser.add_argument("--add", action="store_true", help="to the output's cases, with the rates that it holds")
    parser.add_argument("--output", default=str(OUTPUT))
    options = parser.parse_args(arguments)
    options.model, options.data = str(Path(options.model).resolve()), str(Path(options.data).resolve())
    records: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        hardware = Path(options.hardware) if options.hardware else Path(folder) / "hardware.yaml"
        if options.add:
            earlier = json.loads(Path(options.output).read_text(encoding="utf-8"))
            records |= earlier["cases"]
            hardware.write_text(earlier["hardware"], encoding="utf-8")
        elif not options.hardware:
            measure_rates(hardware)
        for number, case in enumerate(options.cases):
            records[case] = train(options, case, hardware, Path(folder) / str(number))
            print(table({case: records[case]}).splitlines()[-1], flush=True)
        figures = hardware.read_text(encoding="utf-8")
    settings = {"model": Path(options.model).name, "data": Path(options.data).name, "steps": options.steps}
    result = {"settings": settings, "hardware": figures, "cases": records}
    Path(options.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(records))
    if Path(options.output) == OUTPUT:
        draw(records)


if __name__ == "__main__":
    main()

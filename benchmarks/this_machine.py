"""Predicted against measured on the machine at hand: step time and peak memory of full, LoRA and QLoRA.

    python benchmarks/this_machine.py --model MODEL_DIR --data HH.jsonl.gz [--methods full lora qlora] [--steps 5]

Measures the machine's rates first (`rm-scale bench hardware`), then trains for a few steps with each method through
`rm_scale/train.py`, which compares itself with its plan. See docs/planning.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
METHODS = {"full": [], "lora": ["--use_peft"], "qlora": ["--use_peft", "--load_in_4bit"]}


def measure_rates(file: Path) -> None:
    """Write the machine's figures."""
    command = [sys.executable, "-m", "rm_scale.cli", "bench", "hardware", "--nproc", "1", "--output", str(file)]
    subprocess.run(command, check=True, cwd=REPOSITORY)


def train(options: argparse.Namespace, method: str, hardware: Path, folder: Path) -> dict[str, object]:
    """A few steps; what the run said of its plan."""
    words = ["--model_name_or_path", options.model, "--dataset_path", options.data, "--hardware", str(hardware)]
    words += ["--output_dir", str(folder), "--max_length", "1024", "--max_rejected_share", "1"]
    words += ["--global_batch_size", "16", "--max_tokens_per_device", str(options.max_tokens), "--logging_steps", "1"]
    words += ["--max_steps", str(options.steps), "--disable_tqdm", "true", "--sample_scores", "0"]
    words += ["--gradient_checkpointing", "true" if options.checkpointing else "false", *METHODS[method]]
    train_file = str(REPOSITORY / "rm_scale" / "train.py")
    subprocess.run([sys.executable, train_file, *words], check=True, capture_output=True, cwd=REPOSITORY)
    return dict(json.loads((folder / "run" / "plan_check.json").read_text(encoding="utf-8")))


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--max_tokens", type=int, default=4096)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--output", default=str(REPOSITORY / "benchmarks" / "results" / "cpu" / "this_machine.json"))
    options = parser.parse_args()
    options.model, options.data = str(Path(options.model).resolve()), str(Path(options.data).resolve())
    records: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        hardware = Path(folder) / "hardware.yaml"
        measure_rates(hardware)
        for method in options.methods:
            record = train(options, method, hardware, Path(folder) / method)
            records[method] = record
            print(method, json.dumps({key: record[key] for key in ("predicted", "measured")}), flush=True)
        measured = hardware.read_text(encoding="utf-8")
    settings = {key: value for key, value in vars(options).items() if key not in {"model", "data", "output"}}
    settings |= {"model": Path(options.model).name, "data": Path(options.data).name}
    result = {"settings": settings, "hardware": measured, "methods": records}
    Path(options.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

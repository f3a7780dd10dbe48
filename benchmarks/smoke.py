"""All cases of `packing.py` at their smallest size, on a tiny model and generated pairs: does everything still run?

    make bench-smoke

Its figures mean nothing; nothing is compared with a limit.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent


def main() -> int:
    """Run the cases that need one process, and give the benchmark's exit code."""
    from rm_scale.data.synthetic import generate_pairs
    from rm_scale.modeling.assets import make_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder) / "model")
        data = Path(folder) / "pairs.jsonl"
        with data.open("w", encoding="utf-8") as file:
            for row in generate_pairs(200, seed=0, split="train"):
                turn = f"\n\nHuman: {row['prompt']}\n\nAssistant: "
                file.write(json.dumps({side: turn + row[side].strip() for side in ("chosen", "rejected")}) + "\n")
        words = ["--model", str(model), "--data", str(data), "--steps", "2", "--trl_micro_batches", "8"]
        words += ["--cases", "hh", "lora", "short_prompt", "k4", "--output", str(Path(folder) / "packing.json")]
        return subprocess.run([sys.executable, str(BENCHMARKS / "packing.py"), *words], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

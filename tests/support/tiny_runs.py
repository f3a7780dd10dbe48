"""Tiny trained reward models for the tests of what comes after training."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support.launching import TRAIN, read_lines, run


def train_tiny(model: Path, pairs: Path, output: Path, *words: str) -> Path:
    """A few fp32 steps through the real entry, one process, evaluated on 12 pairs."""
    settings = ["--model_name_or_path", str(model), "--dataset_path", str(pairs), "--output_dir", str(output)]
    settings += ["--bf16", "false", "--eval_split_size", "12", "--max_steps", "6", "--learning_rate", "5e-3"]
    done = run([sys.executable, str(TRAIN), *settings, *words, "--sample_scores", "0", "--disable_tqdm"])
    assert done.code == 0, done.output[-3000:]
    return output


def evaluated_texts(run_folder: Path, pairs: Path) -> tuple[list[str], list[str]]:
    """Prompts and completions of a run's evaluation set, in the order of its scores."""
    rows = {row["id"]: row for row in read_lines(pairs)}
    order = [rows[line["id"]] for line in read_lines(run_folder / "run" / "evaluation_scores.jsonl")]
    prompts = [row["prompt"] for row in order for _ in range(2)]
    return prompts, [row[side] for row in order for side in ("chosen", "rejected")]

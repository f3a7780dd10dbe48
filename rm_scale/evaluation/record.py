"""`evaluation.json`: the exact result of the final evaluation, and the rewards it came from."""

from __future__ import annotations

import json
import os
from pathlib import Path

from rm_scale.training.metrics import EvaluationResult


def write_evaluation(result: EvaluationResult, run_dir: Path) -> Path:
    """Write `evaluation.json` and every group's rewards beside it (`evaluation_scores.jsonl`) into `run/`."""
    path = run_dir / "evaluation.json"
    _write_whole(path, json.dumps(result.as_dict(), indent=2))
    lines = [
        json.dumps({"id": group.id, "subset": group.subset, "ranks": group.ranks, "rewards": group.rewards})
        for group in result.groups
    ]
    _write_whole(run_dir / "evaluation_scores.jsonl", "\n".join(lines) + "\n")
    return path


def _write_whole(path: Path, text: str) -> None:
    """Write the file, whole or not at all."""
    aside = path.with_suffix(".tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def evaluation_table(result: EvaluationResult) -> str:
    """The result as lines for people: overall, then each subset, then what length alone would reach."""
    values = result.as_dict()
    rows = [("all", values), *values["subsets"].items()]
    width = max(len(name) for name, _ in rows)
    lines = [f"{'subset':<{width}}  accuracy  95 % interval     pairs  ties   loss  margin"]
    for name, part in rows:
        low, high = part["accuracy_ci95"]
        numbers = [part[key] if part[key] is not None else float("nan") for key in ("accuracy", "loss", "mean_margin")]
        lines.append(
            f"{name:<{width}}  {numbers[0]:8.4f}  {low:.4f} - {high:.4f}  {part['num_pairs']:6d}  "
            f"{part['num_ties']:4d}  "
            f"{numbers[1]:5.3f}  {numbers[2]:6.3f}"
        )
    baselines = values["baselines"]
    if baselines["longer_wins"] is not None:
        lines.append(
            f"for comparison: longer wins {baselines['longer_wins']:.4f}, shorter wins {baselines['shorter_wins']:.4f}"
        )
    return "\n".join(lines)

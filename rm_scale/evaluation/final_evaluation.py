"""Write `run/evaluation.json`, the exact result of a run's final evaluation, and show it as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rm_scale.evaluation.scores_file import score_lines
from rm_scale.files import write_whole
from rm_scale.training.pair_counts import EvaluationResult


def write_evaluation(result: EvaluationResult, run_dir: Path) -> Path:
    """Write `evaluation.json` and every group's rewards beside it (`evaluation_scores.jsonl`) into `run/`."""
    path = run_dir / "evaluation.json"
    write_whole(path, json.dumps(result.as_dict(), indent=2))
    write_whole(run_dir / "evaluation_scores.jsonl", score_lines(result.groups))
    return path


# --- Rewards -------------------------------------------------------------------------------------------------------


# --- For people ----------------------------------------------------------------------------------------------------


def evaluation_table(result: EvaluationResult) -> str:
    """Return the result as lines for people: overall, each subset and source, then what length alone would reach."""
    values = result.as_dict()
    sources = {f"source {name}": part for name, part in values.get("sources", {}).items()}
    return results_table(values, {**values["subsets"], **sources})


def results_table(values: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table of accuracies.

    Args:
        values: results over everything, with `baselines`.
        parts: results per subset or source, with the same keys.
    """
    rows = [("all", values), *parts.items()]
    width = max(len(name) for name, _ in rows)
    lines = [f"{'subset':<{width}}  accuracy  95 % interval     pairs  ties   loss  margin"]
    for name, part in rows:
        low, high = part["accuracy_ci95"]
        numbers = [part[key] if part[key] is not None else math.nan for key in ("accuracy", "loss", "mean_margin")]
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

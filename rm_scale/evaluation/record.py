"""`evaluation.json`: the exact result of the final evaluation, and the rewards it came from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rm_scale.errors import DataError
from rm_scale.training.metrics import EvaluationResult, ScoredGroup

_FIX = "Fix: give an evaluation_scores.jsonl that training or rm-scale eval wrote."


def write_evaluation(result: EvaluationResult, run_dir: Path) -> Path:
    """Write `evaluation.json` and every group's rewards beside it (`evaluation_scores.jsonl`) into `run/`."""
    path = run_dir / "evaluation.json"
    write_whole(path, json.dumps(result.as_dict(), indent=2))
    write_whole(run_dir / "evaluation_scores.jsonl", score_lines(result.groups))
    return path


def write_whole(path: Path, text: str) -> None:
    """Write the file, whole or not at all."""
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


# --- Rewards -------------------------------------------------------------------------------------------------------


def score_lines(groups: Iterable[ScoredGroup]) -> str:
    """One JSON object per line and group: all that an evaluation needs; what is not known is left out."""
    return "".join(json.dumps(_as_row(group), ensure_ascii=False) + "\n" for group in groups)


def _as_row(group: ScoredGroup) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": group.id,
        "subset": group.subset,
        "ranks": list(group.ranks),
        "rewards": list(group.rewards),
    }
    further = {
        "lengths": list(group.lengths),
        "margin": group.margin,
        "soft_label": group.soft_label,
        "source": group.source,
        "prompt": group.prompt,
        "content": group.content,
    }
    return row | {name: value for name, value in further.items() if value not in (None, "", [])}


def read_scores(path: Path) -> list[ScoredGroup]:
    """Groups and rewards from a file that `score_lines` gave.

    Raises:
        DataError: the file can't be read, is empty, or a line is not such a group.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read ({error}). {_FIX}") from error
    groups = [_group(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not groups:
        raise DataError(f"{path}: holds no group. Fix: give an evaluation_scores.jsonl with at least one line.")
    return groups


def _group(path: Path, number: int, line: str) -> ScoredGroup:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise _bad_line(path, number, f"is not JSON ({error})") from None
    problem = "; ".join(_row_problems(row)) if isinstance(row, dict) else "is not an object"
    if problem:
        raise _bad_line(path, number, problem)
    texts = {name: row.get(name) or "" for name in ("id", "subset", "source", "prompt", "content")}
    return ScoredGroup(
        rewards=[float(value) for value in row["rewards"]],
        ranks=row["ranks"],
        margin=row.get("margin"),
        soft_label=row.get("soft_label"),
        lengths=row.get("lengths") or [],
        **{name: str(value) for name, value in texts.items()},
    )


def _row_problems(row: Mapping[str, Any]) -> Iterator[str]:
    ranks, rewards = row.get("ranks"), row.get("rewards")
    if not _are_numbers(ranks) or not all(isinstance(rank, int) for rank in ranks or []):
        yield "ranks must be a list of whole numbers"
    elif not _are_numbers(rewards):
        yield "rewards must be a list of numbers"
    elif len(ranks or []) != len(rewards or []) or len(ranks or []) < 2:
        yield f"has {len(ranks or [])} ranks and {len(rewards or [])} rewards, and needs as many of both, at least 2"
    elif row.get("lengths") and (not _are_numbers(row["lengths"]) or len(row["lengths"]) != len(ranks or [])):
        yield "lengths must be as many numbers as ranks"
    for name in ("margin", "soft_label"):
        value = row.get(name)
        if value is not None and not _are_numbers([value]):
            yield f"{name} must be a number"
    soft = row.get("soft_label")
    if _are_numbers([soft]) and (not 0 <= float(soft or 0) <= 1 or len(ranks or []) != 2):
        yield "soft_label must be between 0 and 1, for two responses"


def _are_numbers(values: Any) -> bool:
    """A list of numbers; rewards may be NaN here, which the evaluation refuses with the model's name."""
    return isinstance(values, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values
    )


def _bad_line(path: Path, number: int, problem: str) -> DataError:
    return DataError(f"{path}, line {number}: {problem}. {_FIX}")


# --- For people ----------------------------------------------------------------------------------------------------


def evaluation_table(result: EvaluationResult) -> str:
    """The result as lines for people: overall, then each subset, then what length alone would reach."""
    values = result.as_dict()
    return results_table(values, values["subsets"])


def results_table(values: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of accuracies.

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

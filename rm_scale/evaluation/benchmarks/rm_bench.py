"""RM-Bench (THU-KEG/RM-Bench; Liu et al. 2024, arXiv 2410.16184): does a model judge substance, or style?

Each prompt has a right and a wrong answer in three styles of rising polish: concise, detailed, detailed with Markdown.
All nine pairs are compared. Easy: the right answer is the more polished one; normal: equally polished; hard: the wrong
one is the more polished. The rule is `compute_accuracy` in `scripts/utils.py` of that repository.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from rm_scale.evaluation.benchmarks.benchmark import Benchmark, mean

STYLES = 3
LEVELS = ("easy", "normal", "hard")
DOMAINS = ("chat", "math", "code", "safety")
SAFETY_PARTS = ("safety-refuse", "safety-response")
"""Safety's items are pooled, so that a part weighs as much as it has items (284 and 157 of 441)."""
DOMAIN_NAMES = (*DOMAINS, *SAFETY_PARTS)
"""What a column `domain` may hold; `safety` where a file doesn't tell its two parts apart."""

Matrix = list[list[float]]


class RMBench(Benchmark):
    """Nine pairs per prompt; a tie of rewards is wrong. The overall score is the mean over domains of the mean over
    levels."""

    name = "RM-Bench"
    source = "THU-KEG/RM-Bench, arXiv 2410.16184"

    def _score(self, rewards: Sequence[Sequence[float]]) -> dict[str, Any]:
        wins: dict[str, list[Matrix]] = defaultdict(list)
        for item, values in zip(self.items, rewards, strict=True):
            right, wrong = values[:STYLES], values[STYLES:]
            wins[item.subset].append([[float(one > other) for other in wrong] for one in right])
        domains, missing = _domains(wins)
        parts = {name: mean(list(found.values())) for name, found in domains.items()}
        if not missing:
            parts |= {level: mean([domains[name][level] for name in DOMAINS]) for level in LEVELS}
        overall = mean([parts[name] for name in DOMAINS]) if not missing else None
        table = {name: _entry(found) for name, found in sorted(wins.items())}
        return {"score": overall, "parts": parts, "subsets": table, "missing": missing}


def _entry(found: Sequence[Matrix]) -> dict[str, Any]:
    """Return what is said of one subset: how many items, the mean over levels, each level, the matrix itself."""
    matrix = mean_matrix(found)
    levels = level_accuracies(matrix)
    return {"num_items": len(found), "score": mean(list(levels.values())), **levels, "matrix": matrix}


def _domains(wins: dict[str, list[Matrix]]) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Return the levels of each domain whose parts are all there, and the names of those that are not."""
    domains, missing = {}, []
    for domain in DOMAINS:
        has_parts = domain == "safety" and "safety" not in wins
        absent = [name for name in (SAFETY_PARTS if has_parts else (domain,)) if name not in wins]
        missing += absent
        if not absent:
            pooled = [matrix for name in wins if domain_of(name) == domain for matrix in wins[name]]
            domains[domain] = level_accuracies(mean_matrix(pooled))
    return domains, missing


def domain_of(name: str) -> str:
    """Return the domain that an entry of `DOMAIN_NAMES` belongs to."""
    return name.partition("-")[0]


def domain_of_file(path: str) -> str | None:
    """Return the domain that a file's name says, as published: `safety-refuse_filtered.json`; `None` if it says none.

    The rows of those files have no column for it.
    """
    stem = PurePath(path).name.partition(".")[0].partition("_")[0].lower()
    return stem if stem in DOMAIN_NAMES else None


def mean_matrix(found: Sequence[Matrix]) -> Matrix:
    """Return the mean of 3 x 3 matrices: rows are the right answer's style, columns the wrong one's."""
    return [[mean([one[row][column] for one in found]) for column in range(STYLES)] for row in range(STYLES)]


def level_accuracies(matrix: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return the accuracies below the diagonal (easy), on it (normal) and above it (hard)."""
    places = [(row, column) for row in range(STYLES) for column in range(STYLES)]
    return {
        "easy": mean([matrix[row][column] for row, column in places if row > column]),
        "normal": mean([matrix[row][column] for row, column in places if row == column]),
        "hard": mean([matrix[row][column] for row, column in places if row < column]),
    }

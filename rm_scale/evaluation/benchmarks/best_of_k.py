"""The correctness half of PPE, Preference Proxy Evaluations (lmarena/PPE; Frick et al. 2024, arXiv 2410.14872): K = 32
responses to a question, each right or wrong as a checker says.

Accuracy is that over the pairs of a right and a wrong response which the data set names (`sampled_conflict_pairs`); a
tie is wrong. Beside it: the area under the ROC curve within a question, and the share of questions whose response is
right when the best of all K by reward is taken, or of the n at which that is largest (expected over every choice of n).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from rm_scale.evaluation.benchmarks.benchmark import Benchmark, BenchmarkItem, mean
from rm_scale.inference.ranking.best_of_n import expected_best

PPE_DOMAINS = ("mmlu_pro", "math", "gpqa", "ifeval", "mbpp_plus")


class PPECorrectness(Benchmark):
    """Questions of five domains with K responses each. The overall score is the mean over domains of the accuracy."""

    name = "PPE correctness"
    source = "lmarena/PPE, arXiv 2410.14872"

    def _score(self, rewards: Sequence[Sequence[float]]) -> dict[str, Any]:
        found: dict[str, list[tuple[BenchmarkItem, Sequence[float]]]] = defaultdict(list)
        for item, values in zip(self.items, rewards, strict=True):
            found[item.subset].append((item, values))
        table = {domain: _entry(found[domain]) for domain in sorted(found)}
        parts = {name: table[name]["score"] for name in PPE_DOMAINS if name in table and table[name]["num_pairs"]}
        missing = [domain for domain in PPE_DOMAINS if domain not in parts]
        score = mean([parts[domain] for domain in PPE_DOMAINS]) if not missing else None
        return {"score": score, "parts": parts, "subsets": table, "missing": missing}


def _entry(found: Sequence[tuple[BenchmarkItem, Sequence[float]]]) -> dict[str, Any]:
    """Return what is said of one domain; null where no question has both right and wrong responses."""
    decisions = [
        float(values[good] > values[bad]) for item, values in found for good, bad in item.pairs or _every_pair(item)
    ]
    areas = [_area(values[: item.num_correct], values[item.num_correct :]) for item, values in found if _is_mixed(item)]
    curve = _best_of_n([(item, values) for item, values in found])
    return {
        "num_items": len(found),
        "score": mean(decisions) if decisions else None,
        "num_pairs": len(decisions),
        "auc": mean(areas) if areas else None,
        "best_of_all": float(curve[-1]),
        "largest": float(curve.max()),
        "largest_at": int(curve.argmax()) + 1,
        "one_at_random": float(curve[0]),
    }


def _is_mixed(item: BenchmarkItem) -> bool:
    return 0 < item.num_correct < len(item.completions)


def _every_pair(item: BenchmarkItem) -> list[tuple[int, int]]:
    """Return all pairs of a right and a wrong response, for data that names none."""
    total = len(item.completions)
    return [(good, bad) for good in range(item.num_correct) for bad in range(item.num_correct, total)]


def _area(good: Sequence[float], bad: Sequence[float]) -> float:
    """Return the probability that a right response has the higher reward than a wrong one, ties half."""
    differences = np.subtract.outer(np.asarray(good, dtype=np.float64), np.asarray(bad, dtype=np.float64))
    return float((np.sign(differences) + 1).mean() / 2)


def _best_of_n(found: Sequence[tuple[BenchmarkItem, Sequence[float]]]) -> np.ndarray[Any, Any]:
    """Return the expected share of right answers for n = 1, 2, ..., as far as every question has responses."""
    most = min(len(values) for _, values in found)
    curves = [
        expected_best(values, most, [float(place < item.num_correct) for place in range(len(values))])
        for item, values in found
    ]
    return np.asarray(np.mean(curves, axis=0))


def ppe_domain_of_file(path: str) -> str | None:
    """Return the domain that a path names, as the data sets and the results do: `PPE-MMLU-Pro-Best-of-K/...`."""
    for part in PurePath(path).parts[::-1]:
        words = part.lower().partition(".")[0].replace("-", "_").split("_")
        for domain in PPE_DOMAINS:
            wanted = domain.split("_")
            if any(words[start : start + len(wanted)] == wanted for start in range(len(words))):
                return domain
    return None

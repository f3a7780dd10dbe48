"""JudgeBench (ScalerLab/JudgeBench; Tan et al. 2024, arXiv 2410.12784) and LLMBar (princeton-nlp/LLMBar; Zeng et al.
2023, arXiv 2310.07641): pairs with an objectively better answer.

JudgeBench asks judges twice, in both orders, and counts a pair as correct when the two decisions together favour the
right answer (`compute_final_metrics` in `utils/metrics.py`). A reward does not depend on the order: a pair is correct
when the right answer has the higher reward; equal rewards favour the other answer once, which counts as not correct.
Parts are the beginnings of `source` as `run_judge.py` takes them. LLMBar averages accuracy over both orders
(`correct_average` in `LLMEvaluator/evaluate.py`), which is the same here; its table averages the five sets alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from rm_scale.evaluation.benchmarks.benchmark import Benchmark, mean, subset_table

JUDGE_SOURCES = {
    "Knowledge": "mmlu-pro",
    "Reasoning": "livebench-reasoning",
    "Math": "livebench-math",
    "Coding": "livecodebench",
}
"""Parts of JudgeBench, and how the `source` of their pairs begins."""
ADVERSARIAL = ("Neighbor", "GPTInst", "GPTOut", "Manual")
LLMBAR_SETS = ("Natural", *ADVERSARIAL)


class JudgeBench(Benchmark):
    """Pairs in four parts; a tie of rewards is wrong. The overall score is the accuracy over all pairs."""

    name = "JudgeBench"
    source = "ScalerLab/JudgeBench, arXiv 2410.12784"

    def _score(self, rewards: Sequence[Sequence[float]]) -> dict[str, Any]:
        table = _decisions(self, rewards)
        missing = [name for name in JUDGE_SOURCES if name not in table]
        every = [value for name in table for value in table[name]]
        parts = {name: mean(table[name]) for name in JUDGE_SOURCES if name in table}
        score = mean(every) if not missing else None
        return {"score": score, "parts": parts, "subsets": subset_table(table), "missing": missing}


class LLMBar(Benchmark):
    """Pairs in five sets; a tie of rewards is wrong. The overall score is the mean over the sets."""

    name = "LLMBar"
    source = "princeton-nlp/LLMBar, arXiv 2310.07641"

    def _score(self, rewards: Sequence[Sequence[float]]) -> dict[str, Any]:
        table = _decisions(self, rewards)
        missing = [name for name in LLMBAR_SETS if name not in table]
        parts = {name: mean(table[name]) for name in LLMBAR_SETS if name in table}
        score = mean([parts[name] for name in LLMBAR_SETS]) if not missing else None
        if all(name in parts for name in ADVERSARIAL):
            parts["Adversarial"] = mean([parts[name] for name in ADVERSARIAL])
        return {"score": score, "parts": parts, "subsets": subset_table(table), "missing": missing}


def _decisions(benchmark: Benchmark, rewards: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Return 1 or 0 for each pair, by part."""
    table: dict[str, list[float]] = defaultdict(list)
    for item, (good, bad) in zip(benchmark.items, rewards, strict=True):
        table[item.subset].append(float(good > bad))
    return table


def llmbar_set_of_file(path: str) -> str | None:
    """Return the set that a file's path names: `Adversarial_GPTInst.json`, `Adversarial/GPTInst/dataset.json`."""
    words = [word for part in PurePath(path).parts[::-1] for word in part.partition(".")[0].split("_")]
    return next((name for word in words for name in LLMBAR_SETS if word.lower() == name.lower()), None)

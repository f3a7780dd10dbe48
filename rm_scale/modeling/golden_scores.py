"""Golden scores: check that a saved model scores as it did in training, within what precision and kernels explain."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rm_scale.errors import ScoresDiffer
from rm_scale.modeling.scoring_contract import ScoringContract

# Largest difference between the training model's score and the reloaded one's that kernels and batching can explain.
SCORE_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


def allowed_drift(contract: ScoringContract, dtype: str, scores: Sequence[float] = ()) -> float:
    """Return how far precision or kernels may move a score: the type's tolerance, or half a standard deviation.

    Real models have large activations, and in bfloat16 kernels of equal right differ by a tenth of a deviation or more;
    a wrong head or wrong weights are off by whole ones.

    Args:
        contract: knows the deviation over the evaluation set, if there was one.
        dtype: the type in question.
        scores: their deviation stands in where the contract has none; default the golden ones.
    """
    scores = list(scores) or [golden.score for golden in contract.golden_scores]
    scale = max([1.0, *(abs(score) for score in scores)])
    spread = contract.score_std or (statistics.pstdev(scores) if len(scores) > 1 else 0.0)
    return max(SCORE_TOLERANCE[dtype] * scale, 0.5 * spread if dtype != "float32" else 0.0)


def check_golden(
    expected: list[float], actual: list[float], dtype: str, where: str, allowed: float | None = None
) -> None:
    """Compare scores before a save and after the reload.

    Args:
        expected: scores of the model in training.
        actual: scores of the same texts after the reload.
        dtype: the type both were computed in.
        where: the folder, for the message.
        allowed: largest difference; default the type's tolerance, relative to the size of the scores.

    Raises:
        ScoresDiffer: they differ by more.
    """
    if allowed is None:
        allowed = SCORE_TOLERANCE[dtype] * max([1.0, *(abs(score) for score in expected)])
    differences = [abs(a - b) for a, b in zip(expected, actual, strict=True)]
    # `not <=` rather than `>`, and no max() before it: a NaN must fail too.
    if not all(difference <= allowed for difference in differences):
        worst = max(differences, key=lambda difference: (difference != difference, difference))
        raise ScoresDiffer(
            f"{where}: the saved model scores differently from the one in training (largest difference {worst:.3g}, "
            f"allowed {allowed:.3g} in {dtype}). The save is not usable. Fix: keep the previous checkpoint "
            "and report this with both scores: "
            f"before {[round(s, 4) for s in expected]}, after {[round(s, 4) for s in actual]}."
        )

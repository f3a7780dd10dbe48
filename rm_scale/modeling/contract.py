"""`ScoringContract`: how a text becomes a score, written beside the weights and obeyed by everything that scores."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rm_scale.errors import CheckpointError, ModelError

CONTRACT_FILE = "scoring_contract.json"
CONTRACT_VERSION = 1


@dataclass(frozen=True)
class BaseModel:
    """The weights an adapter belongs to; for a full model, where training started.

    Attributes:
        name: folder or hub name.
        revision: hub revision.
        trust_remote_code: its own code was allowed to run.
        quantization: bitsandbytes settings of QLoRA, or `None`.
    """

    name: str
    revision: str = "main"
    trust_remote_code: bool = False
    quantization: dict[str, Any] | None = None


@dataclass(frozen=True)
class GoldenScore:
    """A token sequence of the evaluation set and the score that training gave it; a reload must give it again."""

    input_ids: list[int]
    score: float


@dataclass(frozen=True)
class ScoringContract:
    """Everything that decides the score of a text.

    Attributes:
        encoding: how a text becomes tokens (template and its hash, BOS and EOS policy, maximum length, policy past it).
        pad_token_id: differs from EOS.
        vocab_size: rows of the embedding, a padding token that was added included.
        dtype: type of the backbone's weights; the head is always float32.
        compute_dtype: type of the matrix products in training.
        base_model: see `BaseModel`.
        pooling: which position is read.
        padding_side: where padding goes.
        golden_scores: token sequences with their scores.
        score_mean, score_std: over all responses of the evaluation set, `None` without one.
        num_scored: how many responses that was.
    """

    encoding: dict[str, Any]
    pad_token_id: int
    vocab_size: int
    dtype: str
    compute_dtype: str
    base_model: BaseModel
    pooling: str = "last_real_token"
    padding_side: str = "right"
    golden_scores: list[GoldenScore] = field(default_factory=list)
    score_mean: float | None = None
    score_std: float | None = None
    num_scored: int = 0
    version: int = CONTRACT_VERSION

    def with_golden(self, sequences: list[list[int]], scores: list[float]) -> ScoringContract:
        """The same contract with these golden scores."""
        golden = [GoldenScore(list(ids), score) for ids, score in zip(sequences, scores, strict=True)]
        return replace(self, golden_scores=golden)

    def save(self, folder: str | Path) -> Path:
        """Write `scoring_contract.json` into the folder, whole or not at all."""
        path = Path(folder) / CONTRACT_FILE
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False), encoding="utf-8")
        os.replace(aside, path)
        return path

    @classmethod
    def load(cls, folder: str | Path) -> ScoringContract:
        """Read the contract of a saved model.

        Raises:
            ModelError: there is none, or it was written by a later version.
        """
        path = Path(folder) / CONTRACT_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{path}: the scoring contract can't be read ({error}). Fix: give a folder written by rm_scale."
            ) from error
        if values.get("version") != CONTRACT_VERSION:
            raise ModelError(
                f"{path}: contract version {values.get('version')}, this rm_scale reads {CONTRACT_VERSION}. "
                "Fix: use the rm_scale version that trained the model."
            )
        values["base_model"] = BaseModel(**values["base_model"])
        values["golden_scores"] = [GoldenScore(**golden) for golden in values["golden_scores"]]
        return cls(**values)


# Largest difference between the training model's score and the reloaded one's that kernels and batching can explain.
SCORE_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


def allowed_drift(contract: ScoringContract, dtype: str, scores: Sequence[float] = ()) -> float:
    """By how much another precision or kernel may move a score: the type's tolerance, or half a standard deviation.

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


def check_golden(expected: list[float], actual: list[float], dtype: str, where: str) -> None:
    """Compare scores before a save and after the reload.

    Raises:
        CheckpointError: they differ by more than the type's tolerance, relative to the size of the scores.
    """
    tolerance = SCORE_TOLERANCE[dtype]
    scale = max([1.0, *(abs(score) for score in expected)])
    differences = [abs(a - b) for a, b in zip(expected, actual, strict=True)]
    # `not <=` rather than `>`, and no max() before it: a NaN must fail too.
    if not all(difference <= tolerance * scale for difference in differences):
        worst = max(differences, key=lambda difference: (difference != difference, difference))
        raise CheckpointError(
            f"{where}: the saved model scores differently from the one in training (largest difference {worst:.3g}, "
            f"allowed {tolerance * scale:.3g} in {dtype}). The save is not usable. Fix: keep the previous checkpoint "
            "and report this with both scores: "
            f"before {[round(s, 4) for s in expected]}, after {[round(s, 4) for s in actual]}."
        )

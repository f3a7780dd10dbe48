"""`ScoringContract`: how a text becomes a score, written beside the weights and obeyed by everything that scores."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rm_scale.errors import ModelError
from rm_scale.files import not_a_file, write_whole
from rm_scale.json_values import as_number, parse_json, shown
from rm_scale.modeling.contract_fields import PADDING_SIDE, POOLING, field_problem

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
        pad_token_id: differs from EOS in every contract that is saved.
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
    pooling: str = POOLING
    padding_side: str = PADDING_SIDE
    golden_scores: list[GoldenScore] = field(default_factory=list)
    score_mean: float | None = None
    score_std: float | None = None
    num_scored: int = 0
    version: int = CONTRACT_VERSION

    def with_golden(self, sequences: list[list[int]], scores: list[float]) -> ScoringContract:
        """Return the same contract with these golden scores."""
        golden = [GoldenScore(list(ids), score) for ids, score in zip(sequences, scores, strict=True)]
        return replace(self, golden_scores=golden)

    def save(self, folder: str | Path) -> Path:
        """Write `scoring_contract.json` into the folder, whole or not at all."""
        return write_whole(Path(folder) / CONTRACT_FILE, json.dumps(asdict(self), indent=2, ensure_ascii=False))

    @classmethod
    def load(cls, folder: str | Path) -> ScoringContract:
        """Read the contract of a saved model.

        Raises:
            ModelError: there is none, it was written by a later version, or a field is not what a contract's must be.
        """
        path = Path(folder) / CONTRACT_FILE
        values = _read(path)
        if type(values.get("version")) is not int or values["version"] != CONTRACT_VERSION:
            raise ModelError(
                f"{path}: contract version {shown(values.get('version'))}, this rm_scale reads {CONTRACT_VERSION}. "
                "Fix: use the rm_scale version that trained the model."
            )
        unknown = sorted(set(values) - {one.name for one in fields(cls)})
        if unknown:
            raise ModelError(
                f"{path}: {', '.join(unknown)}: this rm_scale knows no such field, so what it asks for would not be "
                "done. Fix: use the rm_scale version that trained the model, or take out what was added by hand."
            )
        problem = field_problem(values)
        if problem is not None:
            raise ModelError(
                f"{path}: the scoring contract is not whole ({problem}). Fix: copy {path.name} from the training run "
                "again, or use the rm_scale version that wrote it."
            )
        values["base_model"] = BaseModel(**values["base_model"])
        values["golden_scores"] = [GoldenScore(**golden) for golden in values["golden_scores"]]
        for name in ("score_mean", "score_std"):  # not-a-number is what was written where none is known
            values[name] = as_number(values.get(name))
        return cls(**values)


def _read(path: Path) -> dict[str, Any]:
    try:
        what = not_a_file(path)
        if what is not None:
            raise ValueError(f"is {what}")
        values = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: the scoring contract can't be read ({error}). Fix: give a folder written by rm_scale."
        ) from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: is not a JSON object. Fix: give a folder written by rm_scale.")
    return values

"""The scoring contract survives a round trip, and a save that scores differently is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rm_scale.errors import CheckpointError, ModelError
from rm_scale.modeling.golden_scores import check_golden
from rm_scale.modeling.scoring_contract import BaseModel, ScoringContract


def contract() -> ScoringContract:
    base = BaseModel("some/model", quantization={"load_in_4bit": True})
    made = ScoringContract({"max_length": 12}, 0, 100, "bfloat16", "bfloat16", base)
    return made.with_golden([[1, 2], [3]], [0.5, -1.25])


def test_round_trip(tmp_path: Path) -> None:
    contract().save(tmp_path)
    assert ScoringContract.load(tmp_path) == contract()
    assert not list(tmp_path.glob("*.tmp"))


def test_missing_and_later_contracts_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the scoring contract can't be read"):
        ScoringContract.load(tmp_path)
    path = contract().save(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(ModelError, match="contract version 99"):
        ScoringContract.load(tmp_path)


@pytest.mark.parametrize(("dtype", "difference"), [("float32", 1e-3), ("bfloat16", 0.2), ("float32", float("nan"))])
def test_different_scores_fail_the_save(dtype: str, difference: float) -> None:
    with pytest.raises(CheckpointError, match="the saved model scores differently"):
        check_golden([1.0, 0.0], [1.0, difference], dtype, "folder")


def test_rounding_is_allowed() -> None:
    check_golden([10.0, 0.0], [10.0004, 0.0], "float32", "folder")
    check_golden([1.0], [1.03], "bfloat16", "folder")

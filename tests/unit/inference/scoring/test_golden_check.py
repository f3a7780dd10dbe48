"""A model that does not give its golden scores is not scored with, whoever loads it."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rm_scale.errors import ModelError
from rm_scale.inference.reward_function import reward_function
from rm_scale.inference.scoring.golden_check import check_golden_scores
from rm_scale.inference.scoring.scorer import RewardScorer
from rm_scale.inference.server.server_options import ServerOptions
from rm_scale.inference.server.service import Service
from rm_scale.modeling.scoring_contract import GoldenScore, ScoringContract

NOT_ITS_OWN = r"does not give its golden scores \(off by .*, allowed .*; on cpu in float32\).*Fix: copy the whole"


def change(folder: Path, edit: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Write the weights of a folder again, each as `edit` returns it."""
    (file,) = folder.glob("*.safetensors")
    save_file({key: edit(key, tensor) for key, tensor in load_file(file).items()}, file, {"format": "pt"})


def negate_head(folder: Path) -> None:
    change(folder, lambda key, tensor: -tensor if "score" in key else tensor)


@pytest.fixture
def full(full_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(full_run, tmp_path / "full"))


def test_another_head_is_refused_by_all_that_score(full: Path) -> None:
    before = RewardScorer.from_pretrained(full, device="cpu").score(["a"], ["b"])
    negate_head(full)
    with pytest.raises(ModelError, match=NOT_ITS_OWN):
        RewardScorer.from_pretrained(full, device="cpu")
    with pytest.raises(ModelError, match=NOT_ITS_OWN):
        reward_function(full, device="cpu")(["a"], ["b"])
    scorer = RewardScorer.from_pretrained(full, device="cpu", check_scores=False)
    assert scorer.score(["a"], ["b"]) == pytest.approx([-before[0]], abs=1e-5)
    service = Service(scorer, "mine", ServerOptions())
    try:
        with pytest.raises(ModelError, match="mine: the model does not give its golden scores"):
            service.start()
        assert not service.ready
    finally:
        service.close()


def test_an_adapter_whose_base_changed_is_refused(lora_run: Path, tiny_model: Path, tmp_path: Path) -> None:
    folder, base = tmp_path / "lora", tmp_path / "base"
    shutil.copytree(lora_run, folder)
    shutil.copytree(tiny_model, base)
    contract = ScoringContract.load(folder)
    replace(contract, base_model=replace(contract.base_model, name=str(base))).save(folder)
    RewardScorer.from_pretrained(folder, device="cpu")
    change(base, lambda key, tensor: tensor * 1.3 if "q_proj" in key or "down_proj" in key else tensor)
    with pytest.raises(ModelError, match=NOT_ITS_OWN):
        RewardScorer.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_another_type_on_purpose_is_scored(full_run: Path, dtype: str) -> None:
    assert math.isfinite(RewardScorer.from_pretrained(full_run, device="cpu", dtype=dtype).score("a", "b"))


def test_a_trainers_mixed_precision_does_not_move_the_check(full_run: Path) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        RewardScorer.from_pretrained(full_run, device="cpu")


def test_drift_beyond_rounding_is_warned_about_with_its_figures(
    full: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("rm_scale"), "propagate", True)
    contract = ScoringContract.load(full)
    moved = [replace(one, score=one.score + 0.2) for one in contract.golden_scores]
    replace(contract, golden_scores=moved, compute_dtype="bfloat16", score_std=1.0).save(full)
    RewardScorer.from_pretrained(full, device="cpu")
    assert "more than rounding (off by 0.2" in caplog.text and "allowed 0.5; on cpu in float32" in caplog.text
    moved = [replace(one, score=one.score + 0.7) for one in contract.golden_scores]
    replace(contract, golden_scores=moved, compute_dtype="bfloat16", score_std=1.0).save(full)
    with pytest.raises(ModelError, match=r"off by 0\.7"):
        RewardScorer.from_pretrained(full, device="cpu")


def test_scores_that_are_not_numbers_are_refused_wherever_they_stand(full_run: Path) -> None:
    scorer = RewardScorer.from_pretrained(full_run, device="cpu")
    golden = scorer.contract.golden_scores
    scorer.contract = replace(scorer.contract, golden_scores=[*golden, replace(golden[0], score=math.nan)])
    with pytest.raises(ModelError, match="one is not finite"):
        check_golden_scores(scorer, "mine")


@pytest.mark.parametrize("ids", [[5, 10**6], [-1], [], ["a"]])
def test_golden_texts_of_another_tokenizer_are_refused(full: Path, ids: list[int]) -> None:
    contract = ScoringContract.load(full)
    replace(contract, golden_scores=[GoldenScore(ids, 0.0)]).save(full)
    with pytest.raises(ModelError, match=r"a golden text of its scoring contract holds token .* the model has \d+"):
        RewardScorer.from_pretrained(full, device="cpu")


def test_a_contract_without_golden_scores_is_scored(full: Path) -> None:
    file = full / "scoring_contract.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "golden_scores": []}))
    assert math.isfinite(RewardScorer.from_pretrained(full, device="cpu").score("a", "b"))

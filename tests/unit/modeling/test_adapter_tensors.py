"""A saved adapter is put on its base whole, or refused with what lacks, is too much, or can't be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rm_scale.errors import ModelError
from rm_scale.inference.scoring.scorer import RewardScorer
from rm_scale.modeling.loading import load_reward_model
from rm_scale.modeling.scoring_contract import ScoringContract

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def adapter(lora_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lora_run, tmp_path / "lora", ignore=shutil.ignore_patterns("run")))


def edit(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def without_a_matrix(tensors: Tensors) -> None:
    del tensors[next(key for key in tensors if "q_proj.lora_B" in key)]


def with_an_unknown_layer(tensors: Tensors) -> None:
    tensors["base_model.model.model.layers.0.self_attn.zz_\x1b]0;x\x07proj.lora_A.weight"] = torch.ones(2, 32)


def with_a_constant(tensors: Tensors) -> None:
    tensors["base_model.model.score.bias"] = torch.tensor([5.0])


def with_a_narrow_matrix(tensors: Tensors) -> None:
    tensors[next(key for key in tensors if "q_proj.lora_B" in key)] = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_matrix, r"the adapter lacks base_model\.model\.model\.layers\.0\.self_attn\.q_proj\.lora_B\.weight"),
        (with_an_unknown_layer, r"the adapter holds .*self_attn\.zz_\\x1b\]0;x\\x07proj\.lora_A\.weight, for which"),
        (with_a_constant, r"the adapter holds base_model\.model\.score\.bias, for which the model has no place"),
        (with_a_narrow_matrix, r"does not fit its base model .*RuntimeError"),
    ],
)
def test_tensors_that_lack_or_are_too_many_are_refused_by_name(
    adapter: Path, change: Callable[[Tensors], object], message: str
) -> None:
    edit(adapter, change)
    with pytest.raises(ModelError, match=message):
        load_reward_model(adapter)


def test_an_adapter_beside_a_whole_model_is_refused(adapter: Path, full_run: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        shutil.copy(full_run / file, adapter)
    both = r"holds a whole model \(model\.safetensors\) and an adapter \(adapter_config\.json\)"
    with pytest.raises(ModelError, match=both):
        RewardScorer.from_pretrained(adapter, device="cpu")
    (adapter / "adapter_config.json").unlink()
    both = r"holds a whole model \(model\.safetensors\) and an adapter \(adapter_model\.safetensors\)"
    with pytest.raises(ModelError, match=both):
        RewardScorer.from_pretrained(adapter, device="cpu")


def test_impossible_sizes_of_the_base_are_refused_before_anything_is_built(
    adapter: Path, tiny_model: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 100_000}))
    contract = ScoringContract.load(adapter)
    replace(contract, base_model=replace(contract.base_model, name=str(base))).save(adapter)
    with pytest.raises(ModelError, match=r"num_hidden_layers=100000: must be from 1 to 1,000"):
        RewardScorer.from_pretrained(adapter, device="cpu")

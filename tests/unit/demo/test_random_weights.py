"""Models of true shape with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from rm_scale.cli import main
from rm_scale.demo.random_weights import _pieces, make_random_model
from rm_scale.errors import AssetError

SHAPE: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 2000,
    "max_position_embeddings": 512,
}


def test_it_loads_as_any_model_and_computes(tmp_path: Path) -> None:
    folder = make_random_model(tmp_path / "model", SHAPE, "small", shard_bytes=100_000)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(shards) > 3 and set(index["weight_map"].values()) == set(shards)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert sum(p.numel() for p in model.parameters()) * 2 == index["metadata"]["total_size"]
    ids = AutoTokenizer.from_pretrained(folder)("two words", return_tensors="pt")["input_ids"]
    assert model(ids).logits.isfinite().all()
    weights = dict(model.named_parameters())
    assert weights["model.norm.weight"].eq(1).all() and weights["model.layers.0.self_attn.q_proj.bias"].eq(0).all()
    product = weights["model.layers.1.mlp.up_proj.weight"].float()
    assert product.std().item() == pytest.approx(0.02, rel=0.1) and abs(product.mean().item()) < 2e-3
    assert not torch.equal(product, weights["model.layers.2.mlp.up_proj.weight"].float())


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    first, second = (make_random_model(tmp_path / name, SHAPE, "small") for name in ("a", "b"))
    other = make_random_model(tmp_path / "c", SHAPE, "small", seed=1)
    name = "model-00001-of-00001.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes() != (other / name).read_bytes()
    with safe_open(first / name, "pt") as file:
        assert file.get_tensor("model.embed_tokens.weight").dtype == torch.bfloat16
    with pytest.raises(AssetError, match="made with other parameters"):
        make_random_model(tmp_path / "c", SHAPE, "small", seed=2)


def test_noise_goes_round() -> None:
    pieces = [(place, list(piece)) for place, piece in _pieces(3, 9, 5)]
    assert pieces == [(0, [3, 4]), (2, [0, 1, 2, 3, 4]), (7, [0, 1])]


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ({"hidden_size": 8}, "shape: has no model_type"),
        ({"model_type": "nonesuch"}, "model_type='nonesuch': transformers can't build it"),
        ({**SHAPE, "vocab_size": 100}, "vocab_size=100: the tokenizer has"),
    ],
)
def test_impossible_shapes(shape: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=text):
        make_random_model(tmp_path / "model", shape, "odd")
    assert not (tmp_path / "model").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    assert main(["assets", "random", str(tmp_path / "model"), "--model_config", str(tmp_path)]) == 0
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    assert main(["assets", "random", str(tmp_path / "model"), "--tier", "8c"]) == 2
    assert "tier='8c'" in capsys.readouterr().err

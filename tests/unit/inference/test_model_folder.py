"""A plain model without a contract is scored as whoever made it scores it, or refused by name."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    pipeline,
    set_seed,
)

from rm_scale.errors import ModelError
from rm_scale.inference.model_folder import contract_of_plain_model, require_reward_model
from rm_scale.inference.scoring.scorer import RewardScorer

TEXTS = [("What is 2 + 2?", " It is 4."), ("What is 2 + 2?", " Nobody knows that."), ("Hi", "!"), ("", "")]


def score_texts(folder: Path, packed: bool) -> list[float]:
    scorer = RewardScorer.from_pretrained(
        folder, device="cpu", dtype="float32", allow_missing_contract=True, packed=packed
    )
    return scorer.score([prompt for prompt, _ in TEXTS], [completion for _, completion in TEXTS], batch_size=4)


def write_reward_model(source: Path, folder: Path, pad: str | None) -> Path:
    """Save a plain reward model whose config and tokenizer name this padding token: "eos", "bos", or none."""
    set_seed(4)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight)
    tokenizer.pad_token = None if pad is None else getattr(tokenizer, f"{pad}_token")
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pad", ["eos", "bos", None])
def test_the_score_is_read_where_transformers_reads_it(pad: str | None, tiny_model: Path, tmp_path: Path) -> None:
    folder = write_reward_model(tiny_model, tmp_path / "rm", pad)
    ask = pipeline("text-classification", str(folder), function_to_apply="none", dtype=torch.float32)
    expected = [ask(prompt + completion + ask.tokenizer.eos_token)[0]["score"] for prompt, completion in TEXTS]
    for packed in (False, True):
        assert score_texts(folder, packed) == pytest.approx(expected, abs=1e-5)


def test_padding_that_is_eos_is_said(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("rm_scale"), "propagate", True)
    folder = write_reward_model(tiny_model, tmp_path / "rm", "eos")
    contract = contract_of_plain_model(folder)
    assert contract.pad_token_id == json.loads((folder / "config.json").read_text())["eos_token_id"]
    assert "is EOS, so that as in transformers the score is read at the token before it" in caplog.text


def test_a_head_of_another_trainer_is_read_at_the_last_token(tiny_model: Path, tmp_path: Path) -> None:
    """OpenRLHF and LLaMA-Factory go by the attention mask: EOS is read though it is the padding too."""
    folder = write_reward_model(tiny_model, tmp_path / "rm", "eos")
    expected = score_texts(write_reward_model(tiny_model, tmp_path / "plain", None), packed=False)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["value_head.weight"] = tensors.pop("score.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    changes = {"architectures": ["RewardModel"], "normalize_reward": True, "mean": 0.5, "std": 2.0}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    assert score_texts(folder, packed=False) == pytest.approx(expected, abs=1e-5)
    contract = contract_of_plain_model(folder)
    assert (contract.score_mean, contract.score_std) == (0.5, 2.0)


def test_padding_outside_the_vocabulary_is_none(tiny_model: Path, tmp_path: Path) -> None:
    """Llama's first configs say -1."""
    folder = write_reward_model(tiny_model, tmp_path / "rm", None)
    expected = score_texts(folder, packed=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": -1}))
    assert score_texts(folder, packed=False) == pytest.approx(expected, abs=1e-6)


def test_the_longest_text_is_read_by_the_familys_own_name(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.model_max_length = 10**30
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=48, num_labels=1, **ids)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    contract = contract_of_plain_model(tmp_path)
    assert contract.encoding["max_length"] == 48
    assert contract.vocab_size == len(tokenizer)


def test_an_adapter_may_have_its_head_beside_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"task_type": "CAUSAL_LM"}')
    tensors = {"base_model.model.q_proj.lora_A.weight": torch.ones(2, 4)}
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"holds no reward head"):
        require_reward_model(tmp_path)
    save_file({"v_head.summary.weight": torch.ones(1, 4)}, tmp_path / "value_head.safetensors")
    require_reward_model(tmp_path)
    save_file({"v_head.summary.weight": torch.ones(2, 4)}, tmp_path / "value_head.safetensors")
    with pytest.raises(ModelError, match=r"value_head\.safetensors: holds no head of one output alone"):
        require_reward_model(tmp_path)


def test_a_language_model_without_a_head_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "lm"))
    with pytest.raises(ModelError, match="which has no scalar head: not a reward model"):
        RewardScorer.from_pretrained(folder, allow_missing_contract=True)

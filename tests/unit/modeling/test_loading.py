"""Every tested architecture loads, trains a head, saves, and is read back; wrong checkpoints are named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rm_scale.config_parsing import config_from_dict
from rm_scale.demo.assets import make_tiny_model
from rm_scale.errors import ConfigError, ModelError
from rm_scale.modeling.head import ScalarHead, active_head
from rm_scale.modeling.loading import load_for_training, load_reward_model
from rm_scale.modeling.padding_token import ADDED_PAD_TOKEN, settle_pad_token
from rm_scale.modeling.token_scores import score_sequences
from rm_scale.modeling.tokenizers import load_tokenizer
from rm_scale.planning.plan import make_plan

ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi", "phi3"]


def load(folder: Path, **settings: object):  # type: ignore[no-untyped-def]
    values = {"model_name_or_path": str(folder), "dataset_path": str(folder / "config.json"), "bf16": False, **settings}
    parsed = config_from_dict(values)
    plan = make_plan(parsed, 1, "cpu", check_output=False)
    tokenizer = load_tokenizer(str(folder))
    return load_for_training(parsed.config, plan, tokenizer), tokenizer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architecture_gets_a_head_and_scores_alike_padded_or_not(architecture: str, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "m", architecture, texts=["a few words 12"] * 5, vocab_size=300, hidden_size=32)
    loaded, tokenizer = load(folder)
    assert not loaded.head_was_found
    assert isinstance(active_head(loaded.model), ScalarHead)
    sequences = [tokenizer("a few words")["input_ids"], tokenizer("a few words 12 and some more")["input_ids"]]
    alone = score_sequences(loaded.model, sequences, tokenizer.pad_token_id, batch_size=1, device="cpu")
    together = score_sequences(loaded.model, sequences, tokenizer.pad_token_id, batch_size=2, device="cpu")
    assert alone == pytest.approx(together, abs=1e-5)
    loaded.model.save_pretrained(tmp_path / "saved")
    again = load_reward_model(tmp_path / "saved")
    assert score_sequences(again, sequences, tokenizer.pad_token_id, 2, "cpu") == pytest.approx(together, abs=1e-6)


@pytest.fixture
def reward_model(tiny_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "rm"
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    model.save_pretrained(folder)
    for file in tiny_model.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def test_existing_head_is_kept(reward_model: Path) -> None:
    loaded, _ = load(reward_model)
    saved = load_file(reward_model / "model.safetensors")["score.weight"]
    assert loaded.head_was_found
    assert torch.equal(active_head(loaded.model).effective_weight(), saved)


@pytest.mark.parametrize("settings", [{}, {"use_peft": True}])
def test_existing_head_keeps_its_fp32_value_in_bf16_training(reward_model: Path, settings: dict[str, object]) -> None:
    saved = load_file(reward_model / "model.safetensors")["score.weight"]
    assert not torch.equal(saved, saved.bfloat16().float())
    loaded, _ = load(reward_model, bf16=True, dtype="bfloat16", **settings)
    assert torch.equal(active_head(loaded.model).effective_weight(), saved)
    assert loaded.saved_head is not None and torch.equal(loaded.saved_head, saved)


def test_checkpoint_with_missing_layers_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"its files lack 1 weights, first model\.layers\.1\.mlp\.up_proj"):
        load(folder)


def test_a_value_that_no_config_takes_is_named(reward_model: Path) -> None:
    config = json.loads((reward_model / "config.json").read_text())
    (reward_model / "config.json").write_text(json.dumps({**config, "hidden_act": 3}))
    with pytest.raises(ModelError, match=r"can't build it from its config\.json .*hidden_act.*Fix: correct the value"):
        load_reward_model(reward_model)


def test_folder_without_a_reward_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json or adapter_config\.json"):
        load_reward_model(tmp_path)


def test_lora_trains_adapters_and_head_only(tiny_model: Path) -> None:
    loaded, _ = load(tiny_model, use_peft=True, lora_r=4, use_dora=True)
    trained = {name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad}
    assert any("score.modules_to_save" in name for name in trained)
    assert all("lora_" in name or "score" in name for name in trained)
    assert not any("score" in name and "lora" in name for name in trained)


def test_qlora_quantises_the_backbone_and_not_the_head(tiny_model: Path) -> None:
    import bitsandbytes as bnb

    loaded, _ = load(tiny_model, use_peft=True, load_in_4bit=True, force=["qlora_fp32"])
    kinds = {type(module).__name__ for name, module in loaded.model.named_modules() if name.endswith("base_layer")}
    assert kinds == {"Linear4bit"}
    assert not isinstance(active_head(loaded.model), bnb.nn.Linear4bit)
    assert active_head(loaded.model).weight.dtype == torch.float32


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
def test_4bit_weights_need_the_files_no_longer(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "alone"))  # other tests may hold the shared one
    loaded, _ = load(folder, use_peft=True, load_in_4bit=True, force=["qlora_fp32"])
    assert loaded.model is not None and str(folder) not in Path("/proc/self/maps").read_text()


def test_unknown_target_module_names_the_choices(tiny_model: Path) -> None:
    """Already where the plan is made, from the names in a local model's file; else by PEFT's own error."""
    told = r"lora_target_modules=\['nothing'\]: the model has no such module. Fix: name some of .*q_proj"
    with pytest.raises(ConfigError, match=told):
        load(tiny_model, use_peft=True, lora_target_modules=["nothing"])


def test_pad_token_differs_from_eos(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.pad_token = tokenizer.eos_token
    settle_pad_token(tokenizer)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    with pytest.raises(ModelError, match="is the EOS token"):
        settle_pad_token(tokenizer, tokenizer.eos_token)
    with pytest.raises(ModelError, match="is not in the tokenizer's vocabulary"):
        settle_pad_token(tokenizer, "<never seen>")


def _without_pad(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(str(folder))
    tokenizer.pad_token = tokenizer.eos_token
    settle_pad_token(tokenizer)
    return tokenizer


def test_pad_token_is_added_when_there_is_none(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rm_scale.modeling.padding_token.PAD_CANDIDATES", ())
    assert _without_pad(tiny_model).pad_token == "<bos>", "no new row in the embedding when BOS can serve"
    folder = tmp_path / "m"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["pad_token"] = config["bos_token"] = config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loaded, tokenizer = load(folder)
    assert tokenizer.pad_token == ADDED_PAD_TOKEN
    assert loaded.model.config.vocab_size >= len(tokenizer)
    assert loaded.model.config.pad_token_id == tokenizer.pad_token_id


def test_tokenizer_problems_are_named(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="its tokenizer can't be loaded"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ModelError, match=r"eos_token='<zz>': is not in the tokenizer's vocabulary"):
        load_tokenizer(str(tiny_model), eos_token="<zz>")


def test_names_of_tensors_do_nothing_to_a_terminal(tiny_model: Path, tmp_path: Path) -> None:
    """In a process of its own, as a user of the Python interface has it: nobody has set up how it logs."""
    folder = tmp_path / "escaping"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["a\x1b]0;owned\x07b.thing"] = torch.ones(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    code = (
        "import sys; from rm_scale.modeling.loading import _load_sequence_classifier\n"
        "try:\n    _load_sequence_classifier(sys.argv[1], dtype='auto', stored=None)\n"
        "except ValueError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "owned" in done.stdout and "\x1b]0" not in done.stdout + done.stderr
    assert "LOAD REPORT" not in done.stderr

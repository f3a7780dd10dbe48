"""Models that also see: their language model alone is planned, trained, saved under its own names, and scored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from rm_scale.config_parsing import config_from_dict
from rm_scale.errors import ModelError
from rm_scale.inference.export.export_model import export
from rm_scale.modeling.language_model import language_model_in
from rm_scale.modeling.loading import load_for_training, load_reward_model
from rm_scale.modeling.token_scores import score_sequences
from rm_scale.modeling.tokenizers import load_tokenizer
from rm_scale.planning.plan import make_plan
from tests.support.families import WITH_A_TOWER, tiny_classifier, write_model_that_sees
from tests.support.in_process import train_here
from tests.support.launching import read_json, weights

TYPES = sorted(WITH_A_TOWER)
CLASSIFIERS = {
    "gemma3": "Gemma3TextForSequenceClassification",
    "mistral3": "Ministral3ForSequenceClassification",
    "qwen3_5": "Qwen3_5TextForSequenceClassification",
}
SEQUENCES = [[3, 17, 9, 40, 5, 23, 11, 8, 30, 12], [3, 20, 7]]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_model)
    return loaded


@pytest.fixture(params=TYPES)
def seeing(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    """A tiny model of each family that sees, as a user would bring it."""
    return write_model_that_sees(tmp_path / request.param, request.param, tokenizer)


def load(folder: Path):  # type: ignore[no-untyped-def]
    files = {"model_name_or_path": str(folder), "dataset_path": str(folder / "config.json")}
    parsed = config_from_dict({**files, "bf16": False, "max_length": 128})
    plan = make_plan(parsed, 1, "cpu", check_output=False)
    return load_for_training(parsed.config, plan, load_tokenizer(str(folder))), plan


def scores(model: torch.nn.Module, pad: int = 0) -> list[float]:
    return score_sequences(model, SEQUENCES, pad, len(SEQUENCES), "cpu")


def of_the_tower(folder: Path) -> int:
    """Parameters in the files that are no part of the language model."""
    tensors = weights(folder).items()
    return sum(one.numel() for key, one in tensors if any(part in key for part in ("vis", "multi_modal_projector")))


def test_the_language_model_is_loaded_alone(seeing: Path, tmp_path: Path) -> None:
    """Every parameter that is trained gets a gradient, and the plan has counted the same ones."""
    loaded, plan = load(seeing)
    model = loaded.model
    assert type(model).__name__ == CLASSIFIERS[seeing.name]
    assert not loaded.head_was_found
    assert plan.num_parameters == sum(one.numel() for one in model.parameters()) - 32
    model(input_ids=torch.tensor(SEQUENCES[:1])).logits.sum().backward()
    assert [name for name, one in model.named_parameters() if one.grad is None] == []
    stored = weights(seeing)
    matrix = next(key for key in stored if key.endswith("layers.1.mlp.up_proj.weight"))
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, stored[matrix])

    model.save_pretrained(tmp_path / "saved")
    config = read_json(tmp_path / "saved" / "config.json")
    assert config["architectures"] == [CLASSIFIERS[seeing.name]] and "vision_config" not in config
    tiny_classifier(config["model_type"]).save_pretrained(tmp_path / "plain")
    assert weights(tmp_path / "saved").keys() == weights(tmp_path / "plain").keys()
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert scores(plain) == pytest.approx(scores(model), abs=1e-6)


@pytest.mark.parametrize(
    ("model_type", "method"),
    [
        pytest.param("gemma3", [], id="gemma3-full"),
        pytest.param("gemma3", ["--use_peft"], id="gemma3-lora"),
        pytest.param("qwen3_5", [], id="qwen3_5-full", marks=pytest.mark.long),
        pytest.param("qwen3_5", ["--use_peft"], id="qwen3_5-lora", marks=pytest.mark.long),
    ],
)
def test_a_run_says_what_is_left_out_and_ends_in_a_plain_model(
    model_type: str,
    method: list[str],
    tokenizer: PreTrainedTokenizerBase,
    pairs_file: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    seeing = write_model_that_sees(tmp_path / model_type, model_type, tokenizer)
    output = tmp_path / "run"
    flags = ["--model_name_or_path", str(seeing), "--dataset_path", str(pairs_file), "--output_dir", str(output)]
    flags += ["--bf16", "false", "--max_length", "128", "--eval_split_size", "8", "--max_steps", "3"]
    flags += ["--learning_rate", "5e-3", "--sample_scores", "0", "--disable_tqdm"]
    done = train_here([*flags, *method], capfd)
    assert done.code == 0, done.output[-3000:]
    assert f"left out ({of_the_tower(seeing):,} parameters)" in done.output
    assert done.output.count("vision tower") == 1, "once in a run, whatever loads the model again"
    contract = read_json(output / "scoring_contract.json")
    pad = contract["pad_token_id"]
    expected = scores(load_reward_model(output, torch.float32), pad)
    if method:
        base = AutoModelForSequenceClassification.from_pretrained(
            seeing, dtype=torch.float32, **language_model_in(str(seeing)).load_settings
        )
        base.config.pad_token_id = pad
        assert scores(PeftModel.from_pretrained(base, str(output)), pad) == pytest.approx(expected, abs=1e-5)
        output = export(output, tmp_path / "export", dtype="float32").folder
    assert read_json(output / "config.json")["architectures"] == [CLASSIFIERS[model_type]]
    plain = AutoModelForSequenceClassification.from_pretrained(output)
    assert type(plain).__name__ == CLASSIFIERS[model_type]
    assert scores(plain, pad) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_5"])
def test_a_reward_model_with_its_tower_is_scored_as_transformers_scores_it(
    model_type: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = write_model_that_sees(tmp_path / "rm", model_type, tokenizer, scalar_head=True)
    whole = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    assert type(whole).__name__ == CLASSIFIERS[model_type].replace("Text", "")
    expected = scores(whole)
    assert scores(load_reward_model(folder)) == pytest.approx(expected, abs=1e-6)
    loaded, _ = load(folder)
    assert loaded.head_was_found and scores(loaded.model) == pytest.approx(expected, abs=1e-6)


def test_names_as_of_older_checkpoints_are_read_too(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Released weights of Gemma 3 and of Qwen3.5 name the same part differently."""
    folder = write_model_that_sees(tmp_path / "gemma3", "gemma3", tokenizer)
    expected = load(folder)[0].model.state_dict()
    old = load_file(folder / "model.safetensors")
    assert all(key.startswith(("language_model.model.", "vision_tower.", "multi_modal_")) for key in old)
    new = {f"model.{key.replace('language_model.model.', 'language_model.')}": tensor for key, tensor in old.items()}
    save_file(new, folder / "model.safetensors", metadata={"format": "pt"})
    found = load(folder)[0].model.state_dict()
    assert found.keys() == expected.keys()
    assert [key for key in found if "score" not in key and not torch.equal(found[key], expected[key])] == []


@pytest.mark.parametrize("name", ["model.reward_layers.weight", "language_model.extra.weight"])
def test_what_is_no_part_of_the_tower_is_not_left_out(seeing: Path, name: str) -> None:
    tensors = load_file(seeing / "model.safetensors")
    save_file({**tensors, name: torch.ones(3, 32)}, seeing / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"holds tensors that can't be used here \(.*(reward_layers|extra)"):
        load(seeing)


def test_a_tower_that_is_not_whole_does_not_matter_but_a_layer_does(seeing: Path) -> None:
    tensors = load_file(seeing / "model.safetensors")
    tower = next(key for key in tensors if "vis" in key)
    layer = next(key for key in tensors if key.endswith("layers.1.mlp.up_proj.weight"))
    file = seeing / "model.safetensors"
    save_file({key: one for key, one in tensors.items() if key != tower}, file, metadata={"format": "pt"})
    load(seeing)
    save_file({key: one for key, one in tensors.items() if key != layer}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"its files lack 1 weights, first model\.layers\.1\.mlp\.up_proj"):
        load(seeing)


def test_only_models_with_a_tower_and_a_known_language_model_are_taken_apart(
    tiny_model: Path, seeing: Path, tmp_path: Path
) -> None:
    assert language_model_in(str(tiny_model)) is None
    inside = language_model_in(str(seeing))
    assert inside is not None and inside.config.num_labels == 1
    shutil.copytree(seeing, tmp_path / "quantised")
    values = json.loads((seeing / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(values))
    assert language_model_in(str(tmp_path / "quantised")) is None, "what was left out of it is not known"
    assert AutoConfig.from_pretrained(seeing).text_config.model_type == WITH_A_TOWER[seeing.name]["text_config"]

"""Kinds of model that the planner's formulas don't know, where a user meets them: plan, launch and doctor."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rm_scale.cli import main
from rm_scale.doctor import checks_machine
from rm_scale.doctor.findings import Asked
from rm_scale.planning import families
from tests.support.families import tiny_classifier, tiny_config, write_causal_model

WAY = ["--gpus", "2", "--zero", "2", "--offload", "none", "--checkpointing", "on", "--seq", "64"]


@pytest.fixture(scope="module")
def hybrid(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Zamba2, of which no formula knows anything."""
    folder = tmp_path_factory.mktemp("zamba2")
    return write_causal_model(folder, "zamba2", AutoTokenizer.from_pretrained(tiny_model))


def num_parameters(model_type: str, **sizes: int) -> int:
    """Of the backbone."""
    model = tiny_classifier(model_type, **sizes)
    return sum(p.numel() for p in model.parameters()) - model.config.hidden_size


def test_plan_asks_the_class_where_it_is_told_to(hybrid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(hybrid), *WAY]) == 2
    assert "'zamba2'" in (refused := capsys.readouterr().err) and "--exact" in refused
    assert main(["plan", "--model", str(hybrid), *WAY, "--exact", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    vocabulary = json.loads((hybrid / "config.json").read_text())["vocab_size"]
    assert answer["num_parameters"] == num_parameters("zamba2", vocab_size=vocabulary)
    assert answer["memory"]["activations"] > 0 and answer["step_seconds"]["low"] > 0
    assert any("counted on its class Zamba2ForSequenceClassification" in note for note in answer["notes"])


def test_of_a_known_kind_both_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("qwen3").to_dict()))
    words = ["plan", "--model", str(tmp_path), *WAY, "--exact"]
    assert main(words) == 0
    seen = capsys.readouterr()
    assert "the formulas count the tensors of Qwen3ForSequenceClassification" in seen.out + seen.err
    assert "counted on its class" not in seen.out
    # Formulas that forget the norms on queries and keys, which are 8 wide in each of three layers.
    wrong = replace(families.LAYER_STYLES["qwen3"], qk_norm="none")
    monkeypatch.setitem(families.LAYER_STYLES, "qwen3", wrong)
    assert main(words) == 0
    seen = capsys.readouterr()
    assert "vector tensors of 8 weights: 0 by formula, 6 in the class" in seen.out + seen.err
    assert "counted on its class Qwen3ForSequenceClassification" in seen.out


def test_of_a_model_that_sees_the_plan_names_what_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tiny_config("gemma3_text").to_dict()
    composite = {"model_type": "gemma3", "text_config": text, "vision_config": {"model_type": "siglip_vision_model"}}
    (tmp_path / "config.json").write_text(json.dumps(composite))
    for exact in ([], ["--exact"]):
        assert main(["plan", "--model", str(tmp_path), *WAY, *exact, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["num_parameters"] == num_parameters("gemma3_text")
        assert answer["notes"] == [
            "vision tower (siglip_vision_model) left out: the plan counts the language model alone"
        ]


def test_code_of_the_model_needs_both_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("llama").to_dict()))
    assert main(["plan", "--model", str(tmp_path), *WAY, "--trust_remote_code"]) == 2
    assert "trust_remote_code=True without exact" in capsys.readouterr().err


def test_launch_asks_the_class_by_itself(
    hybrid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pairs_file: Path
) -> None:
    settings = ["--model_name_or_path", str(hybrid), "--dataset_path", str(pairs_file), "--max_length", "64"]
    further = ["--output_dir", str(tmp_path / "out"), "--gradient_checkpointing", "true", "--deepspeed", "zero2"]
    assert main(["launch", "--gpus", "1", "--dry_run", *settings, *further]) == 0
    seen = capsys.readouterr()
    assert "model type 'zamba2' is not one that the planner's formulas know" in seen.out + seen.err
    assert "counted on its class Zamba2ForSequenceClassification" in seen.out


def test_doctor_knows_what_such_a_run_writes(hybrid: Path, tmp_path: Path) -> None:
    asked = Asked(model=str(hybrid), output_dir=str(tmp_path))
    check = checks_machine.model(asked)
    assert check.status == "pass" and "zamba2" in check.seen
    assert "a guess" not in checks_machine.disk(asked).seen

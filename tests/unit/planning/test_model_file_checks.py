"""What a model's files say about tokens and adapted modules is what loading the model would say."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from rm_scale.config import RunConfig
from rm_scale.errors import ModelError
from rm_scale.modeling.tokenizers import load_tokenizer
from rm_scale.planning.model_file_checks import check_adapted_modules, check_tokens
from tests.support.launching import run


def config(model: Path | str, **settings: Any) -> RunConfig:
    return RunConfig(model_name_or_path=str(model), dataset_path=["d"], **settings)


@pytest.mark.parametrize(
    "tokens",
    [
        {"eos_token": "nosuch"},
        {"pad_token": "nosuch"},
        {"pad_token": "<eos>"},
        {"pad_token": "<pad>"},
        {"eos_token": "<pad>", "pad_token": "<pad>"},
        {"eos_token": "<pad>", "pad_token": "<eos>"},
    ],
    ids=str,
)
def test_tokens_are_refused_as_the_tokenizer_itself_refuses_them(tiny_model: Path, tokens: dict[str, Any]) -> None:
    try:
        load_tokenizer(str(tiny_model), **tokens)
        expected = []
    except ModelError as error:
        expected = [str(error)]
    assert check_tokens(config(tiny_model, **tokens)) == expected


def test_every_token_of_the_tokenizer_is_known(tiny_model: Path) -> None:
    for token in load_tokenizer(str(tiny_model)).get_vocab():
        assert check_tokens(config(tiny_model, eos_token=token)) == []


def test_tokens_that_the_files_do_not_tell_are_left_to_the_tokenizer(tiny_model: Path, tmp_path: Path) -> None:
    assert check_tokens(config("owner/on-the-hub", eos_token="nosuch")) == []
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "auto_map": {"AutoTokenizer": ["a", None]}}))
    assert check_tokens(config(model, eos_token="nosuch")) == []
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "tokenizer.json").write_text("{")
    assert check_tokens(config(model, eos_token="nosuch")) == []


@pytest.mark.parametrize("targets", [["q_proj"], ["self_attn.q_proj", "nosuch"], ["layers.0.mlp.up_proj"]], ids=str)
def test_names_of_modules_and_their_ends_are_found(tiny_model: Path, targets: list[str]) -> None:
    assert check_adapted_modules(config(tiny_model, use_peft=True, lora_target_modules=targets)) == []


def test_names_that_no_module_has_are_refused(tiny_model: Path) -> None:
    (problem,) = check_adapted_modules(config(tiny_model, use_peft=True, lora_target_modules=["q_prj"]))
    assert problem.startswith("lora_target_modules=['q_prj']: the model has no such module. Fix: did you mean q_proj?")
    (problem,) = check_adapted_modules(config(tiny_model, use_peft=True, lora_target_modules=["nosuch"]))
    names = "down_proj, embed_tokens, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert f"name some of {names}. Without the setting all linear layers are adapted." in problem
    assert check_adapted_modules(config(tiny_model, lora_target_modules=["nosuch"])) == []
    assert check_adapted_modules(config("owner/name", use_peft=True, lora_target_modules=["nosuch"])) == []


def test_sharded_weights_tell_their_names_by_the_index_and_experts_are_left_to_the_loader(tmp_path: Path) -> None:
    names = ["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "a")}))
    wrong = config(tmp_path, use_peft=True, lora_target_modules=["nosuch"])
    assert "did you mean" not in check_adapted_modules(wrong)[0]
    assert check_adapted_modules(config(tmp_path, use_peft=True, lora_target_modules=["q_proj"])) == []
    names.append("model.layers.0.mlp.experts.0.w1.weight")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "a")}))
    assert check_adapted_modules(wrong) == []


def test_no_torch_is_loaded(tiny_model: Path) -> None:
    code = (
        "import sys; from rm_scale.config import RunConfig\n"
        "from rm_scale.planning.model_file_checks import check_adapted_modules, check_tokens\n"
        f"c = RunConfig(model_name_or_path={str(tiny_model)!r}, dataset_path=['d'], use_peft=True, pad_token='nosuch',"
        " lora_target_modules=['nosuch'])\n"
        "assert check_tokens(c) and check_adapted_modules(c) and 'torch' not in sys.modules\n"
    )
    done = run([sys.executable, "-c", code])
    assert done.code == 0, done.output

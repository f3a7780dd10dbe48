"""A damaged weight file is one message that names it and says what is wrong, wherever a model is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from rm_scale.errors import ModelError
from rm_scale.inference.model_folder import require_reward_model
from rm_scale.modeling.loading import load_reward_model
from rm_scale.modeling.stored_head import head_to_start_from
from rm_scale.modeling.weight_files import checkpoint_tensors, read_header

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab12\nsize 12345\n"


def _too_long(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"more")


def _cut(size: int) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(file.read_bytes()[:size])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda file: file.write_bytes(b""), r"is empty \(0 bytes\)\. Fix: download or copy"),
    "pointer": (lambda file: file.write_bytes(POINTER), r"is a Git LFS pointer of \d+ bytes, .* Fix: git lfs pull"),
    "half": (lambda file: _cut(file.stat().st_size // 2)(file), r"is cut short \(\d+ bytes, its header says \d+\)"),
    "header": (_cut(300), r"is cut short \(300 bytes, its header alone has \d+\)"),
    "few": (_cut(5), "is no safetensors file"),
    "garbage": (lambda file: file.write_bytes(bytes(range(256)) * 40), "is no safetensors file"),
    "list": (lambda file: file.write_bytes((2).to_bytes(8, "little") + b"[]"), "is no safetensors file"),
    "longer": (_too_long, "holds more than its header says"),
    "gone": (lambda file: file.unlink(), "has no safetensors weights"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(damage: str, tiny_model: Path, tmp_path: Path) -> None:
    change, message = DAMAGES[damage]
    folder = Path(shutil.copytree(tiny_model, tmp_path / "m"))
    change(folder / "model.safetensors")
    for open_it in (lambda: head_to_start_from(str(folder)), lambda: require_reward_model(folder)):
        with pytest.raises(ModelError, match=message) as caught:
            open_it()
        assert str(folder) in str(caught.value)
    with pytest.raises(ModelError, match=message):
        load_reward_model(folder)


def test_a_damaged_adapter_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(POINTER)
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: is a Git LFS pointer"):
        require_reward_model(tmp_path)


def test_shards_are_looked_at_one_by_one(tiny_model: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert set(checkpoint_tensors(str(tmp_path))) == set(model.state_dict())
    shards = sorted(tmp_path.glob("*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-1])
    with pytest.raises(ModelError, match=rf"{shards[1].name}: is cut short"):
        checkpoint_tensors(str(tmp_path))
    shards[1].unlink()
    with pytest.raises(ModelError, match=rf"index\.json: names {shards[1].name}, which is not there"):
        checkpoint_tensors(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}}))
    with pytest.raises(ModelError, match=r"index\.json: is no index of weights"):
        checkpoint_tensors(str(tmp_path))


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the weights can't be read \(No such file"):
        read_header(tmp_path / "model.safetensors")

"""A tokenizer that can't be loaded: the message names the file or package to blame, and no fix for another cause."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rm_scale.errors import ModelError
from rm_scale.modeling import tokenizers
from rm_scale.modeling.tokenizers import load_tokenizer, read_tokenizer

MISSING = "it comes as tokenizer.model, without tokenizer.json"


def _leave_sentencepiece_alone(folder: Path) -> None:
    for file in folder.glob("token*"):
        file.unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"})
    )


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (
        lambda f: (f / "tokenizer.json").write_text('{"version": '),
        r"tokenizer\.json is no JSON object, or is cut",
    ),
    "empty": (lambda f: (f / "tokenizer.json").write_text(""), r"tokenizer\.json is empty\. Fix"),
    "bytes": (lambda f: (f / "tokenizer.json").write_bytes(bytes(range(256))), r"tokenizer\.json is no JSON object"),
    "settings": (lambda f: (f / "tokenizer_config.json").write_text("[]"), r"tokenizer_config\.json is no JSON object"),
    "pointer": (
        lambda f: (f / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\n"),
        r"tokenizer\.json is a Git LFS pointer\. Fix: git lfs pull",
    ),
    "none": (
        lambda f: [file.unlink() for file in f.glob("token*")],
        r"no tokenizer files in that folder\. Fix: put the",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_file_to_blame_is_named(case: str, tiny_model: Path, tmp_path: Path) -> None:
    change, message = CASES[case]
    folder = Path(shutil.copytree(tiny_model, tmp_path / "m"))
    change(folder)
    for read in (load_tokenizer, read_tokenizer):
        with pytest.raises(ModelError, match=message) as caught:
            read(str(folder))
        assert str(folder) in str(caught.value)


@pytest.mark.parametrize("missing", [["sentencepiece"], ["google.protobuf"], ["sentencepiece", "google.protobuf"]])
def test_a_missing_package_is_named(
    missing: list[str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "m"))
    _leave_sentencepiece_alone(folder)
    monkeypatch.setattr(tokenizers, "_is_installed", lambda package: package not in missing)
    names = [package.removeprefix("google.") for package in missing]
    with pytest.raises(
        ModelError, match=rf"{MISSING}.*{' and '.join(names)} is needed.*pip install {' '.join(names)}\)"
    ):
        read_tokenizer(str(folder))


def test_the_error_stands_alone_where_the_cause_is_not_known(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "m"))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"its tokenizer can't be loaded \(KeyError: 'added_tokens'\)$") as caught:
        read_tokenizer(str(folder))
    assert "Fix" not in str(caught.value)
    _leave_sentencepiece_alone(folder)
    monkeypatch.setattr(tokenizers, "_is_installed", lambda package: True)
    with pytest.raises(ModelError) as caught:
        read_tokenizer(str(folder))
    assert MISSING not in str(caught.value) and "beside the model" not in str(caught.value)

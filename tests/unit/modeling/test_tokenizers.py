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
from rm_scale.planning.template_checks import template_problems

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


# --- A chat template from another tokenizer --------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}<|turn|>{{ m['role'] }}: {{ m['content'] }}<|done|>{% endfor %}"


def another_tokenizer(model: Path, folder: Path, template: str | None, **settings: str) -> Path:
    """The model's tokenizer with two tokens more and another EOS, as a folder of its own."""
    tokenizer = read_tokenizer(str(model))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|done|>"], **settings})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def test_a_template_is_taken_from_another_tokenizer_with_its_eos(tiny_model: Path, tmp_path: Path) -> None:
    """The same template, EOS and tokens as TRL's `clone_chat_template` gives, where the model has the tokens."""
    from transformers import AutoModelForSequenceClassification
    from trl import clone_chat_template

    source = another_tokenizer(tiny_model, tmp_path / "source", TEMPLATE, eos_token="<|done|>")
    ours_before = another_tokenizer(tiny_model, tmp_path / "ours", None)
    ours = load_tokenizer(str(ours_before), chat_template_path=str(source))
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    _, theirs, _ = clone_chat_template(model, read_tokenizer(str(ours_before)), str(source))
    assert (ours.chat_template, ours.eos_token) == (TEMPLATE, "<|done|>")
    assert (theirs.chat_template, theirs.eos_token) == (ours.chat_template, ours.eos_token)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    assert ours.apply_chat_template(messages)["input_ids"] == theirs.apply_chat_template(messages)["input_ids"]
    named = load_tokenizer(str(ours_before), chat_template_path=str(source), eos_token=read_eos(tiny_model))
    assert named.eos_token == read_eos(tiny_model)


def read_eos(model: Path) -> str:
    return str(read_tokenizer(str(model)).eos_token)


def test_a_template_with_tokens_that_the_model_has_not_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    source = another_tokenizer(tiny_model, tmp_path / "source", TEMPLATE)
    with pytest.raises(ModelError, match=r"its template writes <\|turn\|>, <\|done\|>, which the model's tokenizer"):
        load_tokenizer(str(tiny_model), chat_template_path=str(source))
    plain = another_tokenizer(tiny_model, tmp_path / "plain", "{{ messages[0]['content'] }}")
    assert load_tokenizer(str(tiny_model), chat_template_path=str(plain)).eos_token == read_eos(tiny_model)


def test_where_a_template_may_be_is_checked_before_anything_is_loaded(tiny_model: Path, tmp_path: Path) -> None:
    source = another_tokenizer(tiny_model, tmp_path / "source", TEMPLATE)
    bare = another_tokenizer(tiny_model, tmp_path / "bare", None)
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE)
    assert [template_problems(str(path)) for path in (source, file, "Qwen/Qwen3-0.6B")] == [[], [], []]
    assert "the tokenizer there has no chat template" in template_problems(str(bare))[0]
    for path in ("templates/chat.jinja", str(tmp_path / "chat.jinj"), "chat"):
        (problem,) = template_problems(path)
        assert problem.startswith(f"chat_template_path={path}: can't be read (")
    with pytest.raises(ModelError, match="that tokenizer has no chat template"):
        load_tokenizer(str(tiny_model), chat_template_path=str(bare))

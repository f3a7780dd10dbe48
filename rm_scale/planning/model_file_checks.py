"""Check tokens and adapted modules against the files of a model's folder, without loading the model.

What the files don't say for certain is left to those who load them: a hub model, a tokenizer with code of its own, a
vocabulary in another form, experts that are renamed while they are read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rm_scale.config import RunConfig
from rm_scale.texts import did_you_mean

_TOKEN_LISTS = {"added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"}


def check_tokens(config: RunConfig) -> list[str]:
    """Return a problem for `eos_token` and `pad_token` that the tokenizer does not have, or that are the same."""
    given = {name: token for name in ("eos_token", "pad_token") if (token := getattr(config, name)) is not None}
    folder = Path(config.model_name_or_path)
    settings = _read_object(folder / "tokenizer_config.json")
    if not given or "auto_map" in settings:
        return []
    vocabulary = _vocabulary(folder, settings)
    if vocabulary is None:
        return []
    problems = [
        f"{name}={token!r}: is not in the tokenizer's vocabulary. Fix: name a token that is."
        for name, token in given.items()
        if token not in vocabulary
    ]
    if not problems and config.pad_token is not None and config.pad_token == _end_token(config, folder, settings):
        problems.append(
            f"pad_token={config.pad_token!r}: is the EOS token, so the score would be read one token too early. "
            "Fix: leave pad_token out, or name another token."
        )
    return problems


def check_adapted_modules(config: RunConfig) -> list[str]:
    """Return a problem when no module of the model has a name that `lora_target_modules` gives."""
    targets = config.lora_target_modules
    if not config.use_peft or not targets:
        return []
    modules = _module_names(Path(config.model_name_or_path))
    ends = {part for name in modules for part in _ends(name)}
    if not modules or any(target in ends for target in targets) or any(".experts." in name for name in modules):
        return []
    lowest = modules - {name.rpartition(".")[0] for name in modules}
    layers = sorted({end for name in lowest if "norm" not in (end := name.rpartition(".")[2])})
    fix = did_you_mean(targets[0], layers, f"name some of {', '.join(layers[:12])}." if layers else "correct them.")
    return [
        f"lora_target_modules={targets}: the model has no such module. Fix: {fix} Without the setting all linear "
        "layers are adapted."
    ]


def _ends(name: str) -> list[str]:
    """Return the whole of a dotted name and each of its ends, which PEFT takes as well: a.b.c, b.c, c."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _module_names(folder: Path) -> set[str]:
    """Return the names of a model's modules that have weights, or of those above them; none when it can't be told."""
    tensors = _read_object(folder / "model.safetensors.index.json").get("weight_map")
    if isinstance(tensors, dict):
        names = list(map(str, tensors))
    else:
        names = _names_in_header(folder / "model.safetensors")
    modules = {name.rpartition(".")[0] for name in names if "." in name}
    above = {".".join(name.split(".")[:end]) for name in modules for end in range(1, name.count(".") + 1)}
    return modules | above


def _names_in_header(path: Path) -> list[str]:
    if not path.is_file():
        return []
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as weights:
            return list(weights.keys())
    except (OSError, ValueError, SafetensorError):
        return []  # what is wrong with the file is said when it is loaded


def _vocabulary(folder: Path, settings: dict[str, Any]) -> set[str] | None:
    """Return all tokens of a tokenizer, or `None` when its files don't say."""
    file = _read_object(folder / "tokenizer.json")
    model = file.get("model")
    words = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(words, list):  # Unigram: pairs of token and weight
        words = [word[0] for word in words if isinstance(word, list) and word]
    if not words:
        return None
    added = file.get("added_tokens")
    known = {str(word) for word in words}
    known |= set(_tokens_in(added if isinstance(added, list) else []))
    for content in (settings, _read_object(folder / "special_tokens_map.json")):
        for name, value in content.items():
            if name.endswith("_token"):
                known |= set(_tokens_in([value]))
            elif isinstance(value, dict) and name in _TOKEN_LISTS:
                known |= set(_tokens_in(list(value.values())))
            elif isinstance(value, list) and name in _TOKEN_LISTS:
                known |= set(_tokens_in(value))
    return known | set(_read_object(folder / "added_tokens.json"))


def _tokens_in(values: list[Any]) -> list[str]:
    """Return the tokens among values: texts, and objects with a text as their `content`."""
    texts = [value.get("content") if isinstance(value, dict) else value for value in values]
    return [text for text in texts if isinstance(text, str)]


def _end_token(config: RunConfig, folder: Path, settings: dict[str, Any]) -> str | None:
    if config.eos_token is not None:
        return config.eos_token
    for content in (settings, _read_object(folder / "special_tokens_map.json")):
        found = _tokens_in([content.get("eos_token")])
        if found:
            return found[0]
    return None


def _read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one when it can't be read, which is said when the model is loaded."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}

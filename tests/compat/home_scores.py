"""Reward models that other projects' released code writes and scores, and the same by `RewardScorer`.

Three steps, of which the second runs in an environment with those releases: a tiny language model is made; each
project's classes write a model of it and score token ids; the scores are compared. See home_scores.sh.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.machinery
import json
import os
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

SEQUENCES = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [11, 12, 13, 14], [250, 31, 7, 99, 120, 5, 66, 40, 3]]
META = {"format": "pt"}
TOLERANCE = 1e-5


def main() -> int:
    """Do one of the three steps; return 1 if a score differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    for step in ("make_base", "write", "compare"):
        parser.add_argument(f"--{step}", action="store_true")
    options = parser.parse_args()
    if options.make_base:
        from rm_scale.demo.assets import make_tiny_model

        shutil.rmtree(options.folder, ignore_errors=True)
        make_tiny_model(options.folder / "base", vocab_size=400, hidden_size=32)
        return 0
    return _write_all(options.folder) if options.write else _compare(options.folder)


# --- In the environment of the other projects ------------------------------------------------------------------------


def _write_all(folder: Path) -> int:
    torch.manual_seed(5)
    base = folder / "base"
    writers: dict[str, Callable[[Path, Path], torch.Tensor]] = {
        "openrlhf_score": lambda base, target: _openrlhf(base, target, "score"),
        "openrlhf_value_head": lambda base, target: _openrlhf(base, target, "value_head"),
        "openrlhf_own_prefix": lambda base, target: _openrlhf(base, target, "preference_head"),
        "trl_value_head": _trl_value_head,
        "llama_factory": _llama_factory,
        "llama_factory_adapter": _llama_factory_adapter,
        "starling": lambda base, target: _rewardbench(base, target, "starling", "LlamaForSequenceClassification"),
        "ultrarm": lambda base, target: _rewardbench(base, target, "openbmb", "LlamaRewardModel"),
        "beaver": lambda base, target: _rewardbench(base, target, "beaver", "LlamaForScore"),
    }
    scores = {}
    for name, write in writers.items():
        (folder / name).mkdir()
        scores[name] = [float(score) for score in write(base, folder / name)]
        AutoTokenizer.from_pretrained(base).save_pretrained(folder / name)
    (folder / "home_scores.json").write_text(json.dumps(scores, indent=1))
    return 0


def _batch(base: Path, side: str) -> dict[str, torch.Tensor]:
    """Return the sequences as one padded batch, as home code gets them."""
    pad = AutoTokenizer.from_pretrained(base).pad_token_id
    longest = max(len(ids) for ids in SEQUENCES)
    rows, masks = [], []
    for ids in SEQUENCES:
        gap = longest - len(ids)
        rows.append([pad] * gap + ids if side == "left" else ids + [pad] * gap)
        masks.append([0] * gap + [1] * len(ids) if side == "left" else [1] * len(ids) + [0] * gap)
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def _part(package: str, module: str) -> Any:
    """Import one module of a package without its `__init__`, which asks for much that no score needs."""
    place = _folder_of(package)
    inner = {f"{package}.{one.parent.name}": one.parent for one in place.glob("*/__init__.py")}
    for name, path in {package: place, **inner}.items():
        if getattr(sys.modules.get(name), "__spec__", 0) is not None:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(path)]
    return importlib.import_module(f"{package}.{module}")


def _folder_of(package: str) -> Path:
    return next(Path(sys.prefix).glob(f"lib/python3*/site-packages/{package}"))


@contextmanager
def _without_flash_attention() -> Iterator[None]:
    """Stand in for the CUDA package whose functions packed rows alone call."""
    names = ("flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed")
    for name in names:
        bare = types.ModuleType(name)
        bare.__spec__ = importlib.machinery.ModuleSpec(name, None)
        bare.__path__ = []
        bare.__getattr__ = lambda _: None  # type: ignore[method-assign]
        sys.modules[name] = bare
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)


def _openrlhf(base: Path, target: Path, prefix: str) -> torch.Tensor:
    with _without_flash_attention():
        home = _part("openrlhf", "models.model")
    types_of_home: Any = importlib.import_module("openrlhf.utils.utils")
    types_of_home.convert_to_torch_dtype = lambda _: torch.float32  # it offers 16 bits alone
    fixed = {"attn_implementation": "eager", "param_dtype": "bf16", "value_head_prefix": prefix}
    new = home.get_llm_for_sequence_regression(str(base), "reward", init_value_head=True, **fixed)
    getattr(new, prefix).weight.data.normal_()
    new.config.value_head_prefix, new.config.mean, new.config.std = prefix, 0.5, 2.0
    new.save_pretrained(target)
    saved = home.get_llm_for_sequence_regression(str(target), "reward", **fixed).eval()
    with torch.no_grad():
        return saved(**_batch(base, "left"))


def _value_head_model(language_model: Any) -> Any:
    model = _part("trl", "models.modeling_value_head").AutoModelForCausalLMWithValueHead(language_model).eval()
    model.is_peft_model = False
    model.v_head.summary.weight.data.normal_()
    return model


def _last_values(model: Any, base: Path) -> torch.Tensor:
    """Return the value at the last token of the mask, as LLaMA-Factory's `compute_loss` gathers it."""
    batch = _batch(base, "right")
    with torch.no_grad():
        values = model(**batch)[-1]
    return values.gather(-1, batch["attention_mask"].sum(-1, keepdim=True) - 1).squeeze(-1)


def _state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}


def _trl_value_head(base: Path, target: Path) -> torch.Tensor:
    model = _value_head_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    model.pretrained_model.config.save_pretrained(target)
    save_file(_state_of(model), target / "model.safetensors", META)
    return _last_values(model, base)


def _fix_valuehead_checkpoint() -> Callable[..., None]:
    """Return LLaMA-Factory's function that splits the head off a checkpoint; its module asks for a user interface."""
    from peft import PeftModel

    source = (_folder_of("llamafactory") / "train" / "callbacks.py").read_text()
    names: dict[str, Any] = {
        **{"os": os, "torch": torch, "safe_open": safe_open, "save_file": save_file},
        **{"PreTrainedModel": PreTrainedModel, "PeftModel": PeftModel},
        **{"SAFE_WEIGHTS_NAME": "model.safetensors", "WEIGHTS_NAME": "pytorch_model.bin"},
        **{"V_HEAD_SAFE_WEIGHTS_NAME": "value_head.safetensors", "V_HEAD_WEIGHTS_NAME": "value_head.bin"},
        "logger": types.SimpleNamespace(info_rank0=print),
    }
    begin = source.index("def fix_valuehead_checkpoint(")
    exec(source[begin : source.index("\nclass ", begin)], names)
    function: Callable[..., None] = names["fix_valuehead_checkpoint"]
    return function


def _llama_factory(base: Path, target: Path) -> torch.Tensor:
    model = _value_head_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    save_file(_state_of(model), target / "model.safetensors", META)
    _fix_valuehead_checkpoint()(model, str(target), True)
    return _last_values(model, base)


def _llama_factory_adapter(base: Path, target: Path) -> torch.Tensor:
    from peft import LoraConfig, get_peft_model

    language_model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(language_model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    model = _value_head_model(adapted)
    model.is_peft_model = True
    save_file(
        {f"v_head.{key}": one for key, one in _state_of(model.v_head).items()}, target / "model.safetensors", META
    )
    _fix_valuehead_checkpoint()(model, str(target), True)
    return _last_values(model, base)


def _rewardbench(base: Path, target: Path, module: str, name: str) -> torch.Tensor:
    import transformers.models.llama.modeling_llama as llama

    # Texts for docstrings that transformers 4 had.
    for text in ("_CONFIG_FOR_DOC", "LLAMA_INPUTS_DOCSTRING"):
        setattr(llama, text, "")
    for decorator in ("add_start_docstrings_to_model_forward", "replace_return_docstrings", "add_start_docstrings"):
        if not hasattr(importlib.import_module("transformers.utils"), decorator):
            setattr(
                importlib.import_module("transformers.utils"), decorator, lambda *_, **__: lambda function: function
            )
    model = getattr(_part("rewardbench", f"models.{module}"), name)(AutoConfig.from_pretrained(base)).eval()
    weights = load_file(base / "model.safetensors")
    if module == "starling":
        weights = {key.replace("model.", "transformer.", 1): tensor for key, tensor in weights.items()}
        model.PAD_ID = AutoTokenizer.from_pretrained(base).pad_token_id
    rest = model.load_state_dict(weights, strict=False)
    assert not rest.unexpected_keys, rest.unexpected_keys
    for key, parameter in model.named_parameters():
        if key.split(".")[0] in {"v_head", "regression_head", "score_head"}:
            parameter.data.normal_()
    model.save_pretrained(target)
    with torch.no_grad():
        found = model(**_batch(base, "right"))
    if module == "starling":
        found = found["scores"]
    return (found["end_scores"] if module == "beaver" else found).reshape(-1)


# --- In .venv --------------------------------------------------------------------------------------------------------


def _compare(folder: Path) -> int:
    from rm_scale import RewardScorer
    from tests.compat.records import write_record

    failed = []
    rows = []
    for name, home in json.loads((folder / "home_scores.json").read_text()).items():
        scorer = RewardScorer.from_pretrained(folder / name, device="cpu", allow_missing_contract=True)
        found = scorer.score_tokens(SEQUENCES)
        worst = max(abs(one - other) for one, other in zip(home, found, strict=True))
        allowed = TOLERANCE * max(1.0, *(abs(score) for score in home))
        verdict = "holds" if worst <= allowed else "**off**"
        rows.append([name, f"`{_head_in(folder / name)}`", f"{worst:.1e}", verdict])
        failed += [] if worst <= allowed else [name]
    what = "Checkpoints that the projects' released code wrote and scored, and the same folders scored by rm_scale"
    heads = ["model", "its head", "largest difference", ""]
    theirs = ["openrlhf", "trl", "llamafactory", "rewardbench"]
    write_record(folder.parent / "record.json", "home_scores.txt", theirs, what, heads, rows)
    return 1 if failed else 0


def _head_in(folder: Path) -> str:
    for file in sorted(folder.glob("*.safetensors"), key=lambda path: path.name, reverse=True):
        for key in load_file(file):
            if key.endswith("weight") and not key.startswith("lm_head") and ("head" in key or key == "score.weight"):
                return f"{key} ({file.name})"
    return ""


if __name__ == "__main__":
    sys.exit(main())

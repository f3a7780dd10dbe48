"""Describe the settings for people: the text of `train.py --help`, and each setting's values and default.

docs/settings.md has the same groups in the same order; `python tools/settings_tables.py` writes its tables.
"""

from __future__ import annotations

import textwrap
import types
import typing
from typing import Any

from rm_scale.config import RunConfig, setting_groups

_EXAMPLE = """\
example:
  deepspeed --num_gpus 8 rm_scale/train.py --model_name_or_path Qwen/Qwen2.5-7B-Instruct \\
      --dataset_path pairs.jsonl --eval_split_size 300 --use_peft --learning_rate 1e-4 --num_train_epochs 1 \\
      --global_batch_size 64 --deepspeed zero2 --output_dir outputs/my_reward_model"""
_TYPE_NAMES = {
    str: "text",
    int: "whole number",
    float: "number",
    list[str]: "list of text",
    dict[str, Any]: "mapping",
    list[dict[str, Any]]: "list of mappings",
}
_NAME_COLUMN = 36
_WIDTH = 120


def help_text() -> str:
    """Return all settings by group, with meaning, values and default, and one example: what `--help` prints."""
    lines = [
        "usage: deepspeed rm_scale/train.py --config FILE.yaml [--setting value ...]",
        "",
        "Train a reward model. FILE.yaml maps names of settings to values; flags win over the file. torchrun, srun and",
        "python can take the place of deepspeed. --dry_run prints what settings come to (--json: as JSON) and stops.",
        "A setting without a default below may be left out.",
    ]
    for group, names in setting_groups().items():
        lines += ["", f"{group}:"]
        for name in names:
            lines += _help_lines(name)
    return "\n".join([*lines, "", _EXAMPLE])


def _help_lines(name: str) -> list[str]:
    values = " | ".join(value_choices(name)) or value_type(name)
    default = default_text(name)
    shown = {"required": "; required", "none": ""}.get(default, f"; default {default}")
    text = f"{RunConfig.model_fields[name].description} [{values}{shown}]"
    indent = " " * _NAME_COLUMN
    wrapped = textwrap.wrap(text, _WIDTH - _NAME_COLUMN, break_on_hyphens=False, break_long_words=False)
    return [f"  --{name} ".ljust(_NAME_COLUMN) + wrapped[0], *(indent + line for line in wrapped[1:])]


def value_choices(name: str) -> tuple[str, ...]:
    """Return the values a setting can have, or () when they are not a fixed choice."""
    annotation = _annotation(name)
    if annotation is bool:
        return "true", "false"
    return typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()


def value_type(name: str) -> str:
    """Return the type of a setting that has no fixed choice of values, with its limits, e.g. "whole number, >= 1"."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [
        f"{sign} {_number(getattr(limit, kind))}"
        for limit in RunConfig.model_fields[name].metadata
        for kind, sign in signs.items()
        if hasattr(limit, kind)
    ]
    return ", ".join([_TYPE_NAMES[_annotation(name)], *limits])


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def default_text(name: str) -> str:
    """Return a setting's default as one writes it in YAML; "none" for not set, "empty" for an empty list."""
    info = RunConfig.model_fields[name]
    if info.is_required():
        return "required"
    match info.get_default(call_default_factory=True):
        case bool() as value:
            return str(value).lower()
        case None:
            return "none"
        case []:
            return "empty"
        case float() as value:
            return f"{value:g}"
        case value:
            return str(value)


def _annotation(name: str) -> Any:
    """Return a setting's type, without its "or None"."""
    annotation = RunConfig.model_fields[name].annotation
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return annotation
    (kind,) = (part for part in typing.get_args(annotation) if part is not types.NoneType)
    return kind

"""What `train.py --help` shows: every setting under its group, and an example that works."""

from __future__ import annotations

import re
import shlex

from rm_scale.config import Group, RunConfig, setting_groups
from rm_scale.config_help import default_text, help_text, value_choices, value_type
from rm_scale.config_parsing import parse_config


def test_every_setting_is_shown_under_its_group() -> None:
    shown: dict[str, list[str]] = {}
    for line in help_text().partition("\nexample:")[0].splitlines():
        if line in {f"{group}:" for group in Group}:
            names = shown.setdefault(line.removesuffix(":"), [])
        elif found := re.match(r"  --(\w+) ", line):
            names.append(found[1])
    assert shown == {str(group): names for group, names in setting_groups().items()}
    assert sum(map(len, shown.values())) == len(RunConfig.model_fields)
    assert max(map(len, help_text().splitlines())) <= 120


def test_the_example_is_a_whole_command_that_works() -> None:
    command = shlex.split(help_text().partition("example:\n")[2].replace("\\\n", " "))
    assert command[: command.index("rm_scale/train.py")] == ["deepspeed", "--num_gpus", "8"]
    parsed = parse_config(command[command.index("rm_scale/train.py") + 1 :])
    assert parsed.problems == ()
    assert {"model_name_or_path", "dataset_path", "output_dir", "deepspeed"} <= parsed.given


def test_values_and_defaults_as_a_reader_writes_them() -> None:
    assert (value_choices("bf16"), default_text("bf16")) == (("true", "false"), "true")
    assert (value_choices("overlong_policy")[0], default_text("overlong_policy")) == ("drop", "drop")
    assert value_choices("bnb_4bit_quant_storage") == ("uint8", "bfloat16", "float16", "float32")
    assert (value_type("lora_dropout"), default_text("lora_dropout")) == ("number, >= 0, < 1", "0.05")
    assert (value_type("max_train_samples"), default_text("max_train_samples")) == (
        "whole number, >= 1, <= 1,000,000,000",
        "none",
    )
    assert (value_type("report_to"), default_text("report_to")) == ("list of text", "empty")
    assert (value_type("gradient_checkpointing_kwargs"), default_text("adam_epsilon")) == ("mapping", "1e-08")
    assert (value_type("model_name_or_path"), default_text("model_name_or_path")) == ("text", "required")

"""DeepSpeed files of other tools: read as DeepSpeed reads them, under whichever of its names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rm_scale.config_parsing import config_from_dict
from rm_scale.errors import ConfigError
from rm_scale.planning.deepspeed_config import (
    OTHER_NAMES,
    check_deepspeed_config,
    offload_device,
    read_deepspeed_config,
)

AUTO = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping"), "auto")


def read(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    file = folder / "ds.json"
    file.write_text(json.dumps(values))
    return read_deepspeed_config(str(file))


def problems_of(folder: Path, values: dict[str, Any]) -> list[str]:
    config = config_from_dict({"model_name_or_path": "m", "dataset_path": "d", "deepspeed": "ds.json"}).config
    return check_deepspeed_config(read(folder, values), config, world_size=2)


@pytest.mark.parametrize(
    "zero",
    [
        {"gather_16bit_weights_on_model_save": True, "max_live_parameters": 0, "prefetch_bucket_size": "auto"},
        {"stage3_gather_fp16_weights_on_model_save": True},
        {"stage3_gather_16bit_weights_on_model_save": True, "gather_16bit_weights_on_model_save": True},
        {"gather_16bit_weights_on_model_save": True, "offload_param": None, "offload_optimizer": {"device": "cpu"}},
    ],
)
def test_files_of_other_tools_are_accepted(zero: dict[str, Any], tmp_path: Path) -> None:
    for blocks in ({"bf16": {"enabled": "auto"}}, {"bfloat16": {"enabled": True}}):
        fp16 = {"fp16": {"enabled": "auto", "loss_scale": 0}}
        assert problems_of(tmp_path, {**AUTO, **fp16, **blocks, "zero_optimization": {"stage": 3, **zero}}) == []


def test_names_are_those_that_deepspeed_knows() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    aliases = {name: field.alias for name, field in fields.items() if field.alias and field.alias != name}
    assert OTHER_NAMES.items() >= aliases.items()
    assert set(OTHER_NAMES) - set(aliases) == {"stage3_gather_fp16_weights_on_model_save"}


def test_every_setting_is_handed_on_under_one_name(tmp_path: Path) -> None:
    zero = {"stage": 3, "prefetch_bucket_size": "auto", "max_reuse_distance": 7, "cpu_offload": True}
    values = read(tmp_path, {"bfloat16": {"enabled": "auto"}, "zero_optimization": zero})
    assert values == {
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": "auto",
            "stage3_max_reuse_distance": 7,
            "offload_optimizer": {"device": "cpu"},
        },
    }
    assert offload_device(values) == "cpu" and offload_device(values, "offload_param") == "none"
    assert offload_device({"zero_optimization": {"offload_param": None}}, "offload_param") == "none"
    zero = {"stage": 2, "cpu_offload": False}
    assert read(tmp_path, {"zero_optimization": zero})["zero_optimization"] == {"stage": 2}


def test_two_values_of_one_setting_are_refused(tmp_path: Path) -> None:
    zero = {"max_live_parameters": 1, "stage3_max_live_parameters": 2}
    with pytest.raises(ConfigError, match=r"max_live_parameters=1 and stage3_max_live_parameters=2 are one setting"):
        read(tmp_path, {"zero_optimization": zero})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bf16": True}, "bf16=True: must be a block of settings"),
        ({"fp16": None}, "fp16=None: must be a block of settings"),
        ({"bf16": {}}, "bf16.enabled=False but the run has bf16=True"),
        ({"timers": 3}, "timers=3: must be a block of settings"),
        (
            {"zero_optimization": {"zero_hpz_partition_size": "auto"}},
            "zero_hpz_partition_size='auto': must be a number.",
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": "big"}},
            "reduce_bucket_size='big': must be a number, or \"auto\"",
        ),
    ],
)
def test_values_of_the_wrong_kind_are_named(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert any(message in problem for problem in problems_of(tmp_path, values))

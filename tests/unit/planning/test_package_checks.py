"""A setting whose package is not installed is refused by its own name; one whose package is there is not."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from rm_scale.config import RunConfig
from rm_scale.config_names import LOGGERS, OPTIMIZERS, OPTIMIZERS_WITH_ARGUMENTS
from rm_scale.planning import package_checks
from rm_scale.planning.package_checks import check_packages


def problems(device: str = "cuda", **settings: Any) -> list[str]:
    return check_packages(RunConfig(model_name_or_path="m", dataset_path=["d"], **settings), device)


@pytest.mark.parametrize(
    ("settings", "module", "fix"),
    [
        ({"optim": "lomo"}, "lomo_optim", "pip install lomo-optim, or use adamw_torch."),
        ({"optim": "adamw_torch_4bit"}, "torchao", "pip install torchao"),
        ({"optim": "schedule_free_sgd"}, "schedulefree", "pip install schedulefree"),
        ({"report_to": ["wandb"]}, "wandb", "pip install wandb, or leave it out."),
        ({"report_to": ["azure_ml"]}, "azureml", "pip install azureml-core"),
        ({"attn_implementation": "flash_attention_2"}, "flash_attn", "pip install flash-attn, or leave it out."),
        ({"attn_implementation": "flash_attention_3"}, "flash_attn_interface", "pip install flash-attn-3"),
    ],
)
def test_a_missing_package_is_named_by_its_setting(settings: dict[str, Any], module: str, fix: str) -> None:
    if importlib.util.find_spec(module) is not None or importlib.util.find_spec("kernels") is not None:
        pytest.skip("installed here")
    ((name, value),) = settings.items()
    (problem,) = problems(**settings)
    shown = value if isinstance(value, str) else value[0]
    assert problem.startswith(f"{name}={shown}: the package that it needs is not installed. Fix: ")
    assert fix in problem


def test_what_is_installed_passes() -> None:
    assert problems(report_to=["tensorboard", "none"], optim="adamw_8bit", load_in_4bit=True, use_peft=True) == []
    assert problems(attn_implementation="sdpa", report_to=["all"], optim="adafactor") == []


def test_flash_attention_needs_a_gpu() -> None:
    (problem,) = problems("cpu", attn_implementation="flash_attention_2")
    assert problem.startswith("attn_implementation=flash_attention_2 on cpu: flash attention is written for GPUs.")


def test_each_name_that_transformers_takes_from_a_package_is_known_here() -> None:
    own = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}
    beginnings = tuple(one for names, _, _ in package_checks._OPTIMIZER_PACKAGES for one in names)
    rest = {name for name in OPTIMIZERS if not name.startswith((*beginnings, *OPTIMIZERS_WITH_ARGUMENTS))}
    assert rest == own
    # kubeflow needs no package; its server is found by the environment.
    assert {*LOGGERS} - {"all", "none", "kubeflow"} == {*package_checks._LOGGER_PACKAGES}

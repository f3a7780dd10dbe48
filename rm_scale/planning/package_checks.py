"""Check that the packages which settings ask for are installed."""

from __future__ import annotations

import importlib.util

from rm_scale.config import RunConfig

# By how an optimizer's name begins: the module it is in, and what to install for it.
_OPTIMIZER_PACKAGES = (
    (("lomo", "adalomo"), "lomo_optim", "lomo-optim"),
    (("grokadamw",), "grokadamw", "grokadamw"),
    (("schedule_free_",), "schedulefree", "schedulefree"),
    (("stable_adamw",), "optimi", "torch-optimi"),
    (("adamw_torch_4bit", "adamw_torch_8bit"), "torchao", "torchao"),
    (("adamw_torch_xla",), "torch_xla", "torch_xla"),
    (("adamw_torch_npu_fused",), "torch_npu", "torch_npu"),
    (("adamw_anyprecision",), "torchdistx", "torchdistx"),
    (("adamw_bnb", "adamw_8bit", "ademamix", "lion_", "paged_", "rmsprop_bnb"), "bitsandbytes", "bitsandbytes"),
)
# By a logger's name: modules of which one is enough, and what to install for it.
_LOGGER_PACKAGES = {
    "azure_ml": (("azureml.core",), "azureml-core"),
    "clearml": (("clearml",), "clearml"),
    "codecarbon": (("codecarbon",), "codecarbon"),
    "comet_ml": (("comet_ml",), "comet_ml"),
    "dagshub": (("dagshub",), "dagshub mlflow"),
    "dvclive": (("dvclive",), "dvclive"),
    "flyte": (("flytekit",), "flytekit flytekitplugins-deck-standard"),
    "mlflow": (("mlflow",), "mlflow"),
    "neptune": (("neptune",), "neptune"),
    "swanlab": (("swanlab",), "swanlab"),
    "tensorboard": (("tensorboard", "tensorboardX"), "'rm-scale[tensorboard]'"),
    "trackio": (("trackio",), "trackio"),
    "wandb": (("wandb",), "wandb"),
}
# By an attention kernel's name likewise; transformers takes the same from the hub where `kernels` is installed.
_ATTENTION_PACKAGES = {
    "flash_attention_2": (("flash_attn", "kernels"), "flash-attn"),
    "flash_attention_3": (("flash_attn_interface", "kernels"), "flash-attn-3"),
    "flash_attention_4": (("flash_attn", "kernels"), "flash-attn-4"),
}


def check_packages(config: RunConfig, device: str) -> list[str]:
    """Return a problem for each setting whose package is missing: optimizer, loggers, attention kernel, 4-bit weights.

    A package that is there may still refuse to work; that is found when it is first used.
    """
    problems = []
    for beginnings, module, package in _OPTIMIZER_PACKAGES:
        if config.optim.startswith(beginnings) and not _is_installed(module):
            problems.append(_missing(f"optim={config.optim}", package, "use adamw_torch"))
    for name in config.report_to:
        modules, package = _LOGGER_PACKAGES.get(name, ((), ""))
        if modules and not any(map(_is_installed, modules)):
            problems.append(_missing(f"report_to={name}", package, "leave it out"))
    modules, package = _ATTENTION_PACKAGES.get(config.attn_implementation or "", ((), ""))
    if modules and device != "cuda":
        kernel = f"attn_implementation={config.attn_implementation} on {device}"
        problems.append(f"{kernel}: flash attention is written for GPUs. Fix: leave it out, or use sdpa.")
    elif modules and not any(map(_is_installed, modules)):
        problems.append(_missing(f"attn_implementation={config.attn_implementation}", package, "leave it out"))
    if config.load_in_4bit and not _is_installed("bitsandbytes"):
        problems.append(_missing("load_in_4bit=True", "bitsandbytes", "leave it out"))
    return problems


def _missing(setting: str, package: str, otherwise: str) -> str:
    return f"{setting}: the package that it needs is not installed. Fix: pip install {package}, or {otherwise}."


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # the package that it would be in, or a module with no spec
        return False

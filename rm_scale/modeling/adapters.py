"""Add LoRA adapters to a model whose head is trained in full."""

from __future__ import annotations

from collections import defaultdict

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import transformers_weight_conversion
from transformers import PreTrainedModel

from rm_scale.config import RunConfig
from rm_scale.errors import ModelError
from rm_scale.logs import get_logger
from rm_scale.modeling.experts import expert_tensors, num_weights, routers
from rm_scale.modeling.head import HEAD_NAMES, check_head_trainable
from rm_scale.planning.expert_settings import short_name, targets_problem
from rm_scale.planning.plan_checks import expert_names_problem
from rm_scale.texts import first_line, large_number, one_line

logger = get_logger(__name__)

_ABOUT_TARGETS = ("Target module", "target_modules", "No modules were targeted")
"""One of these is in PEFT's errors about `lora_target_modules`; its `ValueError`s have many other causes."""
_NAME = "default"
_READ_AS_TENSORS = {"jamba": {"dt_proj"}, "zamba2": {"out_proj"}}
"""Linear layers whose weight their model reads past the layer, by model type: an adapter there does nothing."""


def lora_config(config: RunConfig, model: PreTrainedModel) -> LoraConfig:
    """Return PEFT's configuration. The task type is always SEQ_CLS, the only one that trains and saves the head."""
    return LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        # PEFT refuses dropout for all when a single target is a tensor of experts; `set_dropout` gives it to the rest.
        lora_dropout=0.0 if expert_tensors(model) else config.lora_dropout,
        target_modules=config.lora_target_modules or default_targets(model),
        target_parameters=config.lora_target_parameters,
        modules_to_save=config.lora_modules_to_save,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        bias="none",
    )


def default_targets(model: PreTrainedModel) -> str | list[str]:
    """Return the default targets: all linear layers but the head; of a mixture of experts, by name.

    There PEFT reads "all-linear", and names like `down_proj`, as the experts and the router, as which such names stood
    in the files of older versions. So layers of these names are left out: shared experts, and MLPs of dense layers.
    Layers that are never called, only read, are left out too.
    """
    unread = _READ_AS_TENSORS.get(model.config.model_type, set())
    if not expert_tensors(model) and not unread:
        return "all-linear"
    left_out = {*HEAD_NAMES, *unread, *_read_as_experts(model)}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and name.rpartition(".")[2] not in left_out
        and name not in routers(model)  # some are linear layers
    ]


def _read_as_experts(model: PreTrainedModel) -> set[str]:
    """Return the names of modules that PEFT takes for experts or routers of this kind of model."""
    kinds = transformers_weight_conversion._MODEL_TO_CONVERSION_PATTERN
    return set(transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING.get(kinds.get(model.config.model_type), ()))


def add_adapters(model: PreTrainedModel, config: RunConfig, keep_dtype: bool) -> PeftModel:
    """Freeze the model and put LoRA layers beside its linear layers; the head stays trainable.

    Args:
        model: sequence-classification model with a `ScalarHead`.
        config: the run's LoRA settings.
        keep_dtype: leave adapters in the backbone's type, which ZeRO-3 needs (TRL#6089); else they are fp32.

    Raises:
        ModelError: a target module or parameter does not exist or would be read as another, or the head would be
            frozen.
    """
    _refuse_unread_layers(model, config)
    problem = expert_names_problem(config.lora_target_modules, model.config.model_type, _read_as_experts(model))
    if problem is not None:
        raise ModelError(problem)
    problem = targets_problem(config.lora_target_parameters or [], _matrices(model), type(model).__name__)
    if problem is not None:
        raise ModelError(problem)
    try:
        adapted = get_peft_model(model, lora_config(config, model), autocast_adapter_dtype=not keep_dtype)
    except (ValueError, NotImplementedError, TypeError) as error:
        raise ModelError(_refused(error, model, config)) from error
    set_dropout(adapted, config.lora_dropout)
    check_head_trainable(adapted)
    logger.info(describe_adapters(adapted))
    return adapted


def _refuse_unread_layers(model: PreTrainedModel, config: RunConfig) -> None:
    """Refuse target modules on which an adapter would do nothing.

    Raises:
        ModelError: there is one.
    """
    unread = _READ_AS_TENSORS.get(model.config.model_type, set())
    found = [name for name in config.lora_target_modules or [] if name.rpartition(".")[2] in unread]
    if found:
        raise ModelError(
            f"lora_target_modules={config.lora_target_modules}: {model.config.model_type} models read the weight of "
            f"{found[0]} without calling the layer, so an adapter there would do nothing. Fix: leave {found[0]} out."
        )


def _matrices(model: torch.nn.Module) -> list[str]:
    """Return the names of the experts' 3-D tensors."""
    return [name for name, p in expert_tensors(model).items() if len(getattr(p, "ds_shape", p.shape)) == 3]


def _lora_layers(model: torch.nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def set_dropout(adapted: PeftModel, share: float) -> None:
    """Give linear layers the dropout that PEFT was not told of. Tensors of experts can't have any.

    Without such tensors the saved configuration names it as well; PEFT would refuse it for those.
    """
    settings = adapted.peft_config[_NAME]
    if settings.lora_dropout == share:
        return
    layers = _lora_layers(adapted).values()
    for layer in layers:
        if not isinstance(layer, ParamWrapper):
            layer.lora_dropout[_NAME] = torch.nn.Dropout(share)
    if not any(isinstance(layer, ParamWrapper) for layer in layers):
        settings.lora_dropout = share


def describe_adapters(adapted: PeftModel) -> str:
    """Say which weights have adapters and, of a mixture of experts, which have none."""
    layers = _lora_layers(adapted)
    linear = [name.rpartition(".")[2] for name, layer in layers.items() if not isinstance(layer, ParamWrapper)]
    tensors = [layer.parameter_name for layer in layers.values() if isinstance(layer, ParamWrapper)]
    text = f"LoRA adapts {len(linear)} linear layers ({_listed(linear)})"
    if tensors:
        text += f" and {len(tensors)} tensors of experts and routers ({_listed(tensors)}; these without dropout)"
    bare = _without_adapter(adapted)
    if bare:
        text += f"; not {_listed(bare)}"
    frozen = _frozen_experts(adapted)
    if frozen:
        text += (
            f"; not the experts ({large_number(num_weights(frozen.values()))} weights), which lora_target_parameters: "
            f"[{', '.join(sorted(set(map(short_name, frozen))))}] would adapt too"
        )
    return text


def _without_adapter(adapted: PeftModel) -> list[str]:
    """Return the last names of linear layers that stay as they are, the head left out."""
    inside = tuple(f"{name}." for name in _lora_layers(adapted))
    return [
        ".".join(name.split(".")[-2:])
        for name, module in adapted.named_modules()
        if isinstance(module, torch.nn.Linear)
        and not name.startswith(inside)
        and not isinstance(module, LoraLayer)
        and not set(HEAD_NAMES) & set(name.split("."))
    ]


def _frozen_experts(adapted: PeftModel) -> dict[str, torch.nn.Parameter]:
    """Return the experts' matrices without an adapter, by name."""
    wrapped = defaultdict(set)
    for layer in _lora_layers(adapted).values():
        if isinstance(layer, ParamWrapper):
            wrapped[layer.get_base_layer()].add(layer.parameter_name)
    modules = dict(adapted.named_modules())
    return {
        name: parameter
        for name, parameter in expert_tensors(adapted).items()
        if name.rpartition(".")[2] not in wrapped[modules[name.rpartition(".")[0]]]
        and len(getattr(parameter, "ds_shape", parameter.shape)) == 3
    }


def _listed(names: list[str]) -> str:
    return ", ".join(sorted(set(names)))


def _refused(error: Exception, model: PreTrainedModel, config: RunConfig) -> str:
    """Return what PEFT refused; with a fix only where the cause is known, since other fixes would mislead."""
    text = one_line(error, 400)
    if ParamWrapper.__name__ in text and config.use_dora:
        return (
            f"use_dora=True: tensors of experts can't have it ({text}). Fix: set use_dora: false, or adapt linear "
            "layers alone (leave lora_target_parameters out; name the layers in lora_target_modules)."
        )
    if not any(word in text for word in _ABOUT_TARGETS):
        return f"use_peft=True: LoRA layers can't be added to {type(model).__name__} ({type(error).__name__}: {text})"
    names = sorted({name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
    return (
        f"lora_target_modules={config.lora_target_modules}: {first_line(error)} "
        f"Fix: choose among {', '.join(n for n in names if n not in HEAD_NAMES)}, or leave it out for all."
    )

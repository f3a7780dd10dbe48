"""Settings for experts, checked against the model: `lora_target_parameters` and `router_aux_loss_coef`.

One reading of both, by the names and facts of a model's config.json before the run and by the loaded model's own in it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from rm_scale.errors import ModelError
from rm_scale.planning.families import EXPERTS_ARE_IN, WITHOUT_BALANCING_LOSS
from rm_scale.planning.parameters import active_parameters, backbone_tensors, is_adapted, total
from rm_scale.planning.scenario import Method
from rm_scale.planning.shape import ModelShape
from rm_scale.texts import large_number, some_names

_MATRICES = ("gate_up_proj", "down_proj")


def expert_names(shape: ModelShape) -> tuple[str, ...]:
    """Return the full names of the experts' 3-D tensors, as transformers' classifier has them."""
    if shape.exact is not None:
        return shape.exact.expert_names
    if shape.experts is None:
        return ()
    block = EXPERTS_ARE_IN.get(shape.model_type, "mlp")
    return tuple(
        f"model.layers.{place}.{block}.experts.{matrix}"
        for place, kind in enumerate(shape.layers)
        if kind.feed_forward == "experts"
        for matrix in _MATRICES
    )


def is_named(parameter: str, targets: Collection[str]) -> bool:
    """Tell whether `lora_target_parameters` names a parameter: by its whole name or by the end of it, as PEFT reads."""
    return any(parameter == target or parameter.endswith(f".{target}") for target in targets)


def short_name(parameter: str) -> str:
    """Return the name by which the setting is told of an experts' tensor in all layers: experts.down_proj."""
    return f"experts.{parameter.rpartition('.')[2]}"


def targets_problem(targets: Sequence[str], names: Iterable[str], model: str) -> str | None:
    """Say which of `lora_target_parameters` name no tensor of the model's experts; `None`: each names some.

    Args:
        targets: the setting.
        names: full names of the experts' 3-D tensors.
        model: what the model is called in the message.
    """
    names = list(names)
    wrong = [target for target in targets if not any(is_named(name, [target]) for name in names)]
    if not wrong:
        return None
    known = sorted({short_name(name) for name in names})
    if not known:
        return f"lora_target_parameters={list(targets)}: {model} has no experts. Fix: leave lora_target_parameters out."
    return (
        f"lora_target_parameters={list(targets)}: {model} has no tensor of experts whose name ends in {wrong[0]}. "
        f"Fix: choose among {', '.join(known)}."
    )


def adapted_parameters(targets: Sequence[str] | None, shape: ModelShape) -> tuple[str, ...]:
    """Return the experts' tensors that `lora_target_parameters` names, in the form in which the planner counts them.

    A tensor that is adapted in all layers is named once and shortly ("experts.down_proj"), else by its full name in
    each of its layers. PEFT reads either.

    Args:
        targets: the setting, with names in any spelling that PEFT takes.
        shape: the model's.

    Raises:
        ModelError: a name is of no such tensor.
    """
    if not targets:
        return ()
    names = expert_names(shape)
    problem = targets_problem(targets, names, f"a model of type {shape.model_type}")
    if problem is not None:
        raise ModelError(problem)
    found = []
    for short in sorted({short_name(name) for name in names}, reverse=True):
        alike = [name for name in names if short_name(name) == short]
        adapted = [name for name in alike if is_named(name, targets)]
        in_all_layers = adapted == alike and all(is_named(name, [short]) for name in alike)
        found += [short] if in_all_layers else adapted
    return tuple(found)


def no_router_loss(shape: ModelShape) -> str | None:
    """Say why the routers of a model have no load-balancing loss; `None`: they have one."""
    if shape.exact is not None:
        return shape.exact.no_router_loss
    if shape.experts is None:
        return NO_EXPERTS
    return BALANCED_OTHERWISE if shape.model_type in WITHOUT_BALANCING_LOSS else None


NO_EXPERTS = "it has no experts"
BALANCED_OTHERWISE = "its routers are balanced in another way"


def router_loss_problem(asked: float | None, model_type: str, reason_against: str | None) -> str | None:
    """Say why `router_aux_loss_coef` can't be had of a model; `None`: it can, or is not asked for.

    Args:
        asked: the setting; 0 turns the loss off, which any model allows.
        model_type: transformers' name of the family.
        reason_against: why its routers have no such loss, if they have none.
    """
    if not asked or reason_against is None:
        return None
    return (
        f"router_aux_loss_coef={asked:g}: there is no load-balancing loss of {model_type} models here, "
        f"{reason_against}. Fix: leave router_aux_loss_coef out."
    )


def expert_notes(
    shape: ModelShape, method: Method, targets: Sequence[str] | None, parameters: Sequence[str]
) -> list[str]:
    """Say of a mixture of experts what a token goes through, what LoRA adapts and what is kept in 4 bits.

    Args:
        shape: the model's; of one without experts there is nothing to say.
        method: full, lora or qlora.
        targets: adapted modules; `None` for all linear layers.
        parameters: adapted tensors of experts, as `adapted_parameters` gives them.
    """
    experts = shape.experts
    if experts is None:
        return []
    tensors = backbone_tensors(shape)
    in_experts = total([tensor for tensor in tensors if tensor.role == "experts"])
    shared = f" and one shared of width {experts.shared_width:,}" if experts.shared_width else ""
    lines = [
        f"mixture of experts: {large_number(active_parameters(shape))} of the parameters at work for a token, "
        f"{experts.chosen} of {experts.num} experts a layer{shared}; all {large_number(in_experts)} weights of experts "
        "are in memory"
    ]
    if method != "full":
        adapted = sorted({tensor.module for tensor in tensors if is_adapted(tensor, targets)})
        named = some_names(parameters, most=6)
        rest = f"of the experts {named}" if named else "not the experts, which lora_target_parameters would add"
        lines.append(f"LoRA adapts {', '.join(adapted)}; {rest}")
    if method == "qlora":
        lines.append(
            f"4 bits: linear layers alone. bitsandbytes leaves the experts' 3-D tensors in 16 bits, "
            f"{2 * in_experts / 1e9:.1f} GB of them"
        )
    return lines

"""What of a model are its experts and routers, by name: transformers holds all experts of a layer as 3-D tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from rm_scale.planning.expert_settings import BALANCED_OTHERWISE, NO_EXPERTS

_EXPERTS = "experts"


def expert_tensors(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the weights of routed experts by name, matrices `(experts, rows, columns)` and biases `(experts, rows)`.

    Shared experts, through which every token goes, are plain linear layers and not among them; nor are adapters.
    """
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if _EXPERTS in name.split(".") and ".lora_" not in name
    }


def num_weights(parameters: Iterable[torch.nn.Parameter]) -> int:
    """Return the number of weights, whole where ZeRO-3 has sharded a parameter or 4 bits share an element."""
    return sum(_numel(parameter) for parameter in parameters)


def _numel(parameter: torch.nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return int(torch.Size(state.shape).numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def routers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the modules that choose experts for each token, by name and in the order of the layers.

    Each gives `(logits, weights, indices)`: `(tokens, experts)`, `(tokens, top_k)` and `(tokens, top_k)`. They are
    those from whose first output transformers records `router_logits`. The few modules that give these logits at
    another place (JetMoe's, Doge's) give no such three, and are left out: see `num_uncounted_routers`.
    """
    return {name: module for name, module, place in _recorded(model) if place == 0}


def num_uncounted_routers(model: torch.nn.Module) -> int:
    """Return how many modules choose experts in a way that `routers` does not read."""
    return sum(place != 0 for _, _, place in _recorded(model))


def reason_against_router_loss(model: torch.nn.Module) -> str | None:
    """Say why there is no load-balancing loss of a model's routers; `None`: transformers trains such models with it."""
    if routers(model):
        return None if has_balancing_loss(model) else BALANCED_OTHERWISE
    return "its routers choose experts in a way of their own" if num_uncounted_routers(model) else NO_EXPERTS


def has_balancing_loss(model: torch.nn.Module) -> bool:
    """Tell whether transformers trains models of this kind with a load-balancing loss."""
    kinds = [type(module) for module in model.modules() if isinstance(module, PreTrainedModel)]
    return any(hasattr(sys.modules.get(kind.__module__), "load_balancing_loss_func") for kind in kinds)


def _recorded(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module, int]]:
    """Return the modules from which transformers records `router_logits`, and at which place of their outputs."""
    places: dict[type[torch.nn.Module], int] = {}
    for module in model.modules():
        recorder = (getattr(type(module), "_can_record_outputs", None) or {}).get("router_logits")
        for one in recorder if isinstance(recorder, list) else [recorder]:
            found = getattr(one, "target_class", one)
            if isinstance(found, type):
                places[found] = getattr(one, "index", 0)
    kinds: tuple[type[torch.nn.Module], ...] = tuple(places)
    return [
        (name, module, next(place for kind, place in places.items() if isinstance(module, kind)))
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]

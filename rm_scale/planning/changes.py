"""What would make a request fit that doesn't: the smallest change first, each tried as it is told."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from rm_scale.planning.advise import Choice, Request, recommend
from rm_scale.planning.group_lengths import LengthMix, full_rows

LEFT_OPEN: dict[str, Any] = {
    "zero_stage": None,
    "offload": None,
    "checkpointing": None,
    "max_tokens": None,
    "micro_batch": None,
}
"""Fields of a request that the planner chooses where nothing is asked for."""


@dataclass(frozen=True)
class Change:
    """Something to do otherwise, with which a request fits.

    Attributes:
        changed: fields of the request that are other, with their values.
        choice: how it then runs.
        chosen: fields that were asked for and can't stay as they were, with the values that the choice has for them.
    """

    changed: dict[str, Any]
    choice: Choice
    chosen: dict[str, Any]


def changes_that_fit(request: Request) -> list[Change]:
    """Find what would make a request fit that doesn't, the smallest change first.

    What was asked for stays (ZeRO stage, offload, checkpointing, rows) where a change alone is enough. Only where it is
    not, and leaving that open is not enough either, both come together.
    """
    found = []
    freed = replace(request, **LEFT_OPEN)
    is_fixed = freed != request
    if is_fixed and (best := recommend(freed)).estimate.fits:
        found.append(Change({}, best, _chosen(request, best)))
        is_fixed = False  # on top of another change it would not be needed
    done: set[str] = set()
    for changed in _changes(request):
        kind = next(iter(changed))
        if kind in done and kind != "method":
            continue
        best = recommend(replace(request, **changed))
        if not best.estimate.fits and is_fixed:
            best = recommend(replace(freed, **changed))
        if best.estimate.fits:
            done.add(kind)
            found.append(Change(changed, best, _chosen(replace(request, **changed), best)))
    return found


def _chosen(request: Request, choice: Choice) -> dict[str, Any]:
    """Return what was asked for and is otherwise in a choice."""
    asked = {field.name: getattr(request, field.name) for field in fields(request) if field.name in LEFT_OPEN}
    return {
        name: getattr(choice, name)
        for name, value in asked.items()
        if value is not None and getattr(choice, name) not in (value, None)
    }


def _changes(request: Request) -> Iterator[dict[str, Any]]:
    if request.packing == "none":
        yield {"packing": "prefix_shared"}
    for length in _shorter(request.max_length):
        yield {"max_length": length, "lengths": shortened(request.lengths, length)}
    if request.method == "full":
        yield {"method": "lora"}
    if request.method != "qlora":
        yield {"method": "qlora"}
    per_node = max(request.device.devices_per_node, math.ceil(request.num_devices / request.num_nodes))
    count = request.num_devices
    while count < 64 * per_node and count * 2 <= request.global_batch_size:
        count *= 2
        yield {"num_devices": count, "num_nodes": max(request.num_nodes, math.ceil(count / per_node))}


def _shorter(length: int) -> Iterator[int]:
    while length > 512:
        length //= 2
        yield length


def shortened(lengths: LengthMix, max_length: int) -> LengthMix:
    """Return the lengths without groups that are longer; full rows where none is left."""
    kept = [group for group in lengths.groups if group.longest <= max_length]
    return lengths.cut(max_length) if kept else full_rows(max_length)


_FLAGS = {
    "packing": "--packing",
    "max_length": "--seq",
    "method": "--method",
    "num_devices": "--gpus",
    "num_nodes": "--nodes",
    "zero_stage": "--zero",
    "offload": "--offload",
    "max_tokens": "--max_tokens",
    "micro_batch": "--micro_batch",
    "checkpointing": "--checkpointing",
}


def plan_options(change: Change) -> str:
    """Return a change as the options of `rm-scale plan` that make it."""
    words = []
    for name, value in {**change.changed, **change.chosen}.items():
        if name in _FLAGS:
            shown = {True: "on", False: "off"}[value] if name == "checkpointing" else value
            words.append(f"{_FLAGS[name]} {shown}")
    return " ".join(words)

"""What `rm-scale plan --json` prints; scripts read it, so the names stay."""

from __future__ import annotations

from rm_scale.planning.advise import Choice, Request
from rm_scale.planning.changes import Change, plan_options
from rm_scale.planning.parameters import active_parameters, count_parameters
from rm_scale.planning.plan_text import notes


def to_dict(request: Request, choice: Choice, changes: list[Change]) -> dict[str, object]:
    """Return a plan, and the changes with which it would fit, as JSON for scripts; the names are promised."""
    scenario = choice.estimate.scenario
    return {
        "model": request.name,
        "num_parameters": count_parameters(request.shape),
        "num_active_parameters": active_parameters(request.shape),
        "num_trained_parameters": scenario.num_trained,
        "method": request.method,
        "gpu": request.device.name,
        "gpus": request.num_devices,
        "nodes": request.num_nodes,
        **choice.estimate.to_dict(),
        "recommended": {
            "zero_stage": choice.zero_stage,
            "offload": choice.offload,
            "gradient_checkpointing": choice.checkpointing,
            "max_tokens_per_device": choice.max_tokens if choice.micro_batch is None else None,
            "per_device_train_batch_size": choice.micro_batch,
            "num_micro_steps": scenario.num_micro_steps,
            "global_batch_size": request.global_batch_size,
            "packing": request.packing,
        },
        "lengths": request.lengths.origin,
        "notes": notes(request),
        "changes_that_fit": [plan_options(change) for change in changes],
    }

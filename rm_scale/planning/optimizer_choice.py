"""Which optimizer runs for the one that was asked for."""

from __future__ import annotations

from rm_scale.config import RunConfig

FUSED = "adamw_torch_fused"
OFFLOADED_OPTIMIZERS = ("adamw_torch", FUSED, "adagrad", "paged_adamw_32bit", "lion_32bit", "paged_lion_32bit")
"""Of these DeepSpeed has a version of its own for state on the host; in place of all others it would take its Adam
(`map_pytorch_optim_to_deepspeed` of accelerate)."""


def optimizer_that_runs(config: RunConfig, device: str, uses_deepspeed: bool, offload: str) -> tuple[str, str | None]:
    """Return the optimizer's name as transformers knows it, and a note where it is not the one that was asked for.

    On CUDA torch's AdamW makes a temporary as large as what it updates at once (the square roots of its second
    moments), unless all is done in one kernel. The results differ by rounding only.

    It stays as it is with optimizer state on the host, where DeepSpeed's own Adam takes its place; and where a loss
    scaler steps it, which then leaves out steps inside the kernel, so that nobody hears of them and the schedule goes
    on.

    Args:
        config: what was asked.
        device: cuda or cpu.
        uses_deepspeed: the run goes through DeepSpeed's engine, which scales losses itself.
        offload: where optimizer state is kept: none, cpu or nvme.
    """
    is_stepped_by_scaler = config.fp16 and not uses_deepspeed
    if config.optim != "adamw_torch" or device != "cuda" or offload != "none" or is_stepped_by_scaler:
        return config.optim, None
    return FUSED, "optim adamw_torch runs fused on cuda: in one kernel, without temporaries of the weights' size"

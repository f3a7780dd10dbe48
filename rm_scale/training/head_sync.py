"""The reward head in fp32, under engines that compute in half precision.

DeepSpeed keeps an fp32 master of every trained weight, and computes with a rounded copy. Rewards must not be rounded
that way: the head holds the difference between the two (its residual), which is brought up to date after every step.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from rm_scale.errors import TrainingError
from rm_scale.modeling.head import active_head


class HeadSync(TrainerCallback):
    """Let the forward pass compute with the head's fp32 master under DeepSpeed's half-precision engines.

    Args:
        trainer: whose model has the head.
        saved_head: `(1, hidden_size)` fp32, the head that the model was loaded with; `None` for a new one.
    """

    def __init__(self, trainer: Trainer, saved_head: torch.Tensor | None) -> None:
        self.trainer = trainer
        self.saved_head = saved_head

    def on_train_begin(self, *unused: Any, **also_unused: Any) -> None:
        """Make master and forward pass agree; a resumed run has its master from the checkpoint.

        Raises:
            TrainingError: on every rank, when the head holds NaN or infinite weights.
        """
        if self.trainer.state.global_step == 0 and self.saved_head is not None and self._is_rounded():
            from deepspeed.utils import safe_set_full_fp32_param

            head = active_head(self.trainer.model)
            safe_set_full_fp32_param(head.weight, self.saved_head.to(self.trainer.args.device))
        self.sync()
        if not head_weight(self.trainer.model).isfinite().all():
            raise TrainingError(
                "the reward head holds NaN or infinite weights before the first step. "
                "Fix: check the model's files; for a new head try another --seed."
            )

    def on_step_end(self, *unused: Any, **also_unused: Any) -> None:
        """Bring the residual up to date: the optimizer has changed the master."""
        self.sync()

    def _is_rounded(self) -> bool:
        """Return whether an engine computes with a copy of the head in half precision."""
        has_engine = self.trainer.is_deepspeed_enabled and getattr(self.trainer, "deepspeed", None) is not None
        return has_engine and active_head(self.trainer.model).weight.dtype != torch.float32

    def sync(self) -> None:
        """Hand the head the exact fp32 master that DeepSpeed holds. A collective."""
        if not self._is_rounded():
            return
        from deepspeed.utils import safe_get_full_fp32_param

        head = active_head(self.trainer.model)
        master = safe_get_full_fp32_param(head.weight)
        if master is not None:
            head.set_residual(master.reshape(1, -1))


def head_weight(model: torch.nn.Module) -> torch.Tensor:
    """Return the fp32 head `(1, hidden_size)` that rewards are computed with, on the CPU.

    A collective under ZeRO-3, which has sharded it.
    """
    head = active_head(model)
    if hasattr(head.weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([head.weight]):
            return head.effective_weight().detach().cpu().clone()
    return head.effective_weight().detach().cpu().clone()


def head_parameter_names(model: torch.nn.Module) -> set[str]:
    """Return the names of the head's weight among the model's parameters."""
    head = active_head(model)
    return {name for name, parameter in model.named_parameters() if parameter is head.weight}

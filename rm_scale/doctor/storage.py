"""How much a run writes: checkpoints and the final model, from the model's shape."""

from __future__ import annotations

from dataclasses import dataclass

from rm_scale.doctor.findings import GB
from rm_scale.planning.parameters import adapter_tensors, backbone_tensors, head_tensor, total
from rm_scale.planning.shape import ModelShape

_WEIGHT_BYTES = 2
"""bfloat16."""
_NUM_COPIES = 2
"""Under ZeRO-1 and 2 DeepSpeed writes the weights beside transformers' own file. ZeRO-3 does not: one copy less.
Measured with a model of 2.8M parameters on two ranks: 16.06 and 14.07 bytes per parameter."""
_OPTIMIZER_BYTES = 12
"""For each trainable parameter: an fp32 master copy and Adam's two fp32 moments."""


@dataclass(frozen=True)
class RunStorage:
    """Bytes on disk.

    Attributes:
        checkpoint_bytes: one checkpoint that can be resumed.
        final_bytes: the model at the end.
        num_checkpoints: most of them at one time: those kept and the one being written, since the oldest goes last.
    """

    checkpoint_bytes: float
    final_bytes: float
    num_checkpoints: int

    @property
    def peak_bytes(self) -> float:
        """The most there will be at one time."""
        return self.num_checkpoints * self.checkpoint_bytes + self.final_bytes

    def describe(self) -> str:
        """Say what the sum is made of."""
        return (
            f"{self.num_checkpoints} checkpoints of {self.checkpoint_bytes / GB:.2f} GB, the last one while the oldest "
            f"still lies there, and the model, {self.final_bytes / GB:.2f} GB"
        )


def run_storage(shape: ModelShape, method: str, lora_r: int, save_total_limit: int) -> RunStorage:
    """Return what a run of this model writes.

    A checkpoint has 2 x 2 bytes (bfloat16, twice) and 12 (optimizer) for each trainable parameter; under ZeRO-3 two
    fewer. Adapters (LoRA, QLoRA) are saved without their base.

    Args:
        shape: of the backbone.
        method: full, lora or qlora.
        lora_r: LoRA rank, on all linear layers.
        save_total_limit: checkpoints that are kept.
    """
    tensors = backbone_tensors(shape)
    trained = tensors if method == "full" else adapter_tensors(tensors, lora_r, None)
    num_trained = total([*trained, head_tensor(shape)])
    weights = float(_WEIGHT_BYTES * num_trained)
    return RunStorage(_NUM_COPIES * weights + _OPTIMIZER_BYTES * num_trained, weights, save_total_limit + 1)

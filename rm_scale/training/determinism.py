"""Choose between kernels that are fast and kernels that give the same bits in every run."""

from __future__ import annotations

import os

import torch


def use_deterministic_kernels(wanted: bool) -> None:
    """Let torch use only kernels whose results don't depend on the order in which threads finish, or any.

    On GPUs this concerns the backward passes of attention and of index reads, which add up in no fixed order
    otherwise, and cuBLAS, whose workspace decides how products are split. It has to be called before the first matrix
    product. Collectives of the same ranks in the same places add up in the same order anyway.

    Args:
        wanted: the run's `deterministic`.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Reading memory that nobody has written would be a defect; filling it costs time in every step.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.deterministic = wanted

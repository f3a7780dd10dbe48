"""Recognise that memory ran out, on a device or on the host, and free it afterwards."""

from __future__ import annotations

import gc

import torch

# Where memory runs out outside torch's own allocator, the error has no type of its own.
_TEXTS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: not enough memory",
    "DefaultCPUAllocator: can't allocate",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory, of the device or of the host, did not suffice."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)


def free_memory() -> None:
    """Free what a failed computation has left, and what torch's allocator keeps for later.

    Call it after the error has been handled: until then its traceback holds what was computed.
    """
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where CUDA was never used

"""Build or load whole models on one rank while a ZeRO-3 run is going on, which shards every model as it is made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from transformers.integrations import deepspeed as hf_deepspeed


@contextlib.contextmanager
def without_zero_init() -> Iterator[None]:
    """Load whole weights on this rank alone even while a ZeRO-3 run is going on."""
    saved = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = saved

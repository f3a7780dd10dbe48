"""A device with little memory: a model whose forward pass runs out of it above a number of tokens."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from rm_scale.inference.scoring.scorer import RewardScorer


class Memory:
    """What a model's forward passes met.

    Attributes:
        num_failures: forward passes that ran out of memory.
        num_freed: how often the allocator was told to give back what it keeps.
        passes: tokens of each forward pass that went through.
    """

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.num_failures = 0
        self.num_freed = 0
        self.passes: list[int] = []
        self._held: weakref.ref[torch.Tensor] | None = None

    def take(self, num_tokens: int) -> None:
        """Begin a forward pass."""
        assert self._held is None or self._held() is None, "what the failed pass held was still there"
        assert self.num_freed >= self.num_failures, "the allocator was not told before the next try"
        activations = torch.zeros(num_tokens)
        if num_tokens > self.num_tokens:
            self.num_failures += 1
            self._held = weakref.ref(activations)
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {num_tokens} of {self.num_tokens}.")
        self.passes.append(num_tokens)


@contextmanager
def small_memory(scorer: RewardScorer, num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    """Let a scorer's model run out of memory above `num_tokens` tokens of a forward pass."""
    memory = Memory(num_tokens)

    def freed() -> None:
        memory.num_freed += 1

    def begin(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        memory.take(inputs[0].numel())

    hook = scorer.model.get_input_embeddings().register_forward_pre_hook(begin)  # type: ignore[operator]
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "empty_cache", freed)
        try:
            yield memory
        finally:
            hook.remove()

"""A budget of tokens under which memory suffices, found by failing."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from rm_scale.inference.scoring import out_of_memory_retry
from rm_scale.inference.scoring.out_of_memory_retry import TokenBudget, is_out_of_memory


@pytest.fixture(autouse=True)
def freed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Collect no garbage after each failure: in a process as large as that of tests it takes a third of a second."""
    if request.function is not test_a_real_allocation_that_fails:
        monkeypatch.setattr(out_of_memory_retry, "free_memory", lambda: None)


class Device:
    """Computes lengths in passes of at most so many tokens, longest first, and runs out of memory above some."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_failures = 0
        self.done: list[int] = []

    def compute(self, lengths: Sequence[int], tokens: int) -> list[str]:
        ordered, at = sorted(lengths, reverse=True), 0
        while at < len(ordered):
            size = max(1, tokens // ordered[at])
            if sum(ordered[at : at + size]) > self.capacity:
                self.num_failures += 1
                raise torch.OutOfMemoryError("CUDA out of memory.")
            at += size
        self.done += lengths
        return [f"result of {length}" for length in lengths]


def results(lengths: Sequence[int], capacity: int) -> list[str | None]:
    return [f"result of {length}" if length <= capacity else None for length in lengths]


@pytest.mark.parametrize("capacity", [7, 64, 100, 999, 10_000])
@pytest.mark.parametrize("lengths", [[5] * 100, list(range(1, 20)), [60, 3, 3, 3, 60, 60, 1], [4]])
def test_every_item_comes_back_once_and_in_order(capacity: int, lengths: list[int]) -> None:
    device, budget = Device(capacity), TokenBudget(1000)
    assert budget.score(lengths, device.compute, sum) == results(lengths, capacity)
    assert sorted(device.done) == sorted(length for length in lengths if length <= capacity)
    assert budget.tokens >= 1


def test_what_sufficed_stays() -> None:
    device, budget = Device(130), TokenBudget(1000)
    budget.score([10] * 90, device.compute, sum)
    assert 65 <= budget.tokens <= 130 and device.num_failures == 3
    for _ in range(5):
        budget.score([10] * 90, device.compute, sum)
    assert device.num_failures == 3
    budget.score([10] * 8 + [131] + [10] * 8, device.compute, sum)
    assert 65 <= budget.tokens <= 130, "one item that is too large says nothing of the others"


def test_one_item_as_long_as_the_budget_makes_it_no_smaller() -> None:
    device, budget = Device(900), TokenBudget(500)
    assert budget.score([950, 400, 90], device.compute, sum) == results([950, 400, 90], 900)
    assert budget.tokens == 500 and device.num_failures == 2, "three, then one alone"


def test_other_errors_are_not_retried() -> None:
    calls = []

    def broken(items: Sequence[int], tokens: int) -> list[int]:
        calls.append(items)
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        TokenBudget(10).score([1, 2], broken, sum)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
    ],
)
def test_how_running_out_of_memory_is_said(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access"), ValueError("out of memory")])
def test_other_failures_are_none_of_it(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_a_real_allocation_that_fails() -> None:
    def allocate(items: Sequence[int], tokens: int) -> list[int]:
        return [torch.empty(item, dtype=torch.uint8).numel() for item in items]

    found = TokenBudget(10).score([8, 2**60, 16], allocate, len)
    assert found == [8, None, 16]

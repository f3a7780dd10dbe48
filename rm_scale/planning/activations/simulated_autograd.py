"""A stand-in for torch's autograd that knows sizes alone, and how many bytes are alive at each moment.

torch's autograd saves some of an operation's tensors for its backward pass, and frees a tensor when nothing refers to
it any more. Both are replayed here without any numbers: a `SizedTensor` is a size and whether it needs a gradient, a
`Graph` records operations with what they save, its `backward` runs them in reverse, and `MemoryCounter` adds up what is
referred to. The largest sum it ever sees is the peak that a real step would allocate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Size:
    """The number of elements of a tensor, and the formula that leads to it, such as "tokens x hidden"."""

    formula: str
    elements: int


@dataclass(eq=False)
class Allocation:
    """The memory of one tensor, alive as long as something refers to it.

    Attributes:
        key: the tensor's name and its formula in bytes.
        num_bytes: bytes of the whole tensor.
        width: bytes per element.
        references: how many variables, saved tensors and waiting gradients refer to it. Views of a tensor refer to the
            same allocation.
        tensors: how many tensors it stands for, mostly one.
    """

    key: tuple[str, str]
    num_bytes: int
    width: int
    references: int = 1
    tensors: int = 1


class MemoryCounter:
    """Count the bytes that are alive, and remember the moment when they were most.

    It plays the part of torch's allocator and of Python's reference counts: `allocate` makes a tensor with one
    reference, `keep` adds a reference, `release` takes one away, and a tensor without references is freed.

    Attributes:
        live: bytes alive now.
        peak: most bytes that were ever alive at once.
        moment: name of the tensor whose allocation brought the peak.
        counts: tensors alive now, by key.
        at_peak: tensors alive at the peak, by key.
        sizes: bytes of one tensor, by key.
    """

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0
        self.moment = ""
        self.counts: Counter[tuple[str, str]] = Counter()
        self.at_peak: dict[tuple[str, str], int] = {}
        self.sizes: dict[tuple[str, str], int] = {}

    def allocate(self, name: str, size: Size, width: int) -> Allocation:
        """Allocate a tensor of `width` bytes per element; the caller has its one reference."""
        allocation = Allocation((name, f"{size.formula} x {width} B"), size.elements * width, width)
        if not allocation.num_bytes:
            return allocation
        known = self.sizes.setdefault(allocation.key, allocation.num_bytes)
        assert known == allocation.num_bytes, allocation.key
        return self._add(allocation)

    def allocate_alike(self, key: tuple[str, str], tensors: int) -> Allocation:
        """Allocate so many tensors like those of a key, as one."""
        return self._add(Allocation(key, tensors * self.sizes[key], 1, tensors=tensors))

    def _add(self, allocation: Allocation) -> Allocation:
        self.live += allocation.num_bytes
        self.counts[allocation.key] += allocation.tensors
        if self.live > self.peak:
            self.peak, self.moment, self.at_peak = self.live, allocation.key[0], dict(self.counts)
        return allocation

    def keep(self, allocation: Allocation) -> Allocation:
        """Add a reference, and return the same allocation."""
        allocation.references += 1
        return allocation

    def release(self, *allocations: Allocation) -> None:
        """Take a reference from each; what has none left is freed."""
        for allocation in allocations:
            allocation.references -= 1
            assert allocation.references >= 0, allocation.key
            if not allocation.references and allocation.num_bytes:
                self.live -= allocation.num_bytes
                self.counts[allocation.key] -= allocation.tensors


@dataclass(eq=False)
class SizedTensor:
    """A tensor without content.

    Attributes:
        size: its elements.
        allocation: its memory, which a view shares with other tensors.
        needs_grad: torch's `requires_grad`.
        grad: during the backward pass, the gradient that has been summed up for it so far.
    """

    size: Size
    allocation: Allocation
    needs_grad: bool
    grad: Allocation | None = None

    @property
    def width(self) -> int:
        """Bytes per element."""
        return self.allocation.width


Gradients = list[tuple[SizedTensor | None, Allocation]]
"""Gradients by the tensor they belong to. `None` stands for a parameter: its gradient is handed over at once, to ZeRO
or into `.grad`, and counts as a model state from there on."""

Backward = Callable[[Allocation], Gradients]
"""An operation's backward pass: from its output's gradient to its inputs' gradients."""


@dataclass(eq=False)
class Node:
    """A recorded operation.

    Attributes:
        output: the tensor that it made.
        saved: what it keeps for its backward pass (torch's `ctx.save_for_backward`).
        backward: its backward pass.
        takes_gradient: `backward` itself releases the output's gradient, earlier than the graph would.
    """

    output: SizedTensor
    saved: list[Allocation]
    backward: Backward
    takes_gradient: bool = False


@dataclass(eq=False)
class Graph:
    """The recorded operations, run backwards in the reverse order of their making, as torch's engine does.

    Attributes:
        memory: where tensors are allocated.
        adds_in_place: a second gradient of a tensor is added into the first where nothing else refers to that, as
            torch does; a tool that watches every tensor keeps it from doing so.
        nodes: operations recorded so far.
        is_recording: off where torch would be under `no_grad`: in the first forward pass of a checkpointed layer.
    """

    memory: MemoryCounter
    adds_in_place: bool
    nodes: list[Node] = field(default_factory=list)
    is_recording: bool = True

    def record(
        self, output: SizedTensor, saved: Sequence[Allocation], backward: Backward, takes_gradient: bool = False
    ) -> SizedTensor:
        """Record the operation that made `output`, unless no gradient will ever reach it; return `output`."""
        if self.is_recording and output.needs_grad:
            kept = [self.memory.keep(allocation) for allocation in saved]
            self.nodes.append(Node(output, kept, backward, takes_gradient))
        return output

    def backward(self) -> None:
        """Run all recorded operations backwards and forget them.

        The order decides the peak, and is that of torch/csrc/autograd/engine.cpp: gradients are first cast to their
        tensors' types; then the output's gradient and the saved tensors are released; then the new gradients are added
        to what other operations have left.
        """
        nodes = self.nodes
        while nodes:
            node = nodes.pop()
            gradient, node.output.grad = node.output.grad, None
            assert gradient is not None
            gradients = [(tensor, self._cast(tensor, result)) for tensor, result in node.backward(gradient)]
            self.memory.release(*([] if node.takes_gradient else [gradient]), *node.saved)
            for tensor, result in gradients:
                self._accumulate(tensor, result)

    def _cast(self, tensor: SizedTensor | None, gradient: Allocation) -> Allocation:
        if tensor is None or not tensor.needs_grad or tensor.width == gradient.width:
            return gradient
        cast = self.memory.allocate("gradient in another type", tensor.size, tensor.width)
        self.memory.release(gradient)
        return cast

    def _accumulate(self, tensor: SizedTensor | None, gradient: Allocation) -> None:
        if tensor is None or not tensor.needs_grad:
            self.memory.release(gradient)
        elif tensor.grad is None:
            tensor.grad = gradient
        elif self.adds_in_place and tensor.grad.references == 1:
            self.memory.release(gradient)
        else:
            total = self.memory.allocate("sum of gradients", tensor.size, tensor.width)
            self.memory.release(tensor.grad, gradient)
            tensor.grad = total

"""Autograd's books with sizes instead of tensors: what is alive, and most of all at once. No torch.

An operation's result lives as long as a local variable, a node of the graph or a gradient in waiting holds it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Size:
    """A number of elements and the words for it."""

    words: str
    elements: int


@dataclass(eq=False)
class Buffer:
    """Memory of one tensor; gone when nothing holds it.

    Attributes:
        key: name and formula.
        num_bytes: all of it.
        width: bytes per element.
        holders: variables, nodes and gradients that hold it.
    """

    key: tuple[str, str]
    num_bytes: int
    width: int
    holders: int = 1


class Memory:
    """What is alive, and what was when most was.

    Attributes:
        live: bytes now.
        peak: most bytes so far.
        moment: name of the tensor that brought the peak.
        counts: how many are alive, by name and formula.
        at_peak: the same at the peak.
        sizes: bytes of one, by name and formula.
    """

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0
        self.moment = ""
        self.counts: Counter[tuple[str, str]] = Counter()
        self.at_peak: dict[tuple[str, str], int] = {}
        self.sizes: dict[tuple[str, str], int] = {}

    def new(self, name: str, size: Size, width: int) -> Buffer:
        """A tensor of `width` bytes per element, held by the caller."""
        buffer = Buffer((name, f"{size.words} x {width} B"), size.elements * width, width)
        if not buffer.num_bytes:
            return buffer
        self.live += buffer.num_bytes
        self.counts[buffer.key] += 1
        assert self.sizes.setdefault(buffer.key, buffer.num_bytes) == buffer.num_bytes, buffer.key
        if self.live > self.peak:
            self.peak, self.moment, self.at_peak = self.live, name, dict(self.counts)
        return buffer

    def hold(self, buffer: Buffer) -> Buffer:
        """One more holder."""
        buffer.holders += 1
        return buffer

    def drop(self, *buffers: Buffer) -> None:
        """One holder less."""
        for buffer in buffers:
            buffer.holders -= 1
            assert buffer.holders >= 0, buffer.key
            if not buffer.holders and buffer.num_bytes:
                self.live -= buffer.num_bytes
                self.counts[buffer.key] -= 1


@dataclass(eq=False)
class Value:
    """A tensor of the graph, and the gradient that waits for it."""

    size: Size
    buffer: Buffer
    needs_grad: bool
    grad: Buffer | None = None

    @property
    def width(self) -> int:
        """Bytes per element."""
        return self.buffer.width


Results = list[tuple[Value | None, Buffer]]
"""Gradients by the value they belong to; `None` is a parameter, whose gradient is handed over at once."""

Run = Callable[[Buffer], Results]
"""A node's backward pass, from its output's gradient."""


@dataclass(eq=False)
class Node:
    """An operation in the graph.

    Attributes:
        output: what it made.
        saved: what its backward pass reads.
        run: its backward pass.
        takes_gradient: it lets its gradient go by itself.
    """

    output: Value
    saved: list[Buffer]
    run: Run
    takes_gradient: bool = False


@dataclass(eq=False)
class Tape:
    """The graph. Nodes run in the reverse order of their making, as in torch's engine.

    Attributes:
        memory: where tensors live.
        adds_in_place: gradients are added into the first of them if nothing else holds it.
        nodes: the graph.
        is_recording: off in the forward pass of a checkpointed layer.
    """

    memory: Memory
    adds_in_place: bool
    nodes: list[Node] = field(default_factory=list)
    is_recording: bool = True

    def record(self, output: Value, saved: Sequence[Buffer], run: Run, takes_gradient: bool = False) -> Value:
        """Add a node, unless nothing needs its gradient."""
        if self.is_recording and output.needs_grad:
            held = [self.memory.hold(buffer) for buffer in saved]
            self.nodes.append(Node(output, held, run, takes_gradient))
        return output

    def backward(self) -> None:
        """Run and consume the nodes.

        As in torch/csrc/autograd/engine.cpp a node's results are first cast to their values' types, then its gradient
        and its saved tensors are let go, then the results are added to what other nodes left.
        """
        nodes = self.nodes
        while nodes:
            node = nodes.pop()
            gradient, node.output.grad = node.output.grad, None
            assert gradient is not None
            results = [(value, self._cast(value, result)) for value, result in node.run(gradient)]
            self.memory.drop(*([] if node.takes_gradient else [gradient]), *node.saved)
            for value, result in results:
                self._accumulate(value, result)

    def _cast(self, value: Value | None, result: Buffer) -> Buffer:
        if value is None or not value.needs_grad or value.width == result.width:
            return result
        cast = self.memory.new("gradient in another type", value.size, value.width)
        self.memory.drop(result)
        return cast

    def _accumulate(self, value: Value | None, result: Buffer) -> None:
        if value is None or not value.needs_grad:
            self.memory.drop(result)
        elif value.grad is None:
            value.grad = result
        elif self.adds_in_place and value.grad.holders == 1:
            self.memory.drop(result)
        else:
            total = self.memory.new("sum of gradients", value.size, value.width)
            self.memory.drop(value.grad, result)
            value.grad = total

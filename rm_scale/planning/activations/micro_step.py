"""The state of one replayed micro-step, and the elementary operations that layers are made of."""

from __future__ import annotations

from collections.abc import Sequence

from rm_scale.planning.activations.settings import Options, Row
from rm_scale.planning.activations.simulated_autograd import (
    Allocation,
    Gradients,
    Graph,
    MemoryCounter,
    Size,
    SizedTensor,
)
from rm_scale.planning.families import NOT_ADAPTED
from rm_scale.planning.shape import ModelShape

_ROTARY_SHARES = {"qwen3_next": 0.25, "qwen3_5_text": 0.25}
"""By type, where positions rotate part of each head only and the rest would be far off."""


class MicroStep:
    """A micro-step while it is replayed.

    Each operation allocates its result, records what torch's own operation saves, and says which gradients its backward
    pass allocates. The caller has a reference to the result and calls `free` where the variable of the real code goes
    out of scope; that is how tensors which nothing saved go away, as in Python.

    Attributes:
        shape: the model's sizes.
        row: the tokens.
        options: how the step is run.
        memory: counts the bytes that are alive.
        graph: records operations for the backward pass.
        is_full: all weights are trained, rather than adapters.
        base_width, adapter_width: bytes per element of the model's own weights and of the adapters'.
        product_width: bytes per element of what matrix products take and return.
        weight_copies: autocast's copies of fp32 weights, which it keeps until its context ends.
        stops_early: a layer is being recomputed by torch's newer checkpointing, which stops where nothing more is
            needed: before the layer's last product and the sum behind it.
        not_adapted: linear layers without an adapter unless targets are named.
        has_masks: the matmul backend has made the row's masks, which all layers share.
        hidden, mlp, queries, kv, per_head, per_token: sizes of the usual tensors.
    """

    def __init__(self, shape: ModelShape, row: Row, options: Options) -> None:
        self.shape, self.row, self.options = shape, row, options
        self.memory = MemoryCounter()
        self.graph = Graph(self.memory, adds_in_place=not options.as_tracked)
        self.is_full = options.method == "full"
        is_fp32, is_amp = options.precision == "fp32", options.precision == "amp"
        self.base_width = 4 if is_fp32 or (is_amp and self.is_full) else 2
        self.adapter_width = 2 if options.precision == "bf16" else 4
        self.product_width = 4 if is_fp32 else 2
        self.weight_copies: list[SizedTensor] = []
        self.stops_early = False
        self.has_masks = False
        self.not_adapted = NOT_ADAPTED.get(shape.model_type, frozenset())
        tokens = row.tokens
        self.hidden = Size("tokens x hidden", tokens * shape.hidden_size)
        self.mlp = Size("tokens x mlp", tokens * shape.intermediate_size)
        self.queries = Size("tokens x queries", tokens * shape.query_size)
        self.kv = Size("tokens x kv", tokens * shape.kv_size)
        self.per_head = Size("tokens x heads", tokens * shape.num_heads)
        self.per_token = Size("tokens", tokens)

    @property
    def has_rope(self) -> bool:
        """Queries and keys are rotated by their positions."""
        return not (self.shape.style.learned_positions or self.shape.model_type in {"bloom", "mpt"})

    @property
    def rotary_share(self) -> float:
        """Share of a head's width that positions rotate."""
        return _ROTARY_SHARES.get(self.shape.model_type, 1.0)

    # --- Tensors and references

    def new(self, name: str, size: Size, width: int, needs_grad: bool) -> SizedTensor:
        """Allocate a tensor of `width` bytes per element."""
        return SizedTensor(size, self.memory.allocate(name, size, width), needs_grad)

    def view(self, value: SizedTensor, size: Size | None = None) -> SizedTensor:
        """Return a tensor of its own, with its own gradient, on the same memory."""
        return SizedTensor(size or value.size, self.memory.keep(value.allocation), value.needs_grad)

    def hold(self, value: SizedTensor) -> SizedTensor:
        """Refer to a tensor by a second variable, which must be freed too."""
        self.memory.keep(value.allocation)
        return value

    def free(self, *values: SizedTensor) -> None:
        """Drop variables, as Python does at the end of a function."""
        self.memory.release(*(value.allocation for value in values))

    def unless_stopped(self, size: Size, is_last: bool) -> Size:
        """Return the size of a layer's last result: nothing where recomputation stops before it."""
        return Size(size.formula, 0) if is_last and self.stops_early else size

    # --- Elementary operations

    def slice(self, value: SizedTensor, size: Size) -> SizedTensor:
        """Take part of a tensor: a view without memory of its own; backwards the whole, filled up with zeros."""
        part = self.view(value, size)

        def backward(gradient: Allocation) -> Gradients:
            return [(value, self.memory.allocate("zeros around a gradient", value.size, part.width))]

        return self.graph.record(part, [], backward)

    def split(self, value: SizedTensor, sizes: Sequence[Size]) -> list[SizedTensor]:
        """Take a tensor apart into views, all of which must be used; backwards their gradients are joined."""
        parts = [self.view(value, size) for size in sizes]

        def backward(gradient: Allocation) -> Gradients:
            joined = self.memory.allocate("gradients of parts, joined", value.size, value.width)
            for part in parts[1:]:
                if part.grad is not None:
                    self.memory.release(part.grad)
            return [(value, joined)]

        self.graph.record(parts[0], [], backward)
        return parts

    def join(self, name: str, parts: Sequence[SizedTensor], size: Size) -> SizedTensor:
        """Join tensors in a new one, whose gradient is taken apart into views."""
        joined = self.new(name, size, max(part.width for part in parts), any(part.needs_grad for part in parts))

        def backward(gradient: Allocation) -> Gradients:
            return [(part, self.memory.keep(gradient)) for part in parts if part.needs_grad]

        return self.graph.record(joined, [], backward)

    def write(self, whole: SizedTensor, part: SizedTensor, name: str) -> SizedTensor:
        """Write a part into a tensor in place; backwards the whole gradient is copied, and the part's cut out of it."""
        written = SizedTensor(whole.size, whole.allocation, whole.needs_grad or part.needs_grad)

        def backward(gradient: Allocation) -> Gradients:
            rest = self.memory.allocate(f"gradient of {name}", whole.size, whole.width)
            return [
                (part, self.memory.allocate(f"gradient of part of {name}", part.size, part.width)),
                (whole, rest),
            ]

        return self.graph.record(written, [], backward)

    def reorder(self, value: SizedTensor) -> SizedTensor:
        """View a tensor with its elements in another order; backwards its gradient is copied into the first order."""
        view = self.view(value)

        def backward(gradient: Allocation) -> Gradients:
            return [(value, self.memory.allocate("gradient in another order", value.size, value.width))]

        return self.graph.record(view, [], backward)

    def copy(self, name: str, value: SizedTensor) -> SizedTensor:
        """Make a contiguous copy; its gradient is its source's."""
        copy = self.new(name, value.size, value.width, value.needs_grad)
        return self.graph.record(copy, [], lambda gradient: [(value, self.memory.keep(gradient))])

    def cast(self, name: str, value: SizedTensor, width: int) -> SizedTensor:
        """Cast to another type; a tensor that has it already is returned itself, as by `Tensor.to`."""
        if value.width == width:
            return self.hold(value)
        output = self.new(name, value.size, width, value.needs_grad)

        def backward(gradient: Allocation) -> Gradients:
            return [(value, self.memory.allocate("gradient in another type", value.size, value.width))]

        return self.graph.record(output, [], backward)

    def gather(self, name: str, value: SizedTensor, size: Size) -> SizedTensor:
        """Pick elements by index; backwards they are scattered into zeros."""
        output = self.new(name, size, value.width, value.needs_grad)

        def backward(gradient: Allocation) -> Gradients:
            zeros = self.memory.allocate(f"gradient of {name}", value.size, value.width)
            if self.graph.adds_in_place:
                return [(value, zeros)]
            total = self.memory.allocate(f"gradient of {name}", value.size, value.width)
            self.memory.release(zeros)
            return [(value, total)]

        return self.graph.record(output, [], backward)

    def add(self, name: str, one: SizedTensor, other: SizedTensor, size: Size) -> SizedTensor:
        """Add two tensors; the sum's gradient is that of both, without a copy."""
        output = self.new(name, size, max(one.width, other.width), one.needs_grad or other.needs_grad)

        def backward(gradient: Allocation) -> Gradients:
            return [(value, self.memory.keep(gradient)) for value in (one, other) if value.needs_grad]

        return self.graph.record(output, [], backward)

    def scale(self, name: str, value: SizedTensor) -> SizedTensor:
        """Multiply by a number, which saves nothing."""
        return self.multiply_by_constant(name, value, value.width)

    def multiply_by_constant(self, name: str, value: SizedTensor, width: int) -> SizedTensor:
        """Multiply by something that needs no gradient and is there anyway, so that nothing is saved for it."""
        output = self.new(name, value.size, width, value.needs_grad)

        def backward(gradient: Allocation) -> Gradients:
            return [(value, self.memory.allocate(f"gradient of {name}", value.size, width))]

        return self.graph.record(output, [], backward)

    def apply(self, name: str, value: SizedTensor, saves_output: bool) -> SizedTensor:
        """Apply a function to each element, which saves its output (sigmoid, exp, rsqrt) or its input (SiLU)."""
        output = self.new(name, value.size, value.width, value.needs_grad)

        def backward(gradient: Allocation) -> Gradients:
            return [(value, self.memory.allocate(f"gradient of {name} input", value.size, value.width))]

        return self.graph.record(output, [(output if saves_output else value).allocation], backward)

    def multiply_rows(self, name: str, value: SizedTensor, factors: SizedTensor) -> SizedTensor:
        """Multiply rows by a number each, whose gradient is a sum over a tensor as large as all rows."""
        width = max(value.width, factors.width)
        output = self.new(name, value.size, width, value.needs_grad or factors.needs_grad)
        saved = [one.allocation for one, other in ((value, factors), (factors, value)) if other.needs_grad]

        def backward(gradient: Allocation) -> Gradients:
            results: Gradients = []
            if value.needs_grad:
                results.append((value, self.memory.allocate(f"gradient of {name}", value.size, width)))
            if factors.needs_grad:
                whole = self.memory.allocate(f"gradient of {name} before its sum", value.size, width)
                results.append((factors, self.memory.allocate(f"gradient of factors of {name}", factors.size, width)))
                self.memory.release(whole)
            return results

        return self.graph.record(output, saved, backward)

    def multiply(self, name: str, one: SizedTensor, other: SizedTensor) -> SizedTensor:
        """Multiply two tensors; each factor is saved for the other's gradient."""
        output = self.new(name, one.size, max(one.width, other.width), one.needs_grad or other.needs_grad)
        saved = [value.allocation for value, factor in ((other, one), (one, other)) if factor.needs_grad]

        def backward(gradient: Allocation) -> Gradients:
            return [
                (value, self.memory.allocate(f"gradient of {name}", value.size, output.width))
                for value in (one, other)
                if value.needs_grad
            ]

        return self.graph.record(output, saved, backward)

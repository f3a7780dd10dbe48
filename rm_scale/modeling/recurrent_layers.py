"""Let layers of transformers that carry a state along a row keep the responses of a packed row apart.

Such a layer's forward pass calls functions of its module: a short causal convolution, and a scan. These are replaced,
in the module, by ones that do the same except while a packed row is run, when they go segment by segment (see
`rm_scale.batching.packed.recurrence`). The rest of the layer, its projections and norms, runs on the row as it is.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from rm_scale.batching.packed.layout import RowLayout
from rm_scale.batching.packed.recurrence import forked_scan, repeated_scan, segment_convolution
from rm_scale.errors import ModelError


@dataclass
class _Row:
    """A packed row that a recurrent layer runs on, and which parts of the layer have run on its segments so far."""

    layout: RowLayout
    reached: set[str] = field(default_factory=set)


_ROW: ContextVar[_Row | None] = ContextVar("packed row that a recurrent layer runs on", default=None)

RECURRENT_LAYERS = frozenset(
    ["Qwen3NextGatedDeltaNet", "Qwen3_5GatedDeltaNet", "JambaMambaMixer", "ZambaMambaMixer", "Zamba2MambaMixer"]
)
"""Classes of layers that keep responses apart after `keep_responses_apart`."""


class KeepsResponsesApart:
    """Mixed into a recurrent layer by `keep_responses_apart`."""

    packed_layout: RowLayout | None = None

    def forward(self, *args: Any, packed_layout: RowLayout | None = None, **kwargs: Any) -> Any:
        """Run on padded rows as ever, or on a packed row, whose layout is given or was set by the layer around this."""
        layout = packed_layout if packed_layout is not None else self.packed_layout
        forward = super().forward  # type: ignore[misc]
        return forward(*args, **kwargs) if layout is None else _run_untraced(self, forward, layout, args, kwargs)


def _run_on_row(layer: Any, forward: Callable[..., Any], layout: RowLayout, args: Any, kwargs: Any) -> Any:
    row = _Row(layout)
    token = _ROW.set(row)
    try:
        output = forward(*args, **kwargs)
    finally:
        _ROW.reset(token)
    missed = [part for part, functions in _PARTS.items() if not row.reached & functions]
    if missed:
        raise ModelError(
            f"{type(layer).__name__} ran its {' and '.join(missed)} by other code than the functions of transformers "
            "that keep the responses of a packed row apart (a kernel in their place?), so its rewards would be wrong. "
            "Fix: set packing: none, or leave the kernel out."
        )
    return output


# Rows differ in every step: tracing through here would compile a new graph each time.
_run_untraced: Callable[..., Any] = torch.compiler.disable(_run_on_row)


def keep_responses_apart(layer: torch.nn.Module) -> None:
    """Let one of `RECURRENT_LAYERS` run packed rows; padded ones stay as they are."""
    kind = type(layer)
    if issubclass(kind, KeepsResponsesApart):
        return
    module = sys.modules[kind.__module__]
    for name in _REPLACEMENTS:
        function = getattr(module, name, None)
        if function is not None and not hasattr(function, "whole_rows"):
            setattr(module, name, _by_segments(name, function))
    layer.__class__ = type(kind.__name__, (KeepsResponsesApart, kind), {"__module__": kind.__module__})


def _by_segments(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of a module of transformers that runs a packed row by its segments, and other rows whole."""
    replacement = _REPLACEMENTS[name]
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        row = _ROW.get()
        if row is None:
            return function(*args, **kwargs)
        row.reached.add(name)
        bound = signature.bind(*args, **kwargs)
        given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        given.pop("kwargs", None)
        return replacement(function, row.layout, given)

    run.whole_rows = function  # type: ignore[attr-defined]
    return run


def _convolution(function: Callable[..., Any], layout: RowLayout, given: dict[str, Any]) -> torch.Tensor:
    """Run `causal_conv1d_fn`."""
    inputs = given.pop("hidden_states")
    kernel = given["weight"].shape[-1]
    # The row by position, since kernels name it otherwise; they have the same names for the rest.
    return segment_convolution(lambda row: function(row, **given), inputs, kernel, layout)


def _delta_rule(function: Callable[..., Any], layout: RowLayout, given: dict[str, Any]) -> tuple[torch.Tensor, None]:
    """Run `torch_chunk_gated_delta_rule`, or the kernel in its place."""
    names = ("query", "key", "value", "g", "beta")
    rest = {name: value for name, value in given.items() if name not in names}

    def scan(inputs: list[torch.Tensor], start: torch.Tensor | None, wants_end: bool) -> tuple[Any, Any]:
        query, key, value, g, beta = inputs
        states = {"initial_state": start, "output_final_state": wants_end}
        # By position, as transformers' layers do it: the kernel has other names for them.
        output, end = function(query, key, value, g=g, beta=beta, **{**rest, **states})
        return output, end

    return forked_scan(scan, [given[name] for name in names], layout), None


def _chunk_scan(function: Callable[..., Any], layout: RowLayout, given: dict[str, Any]) -> torch.Tensor:
    """Run `mamba2_chunk_scan`, or the kernel in its place."""
    names = ("hidden_states", "dt", "B", "C")
    rest = {name: value for name, value in given.items() if name not in names}
    assert rest.get("z") is None, "a gate would have to be cut as well"

    def scan(inputs: list[torch.Tensor], start: torch.Tensor | None, wants_end: bool) -> tuple[Any, Any]:
        x, dt, b, c = inputs
        states = {"initial_states": start, "return_final_states": wants_end}
        chunk_size = rest["chunk_size"]
        others = {name: value for name, value in rest.items() if name not in {"A", "chunk_size"}}
        result = function(x, dt, rest["A"], b, c, chunk_size, **{**others, **states})
        return result if wants_end else (result, None)

    return forked_scan(scan, [given[name] for name in names], layout)


def _selective_scan(function: Callable[..., Any], layout: RowLayout, given: dict[str, Any]) -> torch.Tensor:
    """Run `mamba_selective_scan`, or the kernel in its place, which takes no state to start from."""
    x, dt, a, b, c = (given.pop(name) for name in ("hidden_states", "dt", "A", "B", "C"))
    inputs = [x, dt, b, c, given.pop("z")]

    def scan(inputs: list[torch.Tensor], start: torch.Tensor | None, wants_end: bool) -> tuple[Any, Any]:
        x, dt, b, c, z = (tensor.transpose(1, 2) for tensor in inputs)
        return function(x, dt, a, b, c, z=z, **given).transpose(1, 2), None

    return repeated_scan(scan, [tensor.transpose(1, 2) for tensor in inputs], layout).transpose(1, 2)


def _no_shortcut(function: Callable[..., Any], layout: RowLayout, given: dict[str, Any]) -> None:
    """Decline to run convolution and scan in one kernel; the layer then takes them one by one."""


_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _convolution,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "mamba2_chunk_scan": _chunk_scan,
    "mamba2_split_conv1d_scan_combined": _no_shortcut,
    "mamba_selective_scan": _selective_scan,
}
"""By the functions' names in transformers' modules."""

_PARTS: dict[str, frozenset[str]] = {
    "convolution": frozenset(["causal_conv1d_fn"]),
    "scan": frozenset(["torch_chunk_gated_delta_rule", "mamba2_chunk_scan", "mamba_selective_scan"]),
}
"""What every layer of `RECURRENT_LAYERS` is made of, and the functions that run it: one of each must be reached."""

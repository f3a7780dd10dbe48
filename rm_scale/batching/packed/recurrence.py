"""Layers that carry a state along a row (delta rules, Mamba's scans, short convolutions), run on packed rows exactly.

A row is cut into segments, prompts and responses. A prompt starts from nothing; a response from the state that its
prompt left, which `forked_scan` hands to each of them, so that a prompt is computed once. Where a scan takes no state
to start from (`repeated_scan`) the prompt is run again before each of its responses, in the scan alone: projections,
norms and convolutions stay shared. Segments of similar lengths are batched, filled up with zeros to the longest; beyond
`SHORTEST_BATCH` that at most doubles their tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from rm_scale.batching.packed.layout import RowLayout

SHORTEST_BATCH = 64
"""Segments up to this length are batched together: scans work in chunks of as many tokens."""

Scan = Callable[[list[torch.Tensor], torch.Tensor | None, bool], tuple[torch.Tensor, torch.Tensor | None]]
"""Takes inputs `(segments, length, ...)`, the states they start from (`None`: nothing) and whether final states are
wanted; returns outputs `(segments, length, ...)` and the final states `(segments, ...)` or `None`. Zeros before a
segment that starts from nothing must not change its state."""


@dataclass(frozen=True)
class SegmentBatch:
    """Segments that are run together.

    Attributes:
        tokens: `(segments, length)` row index of each token; the row's width where a segment has none.
        starts: `(segments,)` which state each starts from: 0 for nothing, else 1 + the prompt's number.
    """

    tokens: torch.Tensor
    starts: torch.Tensor

    def to(self, device: torch.device) -> SegmentBatch:
        """Return it on a device."""
        return SegmentBatch(self.tokens.to(device), self.starts.to(device))


@dataclass(frozen=True)
class SegmentIndex:
    """How a row is cut into batches of segments, and put together again.

    Attributes:
        prompts, responses: the batches, prompts filled up in front and responses behind.
        places: `(width,)` where each token of the row stands in all batches' tokens one after the other; padding stands
            behind them all.
    """

    prompts: list[SegmentBatch]
    responses: list[SegmentBatch]
    places: torch.Tensor

    def to(self, device: torch.device) -> SegmentIndex:
        """Return it on a device."""
        prompts, responses = ([batch.to(device) for batch in part] for part in (self.prompts, self.responses))
        return SegmentIndex(prompts, responses, self.places.to(device))


@dataclass(frozen=True)
class ConvolutionIndex:
    """A longer row in which each segment has before it the tokens that a convolution sees from it.

    Attributes:
        tokens: `(longer,)` row index of each token; the row's width where there is none.
        places: `(width,)` where each token of the row stands in it; padding at any place.
    """

    tokens: torch.Tensor
    places: torch.Tensor

    def to(self, device: torch.device) -> ConvolutionIndex:
        """Return it on a device."""
        return ConvolutionIndex(self.tokens.to(device), self.places.to(device))


def forked_scan(scan: Scan, inputs: Sequence[torch.Tensor], layout: RowLayout) -> torch.Tensor:
    """Run a scan over a packed row: each prompt once, each response from its prompt's final state.

    Args:
        scan: what runs a batch of segments.
        inputs: `(1, width, ...)` each.
        layout: where groups lie.

    Returns:
        `(1, width, ...)`, 0 at padding.
    """
    index: SegmentIndex = _cached(layout, "forked segments", inputs[0].device, _forked_index)
    rows = [_with_zero(tensor[0], 0) for tensor in inputs]
    outputs: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    for batch in index.prompts:
        output, state = scan(_take(rows, batch), None, True)
        assert state is not None
        outputs.append(output)
        states.append(state)
    # In the order of the batches, as `starts` counts them.
    table = torch.cat([torch.zeros_like(states[0][:1]), *states]) if states else None
    for batch in index.responses:
        start = None if table is None else table.index_select(0, batch.starts)
        outputs.append(scan(_take(rows, batch), start, False)[0])
    return _joined(outputs, index)


def repeated_scan(scan: Scan, inputs: Sequence[torch.Tensor], layout: RowLayout) -> torch.Tensor:
    """Run a scan that takes no state over a packed row: each prompt again before each of its responses.

    Arguments and result are those of `forked_scan`.
    """
    index: SegmentIndex = _cached(layout, "repeated segments", inputs[0].device, _repeated_index)
    rows = [_with_zero(tensor[0], 0) for tensor in inputs]
    return _joined([scan(_take(rows, batch), None, False)[0] for batch in index.responses], index)


def segment_convolution(
    convolve: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor, kernel: int, layout: RowLayout
) -> torch.Tensor:
    """Run a causal convolution over a packed row: a response sees the end of its prompt, a prompt nothing before it.

    Args:
        convolve: causal convolution of `(1, channels, length)` along the last dimension.
        inputs: `(1, channels, width)`.
        kernel: tokens that it sees, itself included.
        layout: where groups lie.

    Returns:
        `(1, channels, width)`; what stands at padding is finite, and means nothing.
    """
    name = f"convolution over {kernel}"
    index: ConvolutionIndex = _cached(layout, name, inputs.device, lambda row: _convolution_index(row, kernel))
    row = _with_zero(inputs[0], 1).index_select(1, index.tokens)
    return convolve(row[None]).index_select(2, index.places)


def _convolution_index(layout: RowLayout, kernel: int) -> ConvolutionIndex:
    nothing = [layout.width] * (kernel - 1)
    tokens: list[int] = []
    places = torch.zeros(layout.width, dtype=torch.long)
    for span in layout.spans:
        prompt_end = span.start + span.prompt_length
        before = [*nothing, *range(span.start, prompt_end)]
        segments = [(nothing, span.start, prompt_end)] if span.prompt_length else []
        for seen, start, end in segments + [(before, *response) for response in span.responses()]:
            tokens += seen[len(seen) - kernel + 1 :]
            places[start:end] = torch.arange(len(tokens), len(tokens) + end - start)
            tokens += range(start, end)
    return ConvolutionIndex(torch.tensor(tokens), places)


def _forked_index(layout: RowLayout) -> SegmentIndex:
    spans = layout.spans
    prompts = {
        number: list(range(span.start, span.start + span.prompt_length))
        for number, span in enumerate(spans)
        if span.prompt_length
    }
    order = _by_length(prompts)
    states = {number: place + 1 for place, number in enumerate(number for part in order for number in part)}
    responses = [(number, [*range(*part)]) for number, span in enumerate(spans) for part in span.responses()]
    own = {which: tokens for which, (_, tokens) in enumerate(responses)}
    starts = {which: states.get(number, 0) for which, (number, _) in enumerate(responses)}
    prompt_batches = [_batch([prompts[number] for number in part], [0] * len(part), layout, True) for part in order]
    response_batches = [
        _batch([own[which] for which in part], [starts[which] for which in part], layout, False)
        for part in _by_length(own)
    ]
    return SegmentIndex(prompt_batches, response_batches, _places([*prompt_batches, *response_batches], layout))


def _repeated_index(layout: RowLayout) -> SegmentIndex:
    sequences = dict(
        enumerate(
            [*range(span.start, span.start + span.prompt_length), *range(*part)]
            for span in layout.spans
            for part in span.responses()
        )
    )
    batches = [
        _batch([sequences[which] for which in part], [0] * len(part), layout, False) for part in _by_length(sequences)
    ]
    return SegmentIndex([], batches, _places(batches, layout))


def _by_length(segments: dict[int, list[int]]) -> list[list[int]]:
    """Return the numbers of segments in batches of similar lengths: up to 64 tokens, up to 128, up to 256, ..."""
    batches: dict[int, list[int]] = {}
    for number, tokens in segments.items():
        batches.setdefault((max(len(tokens), SHORTEST_BATCH) - 1).bit_length(), []).append(number)
    return [batches[size] for size in sorted(batches)]


def _batch(segments: list[list[int]], starts: list[int], layout: RowLayout, fill_in_front: bool) -> SegmentBatch:
    length = max(map(len, segments))
    tokens = torch.full((len(segments), length), layout.width)
    for row, segment in zip(tokens, segments, strict=True):
        start = length - len(segment) if fill_in_front else 0
        row[start : start + len(segment)] = torch.tensor(segment)
    return SegmentBatch(tokens, torch.tensor(starts))


def _places(batches: Iterable[SegmentBatch], layout: RowLayout) -> torch.Tensor:
    tokens = torch.cat([batch.tokens.flatten() for batch in batches]).numpy()
    # Behind all batches stands a zero, for padding. Of a prompt that was run several times numpy takes the last.
    places = np.full(layout.width + 1, len(tokens))
    places[tokens] = np.arange(len(tokens))
    places[layout.num_tokens :] = len(tokens)
    return torch.from_numpy(places[:-1])


def _take(rows: Iterable[torch.Tensor], batch: SegmentBatch) -> list[torch.Tensor]:
    flat = batch.tokens.flatten()
    return [row.index_select(0, flat).view(*batch.tokens.shape, *row.shape[1:]) for row in rows]


def _joined(outputs: Iterable[torch.Tensor], index: SegmentIndex) -> torch.Tensor:
    return _with_zero(torch.cat([output.flatten(0, 1) for output in outputs]), 0).index_select(0, index.places)[None]


def _with_zero(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Append a zero along a dimension: what stands where there is no token."""
    return pad(tensor, [0, 0] * (tensor.dim() - 1 - dim) + [0, 1])


def _cached(layout: RowLayout, name: str, device: torch.device, make: Callable[[RowLayout], Any]) -> Any:
    """Return what `make` makes of a row, on a device: once per row, for all its layers."""
    key = (name, device)
    if key not in layout.derived:
        layout.derived[key] = make(layout).to(device)
    return layout.derived[key]

"""Scans and convolutions on packed rows against the same on each sequence by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rm_scale.batching.packed import recurrence
from rm_scale.batching.packed.layout import GroupSpan, RowLayout
from rm_scale.batching.packed.recurrence import forked_scan, repeated_scan, segment_convolution
from tests.unit.batching.packed.test_attention import ROWS, row_layout

CHANNELS = 3


def decay_scan(
    inputs: list[torch.Tensor], start: torch.Tensor | None, wants_end: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A state that decays by a number per token and takes the token in; zeros let a state that is nothing be."""
    values, decays = inputs
    state = torch.zeros_like(values[:, 0]) if start is None else start
    outputs = []
    for value, decay in zip(values.unbind(1), decays.unbind(1), strict=True):
        state = state * torch.sigmoid(decay)[:, None] + value
        outputs.append(state)
    return torch.stack(outputs, 1), state if wants_end else None


def sequences(layout: RowLayout) -> list[tuple[list[int], int]]:
    """For each response the row indices of its prompt and itself, and how many are the prompt's."""
    return [
        ([*range(span.start, span.start + span.prompt_length), *range(*part)], span.prompt_length)
        for span in layout.spans
        for part in span.responses()
    ]


def one_by_one(function: Any, inputs: list[torch.Tensor], layout: RowLayout) -> torch.Tensor:
    """Run each sequence alone; a prompt's outputs are those before its first response."""
    output = torch.zeros_like(inputs[0])
    done: set[int] = set()
    for tokens, _ in sequences(layout):
        new = [place for place, token in enumerate(tokens) if token not in done]
        done.update(tokens)
        output = output.index_copy(
            1, torch.tensor(tokens)[new], function([tensor[:, tokens] for tensor in inputs])[:, new]
        )
    return output


def gradients(output: torch.Tensor, inputs: list[torch.Tensor], layout: RowLayout) -> tuple[torch.Tensor, ...]:
    weights = torch.sin(torch.arange(layout.num_tokens)[:, None] * 0.7 + torch.arange(CHANNELS))
    return torch.autograd.grad((output[0, : layout.num_tokens] * weights).sum(), inputs)


def row_inputs(layout: RowLayout) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(1, layout.width, CHANNELS), (1, layout.width)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("shortest", [2, 64])
@pytest.mark.parametrize("scan", [forked_scan, repeated_scan])
@pytest.mark.parametrize("name", ROWS)
def test_scans_give_what_each_sequence_alone_gives(
    name: str, scan: Any, shortest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recurrence, "SHORTEST_BATCH", shortest)
    layout = row_layout(name)
    inputs = row_inputs(layout)
    wanted = one_by_one(lambda parts: decay_scan(parts, None, False)[0], inputs, layout)
    found = scan(decay_scan, inputs, layout)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradients(found, inputs, layout), gradients(wanted, inputs, layout))


@pytest.mark.parametrize("kernel", [1, 2, 4])
@pytest.mark.parametrize("name", ROWS)
def test_convolutions_give_what_each_sequence_alone_gives(name: str, kernel: int) -> None:
    layout = row_layout(name)
    inputs = row_inputs(layout)[:1]
    weight = torch.randn(CHANNELS, 1, kernel, dtype=torch.float64)
    bias = torch.randn(CHANNELS, dtype=torch.float64)

    def convolve(row: torch.Tensor) -> torch.Tensor:
        length = row.shape[2]
        out = torch.nn.functional.conv1d(row, weight, bias, padding=kernel - 1, groups=CHANNELS)
        return torch.tanh(out[:, :, :length])

    def run(parts: list[torch.Tensor]) -> torch.Tensor:
        return convolve(parts[0].transpose(1, 2)).transpose(1, 2)

    wanted = one_by_one(run, inputs, layout)
    found = segment_convolution(convolve, inputs[0].transpose(1, 2), kernel, layout).transpose(1, 2)
    real = layout.num_tokens
    torch.testing.assert_close(found[:, :real], wanted[:, :real])
    assert torch.isfinite(found).all()
    torch.testing.assert_close(gradients(found, inputs, layout), gradients(wanted, inputs, layout))


def test_one_long_segment_does_not_make_the_short_ones_long() -> None:
    """Fifty responses beside one of 3,000 tokens would fill up to 150,000."""
    layout = RowLayout((GroupSpan(0, 700, (3000, *[20] * 50)),), 4700)
    for scan, most in ((forked_scan, 700 + 3000 + 64 * 50), (repeated_scan, 3700 + 720 * 50)):
        taken: list[int] = []

        def counting(inputs: list[torch.Tensor], start: Any, wants_end: bool, taken: Any = taken) -> Any:
            taken.append(inputs[0].shape[0] * inputs[0].shape[1])
            return inputs[0], torch.zeros(len(inputs[0]), 1) if wants_end else None

        scan(counting, [torch.zeros(1, layout.width, 1)], layout)
        assert sum(taken) <= most

"""The steps of a streamed run, cut up over ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from rm_scale.batching.stream_steps import StepStream, StreamSplit, StreamSteps
from rm_scale.data.encoding import EncodingRules, TextEncoder
from rm_scale.data.formats import RowReader
from rm_scale.data.stream import GroupStream, StreamSource
from tests.unit.data.conftest import build_tokenizer


def part(name: str, count: int, split: StreamSplit | None = None) -> GroupStream:
    def rows(start: int) -> Iterator[tuple[int, Any]]:
        for number in range(start, count):
            prompt = f"question {number} " * (1 + number % 5)
            yield number, {"prompt": prompt, "chosen": " yes", "rejected": " no", "id": f"{name}{number}"}

    source = StreamSource(name, RowReader("explicit_prompt", source=name), rows)
    encoder = TextEncoder(build_tokenizer(), EncodingRules(max_length=512))
    return GroupStream([source], encoder, 16, 3, split.fits if split is not None else None)


def shares(split: StreamSplit, world_size: int, num_steps: int = 5) -> list[list[str]]:
    """Return the ids of the groups that count, step by step, all ranks together."""
    steps = []
    for rank in range(world_size):
        stream = StepStream([part("a", 40, split), part("b", 11, split)], (3, 1), 8, 3, num_steps)
        steps.append(StreamSteps(stream, split, rank))
    found = []
    for number in range(num_steps):
        rows = np.arange(number * 8, number * 8 + 8)
        micro_steps = [step[rows] for step in steps]
        assert len({len(batches) for batches in micro_steps}) == 1, "each rank has as many micro-steps"
        found.append(sorted(g["id"] for batches in micro_steps for batch in batches for g in batch if g["counted"]))
    return found


@pytest.mark.parametrize("max_tokens", [None, 300])
@pytest.mark.parametrize("share_prompts", [False, True])
def test_the_same_groups_in_each_step_however_it_is_cut(max_tokens: int | None, share_prompts: bool) -> None:
    one = shares(StreamSplit(2, 1, max_tokens, share_prompts), 1)
    three = shares(StreamSplit(2, 3, max_tokens, share_prompts), 3)
    assert one == three and all(len(step) == 8 for step in one)
    for step in one:
        assert Counter(name[0] for name in step) == {"a": 6, "b": 2}


def test_a_step_and_its_groups_by_number() -> None:
    stream = StepStream([part("a", 40), part("b", 11)], (3, 1), 8, 3, 5)
    later = [group["id"] for group in stream.step(4)]
    assert [stream[number]["id"] for number in range(32, 40)] == later
    assert [group["id"] for group in stream.step(0)] != later, "an earlier step is found again"
    assert later != sorted(later), "the sources of a step are shuffled"


def test_a_group_that_no_row_can_hold_is_refused() -> None:
    split = StreamSplit(2, 1, 60, False)
    found = part("a", 40, split)
    assert max(group["num_tokens"] for group in found.groups(0, 20)) <= 60
    assert found.rejected()["over_long"] > 0

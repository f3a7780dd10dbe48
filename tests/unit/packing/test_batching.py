"""A step holds the same groups whatever the number of ranks, and all ranks take as many micro-steps."""

from __future__ import annotations

import numpy as np
import pytest

from rm_scale.packing.balancing import split_balanced
from rm_scale.packing.batching import FixedSplit, StepSampler, TokenSplit


def test_each_epoch_holds_every_group_once_in_its_own_order() -> None:
    sampler = StepSampler(23, 5, shuffle=True, seed=7)
    epochs = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        steps = [step[0].tolist() for step in sampler]
        assert [len(step) for step in steps] == [5, 5, 5, 5, 3]
        epochs.append([row for step in steps for row in step])
        assert sorted(epochs[-1]) == list(range(23))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("num_groups", [1, 4, 11, 24])
def test_ranks_share_out_the_step(world: int, num_groups: int) -> None:
    rows = np.arange(100, 100 + num_groups)
    tokens = np.random.default_rng(num_groups).integers(10, 90, 200)
    for split in (FixedSplit(2, world), TokenSplit(tokens, 128, world)):
        shares = [split(rows, rank) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        counted = [ref.row for share in shares for micro in share for ref in micro if ref.counted]
        assert sorted(counted) == rows.tolist()
        assert all(micro for share in shares for micro in share)


def test_parts_keep_the_budget_and_a_full_row_fits() -> None:
    assert split_balanced([64, 64, 128, 100, 28], 1, 128) == [[[0, 1]], [[2]], [[3, 4]]]
    with pytest.raises(ValueError, match="a group of 129 tokens does not fit into 128"):
        split_balanced([129], 2, 128)

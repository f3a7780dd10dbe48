"""A step holds the same groups whatever the number of ranks, and all ranks take as many micro-steps."""

from __future__ import annotations

import time

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rm_scale.batching.collator import PackedCollator, PaddedCollator
from rm_scale.batching.sampler import (
    Batching,
    FixedSplit,
    GroupRef,
    Split,
    StepCollator,
    StepDataset,
    StepSampler,
    TokenSplit,
    read_groups,
)

checked = settings(deadline=None, max_examples=80, database=None, derandomize=True)

LONGEST = 90


def steps_of(sampler: StepSampler, epoch: int) -> list[list[int]]:
    sampler.set_epoch(epoch)
    steps = []
    for (rows,) in sampler:
        steps.append(rows.tolist())
    return steps


@checked
@given(st.integers(1, 60), st.integers(1, 20), st.booleans(), st.integers(0, 2**40), st.integers(0, 5))
def test_epoch_holds_every_group_once(num_groups: int, step: int, shuffle: bool, seed: int, epoch: int) -> None:
    sampler = StepSampler(num_groups, step, shuffle=shuffle, seed=seed)
    steps = steps_of(sampler, epoch)
    assert sorted(row for rows in steps for row in rows) == list(range(num_groups))
    assert len(steps) == len(sampler)
    assert all(len(rows) == step for rows in steps[:-1])
    assert len(steps[-1]) == num_groups - step * (len(steps) - 1)
    if not shuffle:
        assert [row for rows in steps for row in rows] == list(range(num_groups))


def test_order_is_from_seed_and_epoch_alone() -> None:
    sampler = StepSampler(50, 8, shuffle=True, seed=7)
    first, second = steps_of(sampler, 0), steps_of(sampler, 1)
    assert first != second
    np.random.seed(123)
    assert steps_of(sampler, 0) == first, "going back to an epoch gives its order again"
    assert steps_of(StepSampler(50, 8, shuffle=True, seed=7), 1) == second, "a resumed run has the same epoch"
    assert steps_of(StepSampler(50, 8, shuffle=True, seed=8), 0) != first

    def flat(steps: list[list[int]]) -> list[int]:
        return [row for rows in steps for row in rows]

    other_size = StepSampler(50, 3, shuffle=True, seed=7)
    assert flat(steps_of(other_size, 0)) == flat(first), "the size of a step only cuts the order elsewhere"


def test_state_is_the_epoch_alone() -> None:
    sampler = StepSampler(50, 8, shuffle=True, seed=7)
    before = dict(vars(sampler))
    half_read = iter(sampler)
    next(half_read)
    next(half_read)
    assert vars(sampler) == before, "reading leaves no trace"
    whole = [rows.tolist() for (rows,) in sampler]
    assert [rows.tolist() for (rows,) in half_read] == whole[2:], "a resumed run only skips steps"
    sampler.set_epoch(3)
    assert {name for name in before if vars(sampler)[name] != before[name]} == {"epoch"}


def test_ten_million_groups_start_at_once() -> None:
    started = time.process_time()  # of this process alone, whatever else the machine does
    sampler = StepSampler(10_000_000, 512, shuffle=True, seed=1)
    sampler.set_epoch(1)
    (rows,) = next(iter(sampler))
    assert time.process_time() - started < 10
    assert len(rows) == 512
    assert len(sampler) == 19_532


def shares_of(split: type[Split], world: int, rows: np.ndarray, tokens: np.ndarray) -> list[list[list[GroupRef]]]:
    """What each rank gets of a step."""
    made = FixedSplit(3, world) if split is FixedSplit else TokenSplit(tokens, 128, world)
    return [made(rows, rank) for rank in range(world)]


@pytest.mark.parametrize("split", [FixedSplit, TokenSplit])
@checked
@given(st.sets(st.integers(0, 199), min_size=1, max_size=40), st.integers(0, 2**20))
def test_ranks_share_out_the_step(split: type[Split], chosen: set[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(10, LONGEST + 1, 200)
    rows = rng.permutation(sorted(chosen))
    for world in (1, 2, 3):
        shares = shares_of(split, world, rows, tokens)
        assert len({len(share) for share in shares}) == 1, "ranks with more micro-steps would wait for ever"
        refs = [ref for share in shares for micro in share for ref in micro]
        assert sorted(ref.row for ref in refs if ref.counted) == sorted(rows.tolist())
        assert all(micro for share in shares for micro in share)
        assert all(ref.row in chosen for ref in refs), "a filler is a group of the same step"


@checked
@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 4))
def test_fixed_micro_batches_are_all_full(num_groups: int, world: int, size: int) -> None:
    rows = np.arange(100, 100 + num_groups)
    shares = [FixedSplit(size, world)(rows, rank) for rank in range(world)]
    assert all(len(micro) == size for share in shares for micro in share)
    # In the order of micro-steps and ranks the groups come in the step's order, and fillers behind them all.
    counted = [ref for micro_step in zip(*shares, strict=True) for micro in micro_step for ref in micro]
    assert [ref.row for ref in counted if ref.counted] == rows.tolist()
    assert all(ref.counted for ref in counted[:num_groups])
    assert not any(ref.counted for ref in counted[num_groups:])
    assert len(counted) - num_groups < size * world


@checked
@given(st.integers(1, 12), st.integers(0, 2**20))
def test_fillers_stand_only_where_a_rank_has_nothing(num_groups: int, seed: int) -> None:
    tokens = np.random.default_rng(seed).integers(10, LONGEST + 1, 200)
    rows = np.arange(50, 50 + num_groups)
    for world in (1, 2, 3):
        shares = shares_of(TokenSplit, world, rows, tokens)
        for micro in (micro for share in shares for micro in share):
            if all(ref.counted for ref in micro):
                assert sum(tokens[ref.row] for ref in micro) <= 128
                continue
            (filler,) = micro
            assert tokens[filler.row] == tokens[rows].min(), "the cheapest group of the step"


def test_more_ranks_than_groups() -> None:
    tokens = np.array([40, 20])
    shares = [TokenSplit(tokens, 64, 4)(np.array([0, 1]), rank) for rank in range(4)]
    refs = sorted(micro for share in shares for micro in share)
    assert refs == [[(0, True)], [(1, False)], [(1, False)], [(1, True)]]


def test_group_over_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^a group of 65 tokens does not fit into 64$"):
        TokenSplit(np.array([65]), 64, 2)(np.array([0]), 0)


@pytest.fixture
def encoded() -> datasets.Dataset:
    """Groups of 2 and 3 responses of different lengths."""
    rows = []
    for number in range(9):
        prompt = [1] * (number % 4)
        responses = [prompt + [2 + which] * (1 + (number * 5 + which) % 7) for which in range(2 + number % 2)]
        rows.append(
            {
                "input_ids": responses,
                "ranks": list(range(len(responses))),
                "margin": None,
                "soft_label": None,
                "num_tokens": sum(len(sequence) for sequence in responses),
                "prompt_length": len(prompt),
            }
        )
    return datasets.Dataset.from_list(rows)


def test_groups_are_read_with_their_place(encoded: datasets.Dataset) -> None:
    groups = read_groups(encoded, [GroupRef(4, True), GroupRef(1, False), GroupRef(4, False)])
    assert [(group["index"], group["counted"]) for group in groups] == [(4, True), (1, False), (4, False)]
    assert [group["input_ids"] for group in groups] == [encoded[row]["input_ids"] for row in (4, 1, 4)]


def test_step_becomes_batches(encoded: datasets.Dataset) -> None:
    steps = StepDataset(encoded, FixedSplit(2, 2), rank=1)
    assert len(steps) == 9
    batches = StepCollator(PaddedCollator(pad_token_id=0))([steps[np.array([8, 3, 5, 0, 7])]])["micro_batches"]
    assert [batch["group_index"].tolist() for batch in batches] == [[5, 0], [7, 7]]
    # The second micro-step has one group for both ranks; this one has fillers alone.
    assert batches[1]["pair_better"].numel() == 0


def test_scoring_takes_every_row_once_longest_first(encoded: datasets.Dataset) -> None:
    lengths = np.array(encoded["num_tokens"])
    padded = Batching(4, FixedSplit(2, 1), PaddedCollator(0), eval_batch_size=4)
    batches = padded.scoring_batches(encoded)
    assert [len(batch) for batch in batches] == [4, 4, 1]
    order = [row for batch in batches for row in batch]
    assert sorted(order) == list(range(9))
    assert lengths[order].tolist() == sorted(lengths.tolist(), reverse=True)

    for share_prompts in (True, False):
        collate = PackedCollator(0, share_prompts=share_prompts)
        widths = [collate([{**group, "index": 0}])["input_ids"].shape[1] for group in encoded]
        packed = Batching(4, TokenSplit(np.array(widths), 40, 1), collate, eval_batch_size=4)
        batches = packed.scoring_batches(encoded)
        order = [row for batch in batches for row in batch]
        assert sorted(order) == list(range(9))
        assert [widths[row] for row in order] == sorted(widths, reverse=True)
        assert all(len(batch) == 1 or sum(widths[row] for row in batch) <= 40 for batch in batches)

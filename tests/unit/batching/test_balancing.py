"""Parts under a budget: nothing lost, no part too heavy, every rank as many, and weights close to even."""

from __future__ import annotations

import math
import time
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rm_scale.batching.balancing import balanced_parts, split_balanced, split_in_order

checked = settings(deadline=None, max_examples=150, database=None, derandomize=True)

weights_strategy = st.lists(st.integers(1, 100), min_size=1, max_size=40)


def weight(part: list[int], tokens: list[int]) -> int:
    return sum(tokens[position] for position in part)


def best_heaviest(tokens: list[int], num_parts: int) -> int:
    """The least that the heaviest of the parts can weigh, by trying everything."""
    best = sum(tokens)
    # The first goes into part 0 without loss.
    for choice in product(range(num_parts), repeat=len(tokens) - 1):
        weights = [0] * num_parts
        for number, count in zip((0, *choice), tokens, strict=True):
            weights[number] += count
        best = min(best, max(weights))
    return best


@checked
@given(weights_strategy, st.integers(1, 5), st.integers(0, 300))
def test_step_is_cut_up_under_the_budget(tokens: list[int], world_size: int, spare: int) -> None:
    budget = max(tokens) + spare
    micro_steps = split_balanced(tokens, world_size, budget)
    assert all(len(ranks) == world_size for ranks in micro_steps)
    parts = [part for ranks in micro_steps for part in ranks]
    assert sorted(position for part in parts for position in part) == list(range(len(tokens)))
    assert all(part == sorted(part) for part in parts)
    assert all(weight(part, tokens) <= budget for part in parts)
    assert split_balanced(list(tokens), world_size, budget) == micro_steps

    # Longest first exceeds the budget only if every part is more than half full by then.
    loosest = math.ceil(2 * sum(tokens) / budget / world_size)
    assert math.ceil(sum(tokens) / budget / world_size) <= len(micro_steps) <= loosest
    assert any(micro_steps[-1]), "a micro-step in which no rank has a group"


@checked
@given(weights_strategy, st.integers(1, 5))
def test_parts_of_a_micro_step_weigh_alike(tokens: list[int], world_size: int) -> None:
    micro_steps = split_balanced(tokens, world_size, max(tokens) + 50)
    heaviest = [max(weight(part, tokens) for part in ranks) for ranks in micro_steps]
    lightest = [min(weight(part, tokens) for part in ranks) for ranks in micro_steps]
    assert all(low >= high for low, high in zip(lightest, heaviest[1:], strict=False))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_rows_filled_to_the_last_token(world_size: int) -> None:
    tokens = [60, 40, 30, 70, 50, 50, 100, 25, 75]
    micro_steps = split_balanced(tokens, world_size, 100)
    weights = [weight(part, tokens) for ranks in micro_steps for part in ranks]
    assert max(weights) == 100
    assert len(micro_steps) == math.ceil(5 / world_size)


def test_one_group_as_large_as_the_budget() -> None:
    assert split_balanced([128], 1, 128) == [[[0]]]
    assert split_balanced([128, 128], 1, 128) == [[[0]], [[1]]]
    assert split_balanced([128, 128], 2, 128) == [[[0], [1]]]


def test_fewer_groups_than_ranks_leave_parts_empty() -> None:
    (ranks,) = split_balanced([5, 7], 4, 10)
    assert sorted(ranks) == [[], [], [0], [1]]


def test_heavier_group_than_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^a group of 129 tokens does not fit into 128$"):
        split_balanced([5, 129, 7], 2, 128)


@checked
@given(st.lists(st.integers(20, 1000), min_size=1, max_size=8), st.integers(2, 3))
def test_no_split_is_worse_than_the_proven_bound(tokens: list[int], num_parts: int) -> None:
    parts = balanced_parts(tokens, num_parts)
    assert len(parts) == num_parts
    assert sorted(position for part in parts for position in part) == list(range(len(tokens)))
    # Graham 1969: 4/3 - 1/(3 m) of the best.
    heaviest = max(weight(part, tokens) for part in parts)
    assert 3 * num_parts * heaviest <= (4 * num_parts - 1) * best_heaviest(tokens, num_parts)


@pytest.mark.parametrize("num_parts", [2, 3])
def test_few_groups_are_near_the_best_split(num_parts: int) -> None:
    rng = np.random.default_rng(num_parts)
    for _ in range(100):
        tokens = rng.integers(20, 1001, rng.integers(2, 9)).tolist()
        parts = balanced_parts(tokens, num_parts)
        assert max(weight(part, tokens) for part in parts) <= 1.1 * best_heaviest(tokens, num_parts), tokens


@pytest.mark.parametrize(
    "tokens",
    [[133, 133, 133, 133, 173, 173, 342, 342], [239, 239, 239, 328, 328, 328, 729, 729]],
)
def test_rare_mixes_are_near_the_best_split_too(tokens: list[int]) -> None:
    assert max(weight(part, tokens) for part in balanced_parts(tokens, 3)) <= 1.1 * best_heaviest(tokens, 3)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("num_parts", [4, 8, 16])
def test_many_groups_are_near_the_best_split(num_parts: int, seed: int) -> None:
    lengths = np.random.default_rng(seed).lognormal(mean=5.5, sigma=0.8, size=200)
    tokens = [max(20, int(length)) for length in lengths]
    parts = balanced_parts(tokens, num_parts)
    assert sorted(position for part in parts for position in part) == list(range(len(tokens)))
    bound = max(sum(tokens) / num_parts, max(tokens))
    assert max(weight(part, tokens) for part in parts) <= 1.1 * bound


def test_moves_and_swaps_mend_what_longest_first_gets_wrong() -> None:
    # Longest first gives 3 + 2 + 2 against 3 + 2.
    parts = balanced_parts([3, 3, 2, 2, 2], 2)
    assert sorted(parts) == [[0, 1], [2, 3, 4]]


@checked
@given(st.lists(st.integers(1, 100), max_size=40), st.integers(1, 300))
def test_neighbours_stay_together(tokens: list[int], budget: int) -> None:
    parts = split_in_order(tokens, budget)
    assert [position for part in parts for position in part] == list(range(len(tokens)))
    assert all(part for part in parts)
    assert all(len(part) == 1 or weight(part, tokens) <= budget for part in parts)
    # Each is as full as it gets: the next one's first group had no room.
    for part, following in pairwise(parts):
        assert weight(part, tokens) + tokens[following[0]] > budget


def test_group_over_the_budget_is_scored_alone() -> None:
    assert split_in_order([300, 60, 40, 30, 10], 100) == [[0], [1, 2], [3, 4]]
    assert split_in_order([], 100) == []


def test_groups_above_half_the_budget_are_told_apart_at_once() -> None:
    """Trying every number of micro-steps from the sum's bound on took 37 seconds for these."""
    sizes = [1100 + 37 * number % 900 for number in range(512)]
    started = time.process_time()  # of this process alone, whatever else the machine does
    assert len(split_balanced(sizes, 1, 2048)) == 512
    assert time.process_time() - started < 10

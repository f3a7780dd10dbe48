"""The packed row: nothing is lost or doubled, positions go on behind the prompt, and nobody sees another response."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rm_scale.batching.packed.attention_rules import TokenPlaces, sees, token_places
from rm_scale.batching.packed.layout import (
    PackedRow,
    RowLayout,
    common_prefix_length,
    pack_row,
    packed_length,
    round_up,
)

PAD = 9  # A token that real sequences hold too: padding is known by its place, not by its number.
Group = list[list[int]]

checked = settings(deadline=None, max_examples=60, database=None, derandomize=True)


@st.composite
def groups_strategy(draw: Callable[..., Group]) -> Group:
    """K sequences that share a prompt, from few tokens so that they often share more than it, or extend each other."""
    token = st.integers(7, 9)
    prompt = draw(st.lists(token, max_size=6))
    responses = draw(st.lists(st.lists(token, min_size=1, max_size=6), min_size=2, max_size=5))
    if draw(st.booleans()):
        # One response goes on where another ends.
        responses[-1] = responses[0] + draw(st.lists(token, max_size=3))
    if draw(st.booleans()):
        first = draw(token)
        responses = [[first, *response] for response in responses]
    return [prompt + response for response in responses]


rows_strategy = st.lists(groups_strategy(), min_size=1, max_size=4)

ADVERSARIAL: dict[str, list[Group]] = {
    "no common prefix": [[[1, 2, 3], [4, 5]]],
    "responses begin alike": [[[1, 2, 7, 7, 3], [1, 2, 7, 7, 4]]],
    "one-token responses": [[[1, 2, 3], [1, 2, 4], [1, 2, 5], [1, 2, 6], [1, 2, 7]]],
    "one extends another": [[[1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5]]],
    "equal sequences": [[[1, 2, 3], [1, 2, 3]]],
    "single tokens": [[[1], [1]], [[2], [3]]],
    "single sequence": [[[1, 2, 3]]],
    "mixed": [[[1, 2], [3]], [[4, 4, 5], [4, 4, 4, 4]], [[6], [6, 6], [6, 6, 6]]],
}


def walk(row: PackedRow) -> Iterator[list[int]]:
    """Row indices of each sequence, in the order of groups and responses."""
    for span in row.layout.spans:
        prompt = range(span.start, span.start + span.prompt_length)
        for start, end in span.responses():
            yield [*prompt, *range(start, end)]


def check_row(groups: list[Group], share_prompts: bool, multiple: int) -> None:
    row = pack_row(groups, share_prompts, PAD, multiple)
    sequences = [sequence for group in groups for sequence in group]
    paths = list(walk(row))
    tokens, positions = row.input_ids[0].tolist(), row.position_ids[0].tolist()

    assert [[tokens[index] for index in path] for path in paths] == sequences
    assert all([positions[index] for index in path] == list(range(len(path))) for path in paths)
    assert row.score_index.tolist() == [path[-1] for path in paths]

    # Each real token is in one prompt or in one response, and belongs to somebody.
    owners = [0] * row.layout.width
    for span in row.layout.spans:
        assert all(length >= 1 for length in span.response_lengths)
        spans = [(span.start, span.start + span.prompt_length), *span.responses()]
        assert spans[-1][1] == span.end
        for start, end in spans:
            for index in range(start, end):
                owners[index] += 1
    real = row.layout.num_tokens
    assert owners == [1] * real + [0] * (row.layout.width - real)

    assert row.input_ids.shape == row.position_ids.shape == (1, row.layout.width)
    assert row.layout.width == round_up(real, multiple)
    assert row.layout.width % multiple == 0 and 0 <= row.layout.width - real < multiple
    assert tokens[real:] == [PAD] * (row.layout.width - real)

    expected = 0
    for group in groups:
        prompt_length = common_prefix_length(group) if share_prompts else 0
        expected += packed_length(sum(len(sequence) for sequence in group), prompt_length, len(group))
    assert real == expected


@checked
@given(rows_strategy, st.booleans(), st.sampled_from([1, 2, 8, 64]))
def test_every_token_can_be_found_again(groups: list[Group], share_prompts: bool, multiple: int) -> None:
    check_row(groups, share_prompts, multiple)


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_every_token_of_odd_groups_can_be_found_again(name: str, share_prompts: bool) -> None:
    check_row(ADVERSARIAL[name], share_prompts, 8)


@checked
@given(groups_strategy())
def test_prefix_is_the_longest_that_leaves_each_a_token(group: Group) -> None:
    length = common_prefix_length(group)
    assert all(len(sequence) > length for sequence in group)
    assert len({tuple(sequence[:length]) for sequence in group}) == 1
    longer_fits = all(len(sequence) > length + 1 for sequence in group)
    assert not (longer_fits and len({sequence[length] for sequence in group}) == 1)


def test_shared_prompt_stands_once() -> None:
    row = pack_row([[[5, 6, 7], [5, 6, 8, 9]], [[1], [2, 3]]], share_prompts=True, pad_token_id=0, multiple=10)
    assert row.input_ids.tolist() == [[5, 6, 7, 8, 9, 1, 2, 3, 0, 0]]
    assert row.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 0, 1, 0, 0]]
    assert row.score_index.tolist() == [2, 4, 5, 7]
    # Without a common prefix there is nothing to share, so each response is a group of its own.
    assert [(span.start, span.prompt_length, span.response_lengths) for span in row.layout.spans] == [
        (0, 2, (1, 2)),
        (5, 0, (1,)),
        (6, 0, (2,)),
    ]


def test_layout_travels_without_what_was_derived() -> None:
    layout = pack_row([[[1, 2], [1, 3]]], share_prompts=True, pad_token_id=0).layout
    layout.derived["index"] = torch.zeros(3)
    received = pickle.loads(pickle.dumps(layout))
    assert received == layout
    assert received.derived == {}
    assert list(layout.derived) == ["index"]


def test_layouts_do_not_share_what_was_derived() -> None:
    first, second = RowLayout((), 0), RowLayout((), 0)
    first.derived["index"] = 1
    assert second.derived == {}
    assert first.num_tokens == 0


def brute_force(row: PackedRow, window: int | None) -> torch.Tensor:
    """`(width, width)`: a token sees what stands before it in a sequence they share, itself, and nothing else."""
    seen = torch.zeros(row.layout.width, row.layout.width, dtype=torch.bool)
    for path in walk(row):
        for position, query in enumerate(path):
            for other, key in enumerate(path[: position + 1]):
                seen[query, key] = window is None or position - other < window
    for index in range(row.layout.num_tokens, row.layout.width):
        seen[index, index] = True
    return seen


def all_pairs(places: TokenPlaces, width: int, window: int | None) -> torch.Tensor:
    index = torch.arange(width)
    return sees(places, index[:, None], index[None, :], window)


@checked
@given(rows_strategy, st.booleans(), st.sampled_from([None, 1, 2, 3, 7, 100]))
def test_tokens_see_their_own_sequence_only(groups: list[Group], share_prompts: bool, window: int | None) -> None:
    row = pack_row(groups, share_prompts, PAD, multiple=8)
    places = token_places(row.layout)
    seen = all_pairs(places, row.layout.width, window)
    assert torch.equal(seen, brute_force(row, window))

    # Said without the walk: no response sees another, no group another, and all have something to see.
    query, key = seen.nonzero(as_tuple=True)
    assert bool((places.group[query] == places.group[key]).all())
    in_response = places.response[key] != -1
    assert torch.equal(places.response[query][in_response], places.response[key][in_response])
    real = places.group[query] != -1
    assert bool((places.position[key] <= places.position[query])[real].all())
    assert bool(seen.any(dim=1).all())


@checked
@given(rows_strategy, st.booleans())
def test_places_agree_with_the_row(groups: list[Group], share_prompts: bool) -> None:
    row = pack_row(groups, share_prompts, PAD, multiple=8)
    places = token_places(row.layout)
    assert torch.equal(places.position, row.position_ids[0])
    assert int((places.group != -1).sum()) == row.layout.num_tokens
    assert bool((places.response[row.score_index] != -1).all())

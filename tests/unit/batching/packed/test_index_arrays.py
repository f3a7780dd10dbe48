"""Index arrays against the definition of who sees whom, what they cost, and how they travel with their row."""

from __future__ import annotations

import pickle
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from rm_scale.batching.collator import PackedCollator
from rm_scale.batching.packed import matmul_backend
from rm_scale.batching.packed.attention import BACKENDS, index_names
from rm_scale.batching.packed.attention_rules import AttentionRules, sees, token_places
from rm_scale.batching.packed.backend_choice import head_size
from rm_scale.batching.packed.index_arrays import (
    BLOCK,
    FlexIndex,
    VarlenIndex,
    find_index,
    flex_index,
    names_of,
    prepare_index,
    sees_by_ranges,
    token_ranges,
)
from rm_scale.batching.packed.layout import GroupSpan, IndexName, RowLayout
from rm_scale.batching.packed.matmul_backend import row_blocks
from rm_scale.batching.sampler import StepCollator
from rm_scale.modeling.packed_model import enable_packed_rows
from rm_scale.planning.layout_choice import TESTED_MODEL_TYPES
from tests.unit.modeling.test_packed_model import GROUPS, tiny

checked = settings(deadline=None, max_examples=60, database=None, derandomize=True)
ALL_NAMES: tuple[IndexName, ...] = (("varlen", None), ("flex", None), ("flex", 7), ("ranges", None), ("ranges", 7))
LAYOUT = RowLayout((GroupSpan(0, 130, (20, 1, 140)), GroupSpan(291, 0, (9,)), GroupSpan(300, 3, (1, 2))), 310)


@st.composite
def layouts(draw: Callable[..., Any], longest: int) -> RowLayout:
    """Rows of a few groups, with prompts and without, padded to several multiples."""
    spans: list[GroupSpan] = []
    lengths = st.integers(1, longest)
    for _ in range(draw(st.integers(1, 4))):
        start = spans[-1].end if spans else 0
        prompt = draw(st.one_of(st.just(0), lengths))
        spans.append(GroupSpan(start, prompt, tuple(draw(st.lists(lengths, min_size=1, max_size=4)))))
    multiple = draw(st.sampled_from([1, 8, 64, BLOCK]))
    return RowLayout(tuple(spans), -(-spans[-1].end // multiple) * multiple)


def dense(layout: RowLayout, window: int | None) -> torch.Tensor:
    """The definition, `(width, width)`."""
    index = torch.arange(layout.width)
    return sees(token_places(layout), index[:, None], index[None, :], window)


@checked
@given(layouts(12), st.sampled_from([None, 1, 2, 3, 7, 100]))
def test_ranges_are_what_a_token_sees(layout: RowLayout, window: int | None) -> None:
    ranges = token_ranges(layout, window)
    index = torch.arange(layout.width)
    assert torch.equal(sees_by_ranges(ranges, index[:, None], index[None, :]), dense(layout, window))
    # Nothing is counted twice.
    assert bool(((ranges.prompt_to <= ranges.own_from) | (ranges.prompt_from >= ranges.prompt_to)).all())
    for one in (ranges.own_from, ranges.prompt_from, ranges.prompt_to):
        assert one.dtype == torch.int32 and one.shape == (layout.width,)


def tables(counts: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """`(B, B)`: which blocks the lists of a block mask name."""
    counts, columns = counts[0, 0], columns[0, 0]
    table = torch.zeros(columns.shape, dtype=torch.bool)
    for row, count in enumerate(counts.tolist()):
        assert sorted(columns[row].tolist()) == list(range(len(counts))), "each is a permutation"
        table[row, columns[row, :count].long()] = True
    return table


def check_blocks(layout: RowLayout, window: int | None) -> None:
    index = flex_index(layout, window)
    blocks = index.kv_num_blocks.shape[-1]
    assert blocks == max(2, -(-layout.width // BLOCK))
    # Cells behind the row's end are seen by nobody.
    cells = torch.zeros(blocks * BLOCK, blocks * BLOCK, dtype=torch.bool)
    cells[: layout.width, : layout.width] = dense(layout, window)
    cells = cells.view(blocks, BLOCK, blocks, BLOCK).transpose(1, 2).flatten(2)
    full, partial = cells.all(-1), cells.any(-1) & ~cells.all(-1)
    assert torch.equal(tables(index.kv_num_blocks, index.kv_indices), partial)
    assert torch.equal(tables(index.full_kv_num_blocks, index.full_kv_indices), full)
    assert torch.equal(tables(index.q_num_blocks, index.q_indices), partial.T)
    assert torch.equal(tables(index.full_q_num_blocks, index.full_q_indices), full.T)


@settings(deadline=None, max_examples=40, database=None, derandomize=True)
@given(layouts(200), st.sampled_from([None, 1, 40, BLOCK, 300]))
def test_blocks_are_empty_partial_or_full_as_their_cells_are(layout: RowLayout, window: int | None) -> None:
    check_blocks(layout, window)


@pytest.mark.parametrize("width", [1, 127, 128, 129, 255, 256, 257, 640])
@pytest.mark.parametrize("window", [None, 130])
def test_widths_around_a_block(width: int, window: int | None) -> None:
    """One long response has full blocks; a prompt of a block has full ones of its responses."""
    check_blocks(RowLayout((GroupSpan(0, 0, (width,)),), width), window)
    if width > 400:
        check_blocks(RowLayout((GroupSpan(0, 128, (128, 128, 200)),), width), window)
        check_blocks(RowLayout((GroupSpan(0, 300, (1,)),), width), window)


@pytest.mark.parametrize("window", [None, 40, 300])
def test_the_block_mask_is_the_one_that_torch_makes(window: int | None) -> None:
    """`create_block_mask` looks at all cells, `from_kv_blocks` turns the lists round: both find what we say."""
    layout = RowLayout((GroupSpan(0, 300, (20, 260, 1)), GroupSpan(581, 0, (9,)), GroupSpan(590, 3, (140, 2))), 768)
    places, index = token_places(layout), flex_index(layout, window)
    made = create_block_mask(lambda b, h, q, k: sees(places, q, k, window), None, None, 768, 768, device="cpu")
    turned = BlockMask.from_kv_blocks(
        index.kv_num_blocks,
        index.kv_indices,
        index.full_kv_num_blocks,
        index.full_kv_indices,
        BLOCK,
        made.mask_mod,
        (768, 768),
    )
    assert int(index.full_kv_num_blocks.sum()) > 0 or window == 40, "the row has full blocks"
    for name, tensor in index.blocks.items():
        assert tensor.dtype == torch.int32 and tensor.is_contiguous()
        assert torch.equal(tensor, getattr(made, name)), name
        assert torch.equal(tensor, getattr(turned, name)), name


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that an operation gave."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor):
                self.bytes = max(self.bytes, one.numel() * one.element_size())
        return out


@pytest.mark.parametrize("window", [None, 4096])
def test_long_rows_cost_little(window: int | None) -> None:
    """At 32k tokens; `create_block_mask` makes tensors of 1 GB and more on the way to the same lists."""
    spans = [GroupSpan(start, 2000, (700, 700, 696)) for start in range(0, 32768, 4096)]
    layout = RowLayout(tuple(spans), 32768)
    tracemalloc.start()  # numpy's arrays
    with LargestTensor() as largest:
        prepared = prepare_index(layout, [("flex", window), ("varlen", None), ("ranges", window)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest.bytes < 4e6 and peak < 4e6
    assert prepared.index is not None and prepared.index.values.nbytes < 3e6


def same(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor):
        return bool(one == other)
    return one.dtype == other.dtype and torch.equal(one, other)


def equal_arrays(one: Any, other: Any) -> bool:
    return type(one) is type(other) and all(same(value, getattr(other, name)) for name, value in vars(one).items())


def test_prepared_arrays_are_those_that_a_layer_would_make() -> None:
    prepared = prepare_index(LAYOUT, ALL_NAMES)
    assert prepared == LAYOUT and LAYOUT.index is None
    for name in ALL_NAMES:
        found = find_index(prepared, name, "cpu")
        assert equal_arrays(found, find_index(RowLayout(LAYOUT.spans, LAYOUT.width), name, "cpu"))
        assert find_index(prepared, name, "cpu") is found, "once per row, not per layer"
    varlen = find_index(prepared, ("varlen", None), "cpu")
    assert isinstance(varlen, VarlenIndex) and (varlen.max_queries, varlen.max_keys) == (150, 270)
    assert isinstance(find_index(prepared, ("flex", 7), "cpu"), FlexIndex)
    assert not equal_arrays(find_index(prepared, ("flex", 7), "cpu"), find_index(prepared, ("flex", None), "cpu"))


def test_rows_take_their_arrays_to_another_process() -> None:
    prepared = prepare_index(LAYOUT, ALL_NAMES)
    find_index(prepared, ("varlen", None), "cpu")
    received = pickle.loads(pickle.dumps(prepared))
    assert received == prepared and received.derived == {}
    assert all(equal_arrays(find_index(received, name, "cpu"), find_index(prepared, name, "cpu")) for name in ALL_NAMES)


class Copies(TorchDispatchMode):
    """Counts what is copied to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.non_blocking: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default and out.device != args[0].device:
            self.non_blocking.append(bool(kwargs.get("non_blocking", False)))
        elif isinstance(out, torch.Tensor) and out.device.type == "meta":
            on_cpu = [one for one in args if isinstance(one, torch.Tensor) and one.device.type == "cpu" and one.dim()]
            assert not on_cpu, f"{func} mixes devices"
        return out


def test_a_prepared_row_is_moved_by_one_copy() -> None:
    prepared = prepare_index(LAYOUT, ALL_NAMES)
    with Copies() as copies:
        moved = prepared.to("meta", non_blocking=True)
        for name in ALL_NAMES:
            for value in vars(find_index(moved, name, "meta")).values():
                assert not isinstance(value, torch.Tensor) or value.device.type == "meta"
        for window in (None, 7):
            blocks = row_blocks(moved, window, torch.bfloat16, "meta")
            assert {block.bias.device.type for block in blocks} == {"meta"}
    assert copies.non_blocking == [True]
    assert moved == prepared
    assert prepared.to("cpu") is prepared and LAYOUT.to("meta") is LAYOUT, "nothing to move"


def test_a_row_that_was_not_prepared_is_still_moved_at_once() -> None:
    with Copies() as copies:
        for _ in range(3):
            find_index(RowLayout(LAYOUT.spans, LAYOUT.width), ("flex", 7), "meta")
    assert copies.non_blocking == [False] * 3


def test_rows_are_pinned_by_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own function; only the pinning itself needs a GPU."""
    pinned: list[torch.Tensor] = []

    def remember(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        pinned.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", remember)
    prepared = prepare_index(LAYOUT, ALL_NAMES)
    batch = pin_memory({"micro_batches": [{"packed_layout": prepared}, {"packed_layout": LAYOUT}]})
    first, second = (one["packed_layout"] for one in batch["micro_batches"])
    assert prepared.index is not None and [one is prepared.index.values for one in pinned] == [True]
    assert first is not prepared and first == prepared and second is LAYOUT
    assert equal_arrays(find_index(first, ("varlen", None), "cpu"), find_index(prepared, ("varlen", None), "cpu"))


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_come_with_what_was_asked_for(workers: int) -> None:
    names: tuple[IndexName, ...] = (("varlen", None), ("flex", 6))
    collate = PackedCollator(pad_token_id=0, share_prompts=True, pad_to_multiple_of=8, index_names=names)
    loader = DataLoader([[GROUPS[:3], GROUPS[3:]]], batch_size=1, num_workers=workers, collate_fn=StepCollator(collate))
    (step,) = list(loader)
    plain = PackedCollator(pad_token_id=0, share_prompts=True, pad_to_multiple_of=8)
    for batch, groups in zip(step["micro_batches"], (GROUPS[:3], GROUPS[3:]), strict=True):
        layout, wanted = batch["packed_layout"], plain(groups)["packed_layout"]
        assert wanted.index is None, "nothing is prepared unless asked for"
        assert layout == wanted and list(layout.index.entries) == list(names)
        assert all(equal_arrays(find_index(layout, name, "cpu"), find_index(wanted, name, "cpu")) for name in names)


@pytest.mark.parametrize("window", [None, 7])
@torch.no_grad()
def test_prepared_rows_give_the_same_attention_bit_for_bit(window: int | None) -> None:
    query = torch.randn(4, LAYOUT.width, 8)
    key, value = (torch.randn(2, LAYOUT.width, 8) for _ in range(2))
    rules = AttentionRules(0.3, window)
    plain = BACKENDS["matmul"](query, key, value, RowLayout(LAYOUT.spans, LAYOUT.width), rules)
    prepared = BACKENDS["matmul"](query, key, value, prepare_index(LAYOUT, ALL_NAMES), rules)
    assert torch.equal(plain, prepared)


@pytest.mark.parametrize("window", [None, 7])
def test_biases_are_who_sees_whom(window: int | None) -> None:
    seen = dense(LAYOUT, window)
    for dtype in (torch.float32, torch.bfloat16):
        for block in row_blocks(RowLayout(LAYOUT.spans, LAYOUT.width), window, dtype, "cpu"):
            keys = [key for part in block.keys for key in range(*part)]
            cells = seen[slice(*block.queries)][:, keys]
            wanted = torch.zeros(cells.shape, dtype=dtype).masked_fill(~cells, -torch.inf)
            assert block.bias.dtype == dtype and torch.equal(block.bias, wanted)


def test_each_backend_names_what_it_needs() -> None:
    assert names_of("varlen", [None, 7], "cuda") == (("varlen", None),)
    assert names_of("flex", [7, None, 7], "cuda") == (("flex", None), ("flex", 7))
    assert names_of("matmul", [7], "cuda") == (("ranges", 7),)
    assert names_of("matmul", [7], "cpu") == names_of("sdpa", [None], "cuda") == ()


@pytest.mark.parametrize("model_type", sorted(TESTED_MODEL_TYPES))
@torch.no_grad()
def test_models_ask_for_the_arrays_that_were_prepared(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And for no others: what is not prepared is made in the forward pass, without an error."""
    model = tiny(model_type)
    assert index_names(model.config, "cuda") == (), "no packed rows yet"
    enable_packed_rows(model, "matmul")
    names = index_names(model.config, "cuda")
    batch = PackedCollator(0, share_prompts=True, index_names=names)(GROUPS)
    layout = batch["packed_layout"]
    sizes: set[int] = set()
    attend = matmul_backend.blockwise_attention

    def watched(query: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.add(query.shape[-1])
        return attend(query, *rest)

    monkeypatch.setattr(matmul_backend, "blockwise_attention", watched)
    model(**{name: batch[name] for name in ("input_ids", "position_ids", "score_index", "packed_layout")})
    assert sizes == {head_size(model.config)}
    asked = {key[1] for key in layout.derived if key[0] == "index"}
    assert set(names) == asked and len(names) == len(asked)

"""FlexAttention compiled, on a CPU (forward) and traced with its backward pass: one graph for all rows, or an error."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention
from torch._dynamo.utils import counters

from rm_scale.batching.collator import PackedCollator
from rm_scale.batching.packed import flex_backend
from rm_scale.batching.packed.attention import PREFIX, index_names
from rm_scale.batching.packed.attention_rules import AttentionRules
from rm_scale.batching.packed.flex_backend import _kernel_options, flex_block_edge
from rm_scale.batching.packed.index_arrays import BLOCK, find_index, prepare_index
from rm_scale.batching.packed.layout import GroupSpan, RowLayout
from rm_scale.errors import ModelError
from rm_scale.modeling.packed_model import enable_packed_rows
from rm_scale.modeling.token_scores import batch_rewards
from tests.unit.batching.packed.test_attention import SINKS, compare, dense_attention
from tests.unit.modeling.test_packed_model import GROUPS, tiny

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> Iterator[None]:
    """Graphs are counted from 0."""
    torch._dynamo.reset()
    counters.clear()
    flex_backend._compiler_of_flex.cache_clear()
    yield
    torch._dynamo.reset()
    flex_backend._compiler_of_flex.cache_clear()


def compile_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the way that GPUs take."""
    monkeypatch.setattr(flex_backend, "_flex_for", lambda device_type: flex_backend.compiled_flex_row)


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def some_layout(seed: int) -> RowLayout:
    """Rows from less than a block to a dozen, some padded, all different."""
    draw = random.Random(seed)
    spans: list[GroupSpan] = []
    for _ in range(draw.randint(1, 6)):
        lengths = tuple(draw.randint(1, 200) for _ in range(draw.randint(1, 4)))
        spans.append(GroupSpan(spans[-1].end if spans else 0, draw.choice([0, draw.randint(1, 300)]), lengths))
    multiple = draw.choice([1, 16, 64, 128])
    return RowLayout(tuple(spans), -(-spans[-1].end // multiple) * multiple)


def tensors(width: int) -> list[torch.Tensor]:
    """Queries, keys and values as models hand them over: heads behind tokens in memory."""
    torch.manual_seed(width)
    shapes = [(width, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(shape).transpose(0, 1) for shape in shapes]


@pytest.mark.timeout(900)
@pytest.mark.long
@torch.no_grad()
def test_one_graph_serves_rows_of_all_shapes_and_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a soft cap, which is what FlexAttention is chosen for. The first row has as many blocks as heads."""
    compile_on_cpus(monkeypatch)
    same_sizes = RowLayout((GroupSpan(0, 100, (200, 200)),), 128 * HEADS)
    short = [RowLayout((GroupSpan(0, 0, (length,)),), length) for length in (2, 100, 128, 129, 255, 256, 257)]
    rows = [same_sizes, *(some_layout(seed) for seed in range(8)), *short]
    assert min(row.width for row in rows) < 128 and len({row.width for row in rows}) > 10
    for number, row in enumerate(rows):
        # Prepared or not, the arrays look alike to the compiler.
        row = prepare_index(row, [("flex", None), ("flex", 40)] if number % 2 else [])
        for window in (None, 40):
            rules = AttentionRules(0.3, window, softcap=5.0)
            query, key, value = tensors(row.width)
            found = flex_backend.flex_attention(query, key, value, row, rules)
            wanted = dense_attention(query, key, value, row, rules)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)
    assert graphs() == 1


@pytest.mark.long
@pytest.mark.timeout(900)
@torch.no_grad()
def test_models_reach_the_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention function itself is not traced; what it calls is, and different windows share a graph."""
    model = tiny("gemma2")
    enable_packed_rows(model, "matmul")
    batches = [PackedCollator(0, share_prompts=True)(groups) for groups in (GROUPS, GROUPS[:4], GROUPS[2:])]
    wanted = [batch_rewards(model, batch) for batch in batches]

    compile_on_cpus(monkeypatch)
    model.set_attn_implementation(PREFIX + "flex")
    collate = PackedCollator(0, share_prompts=True, index_names=index_names(model.config, "cpu"))
    for groups, expected in zip((GROUPS, GROUPS[:4], GROUPS[2:]), wanted, strict=True):
        torch.testing.assert_close(batch_rewards(model, collate(groups)), expected, rtol=0, atol=1e-5)
    assert graphs() == 1


def traced_only(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Let dynamo trace as ever, and torch run the graphs; with gradients, which FlexAttention refuses on a CPU."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *a: None)


@pytest.mark.long
def test_sinks_need_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, each against dense attention, for rows of all shapes."""
    traced_only(monkeypatch, "aot_eager")
    compile_on_cpus(monkeypatch)
    for seed in range(3):
        for window in (None, 40):
            compare(flex_backend.flex_attention, some_layout(seed), AttentionRules(0.3, window, sinks=SINKS))
    assert graphs() == 1


@pytest.mark.long
def test_training_needs_few_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, each against dense attention; scoring between is another graph."""
    traced_only(monkeypatch, "aot_eager")
    compile_on_cpus(monkeypatch)
    for seed in range(4):
        row = some_layout(seed)
        for window in (None, 40):
            compare(flex_backend.flex_attention, row, AttentionRules(2.0, window, softcap=1.5))
            with torch.no_grad():
                flex_backend.flex_attention(*tensors(row.width), row, AttentionRules(2.0, window, softcap=1.5))
    assert graphs() == 2


def arguments(row: RowLayout, softcap: str | None, dtype: torch.dtype = torch.float32) -> list[Any]:
    index = find_index(row, ("flex", None), "cpu")
    return [*(one.to(dtype)[None] for one in tensors(row.width)), index.ranges, index.blocks, "0.3", softcap]


@torch.no_grad()
def test_too_many_graphs_are_an_error_and_not_an_uncompiled_row(monkeypatch: pytest.MonkeyPatch) -> None:
    traced_only(monkeypatch, "eager")
    monkeypatch.setattr(flex_backend, "MAX_FLEX_GRAPHS", 1)
    row = some_layout(0)
    flex_backend.compiled_flex_row(*arguments(row, None))
    with pytest.raises(ModelError) as caught:
        flex_backend.compiled_flex_row(*arguments(row, "5.0"))
    assert str(caught.value) == (
        "packed_attention=flex was compiled 1 times and a row asks for one more: one graph should serve all rows. Fix: "
        "set packed_attention: matmul, and report this with what TORCH_LOGS=recompiles prints."
    )
    assert graphs() == 1


@torch.no_grad()
def test_what_can_not_be_compiled_says_so() -> None:
    """torch's kernels for CPUs take no float64."""
    with pytest.raises(ModelError, match=r"packed_attention=flex can't be compiled here: .*Fix: set packed_attention"):
        flex_backend.compiled_flex_row(*arguments(some_layout(0), None, torch.float64))


@torch.no_grad()
def test_smaller_blocks_are_constants_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """As which torch's lowering asks for them."""
    seen: list[dict[str, Any]] = []

    def remember(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        calls = [node for node in module.graph.nodes if "flex_attention" in str(node.target)]
        seen.extend(one for node in calls for one in node.args if isinstance(one, dict))
        return module.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=remember))
    flex_backend.compiled_flex_row(*arguments(some_layout(0), "5.0"), "32")
    flex_backend.compiled_flex_row(*arguments(some_layout(1), "5.0"), "32")
    (options,) = seen
    assert options["BACKEND"] == "TRITON" and options["num_stages"] == 1
    assert {name: options[name] for name in options if "BLOCK_" in name} == {
        "fwd_BLOCK_M": 32,
        **{f"{name}": 32 for name in ("fwd_BLOCK_N", "bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2")},
    }


def test_a_gpu_never_runs_it_uncompiled() -> None:
    """`TORCHDYNAMO_DISABLE=1` makes torch.compile give the function back."""
    query = torch.zeros(1, 2, 128, 16, device="meta")
    index = find_index(RowLayout((GroupSpan(0, 0, (128,)),), 128), ("flex", None), "meta")
    with pytest.raises(ModelError, match=r"packed_attention=flex runs uncompiled, .*Fix: unset TORCHDYNAMO_DISABLE"):
        flex_backend._flex_row(query, query, query, index.ranges, index.blocks, "0.3", None)


@pytest.mark.parametrize(
    ("capability", "bytes_per_number", "head_dim", "edge"),
    [
        ((9, 0), 2, 256, None),
        ((8, 0), 2, 256, None),
        ((8, 9), 2, 128, None),
        ((8, 9), 2, 256, 32),
        ((12, 0), 2, 256, 32),
        ((7, 5), 2, 256, 16),
        ((7, 5), 2, 128, None),
        ((9, 0), 4, 64, None),
        ((8, 0), 4, 80, 16),
        ((8, 6), 4, 256, 16),
    ],
)
def test_flex_takes_blocks_that_fit_the_shared_memory(
    capability: tuple[int, int], bytes_per_number: int, head_dim: int, edge: int | None
) -> None:
    assert flex_block_edge(capability, bytes_per_number, head_dim) == edge
    options = _kernel_options(edge)
    # Blocks of the mask must be whole numbers of blocks of the kernel.
    assert all(BLOCK % size == 0 for name, size in options.items() if "BLOCK" in name)
    assert options["BACKEND"] == "TRITON" and (edge is None) == (len(options) == 1)

"""Every backend against dense attention under a mask, outputs and gradients, on rows that are hard to get right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.attention.flex_attention

from rm_scale.errors import ConfigError
from rm_scale.packing import blocks
from rm_scale.packing.attention import (
    BACKENDS,
    AttentionRules,
    Backend,
    causal_mask,
    choose_backend,
    sees,
    token_places,
    varlen_index,
)
from rm_scale.packing.layout import GroupSpan, RowLayout

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8
TENSORS = ("output", "query", "key", "value")

# Prompt length and lengths of the responses of each group, and padding.
ROWS: dict[str, tuple[list[tuple[int, list[int]]], int]] = {
    "no prompts": ([(0, [5]), (0, [1]), (0, [9])], 0),
    "no prompt, several responses": ([(0, [4, 1, 6])], 3),
    "one-token responses": ([(6, [1, 1, 1, 1, 1]), (1, [1, 1])], 2),
    "five of all lengths": ([(11, [3, 17, 1, 8, 30]), (4, [2, 9])], 5),
    "long prompt": ([(317, [12, 1, 40]), (3, [5, 5])], 11),
    "long responses": ([(9, [301, 140, 2])], 0),
    "responses apart": ([(20, [90, 90, 3])], 1),
    "single token": ([(0, [1])], 0),
    "much padding": ([(2, [1, 2])], 59),
}

RULES = {
    "plain": AttentionRules(0.3),
    "window": AttentionRules(0.3, window=7),
    "narrow window": AttentionRules(0.3, window=1),
    "soft cap": AttentionRules(2.0, softcap=1.5),
    "window and soft cap": AttentionRules(2.0, window=7, softcap=1.5),
}

CASES = [
    pytest.param(backend, rules, row, id=f"{backend}-{rules}-{row}")
    for backend in ("matmul", "sdpa", "flex")
    for rules in RULES
    for row in ROWS
    if not (backend == "sdpa" and RULES[rules].softcap is not None)
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let short rows be cut and their responses kept apart, as long rows are."""
    monkeypatch.setattr(blocks, "QUERIES_PER_BLOCK", 96)
    monkeypatch.setattr(blocks, "CALL_COST", 500)
    monkeypatch.setattr(blocks, "FUSED_CALL_COST", 500)


@pytest.fixture
def flex_trains_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention refuses a backward pass on a CPU, though its eager path has one."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *a: None)


def row_layout(name: str) -> RowLayout:
    groups, padding = ROWS[name]
    spans: list[GroupSpan] = []
    for prompt_length, responses in groups:
        start = spans[-1].end if spans else 0
        spans.append(GroupSpan(start, prompt_length, tuple(responses)))
    return RowLayout(tuple(spans), spans[-1].end + padding)


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: RowLayout, rules: AttentionRules
) -> torch.Tensor:
    """The definition: all scores, a mask, softmax."""
    group = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(group, dim=0), value.repeat_interleave(group, dim=0)
    scores = query @ key.transpose(1, 2) * rules.scaling
    if rules.softcap is not None:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    index = torch.arange(layout.width)
    seen = sees(token_places(layout), index[:, None], index[None, :], rules.window)
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ value


def varlen_by_hand(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: RowLayout, rules: AttentionRules
) -> torch.Tensor:
    """What a kernel for sequences of different lengths does with the arrays of `varlen_index`."""
    index = varlen_index(layout)
    group = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(group, dim=0), value.repeat_interleave(group, dim=0)
    if index.key_index is not None:
        key, value = key[:, index.key_index], value[:, index.key_index]
    cu_queries, cu_keys = index.cu_queries.tolist(), index.cu_keys.tolist()
    assert cu_queries[-1] == layout.width and cu_keys[-1] == key.shape[1]
    parts = []
    for number in range(len(cu_queries) - 1):
        queries = query[:, cu_queries[number] : cu_queries[number + 1]]
        own = slice(cu_keys[number], cu_keys[number + 1])
        seen = causal_mask(queries.shape[1], own.stop - own.start, rules.window, "cpu")
        scores = (queries @ key[:, own].transpose(1, 2) * rules.scaling).masked_fill(~seen, -torch.inf)
        parts.append(torch.softmax(scores, -1) @ value[:, own])
    return torch.cat(parts, dim=1)


def run(attention: Backend, layout: RowLayout, rules: AttentionRules, heads: int = HEADS) -> list[torch.Tensor]:
    """Output and gradients of all three inputs, under a loss that looks at real tokens only."""
    torch.manual_seed(layout.width)
    kv_heads = min(heads, KV_HEADS)
    query = torch.randn(heads, layout.width, HEAD_DIM, requires_grad=True)
    key, value = (torch.randn(kv_heads, layout.width, HEAD_DIM, requires_grad=True) for _ in range(2))
    weights = torch.randn(heads, layout.width, HEAD_DIM)
    weights[:, layout.num_tokens :] = 0
    out = attention(query, key, value, layout, rules)
    assert out.shape == query.shape
    assert bool(torch.isfinite(out).all())
    gradients = torch.autograd.grad((out * weights).sum(), (query, key, value))
    return [out.detach()[:, : layout.num_tokens], *gradients]


def compare(attention: Backend, layout: RowLayout, rules: AttentionRules, heads: int = HEADS) -> None:
    wanted = run(dense_attention, layout, rules, heads)
    for name, tensor, reference in zip(TENSORS, run(attention, layout, rules, heads), wanted, strict=True):
        torch.testing.assert_close(
            tensor, reference, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("rules", RULES)
@torch.no_grad()
def test_scoring_alone_gives_the_same(rules: str, row: str) -> None:
    """Without a backward pass the blocks go through another kernel."""
    layout = row_layout(row)
    torch.manual_seed(layout.width)
    # As models hand them over: heads behind tokens in memory.
    query = torch.randn(layout.width, HEADS, HEAD_DIM).transpose(0, 1)
    key, value = (torch.randn(layout.width, KV_HEADS, HEAD_DIM).transpose(0, 1) for _ in range(2))
    found = BACKENDS["matmul"](query, key, value, layout, RULES[rules])
    wanted = dense_attention(query, key, value, layout, RULES[rules])
    assert bool(torch.isfinite(found).all()) and found.shape == query.shape
    torch.testing.assert_close(found[:, : layout.num_tokens], wanted[:, : layout.num_tokens], rtol=1e-5, atol=2e-6)


@pytest.mark.usefixtures("flex_trains_on_cpu")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("backend", "rules", "row"), CASES)
def test_backends_agree_with_dense_attention(backend: str, rules: str, row: str) -> None:
    compare(BACKENDS[backend], row_layout(row), RULES[rules])


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("backend", ["matmul", "sdpa"])
def test_heads_of_their_own_keys(backend: str, heads: int) -> None:
    compare(BACKENDS[backend], row_layout("five of all lengths"), RULES["plain"], heads)


@pytest.mark.parametrize("rules", ["plain", "window", "narrow window"])
@pytest.mark.parametrize("row", ROWS)
def test_varlen_arrays_describe_the_row(row: str, rules: str) -> None:
    compare(varlen_by_hand, row_layout(row), RULES[rules])


def test_varlen_arrays_by_hand() -> None:
    index = varlen_index(RowLayout((GroupSpan(0, 2, (1, 3)), GroupSpan(6, 0, (2,))), 11))
    assert index.cu_queries.tolist() == [0, 3, 6, 8, 11]
    assert index.cu_keys.tolist() == [0, 3, 8, 10, 13]
    assert index.key_index is not None
    assert index.key_index.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9, 10]
    assert (index.max_queries, index.max_keys) == (3, 5)
    assert index.cu_queries.dtype == index.cu_keys.dtype == torch.int32


def test_varlen_takes_the_row_itself_where_nothing_is_shared() -> None:
    assert varlen_index(row_layout("no prompts")).key_index is None
    assert varlen_index(RowLayout((GroupSpan(0, 3, (2,)),), 8)).key_index is None


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("row", ["five of all lengths", "long prompt"])
def test_recomputed_weights_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch, row: str, rules: str) -> None:
    kept = run(BACKENDS["matmul"], row_layout(row), RULES[rules])
    calls = count_calls(monkeypatch)
    monkeypatch.setattr(blocks, "MAX_KEPT_WEIGHTS", 0)
    layout = row_layout(row)
    recomputed = run(BACKENDS["matmul"], layout, RULES[rules])
    num_blocks = len(blocks.row_blocks(layout, RULES[rules].window, torch.float32, "cpu"))
    assert len(calls) == 2 * num_blocks, "once forwards and once backwards"
    for name, tensor, reference in zip(TENSORS, recomputed, kept, strict=True):
        assert torch.equal(tensor, reference), name


def test_small_blocks_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    layout = row_layout("long prompt")
    run(BACKENDS["matmul"], layout, RULES["plain"])
    assert len(calls) == len(blocks.row_blocks(layout, None, torch.float32, "cpu"))


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes each time that attention weights are computed."""
    calls: list[int] = []
    original: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = blocks._weights

    def counted(*args: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(blocks, "_weights", counted)
    return calls


def test_blocks_cover_each_query_once_and_are_made_once() -> None:
    layout = row_layout("long prompt")
    made = blocks.row_blocks(layout, None, torch.float32, "cpu")
    queries = [index for block in made for index in range(*block.queries)]
    assert queries == list(range(layout.num_tokens))
    prompts = [block for block in made if block.queries[1] <= 317]
    assert len(prompts) > 1, "a long prompt is cut"
    assert all(block.keys == ((0, block.queries[1]),) for block in prompts), "with the keys up to its end only"
    assert blocks.row_blocks(layout, None, torch.float32, "cpu") is made
    assert blocks.row_blocks(layout, 7, torch.float32, "cpu") is not made


@pytest.mark.usefixtures("flex_trains_on_cpu")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["matmul", "sdpa", "flex"])
@pytest.mark.parametrize("window", [None, 3])
def test_changing_one_response_leaves_the_others_exactly(backend: str, window: int | None) -> None:
    layout = row_layout("five of all lengths")
    torch.manual_seed(0)
    query = torch.randn(HEADS, layout.width, HEAD_DIM)
    key, value = (torch.randn(KV_HEADS, layout.width, HEAD_DIM) for _ in range(2))
    rules = AttentionRules(0.3, window)
    before = BACKENDS[backend](query, key, value, layout, rules)
    start, end = layout.spans[0].responses()[1]
    for tensor in (query, key, value):
        tensor[:, start:end] = 50.0
    after = BACKENDS[backend](query, key, value, layout, rules)
    assert torch.equal(before[:, :start], after[:, :start])
    assert torch.equal(before[:, end : layout.num_tokens], after[:, end : layout.num_tokens])
    assert not torch.equal(before[:, start:end], after[:, start:end])


def test_sdpa_refuses_a_soft_cap() -> None:
    tensor = torch.zeros(1, 1, 4)
    with pytest.raises(NotImplementedError, match="sdpa has no soft cap"):
        BACKENDS["sdpa"](tensor, tensor, tensor, row_layout("single token"), AttentionRules(1.0, softcap=2.0))


@pytest.mark.parametrize("has_softcap", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cpus_get_matmul(dtype: str, has_softcap: bool) -> None:
    assert choose_backend("auto", "cpu", dtype, has_softcap) == "matmul"
    assert choose_backend("matmul", "cpu", dtype, has_softcap) == "matmul"


@pytest.mark.parametrize(
    ("dtype", "has_softcap", "capability", "expected"),
    [
        ("bfloat16", False, (9, 0), "varlen"),
        ("float16", False, (8, 0), "varlen"),
        ("bfloat16", False, (7, 5), "sdpa"),
        ("float32", False, (9, 0), "sdpa"),
        ("bfloat16", True, (9, 0), "flex"),
        ("float32", True, (7, 5), "flex"),
    ],
)
def test_gpus_get_the_fastest_that_fits(
    monkeypatch: pytest.MonkeyPatch, dtype: str, has_softcap: bool, capability: tuple[int, int], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert choose_backend("auto", "cuda", dtype, has_softcap) == expected
    assert choose_backend(expected, "cuda", dtype, has_softcap) == expected


@pytest.mark.parametrize(
    ("asked", "device", "dtype", "has_softcap", "reason"),
    [
        (
            "varlen",
            "cpu",
            "bfloat16",
            False,
            "needs a CUDA device of compute capability 8 or more and bfloat16 or float16, here cpu, bfloat16",
        ),
        (
            "varlen",
            "cuda",
            "float32",
            False,
            "needs a CUDA device of compute capability 8 or more and bfloat16 or float16, here cuda, float32",
        ),
        ("flex", "cpu", "float32", False, "has no backward pass on a CPU"),
        ("sdpa", "cpu", "float32", True, "can't cap attention scores, as this model does"),
        ("varlen", "cuda", "bfloat16", True, "can't cap attention scores, as this model does"),
    ],
)
def test_backends_that_can_not_do_it_are_refused(
    monkeypatch: pytest.MonkeyPatch, asked: str, device: str, dtype: str, has_softcap: bool, reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(ConfigError) as caught:
        choose_backend(asked, device, dtype, has_softcap)
    assert f"packed_attention={asked}: {reason}. Fix: leave it out, or use matmul." in str(caught.value)

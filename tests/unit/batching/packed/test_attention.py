"""Every backend against dense attention under a mask, outputs and gradients, on rows that are hard to get right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention

from rm_scale.batching.packed import matmul_backend
from rm_scale.batching.packed.attention import BACKENDS
from rm_scale.batching.packed.attention_rules import AttentionRules, Backend, sees, token_places
from rm_scale.batching.packed.index_arrays import varlen_index
from rm_scale.batching.packed.layout import GroupSpan, RowLayout

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8
TENSORS = ("output", "query", "key", "value", "sinks")
SINKS = torch.linspace(-1.0, 2.0, HEADS)

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
    "sinks": AttentionRules(0.3, sinks=SINKS),
    "window and sinks": AttentionRules(0.3, window=7, sinks=SINKS),
    "soft cap and sinks": AttentionRules(2.0, softcap=1.5, sinks=SINKS),
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
    monkeypatch.setattr(matmul_backend, "QUERIES_PER_BLOCK", 96)
    monkeypatch.setattr(matmul_backend, "CALL_COST", 500)
    monkeypatch.setattr(matmul_backend, "FUSED_CALL_COST", 500)


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
    scores = scores.masked_fill(~seen, -torch.inf)
    if rules.sinks is not None:
        scores = torch.cat([scores, rules.sinks[:, None, None].expand(*scores.shape[:2], 1)], dim=-1)
    return torch.softmax(scores, -1)[..., : layout.width] @ value


class FlashByHand:
    """What flash attention does with sequences of different lengths, and what it asks of them (aten's flash_api.cpp).

    Queries are the last of their keys; `left` and `right` bound how far each sees, -1 for no bound.
    """

    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *sizes: Any, **bounds: Any) -> None:
        cu_queries, cu_keys, max_queries, max_keys, dropout, is_causal, *_ = sizes
        for cu, total, longest in ((cu_queries, len(query), max_queries), (cu_keys, len(key), max_keys)):
            assert cu.dtype == torch.int32 and cu.is_contiguous() and int(cu[0]) == 0 and int(cu[-1]) == total
            assert int(cu.diff().min()) > 0 and int(cu.diff().max()) <= longest and type(longest) is int
        assert len(cu_queries) == len(cu_keys) and dropout == 0
        assert all(one.stride(-1) == 1 and one.shape[-1] % 8 == 0 for one in (query, key, value))
        self.group = query.shape[1] // key.shape[1]
        self.query, (self.key, self.value) = query, (one.repeat_interleave(self.group, dim=1) for one in (key, value))
        self.scale, self.left = bounds.pop("scale"), bounds.pop("window_size_left")
        self.right = 0 if is_causal else bounds.pop("window_size_right")
        bounds.pop("window_size_right", None)
        assert set(bounds.values()) <= {None} and self.scale is not None
        self.sequences = list(zip(pairwise(cu_queries.tolist()), pairwise(cu_keys.tolist()), strict=True))

    def weights(self, own: tuple[int, int], keys: tuple[int, int]) -> torch.Tensor:
        """`(heads, queries, keys)` of a sequence."""
        count, length = own[1] - own[0], keys[1] - keys[0]
        row, column = torch.arange(length - count, length)[:, None], torch.arange(length)[None, :]
        seen = torch.ones(count, length, dtype=torch.bool)
        seen &= (column <= row + self.right) if self.right >= 0 else seen
        seen &= (column >= row - self.left) if self.left >= 0 else seen
        scores = torch.einsum("qhd,khd->hqk", self.query[slice(*own)], self.key[slice(*keys)]) * self.scale
        return torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)

    def forward(self) -> torch.Tensor:
        parts = [(self.weights(own, keys), self.value[slice(*keys)]) for own, keys in self.sequences]
        return torch.cat([torch.einsum("hqk,khd->qhd", *part) for part in parts])

    def backward(self, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found: list[list[torch.Tensor]] = [[], [], []]
        for own, keys in self.sequences:
            weights, upstream = self.weights(own, keys), grad[slice(*own)]
            slope = torch.einsum("qhd,khd->hqk", upstream, self.value[slice(*keys)])
            scores = weights * (slope - (slope * weights).sum(-1, keepdim=True)) * self.scale
            found[0].append(torch.einsum("hqk,khd->qhd", scores, self.key[slice(*keys)]))
            found[1].append(torch.einsum("hqk,qhd->khd", scores, self.query[slice(*own)]))
            found[2].append(torch.einsum("hqk,qhd->khd", weights, upstream))
        query, *shared = (torch.cat(parts) for parts in found)
        return (query, *(one.unflatten(1, (-1, self.group)).sum(2) for one in shared))


@pytest.fixture
def flash_attention_on_cpu() -> Iterator[None]:
    """Let torch's `varlen_attn`, its own autograd included, end in the class above where a GPU has its kernel."""

    def forward(*args: Any, return_debug_mask: bool = False, **bounds: Any) -> tuple[torch.Tensor, ...]:
        assert not return_debug_mask
        query, nothing = args[0], torch.empty(0)
        out = FlashByHand(*args, **bounds).forward()
        return out, query.new_zeros(query.shape[1], len(query)), nothing, nothing, nothing

    def backward(grad: torch.Tensor, *args: Any, **bounds: Any) -> tuple[torch.Tensor, ...]:
        query, key, value, _, _, *sizes = args
        return FlashByHand(query, key, value, *sizes, **bounds).backward(grad)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    yield
    library._destroy()


def run(
    attention: Backend, layout: RowLayout, rules: AttentionRules, heads: int = HEADS, value_dim: int = HEAD_DIM
) -> list[torch.Tensor]:
    """Output and gradients of all inputs, sinks among them, under a loss that looks at real tokens only."""
    torch.manual_seed(layout.width)
    kv_heads = min(heads, KV_HEADS)
    query = torch.randn(heads, layout.width, HEAD_DIM, requires_grad=True)
    key, value = (torch.randn(kv_heads, layout.width, size, requires_grad=True) for size in (HEAD_DIM, value_dim))
    weights = torch.randn(heads, layout.width, value_dim)
    inputs = [query, key, value]
    if rules.sinks is not None:
        inputs.append(rules.sinks.clone().requires_grad_())
        rules = replace(rules, sinks=inputs[-1])
    weights[:, layout.num_tokens :] = 0
    out = attention(query, key, value, layout, rules)
    assert out.shape == weights.shape
    assert bool(torch.isfinite(out).all())
    gradients = torch.autograd.grad((out * weights).sum(), inputs)
    return [out.detach()[:, : layout.num_tokens], *gradients]


def compare(
    attention: Backend, layout: RowLayout, rules: AttentionRules, heads: int = HEADS, value_dim: int = HEAD_DIM
) -> None:
    wanted = run(dense_attention, layout, rules, heads, value_dim)
    names = TENSORS[: len(wanted)]
    for name, tensor, reference in zip(names, run(attention, layout, rules, heads, value_dim), wanted, strict=True):
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


@pytest.mark.usefixtures("flash_attention_on_cpu")
@pytest.mark.parametrize("rules", ["plain", "window", "narrow window"])
@pytest.mark.parametrize("row", ROWS)
def test_varlen_tells_flash_attention_what_the_row_is(row: str, rules: str) -> None:
    """All but the kernel is what runs on a GPU: index arrays, torch's call, its windows, its backward pass."""
    compare(BACKENDS["varlen"], row_layout(row), RULES[rules])


@pytest.mark.usefixtures("flex_trains_on_cpu", "flash_attention_on_cpu")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("value_dim", [4, 16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_of_values_may_be_of_another_size(backend: str, value_dim: int) -> None:
    """As in latent attention; flash attention pads the smaller ones, and has no models with larger ones to take."""
    if backend == "varlen" and value_dim > HEAD_DIM:
        return
    for rules in ("plain", "window"):
        compare(BACKENDS[backend], row_layout("five of all lengths"), RULES[rules], value_dim=value_dim)


@pytest.mark.usefixtures("flash_attention_on_cpu")
def test_varlen_takes_heads_of_their_own_keys() -> None:
    compare(BACKENDS["varlen"], row_layout("five of all lengths"), RULES["plain"], heads=2)


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
    monkeypatch.setattr(matmul_backend, "MAX_KEPT_WEIGHTS", 0)
    layout = row_layout(row)
    recomputed = run(BACKENDS["matmul"], layout, RULES[rules])
    num_blocks = len(matmul_backend.row_blocks(layout, RULES[rules].window, torch.float32, "cpu"))
    assert len(calls) == 2 * num_blocks, "once forwards and once backwards"
    for name, tensor, reference in zip(TENSORS[: len(kept)], recomputed, kept, strict=True):
        assert torch.equal(tensor, reference), name


def test_small_blocks_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    layout = row_layout("long prompt")
    run(BACKENDS["matmul"], layout, RULES["plain"])
    assert len(calls) == len(matmul_backend.row_blocks(layout, None, torch.float32, "cpu"))


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes each time that attention weights are computed."""
    calls: list[int] = []
    original: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = matmul_backend._weights

    def counted(*args: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(matmul_backend, "_weights", counted)
    return calls


def test_blocks_cover_each_query_once_and_are_made_once() -> None:
    layout = row_layout("long prompt")
    made = matmul_backend.row_blocks(layout, None, torch.float32, "cpu")
    queries = [index for block in made for index in range(*block.queries)]
    assert queries == list(range(layout.num_tokens))
    prompts = [block for block in made if block.queries[1] <= 317]
    assert len(prompts) > 1, "a long prompt is cut"
    assert all(block.keys == ((0, block.queries[1]),) for block in prompts), "with the keys up to its end only"
    assert matmul_backend.row_blocks(layout, None, torch.float32, "cpu") is made
    assert matmul_backend.row_blocks(layout, 7, torch.float32, "cpu") is not made


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


@pytest.mark.parametrize("rules", [AttentionRules(1.0, softcap=2.0), AttentionRules(1.0, sinks=torch.zeros(1))])
def test_varlen_refuses_soft_caps_and_sinks(rules: AttentionRules) -> None:
    tensor = torch.zeros(1, 1, 8)
    with pytest.raises(NotImplementedError, match="varlen has neither soft caps nor sinks"):
        BACKENDS["varlen"](tensor, tensor, tensor, row_layout("single token"), rules)


def test_sdpa_refuses_a_soft_cap() -> None:
    tensor = torch.zeros(1, 1, 4)
    with pytest.raises(NotImplementedError, match="sdpa has no soft cap"):
        BACKENDS["sdpa"](tensor, tensor, tensor, row_layout("single token"), AttentionRules(1.0, softcap=2.0))

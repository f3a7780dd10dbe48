"""Attention over packed rows on a GPU: every backend against the definition, at the sizes of real models.

How far a kernel may be off is not chosen by hand. The definition (all scores, a mask, softmax) is computed in a higher
precision, which counts as the truth, and once more in the kernel's own type, which shows what that type costs. A
kernel may be off by a small multiple of that.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch

from rm_scale.batching.packed.attention import BACKENDS
from rm_scale.batching.packed.attention_rules import AttentionRules, sees, token_places
from rm_scale.batching.packed.backend_choice import choose_backend
from rm_scale.batching.packed.layout import GroupSpan, RowLayout
from rm_scale.errors import ConfigError
from rm_scale.modeling.head import install_scalar_head
from rm_scale.modeling.packed_model import enable_packed_rows
from rm_scale.modeling.token_scores import score_packed, score_sequences
from tests.support.gpu import needs_gpu

pytestmark = needs_gpu

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Query heads, heads of keys and values, values per head: as in Llama 3.2 1B; in Llama 3 8B and Mistral 7B; with the
# head sizes of Phi-2 and Phi-3; as in Gemma 2B.
SHAPES = {
    "32/8 heads of 64": (32, 8, 64),
    "32/8 heads of 128": (32, 8, 128),
    "16/16 heads of 80": (16, 16, 80),
    "16/16 heads of 96": (16, 16, 96),
    "8/1 heads of 256": (8, 1, 256),
}

# Prompt length and lengths of the responses of each group, and padding.
ROWS: dict[str, tuple[list[tuple[int, list[int]]], int]] = {
    "long": ([(2048, [512, 700, 300, 64, 1]), (0, [900]), (1, [257, 3])], 6),
    "short": ([(70, [20, 9, 1]), (0, [3]), (0, [33, 250]), (11, [1, 1])], 24),
    "no prompts": ([(0, [1500]), (0, [37]), (0, [800])], 7),
    "one response": ([(900, [124])], 0),
}

OUT_FACTOR, GRADIENT_FACTOR = 2.0, 3.0
"""Errors allowed as multiples of those of the definition in the same type, as flash-attention's own tests have them."""


@dataclass(frozen=True)
class Sizes:
    """Heads, heads of keys and values, values per head."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def scaling(self) -> float:
        """What scores are multiplied with."""
        return self.head_dim**-0.5


def row_layout(name: str) -> RowLayout:
    groups, padding = ROWS[name]
    spans: list[GroupSpan] = []
    for prompt_length, responses in groups:
        start = spans[-1].end if spans else 0
        spans.append(GroupSpan(start, prompt_length, tuple(responses)))
    return RowLayout(tuple(spans), spans[-1].end + padding)


def made_inputs(
    layout: RowLayout, sizes: Sizes, dtype: torch.dtype, device: str
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Queries, keys and values as models hand them over, heads behind tokens in memory; and the output's gradient."""
    torch.manual_seed(layout.width)
    shapes = [(layout.width, heads, sizes.head_dim) for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads)]
    tensors = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    gradient = torch.randn(shapes[0], device=device).to(dtype)
    gradient[layout.num_tokens :] = 0
    return [tensor.transpose(0, 1) for tensor in tensors], gradient.transpose(0, 1)


def by_definition(
    inputs: list[torch.Tensor], gradient: torch.Tensor, layout: RowLayout, rules: AttentionRules, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Output and gradients from all scores under a mask, in one precision; a group of heads at a time."""
    device = gradient.device
    index = torch.arange(layout.width, device=device)
    unseen = ~sees(token_places(layout, device), index[:, None], index[None, :], rules.window)
    (heads, kv_heads), results = (inputs[0].shape[0], inputs[1].shape[0]), []
    size = heads // kv_heads
    for number in range(kv_heads):
        own = slice(number * size, (number + 1) * size)
        parts = (inputs[0][own], inputs[1][number : number + 1], inputs[2][number : number + 1])
        query, key, value = leaves = [part.detach().to(dtype).contiguous().requires_grad_() for part in parts]
        scores = query @ key.transpose(1, 2) * rules.scaling
        if rules.softcap is not None:
            scores = rules.softcap * torch.tanh(scores / rules.softcap)
        scores = scores.masked_fill(unseen, -torch.inf)
        if rules.sinks is not None:
            leaves.append(rules.sinks[own].to(dtype).requires_grad_())
            scores = torch.cat([scores, leaves[-1][:, None, None].expand(*scores.shape[:2], 1)], dim=-1)
        out = torch.softmax(scores, -1)[..., : layout.width] @ value
        results.append((out.detach(), *torch.autograd.grad(out, leaves, gradient[own].to(dtype))))
    return [torch.cat(parts) for parts in zip(*results, strict=True)]


def by_backend(
    name: str, inputs: list[torch.Tensor], gradient: torch.Tensor, layout: RowLayout, rules: AttentionRules
) -> list[torch.Tensor]:
    """The same from a backend."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    if rules.sinks is not None:
        inputs.append(rules.sinks.clone().requires_grad_())
        rules = replace(rules, sinks=inputs[-1])
    out = BACKENDS[name](inputs[0], inputs[1], inputs[2], layout, rules)
    assert out.shape == inputs[0].shape and bool(torch.isfinite(out).all())
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]


@contextmanager
def products_in_full_precision() -> Iterator[None]:
    """TF32 would spoil the truth."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def off_by(given: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """Error relative to the truth's size over all values, and the largest error of one value."""
    difference = given.to(truth.dtype) - truth
    return float(difference.norm() / truth.norm()), float(difference.abs().max())


def require(name: str, sizes: Sizes, dtype: torch.dtype, has_softcap: bool = False, has_sinks: bool = False) -> None:
    """Skip where a run would be refused this backend, for the reason that the run would give."""
    try:
        choose_backend(name, "cuda", str(dtype).removeprefix("torch."), has_softcap, sizes.head_dim, has_sinks)
    except ConfigError as error:
        pytest.skip(str(error))
    if name == "flex" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: torch's CUDA builds come with it")


def compare(name: str, row: str, sizes: Sizes, rules: AttentionRules, dtype: torch.dtype, device: str = "cuda") -> None:
    """Fail when a backend is further from the truth than its type explains."""
    if device == "cuda":
        require(name, sizes, dtype, rules.softcap is not None, rules.sinks is not None)
    layout = row_layout(row)
    inputs, gradient = made_inputs(layout, sizes, dtype, device)
    higher = torch.float64 if dtype == torch.float32 else torch.float32
    real = slice(0, layout.num_tokens)
    with products_in_full_precision():
        truth = by_definition(inputs, gradient, layout, rules, higher)
        usual = by_definition(inputs, gradient, layout, rules, dtype)
        given = by_backend(name, inputs, gradient, RowLayout(layout.spans, layout.width), rules)
    # In half precision the truth itself is rounded when it is written; in fp32 sums of another order differ by more.
    rounding = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    names = ("output", "query", "key", "value", "sinks")[: len(truth)]
    for what, tensor, plain, exact in zip(names, given, usual, truth, strict=True):
        if what != "sinks":
            tensor, plain, exact = tensor[:, real], plain[:, real], exact[:, real]
        (overall, worst), (usual_overall, usual_worst) = off_by(tensor, exact), off_by(plain, exact)
        factor = OUT_FACTOR if what == "output" else GRADIENT_FACTOR
        line = f"{name} {what}: off by {overall:.2e} overall (definition {usual_overall:.2e}), worst {worst:.2e} "
        line += f"({usual_worst:.2e})"
        print(line)
        assert overall <= factor * usual_overall + rounding, line
        assert worst <= factor * usual_worst + rounding * float(exact.abs().max()), line


def sizes_of(shape: str) -> Sizes:
    return Sizes(*SHAPES[shape])


# --- Quick: what `make gpu-proof` runs first --------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_attention_by_varlen(shape: str, dtype: str, window: int | None) -> None:
    """flash-attention over one long row: prompts shared by up to five responses, grouped heads."""
    sizes = sizes_of(shape)
    compare("varlen", "long", sizes, AttentionRules(sizes.scaling, window), HALF[dtype])


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("row", ["short", "no prompts", "one response"])
@pytest.mark.parametrize("backend", ["varlen", "sdpa", "matmul"])
def test_packed_attention_of_awkward_rows(backend: str, row: str, window: int | None) -> None:
    """Responses of one token, no prompts at all, and rows that need no repeated keys."""
    sizes = sizes_of("32/8 heads of 64")
    compare(backend, row, sizes, AttentionRules(sizes.scaling, window), torch.bfloat16)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
def test_packed_attention_by_portable_backends(backend: str, shape: str) -> None:
    sizes = sizes_of(shape)
    compare(backend, "long", sizes, AttentionRules(sizes.scaling), torch.bfloat16)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
def test_packed_attention_in_other_types(backend: str, dtype: str) -> None:
    """In fp32, where `auto` takes sdpa, the truth is computed in fp64."""
    sizes = sizes_of("32/8 heads of 128")
    types = {**HALF, "fp32": torch.float32}
    compare(backend, "long", sizes, AttentionRules(sizes.scaling, 700), types[dtype])


@pytest.mark.parametrize("window", [None, 700])
def test_packed_attention_with_a_soft_cap_by_matmul(window: int | None) -> None:
    sizes = sizes_of("8/1 heads of 256")
    compare("matmul", "long", sizes, AttentionRules(sizes.scaling, window, softcap=2.0), torch.bfloat16)


@pytest.mark.parametrize("window", [None, 700])
def test_packed_attention_with_a_soft_cap_by_flex(window: int | None) -> None:
    """As Gemma 2 has it: the one thing that flex is chosen for. The first call compiles."""
    sizes = sizes_of("8/1 heads of 256")
    compare("flex", "long", sizes, AttentionRules(sizes.scaling, window, softcap=2.0), torch.bfloat16)


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("backend", ["flex", "sdpa", "matmul"])
def test_packed_attention_with_sinks(backend: str, window: int | None) -> None:
    """As GPT-OSS has them, with its windows and heads."""
    sizes = Sizes(64, 8, 64)
    sinks = torch.linspace(-1.0, 3.0, sizes.heads, device="cuda")
    compare(backend, "long", sizes, AttentionRules(sizes.scaling, window, sinks=sinks), torch.bfloat16)


@pytest.mark.parametrize("backend", ["varlen", "sdpa", "matmul"])
def test_packed_attention_keeps_responses_apart(backend: str) -> None:
    """Bit for bit: what one response holds changes nothing in another."""
    kept_apart(backend, "cuda", torch.bfloat16)


def kept_apart(backend: str, device: str, dtype: torch.dtype) -> None:
    layout = row_layout("long")
    sizes = Sizes(8, 2, 64)
    if device == "cuda":
        require(backend, sizes, dtype)
    rules = AttentionRules(sizes.scaling)
    inputs, _ = made_inputs(layout, sizes, dtype, device)
    before = BACKENDS[backend](inputs[0], inputs[1], inputs[2], layout, rules)
    start, end = layout.spans[0].responses()[1]
    changed = [tensor.clone() for tensor in inputs]
    for tensor in changed:
        tensor[:, start:end] = 50.0
    after = BACKENDS[backend](changed[0], changed[1], changed[2], layout, rules)
    assert torch.equal(before[:, :start], after[:, :start])
    assert torch.equal(before[:, end : layout.num_tokens], after[:, end : layout.num_tokens])
    assert not torch.equal(before[:, start:end], after[:, start:end])


@pytest.mark.parametrize("backend", ["varlen", "sdpa", "matmul"])
def test_packed_attention_repeats_bit_for_bit_when_asked(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's deterministic algorithms, which is what `--deterministic` switches on; without, it is only shown."""
    require(backend, sizes_of("32/8 heads of 64"), torch.bfloat16)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch refuses to call cuBLAS without it
    print(f"{backend}, as it is: {differing_values(backend, 'cuda', torch.bfloat16)} values differ between two runs")
    torch.use_deterministic_algorithms(True)
    try:
        assert differing_values(backend, "cuda", torch.bfloat16) == 0
    finally:
        torch.use_deterministic_algorithms(False)


def differing_values(backend: str, device: str, dtype: torch.dtype) -> int:
    """Values of output and gradients that differ between two runs of the same."""
    layout, sizes = row_layout("long"), sizes_of("32/8 heads of 64")
    inputs, gradient = made_inputs(layout, sizes, dtype, device)
    first, second = (by_backend(backend, inputs, gradient, layout, AttentionRules(sizes.scaling)) for _ in range(2))
    return sum(int((a != b).sum()) for a, b in zip(first, second, strict=True))


def test_packed_attention_of_a_model_scores_like_padded_rows() -> None:
    """With the backend that `auto` takes, in bf16: no further from fp32 than padded rows are."""
    packed, padded = model_errors("cuda", torch.bfloat16)
    print(f"packed rows are off by {packed:.2e}, padded ones by {padded:.2e}")
    assert packed <= 2 * padded


def model_errors(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """How far rewards of a small Llama are from fp32, packed and padded: root mean square over the spread."""
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=1000,
        num_labels=1,
        pad_token_id=0,
        initializer_range=0.05,
    )
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).to(device)
    install_scalar_head(model)
    chance = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [chance.randrange(1, 1000) for _ in range(count)]

    groups = []
    for prompt_length in (0, 3, 190, 700, 40):
        prompt = tokens(prompt_length)
        groups.append([prompt + tokens(chance.randrange(1, 90)) for _ in range(5)])
    sequences = [sequence for group in groups for sequence in group]
    exact = torch.tensor(score_sequences(model, sequences, 0, 5, device))
    head = model.score.weight.data.clone()
    model.to(dtype)
    model.score.weight.data = head
    padded = torch.tensor(score_sequences(model, sequences, 0, 5, device))
    enable_packed_rows(model, choose_backend("auto", device, str(dtype).removeprefix("torch."), False, 64))
    packed = torch.tensor([score for group in score_packed(model, groups, 0, 1024, device) for score in group])
    spread = float(exact.std())
    return tuple(float((scores - exact).square().mean().sqrt()) / spread for scores in (packed, padded))  # type: ignore[return-value]


# --- Slower: each head size compiled anew, and long rows --------------------------------------------------------


@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES)
def test_flex_at_every_head_size(shape: str, dtype: str, window: int | None) -> None:
    sizes = sizes_of(shape)
    compare("flex", "long", sizes, AttentionRules(sizes.scaling, window), HALF[dtype])


@pytest.mark.parametrize("row", ["short", "no prompts", "one response"])
def test_flex_of_awkward_rows(row: str) -> None:
    sizes = sizes_of("8/1 heads of 256")
    compare("flex", row, sizes, AttentionRules(sizes.scaling, 7, softcap=2.0), torch.bfloat16)


def test_flex_keeps_responses_apart() -> None:
    kept_apart("flex", "cuda", torch.bfloat16)


def test_flex_compiles_a_few_times_for_any_number_of_rows() -> None:
    """Rows differ in every step: were each compiled anew, a step would take a minute, and soon none would be at all."""
    from torch._dynamo.utils import counters

    sizes, chance = Sizes(8, 2, 64), random.Random(0)
    require("flex", sizes, torch.bfloat16, has_softcap=True)
    before = counters["stats"]["unique_graphs"]
    for _ in range(24):
        lengths = [chance.randrange(1, 400) for _ in range(chance.randrange(2, 6))]
        span = GroupSpan(0, chance.randrange(0, 900), tuple(lengths))
        layout = RowLayout((span,), span.end + chance.randrange(0, 64))
        inputs, gradient = made_inputs(layout, sizes, torch.bfloat16, "cuda")
        rules = AttentionRules(sizes.scaling, chance.choice([None, 300]), softcap=2.0)
        results = by_backend("flex", inputs, gradient, layout, rules)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in results)
    compiled = counters["stats"]["unique_graphs"] - before
    print(f"24 rows, with a window and without: {compiled} graphs")
    assert compiled <= 2


def test_flex_of_a_long_row_takes_no_memory_per_pair_of_tokens() -> None:
    """32,768 tokens have 1.07e9 pairs: a byte for each would be a gigabyte."""
    layout = RowLayout((GroupSpan(0, 20_000, (4_000, 4_000, 4_768)),), 32_768)
    sizes = Sizes(8, 1, 64)
    require("flex", sizes, torch.bfloat16, has_softcap=True)
    inputs, _ = made_inputs(layout, sizes, torch.bfloat16, "cuda")
    rules = AttentionRules(sizes.scaling, softcap=2.0)
    short = row_layout("short")
    BACKENDS["flex"](*made_inputs(short, sizes, torch.bfloat16, "cuda")[0], short, rules)  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    BACKENDS["flex"](inputs[0], inputs[1], inputs[2], layout, rules)
    taken = torch.cuda.max_memory_allocated() - held
    print(f"flex over 32,768 tokens took {taken / 2**20:.0f} MiB")
    assert taken < 2**29


@pytest.mark.parametrize(
    ("dtype", "has_softcap", "expected"),
    [
        ("bfloat16", False, "varlen"),
        ("float16", False, "varlen"),
        ("float32", False, "sdpa"),
        ("bfloat16", True, "flex"),
    ],
)
def test_the_backend_chosen_here(dtype: str, has_softcap: bool, expected: str) -> None:
    """On Ampere and newer cards the fastest that fits is taken."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("an older card, which gets the portable backends")
    assert choose_backend("auto", "cuda", dtype, has_softcap, 128) == expected

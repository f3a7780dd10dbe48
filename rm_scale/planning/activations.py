"""Peak activation memory of a micro-step: forward and backward pass replayed with sizes instead of tensors. No torch.

`rm_scale.planning.tape` keeps the books that autograd keeps; here are the operations of transformers' decoder layers
(5.23, `modeling_llama.py` and its kin) and of PEFT's LoRA layers (0.21, `lora/layer.py`) in their order, each with what
it makes and what it saves. Nothing is fitted: benchmarks/activations.py compares the result with what torch allocates
for the real classes at their real sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from rm_scale.planning.shape import ModelShape
from rm_scale.planning.tape import Buffer, Memory, Results, Size, Tape, Value

if TYPE_CHECKING:
    from rm_scale.planning.scenario import Scenario

Checkpointing = Literal["none", "full"]
Method = Literal["full", "lora", "qlora"]
Precision = Literal["bf16", "amp", "fp32"]
Attention = Literal["varlen", "sdpa", "matmul"]
Head = Literal["score", "score_all", "lm", "lm_chunked"]

QUERIES_PER_BLOCK = 256
"""The matmul backend works in blocks of so many queries (rm_scale/packing/blocks.py)."""

FLASH_BLOCK = 128
"""Rows per sequence by which flash-attention's backward buffers are longer than the row (torch, flash_api.cpp)."""


@dataclass(frozen=True)
class Row:
    """The tokens of one micro-step.

    Attributes:
        tokens: tokens that the linear layers process, padding included.
        key_tokens: keys of attention: each response's own tokens and its prompt's. As many as `tokens` unless prompts
            are shared.
        responses: how many responses are scored.
        pairs: query-key pairs that the matmul backend keeps weights of, per head and layer.
        longest: most keys that a query sees.
    """

    tokens: int
    key_tokens: int
    responses: int
    pairs: int = 0
    longest: int = 0

    @classmethod
    def of(cls, groups: Sequence[tuple[int, Sequence[int]]], share_prompts: bool, multiple: int = 1) -> Row:
        """The row that holds these groups.

        Args:
            groups: for each group the tokens of its prompt and of each of its responses.
            share_prompts: the prompt stands once per group.
            multiple: the row is padded to a multiple of this.
        """
        tokens = keys = pairs = longest = responses = 0
        for prompt, lengths in groups:
            tokens += (prompt if share_prompts else prompt * len(lengths)) + sum(lengths)
            keys += sum(prompt + length for length in lengths)
            longest = max(longest, *(prompt + length for length in lengths))
            pairs += _kept_pairs(prompt, lengths, share_prompts)
            responses += len(lengths)
        padding = -tokens % multiple
        return cls(tokens + padding, keys + padding, responses, pairs, longest)


def _kept_pairs(prompt: int, lengths: Sequence[int], share_prompts: bool) -> int:
    """Weights per head of blocks of queries that each see the keys up to their own end."""

    def triangle(queries: int, before: int) -> int:
        blocks = max(1, round(queries / QUERIES_PER_BLOCK))
        return queries * before + queries * (queries + -(-queries // blocks)) // 2

    if not share_prompts:
        return sum(triangle(prompt + length, 0) for length in lengths)
    return triangle(prompt, 0) + sum(triangle(length, prompt) for length in lengths)


@dataclass(frozen=True)
class Part:
    """What one kind of tensor takes at the moment of the peak.

    Attributes:
        num_bytes: all of them together.
        formula: how that came about, in words that `activation_memory` documents.
        stored: alive since the forward pass; else it came and goes in the backward pass.
    """

    num_bytes: int
    formula: str
    stored: bool


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes that a micro-step needs beside parameters, their lasting gradients and optimizer states.

    Attributes:
        stored_bytes: held from the end of the forward pass to the backward pass.
        transient_bytes: what the worst moment needs beyond those.
        peak_bytes: both together.
        moment: the operation whose result brought the peak.
        parts: what was alive at that moment; adds up to `peak_bytes`.
    """

    stored_bytes: int
    peak_bytes: int
    moment: str
    parts: dict[str, Part]

    @property
    def transient_bytes(self) -> int:
        """What the worst moment needs beyond what is stored."""
        return self.peak_bytes - self.stored_bytes

    def explain(self) -> str:
        """A table of the parts, largest first."""
        lines = [f"{self.peak_bytes / 1e9:9.3f} GB at {self.moment}; stored {self.stored_bytes / 1e9:.3f} GB"]
        for name, part in sorted(self.parts.items(), key=lambda item: -item[1].num_bytes):
            kept = "stored" if part.stored else "passing"
            lines.append(f"{part.num_bytes / 1e9:9.3f} GB {kept:8} {name}: {part.formula}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Options:
    """How the micro-step is run.

    Attributes:
        checkpointing: "full" recomputes each layer in the backward pass.
        use_reentrant: torch's older kind of checkpointing, which recomputes a layer to its very end.
        method: full, lora or qlora.
        lora_rank: of the adapters.
        lora_targets: module names such as "q_proj"; `None` for all linear layers.
        lora_dropout: with any dropout each adapter keeps an input and a mask of its own.
        precision: "bf16" (all in bfloat16, as in DeepSpeed's engine), "amp" (trained weights fp32, products in bfloat16
            by autocast; a frozen backbone is bfloat16), or "fp32".
        attention: backend of packed rows; varlen also stands for flash-attention as such.
        head: "score" (a reward head on the scored tokens of packed rows), "score_all" (the same on all tokens, as with
            padded batches), "lm" (logits of all tokens, for published numbers of language models), "lm_chunked"
            (Liger's fused loss).
        as_tracked: what torch's MemTracker sees, which differs from a device in two ways: it does not see workspaces
            inside kernels, and keeps autograd from adding gradients in place.
    """

    checkpointing: Checkpointing = "full"
    use_reentrant: bool = False
    method: Method = "full"
    lora_rank: int = 16
    lora_targets: tuple[str, ...] | None = None
    lora_dropout: float = 0.0
    precision: Precision = "bf16"
    attention: Attention = "varlen"
    head: Head = "score"
    as_tracked: bool = False


@lru_cache(maxsize=4096)
def activation_memory(shape: ModelShape, row: Row, options: Options | None = None) -> ActivationMemory:
    """Predict what a micro-step needs at its peak.

    Gradients of weights count while autograd hands them over, one matrix at a time, and not afterwards. So do
    dequantised weights (QLoRA) and autocast's copies of weights.

    Formulas begin with how many there are and name sizes: tokens and key_tokens (see `Row`), hidden (hidden_size), mlp
    (intermediate_size), heads, queries (heads x head_dim), kv (kv heads x head_dim), vocab, rank; B are bytes per
    element.

    Args:
        shape: the model's sizes.
        row: the micro-step's tokens.
        options: how it is run.
    """
    model = _Model(shape, row, options or Options())
    return model.micro_step()


def activations_of(scenario: Scenario) -> ActivationMemory:
    """The prediction for the largest micro-step of a scenario."""
    load = scenario.load
    factor = scenario.largest_tokens / load.tokens
    row = Row(
        tokens=round(load.tokens * factor),
        key_tokens=round(max(load.tokens, load.effective_tokens) * factor),
        responses=round(load.responses * factor),
        pairs=round(load.squared / 2 * factor),
        longest=round(load.effective_squared / load.effective_tokens),
    )
    options = Options(
        checkpointing="full" if scenario.checkpointing else "none",
        use_reentrant=scenario.method != "full" and scenario.zero_stage == 3,
        method=scenario.method,
        lora_rank=scenario.lora_rank,
        lora_targets=scenario.lora_targets,
        lora_dropout=scenario.lora_dropout,
        precision=scenario.precision,
        attention="varlen" if scenario.attention == "flash1" else scenario.attention,  # type: ignore[arg-type]
        head="score_all" if scenario.head == "score" and not scenario.packed else scenario.head,
    )
    return activation_memory(scenario.shape, row, options)


# --- The operations ---------------------------------------------------------------------------------------------------


class _Model:
    """The operations of one model. What one returns is held once, by a variable of the caller, who frees it."""

    def __init__(self, shape: ModelShape, row: Row, options: Options) -> None:
        self.shape, self.row, self.options = shape, row, options
        self.memory = Memory()
        self.tape = Tape(self.memory, adds_in_place=not options.as_tracked)
        self.is_full = options.method == "full"
        is_fp32, is_amp = options.precision == "fp32", options.precision == "amp"
        self.base_width = 4 if is_fp32 or (is_amp and self.is_full) else 2
        self.adapter_width = 2 if options.precision == "bf16" else 4
        self.product_width = 4 if is_fp32 else 2
        self.weight_copies: list[Value] = []
        self.stops_early = False
        self.has_masks = False
        tokens = row.tokens
        self.hidden = Size("tokens x hidden", tokens * shape.hidden_size)
        self.mlp = Size("tokens x mlp", tokens * shape.intermediate_size)
        self.queries = Size("tokens x queries", tokens * shape.query_size)
        self.kv = Size("tokens x kv", tokens * shape.kv_size)
        self.per_head = Size("tokens x heads", tokens * shape.num_heads)
        self.per_token = Size("tokens", tokens)

    def micro_step(self) -> ActivationMemory:
        """Forward and backward pass."""
        memory = self.memory
        loss = self._forward()
        stored, forward_peak = memory.live, memory.peak
        stored_keys = {key for key, count in memory.counts.items() if count}
        loss.grad = memory.hold(loss.buffer)
        self.tape.backward()
        turn = "forward" if memory.peak == forward_peak else "backward"
        parts = {
            self._part_name(key): Part(count * memory.sizes[key], f"{count} x {key[1]}", key in stored_keys)
            for key, count in memory.at_peak.items()
            if count
        }
        return ActivationMemory(stored, memory.peak, f"{turn}: {memory.moment}", parts)

    def _part_name(self, key: tuple[str, str]) -> str:
        """The tensor's name, with its formula where tensors of several sizes have it."""
        alike = [other for other, count in self.memory.at_peak.items() if other[0] == key[0] and count]
        return key[0] if len(alike) == 1 else f"{key[0]} ({key[1]})"

    def _forward(self) -> Value:
        embedded = self._embed()
        tables = Size("2 x tokens x head_dim", 0 if self._has_no_rope else 2 * self.row.tokens * self.shape.head_dim)
        rotary = self.memory.new("rotary tables", tables, self.base_width)
        self.memory.hold(embedded.buffer)  # a variable of the model's forward pass holds it to the end
        hidden = embedded
        for _ in range(self.shape.num_layers):
            after = self._checkpointed(hidden) if self.options.checkpointing == "full" else self._layer(hidden)
            self._free(hidden)
            hidden = after
        final = self._norm("final norm", hidden, self.hidden)
        self._free(hidden, embedded)
        self.memory.hold(rotary)
        loss = self._head(final)
        self._leave_autocast()
        return loss

    @property
    def _has_no_rope(self) -> bool:
        return self.shape.style.learned_positions or self.shape.model_type in {"bloom", "mpt"}

    def _new(self, name: str, size: Size, width: int, needs_grad: bool) -> Value:
        return Value(size, self.memory.new(name, size, width), needs_grad)

    def _view(self, value: Value, size: Size | None = None) -> Value:
        """The same memory as a value of its own."""
        return Value(size or value.size, self.memory.hold(value.buffer), value.needs_grad)

    def _free(self, *values: Value) -> None:
        self.memory.drop(*(value.buffer for value in values))

    def _embed(self) -> Value:
        # With adapters and checkpointing the embedding's output is made to need a gradient, or no layer would run one.
        needs_grad = self.is_full or self.options.checkpointing == "full"
        embedded = self._new("layer input", self.hidden, self.base_width, needs_grad)
        weight = Size("vocab x hidden", self.shape.vocab_size * self.shape.hidden_size)

        def run(gradient: Buffer) -> Results:
            return [(None, self.memory.new("gradient of embedding", weight, self.base_width))]

        return self.tape.record(embedded, [], run) if self.is_full else embedded

    def _checkpointed(self, hidden: Value) -> Value:
        """A layer that keeps its input alone (torch/utils/checkpoint.py)."""
        self.tape.is_recording = False
        output = self._layer(hidden)
        self.tape.is_recording = True
        output.needs_grad = hidden.needs_grad or self.is_full
        reentrant = self.options.use_reentrant

        def run(gradient: Buffer) -> Results:
            outer, self.tape.nodes = self.tape.nodes, []
            again = self._view(hidden)
            early = self._early_gradients()
            # The newer kind stops where nothing more is needed: before the last product and the sum behind it.
            self.stops_early = not reentrant
            result = self._layer(again)
            self.stops_early = False
            self._leave_autocast()
            self.memory.drop(*early)
            result.grad = self.memory.hold(gradient) if reentrant else gradient
            self.tape.backward()
            self._free(result, again)
            self.tape.nodes = outer
            return [(hidden, again.grad)] if again.grad is not None else []

        return self.tape.record(output, [hidden.buffer], run, takes_gradient=not reentrant)

    def _early_gradients(self) -> list[Buffer]:
        """What is made before anything saved is missed, and so before the layer is recomputed."""
        last = "down_proj" if self.shape.style.gated_mlp else "fc2"
        casts = self.base_width > self.product_width
        if self.options.use_reentrant or self._norms_after or not (self._is_adapted(last) or casts):
            return []
        return [self.memory.new("gradient before recomputation", self.hidden, self.product_width)]

    # --- A layer

    def _layer(self, hidden: Value) -> Value:
        if self.shape.style.num_norms == 1:
            return self._parallel_layer(hidden)
        middle = self._sublayer(hidden, "attention")
        output = self._sublayer(middle, "mlp")
        self._free(middle)
        return output

    def _sublayer(self, hidden: Value, name: str) -> Value:
        before, after = self.shape.model_type != "olmo2", self._norms_after
        inner = self._norm(f"{name} norm", hidden, self.hidden) if before else self._hold(hidden)
        output = self._attention(inner) if name == "attention" else self._mlp(inner, is_last=not after)
        self._free(inner)
        if after:
            plain, output = output, self._norm(f"{name} norm after", output, self.hidden)
            self._free(plain)
        total = self._add("layer input", hidden, output, self._last(self.hidden, name == "mlp" and not after))
        self._free(output)
        return total

    @property
    def _norms_after(self) -> bool:
        """Norms stand behind attention and MLP too, or only there."""
        return self.shape.model_type == "olmo2" or self.shape.style.num_norms == 4

    def _parallel_layer(self, hidden: Value) -> Value:
        """Attention and MLP side by side on one norm's output (phi, gptj)."""
        inner = self._norm("attention norm", hidden, self.hidden)
        attention, mlp = self._attention(inner), self._mlp(inner, is_last=True)
        both = self._add("attention and mlp", attention, mlp, self._last(self.hidden, True))
        total = self._add("layer input", both, hidden, self._last(self.hidden, True))
        self._free(inner, attention, mlp, both)
        return total

    def _last(self, size: Size, is_last: bool) -> Size:
        """Nothing, where recomputation stops before it."""
        return Size(size.words, 0) if is_last and self.stops_early else size

    def _hold(self, value: Value) -> Value:
        self.memory.hold(value.buffer)
        return value

    def _attention(self, inner: Value) -> Value:
        query, key, value = self._projections(inner)
        if self.shape.style.qk_norm != "none":
            plain = (query, key)
            query, key = self._norm("query norm", query, self.queries), self._norm("key norm", key, self.kv)
            self._free(*plain)
        if not self._has_no_rope:
            plain = (query, key)
            query, key = self._rope("query", query), self._rope("key", key)
            self._free(*plain)
        out = self._attend(query, key, value)
        self._free(query, key, value)
        output = self._linear("o_proj", out, self.hidden)
        self._free(out)
        return output

    def _projections(self, inner: Value) -> tuple[Value, Value, Value]:
        if not self.shape.style.fused_qkv:
            query = self._linear("q_proj", inner, self.queries)
            return query, self._linear("k_proj", inner, self.kv), self._linear("v_proj", inner, self.kv)
        width = self.queries.elements + 2 * self.kv.elements
        fused = self._linear("qkv_proj", inner, Size("tokens x (queries + 2 kv)", width))
        query, key = self._slice(fused, self.queries), self._slice(fused, self.kv)
        part = self._slice(fused, self.kv)
        value = self._copy("value", part)
        self._free(fused, part)
        return query, key, value

    def _slice(self, value: Value, size: Size) -> Value:
        """Part of a tensor: no memory of its own; backwards the whole, filled up with zeros."""
        part = self._view(value, size)

        def run(gradient: Buffer) -> Results:
            return [(value, self.memory.new("zeros around a gradient", value.size, part.width))]

        return self.tape.record(part, [], run)

    def _copy(self, name: str, value: Value) -> Value:
        """A contiguous copy; its gradient is its source's."""
        copy = self._new(name, value.size, value.width, value.needs_grad)
        return self.tape.record(copy, [], lambda gradient: [(value, self.memory.hold(gradient))])

    def _mlp(self, inner: Value, is_last: bool) -> Value:
        if not self.shape.style.gated_mlp:
            first = self._linear("fc1", inner, self.mlp)
            product = self._activate(first)
            self._free(first)
            output = self._linear("fc2", product, self.hidden, is_last)
            self._free(product)
            return output
        gate, up = self._gate_and_up(inner)
        product = self._multiply("gate x up", gate, up)
        self._free(gate, up)
        output = self._linear("down_proj", product, self.hidden, is_last)
        self._free(product)
        return output

    def _gate_and_up(self, inner: Value) -> tuple[Value, Value]:
        """The activated gate, and up."""
        if self.shape.style.fused_mlp:
            fused = self._linear("gate_up_proj", inner, Size("2 x tokens x mlp", 2 * self.mlp.elements))
            gate, up = self._slice(fused, self.mlp), self._slice(fused, self.mlp)
            self._free(fused)
            activated = self._activate(gate)
            self._free(gate)
            return activated, up
        gate = self._linear("gate_proj", inner, self.mlp)
        activated = self._activate(gate)
        self._free(gate)
        return activated, self._linear("up_proj", inner, self.mlp)

    # --- Products

    def _linear(self, name: str, value: Value, size: Size, is_last: bool = False) -> Value:
        if self._is_adapted(name):
            return self._adapted(name, value, size, is_last)
        return self._product(name, value, size, is_last)

    def _is_adapted(self, name: str) -> bool:
        targets = self.options.lora_targets
        return not self.is_full and (targets is None or name in targets)

    def _weight(self, value: Value, size: Size) -> Size:
        """A matrix between two widths."""
        words = (of.words.removeprefix("tokens x ").replace(" x tokens", "") for of in (value.size, size))
        return Size(" x ".join(words), value.size.elements * size.elements // self.row.tokens**2)

    def _product(self, name: str, value: Value, size: Size, is_last: bool = False, is_head: bool = False) -> Value:
        """A product with a weight of the model; under autocast of copies in the lower precision."""
        width, weight = self.product_width, self._weight(value, size)
        quantised = self.options.method == "qlora" and not is_head
        inputs = self._to(f"{name} input", value, width)
        copy = self._weight_copy(f"{name} weight", weight, self.base_width, self.is_full)
        if quantised and not self.options.as_tracked:  # inside bitsandbytes' operator gemm_4bit
            self.memory.drop(self.memory.new("dequantised weight", weight, width))
        output = self._new(name, self._last(size, is_last), width, inputs.needs_grad or self.is_full)
        saved = [inputs.buffer] if self.is_full else []
        if copy is not None and inputs.needs_grad:
            saved.append(copy.buffer)

        def run(gradient: Buffer) -> Results:
            results: Results = []
            if inputs.needs_grad:
                whole = [self.memory.new("dequantised weight", weight, width)] if quantised else []
                results.append((inputs, self.memory.new(f"gradient of {name} input", inputs.size, width)))
                self.memory.drop(*whole)
            if self.is_full:
                results.append((copy, self.memory.new(f"gradient of {name} weight", weight, width)))
            return results

        self.tape.record(output, saved, run)
        self._free(inputs)
        return output

    def _weight_copy(self, name: str, weight: Size, width: int, is_trained: bool) -> Value | None:
        """Autocast's bfloat16 copy of an fp32 weight, kept by autocast itself until its context ends."""
        if width == self.product_width:
            return None
        copy = self._new(f"autocast copy of {name}", weight, self.product_width, is_trained)

        def run(gradient: Buffer) -> Results:
            return [(None, self.memory.new(f"gradient of {name}", weight, width))]

        self.weight_copies.append(self.tape.record(copy, [], run))
        return copy

    def _leave_autocast(self) -> None:
        self._free(*self.weight_copies)
        self.weight_copies = []

    def _adapted(self, name: str, value: Value, size: Size, is_last: bool) -> Value:
        """A frozen linear layer with LoRA beside it."""
        base = self._product(name, value, size)
        if self.options.method == "qlora":
            base, plain = self._copy(name, base), base
            self._free(plain)
        inputs = self._adapter_input(name, value)
        dropped = self._dropout(inputs) if self.options.lora_dropout else self._hold(inputs)
        rank = Size("tokens x rank", self.row.tokens * self.options.lora_rank)
        low = self._adapter_product("adapter, low rank", dropped, rank)
        self._free(dropped)
        size = self._last(size, is_last)
        high = self._adapter_product("adapter, high rank", low, size)
        scaled = self._scale("adapter, scaled", high)
        self._free(low, high)
        total = self._add(name, base, scaled, size)
        self._free(base, scaled, inputs)
        return total

    def _adapter_input(self, name: str, value: Value) -> Value:
        """PEFT casts to the adapter's type, autocast or not; beside 4-bit weights it leaves the cast to autocast."""
        if self.options.method == "qlora" and self.options.precision == "amp":
            return self._hold(value)
        return self._to(f"{name} input for its adapter", value, self.adapter_width)

    def _dropout(self, value: Value) -> Value:
        """CUDA's dropout saves a mask of one byte per element (native_dropout)."""
        output = self._new("adapter input after dropout", value.size, value.width, value.needs_grad)
        mask = self.memory.new("dropout mask", value.size, 1)

        def run(gradient: Buffer) -> Results:
            return [(value, self.memory.new("gradient of dropout input", value.size, value.width))]

        self.tape.record(output, [mask], run)
        self.memory.drop(mask)
        return output

    def _adapter_product(self, name: str, value: Value, size: Size) -> Value:
        width = self.product_width
        inputs, weight = self._to("adapter input", value, width), self._weight(value, size)
        copy = self._weight_copy("adapter weight", weight, self.adapter_width, is_trained=True)
        output = self._new(name, size, width, True)

        def run(gradient: Buffer) -> Results:
            of_input = self.memory.new("gradient of adapter input", inputs.size, width)
            return [(inputs, of_input), (copy, self.memory.new("gradient of adapter weight", weight, width))]

        self.tape.record(output, [inputs.buffer, *([copy.buffer] if copy is not None else [])], run)
        self._free(inputs)
        return output

    # --- Elementwise

    def _to(self, name: str, value: Value, width: int) -> Value:
        """In another type; the value itself if it has it."""
        if value.width == width:
            return self._hold(value)
        output = self._new(name, value.size, width, value.needs_grad)

        def run(gradient: Buffer) -> Results:
            return [(value, self.memory.new("gradient in another type", value.size, value.width))]

        return self.tape.record(output, [], run)

    def _add(self, name: str, one: Value, other: Value, size: Size) -> Value:
        output = self._new(name, size, max(one.width, other.width), one.needs_grad or other.needs_grad)

        def run(gradient: Buffer) -> Results:
            return [(value, self.memory.hold(gradient)) for value in (one, other) if value.needs_grad]

        return self.tape.record(output, [], run)

    def _scale(self, name: str, value: Value) -> Value:
        output = self._new(name, value.size, value.width, value.needs_grad)

        def run(gradient: Buffer) -> Results:
            return [(value, self.memory.new(f"gradient of {name}", value.size, value.width))]

        return self.tape.record(output, [], run)

    def _activate(self, value: Value) -> Value:
        """SiLU and GELU save their input."""
        output = self._new("activation", value.size, value.width, value.needs_grad)

        def run(gradient: Buffer) -> Results:
            return [(value, self.memory.new("gradient of activation input", value.size, value.width))]

        return self.tape.record(output, [value.buffer], run)

    def _multiply(self, name: str, one: Value, other: Value) -> Value:
        """Each factor is saved for the other's gradient."""
        output = self._new(name, one.size, max(one.width, other.width), one.needs_grad or other.needs_grad)
        saved = [value.buffer for value, factor in ((other, one), (one, other)) if factor.needs_grad]

        def run(gradient: Buffer) -> Results:
            return [
                (value, self.memory.new(f"gradient of {name}", value.size, output.width))
                for value in (one, other)
                if value.needs_grad
            ]

        return self.tape.record(output, saved, run)

    def _rope(self, name: str, value: Value) -> Value:
        """`x cos + rotate_half(x) sin`; of all this only the tables are saved, which are there anyway."""
        width = max(value.width, self.base_width)
        half = Size(f"{value.size.words} / 2", value.size.elements // 2)
        with_cos = self._by_table(f"{name} x cos", value, width)
        first, second = self._slice(value, half), self._slice(value, half)
        negative = self._scale(f"rotated {name}", second)
        rotated = self._new(f"rotated {name}", value.size, value.width, value.needs_grad)

        def run(gradient: Buffer) -> Results:
            return [(part, self.memory.hold(gradient)) for part in (negative, first) if part.needs_grad]

        self.tape.record(rotated, [], run)
        self._free(first, second, negative)
        with_sin = self._by_table(f"{name} x sin", rotated, width)
        self._free(rotated)
        output = self._add(f"{name} with positions", with_cos, with_sin, value.size)
        self._free(with_cos, with_sin)
        return output

    def _by_table(self, name: str, value: Value, width: int) -> Value:
        output = self._new(name, value.size, width, value.needs_grad)

        def run(gradient: Buffer) -> Results:
            return [(value, self.memory.new(f"gradient of {name}", value.size, width))]

        return self.tape.record(output, [], run)

    # --- Norms

    def _norm(self, name: str, value: Value, size: Size) -> Value:
        value = self._hold(value)
        if self.shape.style.norm_bias:
            output = self._layer_norm(name, value)
        else:
            output = self._rms_norm(name, value)
        self._free(value)
        return output

    def _layer_norm(self, name: str, value: Value) -> Value:
        """torch's own kernel: saves its input, means and deviations. Autocast runs it in fp32."""
        inputs = self._to(f"{name} fp32 input", value, 4 if self.options.precision == "amp" else value.width)
        output = self._new(name, inputs.size, inputs.width, inputs.needs_grad or self.is_full)
        statistics = self.memory.new(f"{name} statistics", Size("2 x tokens", 2 * self.row.tokens), 4)

        def run(gradient: Buffer) -> Results:
            return [(inputs, self.memory.new(f"gradient of {name} input", inputs.size, inputs.width))]

        self.tape.record(output, [inputs.buffer, statistics], run)
        self.memory.drop(statistics)
        self._free(inputs)
        return output

    def _rms_norm(self, name: str, value: Value) -> Value:
        """Python's operations, in fp32: `weight * (x * rsqrt(mean(x^2) + eps)).to(dtype)`; some weigh in fp32 too."""
        weighs_wide = self.shape.model_type.startswith(("gemma", "olmo2"))
        inputs = self._to(f"{name} fp32 input", value, 4)
        root = self._inverse_root(name, inputs)
        normal = self._by_root(f"{name} fp32 output", inputs, root)
        self._free(inputs, root)
        narrow = self._hold(normal) if weighs_wide else self._to(f"{name} before weight", normal, value.width)
        output = self._by_weight(name, narrow, 4 if weighs_wide else max(narrow.width, self.base_width))
        self._free(normal, narrow)
        if weighs_wide:
            wide, output = output, self._to(name, output, value.width)
            self._free(wide)
        return output

    def _inverse_root(self, name: str, inputs: Value) -> Value:
        """`rsqrt(mean(x^2) + eps)`; backwards three temporaries: x^1, 2 x^1, and its product with the gradient."""
        square = self._new(f"{name} square", inputs.size, 4, inputs.needs_grad)

        def run_power(gradient: Buffer) -> Results:
            temporaries = [self.memory.new(f"gradient of {name} square", inputs.size, 4) for _ in range(3)]
            self.memory.drop(*temporaries[:2])
            return [(inputs, temporaries[2])]

        self.tape.record(square, [inputs.buffer], run_power)
        root = self._new(f"{name} inverse root", self.per_token, 4, inputs.needs_grad)

        def run_mean(gradient: Buffer) -> Results:
            return [(square, self.memory.new(f"gradient of {name} square", inputs.size, 4))]

        self.tape.record(root, [root.buffer], run_mean)
        self._free(square)
        return root

    def _by_root(self, name: str, inputs: Value, root: Value) -> Value:
        output = self._new(name, inputs.size, 4, inputs.needs_grad)

        def run(gradient: Buffer) -> Results:
            by_input, by_root = (self.memory.new(f"gradient of {name}", inputs.size, 4) for _ in range(2))
            summed = self.memory.new(f"gradient of {name}", root.size, 4)
            self.memory.drop(by_root)
            return [(inputs, by_input), (root, summed)]

        return self.tape.record(output, [inputs.buffer, root.buffer], run)

    def _by_weight(self, name: str, inputs: Value, width: int) -> Value:
        """The input is saved for the weight's gradient, if there is one."""
        output = self._new(name, inputs.size, width, inputs.needs_grad or self.is_full)

        def run(gradient: Buffer) -> Results:
            results: Results = []
            if inputs.needs_grad:
                results.append((inputs, self.memory.new(f"gradient of {name} before weight", inputs.size, width)))
            if self.is_full:
                results.append((None, self.memory.new(f"gradient of {name} weight by token", inputs.size, width)))
            return results

        return self.tape.record(output, [inputs.buffer] if self.is_full else [], run)

    # --- Attention

    def _attend(self, query: Value, key: Value, value: Value) -> Value:
        width = self.product_width
        parts = []
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            row = self._slice(tensor, tensor.size)  # the one row of the batch
            parts.append(self._to(f"{name} for attention", row, width))
            self._free(row)
        backends = {"varlen": self._varlen, "sdpa": self._sdpa, "matmul": self._matmul}
        out = backends[self.options.attention](*parts)
        self._free(*parts)
        return out

    def _varlen(self, query: Value, key: Value, value: Value) -> Value:
        """Flash-attention saves queries, keys, values, its output and a logarithm per head and token."""
        if self.row.key_tokens > self.row.tokens:
            size = Size("key_tokens x kv", self.row.key_tokens * self.shape.kv_size)
            keys, values = (self._gather(f"{n} with prompts", t, size) for n, t in (("key", key), ("value", value)))
        else:
            keys, values = self._hold(key), self._hold(value)
        out = self._flash(query, keys, values)
        self._free(keys, values)
        return out

    def _gather(self, name: str, value: Value, size: Size) -> Value:
        output = self._new(name, size, value.width, value.needs_grad)

        def run(gradient: Buffer) -> Results:
            zeros = self.memory.new(f"gradient of {name}", value.size, value.width)
            if self.tape.adds_in_place:
                return [(value, zeros)]
            total = self.memory.new(f"gradient of {name}", value.size, value.width)
            self.memory.drop(zeros)
            return [(value, total)]

        return self.tape.record(output, [], run)

    def _flash(self, query: Value, key: Value, value: Value) -> Value:
        out = self._new("attention output", self.queries, query.width, query.needs_grad)
        logarithms = self.memory.new("attention logarithms", self.per_head, 4)

        def run(gradient: Buffer) -> Results:
            gradients = [
                (tensor, self.memory.new(f"gradient of {name}", tensor.size, tensor.width))
                for name, tensor in (("query", query), ("key", key), ("value", value))
            ]
            self.memory.drop(*self._flash_workspace(key))
            return [*gradients]

        self.tape.record(out, [query.buffer, key.buffer, value.buffer, out.buffer, logarithms], run)
        self.memory.drop(logarithms)
        return out

    def _flash_workspace(self, key: Value) -> list[Buffer]:
        """What the backward kernel allocates inside: fp32 query gradients, and key gradients per query head."""
        if self.options.as_tracked:
            return []
        rows = self.row.tokens + FLASH_BLOCK * self.row.responses
        query = Size(f"(tokens + {FLASH_BLOCK} x responses) x queries", rows * self.shape.query_size)
        buffers = [self.memory.new("query gradients inside the kernel", query, 4)]
        if self.shape.num_kv_heads != self.shape.num_heads and key.size.elements:
            per_query = key.size.elements // self.shape.kv_size * self.shape.query_size
            size = Size("2 x key_tokens x queries", 2 * per_query)
            buffers.append(self.memory.new("key and value gradients inside the kernel", size, key.width))
        return buffers

    def _sdpa(self, query: Value, key: Value, value: Value) -> Value:
        """Heads repeated, keys joined per response, outputs joined: see rm_scale/packing/attention.py."""
        keys, values = (self._for_sdpa(name, tensor) for name, tensor in (("key", key), ("value", value)))
        parts = self._flash(query, keys, values)
        self._free(keys, values)
        out = self._copy("attention output, joined", parts)
        self._free(parts)
        return out

    def _for_sdpa(self, name: str, value: Value) -> Value:
        if self.shape.num_kv_heads != self.shape.num_heads:
            repeated = self._gather(f"{name}, heads repeated", value, self.queries)
        else:
            repeated = self._hold(value)
        if self.row.key_tokens == self.row.tokens:
            return repeated
        size = Size("key_tokens x queries", self.row.key_tokens * self.shape.query_size)
        joined = self._gather(f"{name} with prompts", repeated, size)
        self._free(repeated)
        return joined

    def _matmul(self, query: Value, key: Value, value: Value) -> Value:
        """Weights of all blocks are kept: see rm_scale/packing/blocks.py."""
        heads, block = self.shape.num_heads, min(self.row.tokens, QUERIES_PER_BLOCK)
        out = self._new("attention output", self.queries, query.width, query.needs_grad)
        weights = self.memory.new("attention weights", Size("pairs x heads", self.row.pairs * heads), query.width)
        if not self.has_masks:
            self.memory.new("masks of all blocks", Size("pairs", self.row.pairs), query.width)  # kept with the row
            self.has_masks = True
        scores = Size("block x longest x heads", block * self.row.longest * heads)
        self.memory.drop(self.memory.new("attention scores", scores, query.width))

        def run(gradient: Buffer) -> Results:
            gradients = [
                (tensor, self.memory.new(f"gradient of {name}", tensor.size, tensor.width))
                for name, tensor in (("query", query), ("key", key), ("value", value))
            ]
            self.memory.drop(*(self.memory.new("gradient of scores", scores, query.width) for _ in range(2)))
            return [*gradients]

        self.tape.record(out, [query.buffer, key.buffer, value.buffer, weights], run)
        self.memory.drop(weights)
        return out

    # --- Heads; each frees its input

    def _head(self, final: Value) -> Value:
        heads = {
            "score": self._score,
            "score_all": self._score_all,
            "lm": self._language_model,
            "lm_chunked": self._chunked_language_model,
        }
        return heads[self.options.head](final)

    def _score(self, final: Value) -> Value:
        """The reward head on each response's last token (rm_scale/modeling/packed.py)."""
        count = self.row.responses
        scored = Size("responses x hidden", count * self.shape.hidden_size)
        row = self._slice(final, final.size)
        picked = self._gather("scored tokens", row, scored)
        self._free(final, row)
        wide = self._to("scored tokens in fp32", picked, 4)
        rewards = self._rewards(wide, count)
        self._free(picked, wide)
        return rewards

    def _score_all(self, final: Value) -> Value:
        """The reward head on all tokens, as transformers' own class runs it."""
        wide = self._to("head input in fp32", final, 4)
        rewards = self._rewards(wide, self.row.tokens)
        self._free(final, wide)
        return rewards

    def _rewards(self, wide: Value, count: int) -> Value:
        rewards = self._new("rewards", Size("rewards", count), 4, True)

        def run(gradient: Buffer) -> Results:
            return [(wide, self.memory.new("gradient of head input", wide.size, 4))]

        return self.tape.record(rewards, [wide.buffer], run)

    def _language_model(self, final: Value) -> Value:
        """Logits, the same in fp32, their log-softmax, which is kept; the loss that transformers' Llama computes."""
        vocabulary = Size("tokens x vocab", self.row.tokens * self.shape.vocab_size)
        logits = self._product("logits", final, vocabulary, is_head=True)
        wide = self._to("logits in fp32", logits, 4)
        normal = self._new("log-softmax", vocabulary, 4, True)

        def run_softmax(gradient: Buffer) -> Results:
            return [(wide, self.memory.new("gradient of logits", vocabulary, 4))]

        self.tape.record(normal, [normal.buffer], run_softmax)
        loss = self._new("loss", Size("1", 1), 4, True)

        def run_loss(gradient: Buffer) -> Results:
            return [(normal, self.memory.new("gradient of log-softmax", vocabulary, 4))]

        self.tape.record(loss, [normal.buffer], run_loss)
        self._free(final, logits, wide, normal)
        return loss

    def _chunked_language_model(self, final: Value) -> Value:
        """Liger's fused loss (ops/fused_linear_cross_entropy.py): gradients are made in the forward pass, by chunks."""
        hidden, vocab, width = self.shape.hidden_size, self.shape.vocab_size, self.product_width
        chunks = -(-vocab // hidden)
        rows = 1 << max(0, -(-self.row.tokens // chunks) - 1).bit_length()
        weight = Size("vocab x hidden", vocab * hidden)
        made = [self.memory.new("gradient of head input", self.hidden, width)]
        chunk = [self.memory.new("logits of a chunk", Size("chunk x vocab", rows * vocab), width)]
        if self.is_full:
            made.append(self.memory.new("gradient of head weight", weight, width))
            chunk.append(self.memory.new("gradient of head weight, a chunk's", weight, width))
        self.memory.drop(*chunk)
        loss = self._new("loss", Size("1", 1), 4, True)
        self.tape.record(loss, made, lambda gradient: [(final, self.memory.hold(made[0]))])
        self.memory.drop(*made)
        self._free(final)
        return loss

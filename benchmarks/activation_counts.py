"""Activation memory and operations of a micro-step as torch counts them, on fake tensors and on real ones.

Fake tensors (torch's FakeTensorMode) have sizes and types but no content. They are CPU tensors, since a torch without
CUDA can't differentiate fake CUDA ones. What operations save is the same on both: the varlen backend is
flash-attention's own operator, whose fake kernel has one form for all devices, and dropout is replaced by the operator
that CUDA uses. No L x L mask exists, neither for packed rows nor for padded ones.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.attention.varlen  # registers its operation counts, which FlopCounterMode copies
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.activation_cases import Case
from rm_scale.planning.activations.settings import Options


@dataclass(frozen=True)
class Measured:
    """What torch counted.

    Attributes:
        stored_bytes: activations between forward and backward pass.
        peak_bytes: activations and temporaries at their peak.
        flops: operations of matrix products and attention, causality ignored; by operator.
    """

    stored_bytes: int
    peak_bytes: int
    flops: dict[str, int]


def build_model(case: Case) -> torch.nn.Module:
    """Return the model on the meta device, as `rm_scale.modeling.loading` would set it up."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from rm_scale.modeling.head import install_scalar_head
    from rm_scale.modeling.packed_model import enable_packed_rows

    options, values = case.options, case.config
    is_full = options.method == "full"
    dtype = torch.float32 if options.precision == "fp32" or (is_full and options.precision == "amp") else torch.bfloat16
    config = AutoConfig.for_model(values.pop("model_type"), num_labels=1, pad_token_id=0, use_cache=False, **values)
    kind = AutoModelForCausalLM if options.head.startswith("lm") else AutoModelForSequenceClassification
    with torch.device("meta"):
        model = kind.from_config(config, dtype=dtype)
    if kind is AutoModelForSequenceClassification:
        install_scalar_head(model)
    if options.head == "score":
        enable_packed_rows(model, options.attention)
    if options.method == "qlora":
        _quantise(model)
    if not is_full:
        model = _adapt(model, options, dtype)
    model.train()
    built: torch.nn.Module = model
    if options.checkpointing == "full":
        model.gradient_checkpointing_enable({"use_reentrant": options.use_reentrant})
        if not is_full:
            model.enable_input_require_grads()
    return built


def _quantise(model: Any) -> None:
    """Put bitsandbytes' linear layers, without content, in place of torch's."""
    import bitsandbytes as bnb

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                settings = {"compute_dtype": torch.bfloat16, "quant_type": "nf4", "quant_storage": torch.bfloat16}
                layer = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, child.bias is not None, device="meta", **settings
                )
                setattr(parent, name, layer)
    model.is_loaded_in_4bit = True


def _adapt(model: Any, options: Options, dtype: torch.dtype) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model

    from rm_scale.modeling.adapters import _linear_layers

    task = TaskType.CAUSAL_LM if options.head.startswith("lm") else TaskType.SEQ_CLS
    settings = LoraConfig(
        task_type=task, r=options.lora_rank, lora_dropout=options.lora_dropout, target_modules=_linear_layers(model)
    )
    model = get_peft_model(model, settings, low_cpu_mem_usage=True)
    trained_in = dtype if options.precision == "bf16" else torch.float32
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(trained_in)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p:
            setattr(module, "forward", _cuda_dropout(module.p))  # noqa: B010 - a method is replaced
    return model


def _cuda_dropout(probability: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Apply dropout as CUDA does, with a mask of one byte; a CPU's is as wide as its input."""
    return lambda tensor: torch.native_dropout(tensor, probability, True)[0]


def materialise(model: torch.nn.Module) -> None:
    """Give every parameter and buffer a fake tensor; to be called inside `FakeTensorMode`."""
    import bitsandbytes as bnb

    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                module._parameters[name] = torch.nn.Parameter(empty, parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
        if isinstance(module, bnb.nn.Linear4bit):
            _materialise_4bit(module)


def _materialise_4bit(module: Any) -> None:
    from bitsandbytes.functional import QuantState

    elements = module.in_features * module.out_features
    packed: Any = torch.nn.Parameter(torch.empty(elements // 4, 1, dtype=torch.bfloat16), requires_grad=False)
    packed.quant_state = QuantState(
        absmax=torch.empty(elements // 64),
        shape=torch.Size((module.out_features, module.in_features)),
        code=torch.empty(16),
        blocksize=64,
        quant_type="nf4",
        dtype=torch.bfloat16,
    )
    module._parameters["weight"] = packed


class _NoModules:
    """In place of trackers that follow modules, whose hooks keep recomputed layers alive."""

    parents = frozenset(["Global"])
    is_bw = False

    def register_user_hooks(self, *hooks: Any) -> None:
        """Register no hooks."""

    def clear_user_hooks(self) -> None:
        """Clear nothing: there are no hooks."""

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *error: object) -> None:
        """Take nothing back."""


class Tracker(MemTracker):
    """torch's MemTracker without modules, so that it tells parameters and the batch from the rest, but not the rest."""

    def __init__(self) -> None:
        super().__init__()
        self._mod_tracker: Any = _NoModules()

    def activation_bytes(self, when: str) -> int:
        """Return all bytes but those of parameters, buffers and batch; gradients count until they are handed over."""
        lasting = (_MemRefType.PARAM, _MemRefType.BUFFER, _MemRefType.OTH)
        return sum(
            snapshot["Total"] - sum(snapshot[kind] for kind in lasting)
            for snapshot in self.get_tracker_snapshot(when).values()
        )


def measure(case: Case) -> Measured:
    """Run the micro-step with fake tensors."""
    # transformers looks into the positions for several sequences in a row; fake tensors have nothing to look into, so
    # it would build the mask that it can do without.
    no_mask = mock.patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None)
    with warnings.catch_warnings(), no_mask:
        warnings.simplefilter("ignore")
        model = build_model(case)
        counter = FlopCounterMode(display=False, custom_mapping=_counts())
        setattr(counter, "mod_tracker", _NoModules())  # noqa: B010 - another class than torch declares
        with FakeTensorMode():
            materialise(model)
            batch = _batch(case)
            tracker = Tracker()
            tracker.track_external(model, *[value for value in batch.values() if isinstance(value, torch.Tensor)])
            with counter, tracker:
                loss = _loss(case, model, batch)
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.register_post_accumulate_grad_hook(_hand_over)
                stored = tracker.activation_bytes("current")
                loss.backward()
    flops = {str(operator): int(count) for operator, count in counter.get_flop_counts()["Global"].items()}
    return Measured(stored, tracker.activation_bytes("peak"), flops)


def measure_allocator(case: Case) -> int:
    """Run the micro-step with real CPU tensors; return the most bytes that the allocator had given out at once."""
    from torch.profiler import ProfilerActivity, profile

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build_model(case)
        materialise(model)
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data.fill_(0.01)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_hand_over)
        batch = _batch(case)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            _loss(case, model, batch).backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes: list[int] = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))


def _hand_over(parameter: torch.Tensor) -> None:
    """Take a gradient from its parameter as soon as it is there, as ZeRO does for its bucket."""
    parameter.grad = None


def _counts() -> dict[Any, Any]:
    """Count, from their arguments, the operations of kernels that FlopCounterMode does not know."""
    import bitsandbytes  # noqa: F401 (registers its operators)

    operators = torch.ops.aten

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(gradient, query, key, value))

    def gemm_4bit(inputs: Any, weight: Any, shape: Any, *_: Any, **__: Any) -> int:
        return int(2 * math.prod(inputs[:-1]) * shape[0] * shape[1])

    return {
        torch.ops.bitsandbytes.gemm_4bit: gemm_4bit,
        operators._scaled_dot_product_flash_attention_for_cpu: forward,
        operators._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


def _batch(case: Case) -> dict[str, Any]:
    from rm_scale.batching.packed.layout import pack_row

    prompt = [5] * case.prompt
    group = [[*prompt, *[token] * case.response] for token in (7, 9)]
    if case.options.head != "score":
        ids = torch.tensor(group)
        return {"input_ids": ids, **({"labels": ids} if case.options.head == "lm" else {})}
    row = pack_row([group], case.shares, 0)
    return {
        "input_ids": row.input_ids,
        "position_ids": row.position_ids,
        "score_index": row.score_index,
        "packed_layout": row.layout,
    }


def _loss(case: Case, model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.options.precision == "amp"):
        output = model(**batch, use_cache=False)
    if case.options.head == "lm":
        loss: torch.Tensor = output.loss
        return loss
    rewards = output.logits[:, 0].float()
    return -torch.nn.functional.logsigmoid(rewards[0::2] - rewards[1::2]).sum()

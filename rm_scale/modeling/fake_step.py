"""Activation memory and operations of a micro-step as torch counts them on fake tensors of the model's own class.

Fake tensors (torch's FakeTensorMode) have sizes and types but no content. They are CPU tensors, since a torch without
CUDA can't differentiate fake CUDA ones. What operations save is the same on both: the varlen backend is
flash-attention's own operator, whose fake kernel has one form for all devices, and dropout is replaced by the operator
that CUDA uses. No L x L mask exists, neither for packed rows nor for padded ones.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.attention.varlen  # registers its operation counts, which FlopCounterMode copies
from peft import LoraConfig, TaskType, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count

from rm_scale.modeling.adapters import default_targets, set_dropout
from rm_scale.planning.activations.settings import Options

Batch = dict[str, Any]


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


# --- The model, without content -------------------------------------------------------------------------------------


def weight_type(options: Options) -> torch.dtype:
    """Return the type that a backbone is held in."""
    in_fp32 = options.precision == "fp32" or (options.method == "full" and options.precision == "amp")
    return torch.float32 if in_fp32 else torch.bfloat16


def set_up(model: Any, options: Options) -> torch.nn.Module:
    """Make a model on the meta device ready to train: quantised, with adapters, recomputing, as the options say."""
    if options.method == "qlora":
        _quantise(model)
    if options.method != "full":
        model = _adapt(model, options)
    model.train()
    built: torch.nn.Module = model
    if options.checkpointing == "full":
        model.gradient_checkpointing_enable({"use_reentrant": options.use_reentrant})
        if options.method != "full":
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


def _adapt(model: Any, options: Options) -> Any:
    task = TaskType.CAUSAL_LM if options.head.startswith("lm") else TaskType.SEQ_CLS
    targets = default_targets(model) if options.lora_targets is None else list(options.lora_targets)
    settings = LoraConfig(
        task_type=task,
        r=options.lora_rank,
        # PEFT refuses dropout where experts are adapted; `set_dropout` gives it to the rest.
        lora_dropout=0.0 if options.lora_parameters else options.lora_dropout,
        target_modules=targets,
        target_parameters=list(options.lora_parameters) or None,
    )
    dtype = weight_type(options)
    model = get_peft_model(model, settings, low_cpu_mem_usage=True)
    set_dropout(model, options.lora_dropout)
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
    """Give every parameter and buffer a CPU tensor, inside `FakeTensorMode` a fake one; what is shared stays so."""
    import bitsandbytes as bnb

    made: dict[int, torch.Tensor] = {}

    def filled(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            made[id(tensor)] = torch.nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    originals = [*model.parameters(), *model.buffers()]  # kept, or an identity could be given out again
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in list(tensors.items()):
                if tensor is not None:
                    tensors[name] = filled(tensor)  # type: ignore[assignment]
        if isinstance(module, bnb.nn.Linear4bit):
            _materialise_4bit(module)
    del originals


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


# --- Counting ---------------------------------------------------------------------------------------------------------


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


def run_micro_step(
    model: torch.nn.Module,
    make_batch: Callable[[], Batch],
    loss_of: Callable[[torch.nn.Module, Batch], torch.Tensor],
) -> Measured:
    """Run forward and backward pass with fake tensors.

    Args:
        model: on the meta device, which `set_up` made ready; it can't be used again.
        make_batch: makes the batch; called where its tensors become fake.
        loss_of: runs the forward pass and returns the loss.
    """
    counter = flop_counter()
    with _quiet(), FakeTensorMode():
        materialise(model)
        batch = make_batch()
        tracker = Tracker()
        tracker.track_external(model, *[value for value in batch.values() if isinstance(value, torch.Tensor)])
        with counter, tracker:
            loss = loss_of(model, batch)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(hand_over)
            stored = tracker.activation_bytes("current")
            loss.backward()
    return Measured(stored, tracker.activation_bytes("peak"), counted(counter))


def count_forward(model: torch.nn.Module, make_batch: Callable[[], Batch]) -> int:
    """Count the operations of one forward pass of a model on the meta device; it can't be used again."""
    counter = flop_counter()
    with _quiet(), FakeTensorMode(), torch.no_grad():
        materialise(model)
        batch = make_batch()
        with counter:
            model(**batch, use_cache=False)
    return sum(counted(counter).values())


@contextmanager
def _quiet() -> Iterator[None]:
    # transformers looks into the positions for several sequences in a row; fake tensors have nothing to look into, so
    # it would build the mask that it can do without.
    no_mask = mock.patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None)
    with warnings.catch_warnings(), no_mask:
        warnings.simplefilter("ignore")
        yield


def hand_over(parameter: torch.Tensor) -> None:
    """Take a gradient from its parameter as soon as it is there, as ZeRO does for its bucket."""
    parameter.grad = None


def flop_counter() -> FlopCounterMode:
    """Return a counter that knows the kernels which run here, and follows no modules."""
    counter = FlopCounterMode(display=False, custom_mapping=_counts())
    setattr(counter, "mod_tracker", _NoModules())  # noqa: B010 - another class than torch declares
    return counter


def counted(counter: FlopCounterMode) -> dict[str, int]:
    """Return what was counted, by operator."""
    return {str(operator): int(count) for operator, count in counter.get_flop_counts()["Global"].items()}


def _counts() -> dict[Any, Any]:
    """Count, from their arguments, the operations of kernels that FlopCounterMode does not know."""
    import bitsandbytes  # noqa: F401 (registers its operators)
    import transformers.integrations.moe  # noqa: F401 (likewise)

    operators = torch.ops.aten

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(gradient, query, key, value))

    def gemm_4bit(inputs: Any, weight: Any, shape: Any, *_: Any, **__: Any) -> int:
        return int(2 * math.prod(inputs[:-1]) * shape[0] * shape[1])

    def grouped(first: Any, second: Any, *_: Any, **__: Any) -> int:
        # One product per group of tokens, with matrices of its own: (tokens, in) x (experts, in, out); backwards also
        # (in, tokens) x (tokens, out).
        own = first if len(first) == 2 or len(second) == 3 else first[1:]
        return int(2 * math.prod(own) * second[-1])

    def grouped_backward(first: Any, second: Any, *_: Any, **__: Any) -> int:
        return 2 * grouped(first, second)

    def convolution_backward(gradient: Any, inputs: Any, weight: Any, *rest: Any, **__: Any) -> int:
        # torch's own count takes the weight's gradient of a convolution in groups for a dense one.
        is_transposed, wanted = rest[4], rest[7]
        return int(conv_flop_count(inputs, weight, gradient, is_transposed) * sum(wanted[:2]))

    return {
        operators.convolution_backward: convolution_backward,
        operators._grouped_mm: grouped,
        torch.ops.transformers.grouped_mm_fallback: grouped,
        torch.ops.transformers.grouped_mm_fallback_backward: grouped_backward,
        torch.ops.bitsandbytes.gemm_4bit: gemm_4bit,
        operators._scaled_dot_product_flash_attention_for_cpu: forward,
        operators._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }

"""Compare predicted activation memory and operations with what torch counts for real models at their real sizes.

    python benchmarks/activations.py [--cases TEXT ...] [--output FILE.json]

No GPU and hardly any memory is used: tensors are fake (torch's FakeTensorMode), with sizes and types but no content.
They are CPU tensors, since a torch without CUDA can't differentiate fake CUDA ones. What operations save is the same on
both: the varlen backend is flash-attention's own operator, whose fake kernel has one form for all devices, and dropout
is replaced by the operator that CUDA uses. No L x L mask exists, neither for packed rows nor for padded ones.

What is counted: all tensors that torch's MemTracker sees beside parameters, buffers and the batch. A weight's gradient
counts until autograd hands it over, as ZeRO takes it at once. A few small steps are also run for real, and compared
with what torch's CPU allocator gave out. The models are transformers' own classes with this package's head, packed rows
and adapters. Operations are FlopCounterMode's, which ignores causality; so does the prediction it is compared with.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY)]

import torch  # noqa: E402
import torch.nn.attention.varlen  # noqa: E402 (registers its operation counts, which FlopCounterMode copies)
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count  # noqa: E402

from benchmarks.pictures import Point, scatter  # noqa: E402
from rm_scale.planning.activations import ActivationMemory, Options, Row, activation_memory  # noqa: E402
from rm_scale.planning.compute import executed_flops  # noqa: E402
from rm_scale.planning.shape import ModelShape, shape_from_config  # noqa: E402

# What the models' config.json say.
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {
        "model_type": "llama",
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "vocab_size": 128256,
    },
    "Llama-2-7B": {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
    },
    "Llama-3.1-8B": {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
    },
    "Llama-2-13B": {
        "model_type": "llama",
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "intermediate_size": 13824,
        "vocab_size": 32000,
    },
    "Qwen2.5-7B": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
    },
    "Qwen3-4B": {
        "model_type": "qwen3",
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 9728,
        "vocab_size": 151936,
    },
    "Gemma-2-2B": {
        "model_type": "gemma2",
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "intermediate_size": 9216,
        "vocab_size": 256000,
        "attn_logit_softcapping": None,
    },
    "StarCoder2-3B": {
        "model_type": "starcoder2",
        "hidden_size": 3072,
        "num_hidden_layers": 30,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "intermediate_size": 12288,
        "vocab_size": 49152,
        "embedding_dropout": 0.0,
        "residual_dropout": 0.0,
    },
    "OLMo-2-7B": {
        "model_type": "olmo2",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 100352,
    },
    "Phi-3-mini": {
        "model_type": "phi3",
        "hidden_size": 3072,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 8192,
        "vocab_size": 32064,
    },
}
LONG_CLASSES = ("Llama-3.2-1B", "Llama-2-7B", "Llama-3.1-8B", "Llama-2-13B", "Qwen2.5-7B")
RANK = 16


@dataclass(frozen=True)
class Case:
    """One micro-step: a pair of two responses of equal length in one row.

    Attributes:
        model: a name out of `MODELS`.
        options: how it is run.
        prompt, response: tokens of the prompt and of each response.
        shares: the prompt stands once.
        num_layers: fewer layers than the model has.
        num_words: a smaller vocabulary than the model has.
    """

    model: str
    options: Options
    prompt: int = 768
    response: int = 256
    shares: bool = False
    num_layers: int | None = None
    num_words: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        """What config.json would say."""
        config = dict(MODELS[self.model])
        config["num_hidden_layers"] = self.num_layers or config["num_hidden_layers"]
        config["vocab_size"] = self.num_words or config["vocab_size"]
        return config

    @property
    def shape(self) -> ModelShape:
        """The same as the planner sees it."""
        return shape_from_config(self.config)

    @property
    def row(self) -> Row:
        """The row as the planner sees it."""
        return Row.of([(self.prompt, [self.response, self.response])], self.shares)

    @property
    def name(self) -> str:
        """A line for the table."""
        options = self.options
        words = [self.model, f"{self.row.tokens} tokens", options.method, options.precision]
        words += ["shared prompt"] if self.shares else []
        words += ["checkpointing"] if options.checkpointing == "full" else []
        words += ["reentrant"] if options.use_reentrant else []
        words += ["dropout"] if options.lora_dropout else []
        words += [options.attention] if options.attention != "varlen" else []
        words += [options.head] if options.head != "score" else []
        return ", ".join(words)


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


# --- Models of fake tensors -------------------------------------------------------------------------------------------


def build_model(case: Case) -> torch.nn.Module:
    """The model on the meta device, as `rm_scale.modeling.loading` would set it up."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from rm_scale.modeling.head import install_scalar_head
    from rm_scale.modeling.packed import enable_packed_rows

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
    if options.checkpointing == "full":
        model.gradient_checkpointing_enable({"use_reentrant": options.use_reentrant})
        if not is_full:
            model.enable_input_require_grads()
    return model


def _quantise(model: Any) -> None:
    """bitsandbytes' linear layers in place of torch's, without content."""
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

    task = TaskType.CAUSAL_LM if options.head.startswith("lm") else TaskType.SEQ_CLS
    settings = LoraConfig(
        task_type=task, r=options.lora_rank, lora_dropout=options.lora_dropout, target_modules="all-linear"
    )
    model = get_peft_model(model, settings, low_cpu_mem_usage=True)
    trained_in = dtype if options.precision == "bf16" else torch.float32
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(trained_in)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p:
            module.forward = _cuda_dropout(module.p)
    return model


def _cuda_dropout(probability: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Dropout as CUDA does it, with a mask of one byte; a CPU's is as wide as its input."""
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
    packed = torch.nn.Parameter(torch.empty(elements // 4, 1, dtype=torch.bfloat16), requires_grad=False)
    packed.quant_state = QuantState(
        absmax=torch.empty(elements // 64),
        shape=torch.Size((module.out_features, module.in_features)),
        code=torch.empty(16),
        blocksize=64,
        quant_type="nf4",
        dtype=torch.bfloat16,
    )
    module._parameters["weight"] = packed


# --- Measuring --------------------------------------------------------------------------------------------------------


class _NoModules:
    """In place of trackers that follow modules, whose hooks keep recomputed layers alive."""

    parents = frozenset(["Global"])
    is_bw = False

    def register_user_hooks(self, *hooks: Any) -> None:
        """No hooks."""

    def clear_user_hooks(self) -> None:
        """No hooks."""

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to take back."""


class Tracker(MemTracker):
    """torch's MemTracker without modules, so that it tells parameters and the batch from the rest, but not the rest."""

    def __init__(self) -> None:
        super().__init__()
        self._mod_tracker = _NoModules()

    def activation_bytes(self, when: str) -> int:
        """Everything but parameters, buffers and the batch. Gradients count until they are handed over."""
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
        counter.mod_tracker = _NoModules()
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
    """Run the micro-step with real CPU tensors; gives the most bytes that the allocator had given out at once."""
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
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def _hand_over(parameter: torch.Tensor) -> None:
    """As ZeRO does: the gradient leaves for a bucket as soon as it is there, and is no longer the parameter's."""
    parameter.grad = None


def _counts() -> dict[Any, Any]:
    """Operations of kernels that FlopCounterMode does not know, from their arguments."""
    import bitsandbytes  # noqa: F401 (registers its operators)

    operators = torch.ops.aten

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)

    def gemm_4bit(inputs: Any, weight: Any, shape: Any, *_: Any, **__: Any) -> int:
        return 2 * math.prod(inputs[:-1]) * shape[0] * shape[1]

    return {
        torch.ops.bitsandbytes.gemm_4bit: gemm_4bit,
        operators._scaled_dot_product_flash_attention_for_cpu: forward,
        operators._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


def _batch(case: Case) -> dict[str, Any]:
    from rm_scale.packing.layout import pack_row

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
        return output.loss
    rewards = output.logits[:, 0].float()
    return -torch.nn.functional.logsigmoid(rewards[0::2] - rewards[1::2]).sum()


# --- Comparing --------------------------------------------------------------------------------------------------------


def predict(case: Case, as_tracked: bool = True) -> ActivationMemory:
    """The planner's answer; `as_tracked` for comparing, else as a GPU has it."""
    return activation_memory(case.shape, case.row, replace(case.options, as_tracked=as_tracked))


def predict_flops(case: Case) -> float:
    """Operations as FlopCounterMode counts them: attention as if each query saw all keys of the longest sequence."""
    options, length = case.options, case.prompt + case.response
    return executed_flops(
        case.shape,
        case.row.tokens,
        2 * length**2,
        checkpointing=options.checkpointing == "full",
        use_reentrant=options.use_reentrant,
        lora_rank=None if options.method == "full" else options.lora_rank,
    )


def compare(case: Case) -> dict[str, Any]:
    """Measured and predicted figures of a case, errors as shares of what was measured."""
    start = time.perf_counter()
    measured, predicted, on_device = measure(case), predict(case), predict(case, as_tracked=False)
    flops, counts = predict_flops(case), case.options.attention != "matmul" and not case.options.head.startswith("lm")
    total = sum(measured.flops.values())
    return {
        "case": case.name,
        "model": case.model,
        "row": asdict(case.row),
        "options": asdict(case.options),
        "measured": {"stored_bytes": measured.stored_bytes, "peak_bytes": measured.peak_bytes, "flops": measured.flops},
        "predicted": {
            "stored_bytes": predicted.stored_bytes,
            "peak_bytes": predicted.peak_bytes,
            "moment": predicted.moment,
            "flops": flops if counts else None,
        },
        "predicted_on_device": {"peak_bytes": on_device.peak_bytes, "moment": on_device.moment},
        "peak_error": predicted.peak_bytes / measured.peak_bytes - 1,
        "stored_error": predicted.stored_bytes / measured.stored_bytes - 1,
        "flops_error": flops / total - 1 if counts else None,
        "seconds": time.perf_counter() - start,
    }


def all_cases() -> list[Case]:
    """Five models each with and without checkpointing, full and LoRA, in two lengths; then what else a run can be."""
    cases = []
    for model in LONG_CLASSES:
        for method in ("full", "lora"):
            for checkpointing in ("none", "full"):
                for factor in (1, 4):
                    options = Options(method=method, checkpointing=checkpointing, lora_rank=RANK)
                    cases.append(Case(model, options, 768 * factor, 256 * factor))
    return cases + [
        Case(model, Options(checkpointing=checkpointing, **settings), **row)
        for model, settings, row in _further()
        for checkpointing in ("none", "full")
    ]


def _further() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Model, options and row of the further cases."""
    shared = {"prompt": 1536, "response": 256, "shares": True}
    return [
        ("Llama-3.2-1B", {"precision": "amp"}, {}),
        ("Llama-3.1-8B", {"precision": "amp"}, {}),
        ("Llama-3.1-8B", {"precision": "amp", "method": "lora"}, {}),
        ("Llama-3.2-1B", {"precision": "fp32"}, {}),
        ("Llama-3.1-8B", {"method": "lora", "lora_dropout": 0.05}, {}),
        ("Llama-3.1-8B", {"method": "lora", "lora_dropout": 0.05, "precision": "amp"}, {}),
        ("Llama-2-7B", {"method": "qlora"}, {}),
        ("Llama-3.1-8B", {"method": "qlora", "lora_dropout": 0.05}, {}),
        ("Llama-2-7B", {"method": "lora", "use_reentrant": True}, {}),
        ("Llama-3.1-8B", {}, shared),
        ("Llama-3.1-8B", {"method": "lora"}, shared),
        ("Llama-2-7B", {}, shared),
        ("Llama-3.2-1B", {"attention": "sdpa"}, {}),
        ("Llama-3.2-1B", {"attention": "matmul"}, {}),
        ("Llama-2-7B", {"head": "score_all"}, {}),
        ("Llama-2-7B", {"head": "lm"}, {}),
        ("Llama-2-7B", {"head": "lm", "method": "lora"}, {}),
        *((model, {}, {}) for model in ("Qwen3-4B", "Gemma-2-2B", "StarCoder2-3B", "OLMo-2-7B", "Phi-3-mini")),
    ]


def allocator_cases() -> list[Case]:
    """Small steps that a CPU does in seconds: the 1B model's widths, two layers, few tokens and words, in fp32."""
    settings: list[dict[str, Any]] = [
        {"checkpointing": "none"},
        {},
        {"use_reentrant": True},
        {"checkpointing": "none", "method": "lora"},
        {"method": "lora"},
    ]
    return [
        Case(
            "Llama-3.2-1B", Options(precision="fp32", attention="matmul", **words), 96, 96, num_layers=2, num_words=1000
        )
        for words in settings
    ]


def compare_allocator(case: Case) -> dict[str, Any]:
    """The allocator's peak and the predicted one."""
    measured, predicted = measure_allocator(case), predict(case, as_tracked=False).peak_bytes
    return {
        "case": case.name,
        "layers": case.num_layers,
        "vocabulary": case.num_words,
        "measured_peak_bytes": measured,
        "predicted_peak_bytes": predicted,
        "peak_error": predicted / measured - 1,
    }


def environment() -> dict[str, str]:
    """Versions that the figures belong to."""
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def run_fake(cases: list[Case], explains: bool) -> list[dict[str, Any]]:
    """Compare with what torch counts, and print a line for each case."""
    print("GB; errors of prediction in %; device: predicted for a GPU, whose kernels need space of their own")
    print(f"{'measured':>9} {'predicted':>9} {'device':>9} {'peak':>7} {'stored':>7} {'FLOPs':>7}  case")
    rows = []
    for case in cases:
        rows.append(compare(case))
        row = rows[-1]
        peaks = [row[name]["peak_bytes"] / 1e9 for name in ("measured", "predicted", "predicted_on_device")]
        flops = "" if row["flops_error"] is None else f"{100 * row['flops_error']:+.2f}"
        print(
            " ".join(f"{peak:9.3f}" for peak in peaks)
            + f" {100 * row['peak_error']:+7.2f} {100 * row['stored_error']:+7.2f} {flops:>7}  {row['case']}",
            flush=True,
        )
        if explains:
            print(predict(case, as_tracked=False).explain())
    return rows


def run_allocator(cases: list[Case]) -> list[dict[str, Any]]:
    """Compare with what torch's CPU allocator gave out, and print a line for each case."""
    print("real CPU tensors, MB")
    rows = []
    for case in cases:
        rows.append(compare_allocator(case))
        row = rows[-1]
        peaks = [row[name] / 1e6 for name in ("measured_peak_bytes", "predicted_peak_bytes")]
        print(f"{peaks[0]:9.3f} {peaks[1]:9.3f} {100 * row['peak_error']:+7.2f}  {row['case']}", flush=True)
    return rows


RECORD = REPOSITORY / "benchmarks" / "results" / "fake" / "activations.json"


def draw(record: dict[str, Any]) -> None:
    """The record's peaks, predicted against measured, for docs/planning_validation.md."""
    points = [
        Point(row["measured"]["peak_bytes"] / 1e9, row["predicted"]["peak_bytes"] / 1e9, row["model"])
        for row in record["fake_tensors"]
    ]
    title = f"peak of activations: {len(points)} cases on fake tensors, grey: 5 % off"
    scatter(points, "GB", 0.05, title, REPOSITORY / "docs" / "pictures" / "activations.svg")


def main() -> int:
    """Run the cases, print a table, write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", help="only cases whose name holds all these words; none run for real")
    parser.add_argument("--explain", action="store_true", help="print what makes up each peak")
    parser.add_argument("--output", help="default benchmarks/results/fake/activations.json, if all cases are run")
    parser.add_argument("--draw", action="store_true", help="only draw the picture of the committed record anew")
    arguments = parser.parse_args()
    if arguments.draw:
        draw(json.loads(RECORD.read_text(encoding="utf-8")))
        return 0
    words = arguments.cases or []
    rows = run_fake([case for case in all_cases() if all(word in case.name for word in words)], arguments.explain)
    real = [] if words else run_allocator(allocator_cases())
    worst = max(abs(row["peak_error"]) for row in [*rows, *real])
    worst_flops = max((abs(row["flops_error"]) for row in rows if row["flops_error"] is not None), default=0.0)
    print(f"largest error: {100 * worst:.2f} % of memory, {100 * worst_flops:.2f} % of operations")
    result = {
        "environment": environment(),
        "largest_peak_error": worst,
        "largest_flops_error": worst_flops,
        "fake_tensors": rows,
        "cpu_allocator": real,
    }
    target = arguments.output or (None if words else RECORD)
    if target is not None:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if target == RECORD:
        draw(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What this package calls only where there is a GPU, held against the installed libraries' signatures on any machine.

Names and calls are found by reading the package's source, so none is missed: each name must exist and each call must
fit, to the number of its arguments and the name of each. `torch.cuda` is held to a table besides: a new use of it fails
here until somebody has said what is relied on. Where a build for CPUs lacks the object, its stub in the wheel, the
operator's registered schema or the C++ header stands for it, and the table says so.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import mmap
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent

LIBRARIES = (
    "torch.cuda.",
    "torch.backends.",
    "torch.accelerator.",
    "torch.distributed.",
    "torch.nn.attention.",
    "torch.compile",
    "torch.compiler.",
    "torch._",
    "torch.fx.",
    "torch.utils.data._utils.",
    "deepspeed.",
    "bitsandbytes.",
    "transformers.BitsAndBytesConfig",
    "peft.",
)
"""What names that are held to account begin with: what only a GPU runs, and what quantised models and ranks rest on."""


@dataclass(frozen=True)
class Use:
    """A name of a library in our source, and the call that it is the function of, if any."""

    name: str
    place: str
    call: ast.Call | None

    def __str__(self) -> str:
        return f"{self.name} in {self.place}"


class Reader:
    """The libraries' names in one file; imports and plain assignments (`dist = torch.distributed`) are followed."""

    def __init__(self, source: str) -> None:
        tree = ast.parse(source)
        self.nodes = list(ast.walk(tree))
        self.parents = {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}
        # What each function calls by a name of its own: a library's dotted name, or nothing that is known.
        self.known: dict[ast.AST, dict[str, str | None]] = {tree: {}}
        for node in self.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                self.known[node] = {one.arg: None for one in ast.walk(node.args) if isinstance(one, ast.arg)}
        for node in self.nodes:
            if isinstance(node, ast.Import):
                for one in node.names:
                    name = one.name if one.asname else one.name.split(".")[0]
                    self.known[self.scope(node)][one.asname or name] = name
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
                self.known[self.scope(node)] |= names
        for node in self.nodes:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
            if isinstance(target, ast.Name) and (name := self.dotted(value)) and _is_called(name):
                self.known[self.scope(node)].setdefault(target.id, name)

    def scope(self, node: ast.AST) -> ast.AST:
        """The function that a node stands in, or the module."""
        node = self.parents.get(node, node)
        while node not in self.known:
            node = self.parents[node]
        return node

    def dotted(self, node: ast.AST | None) -> str | None:
        """A library's name for what a node names."""
        if isinstance(node, ast.Attribute):
            owner = self.dotted(node.value)
            return f"{owner}.{node.attr}" if owner else None
        if not isinstance(node, ast.Name):
            return None
        scope = self.scope(node)
        while node.id not in self.known[scope] and scope in self.parents:
            scope = self.scope(scope)
        return self.known[scope].get(node.id)

    def uses(self, path: str) -> Iterator[Use]:
        """All of them, at their places in `path`."""
        calls = {node.func: node for node in self.nodes if isinstance(node, ast.Call)}
        inner = {node.value for node in self.nodes if isinstance(node, ast.Attribute)}
        for node in self.nodes:
            if isinstance(node, ast.Name | ast.Attribute) and node not in inner and isinstance(node.ctx, ast.Load):
                name = self.dotted(node)
                if name is not None and name.startswith(LIBRARIES):
                    yield Use(name, f"{path}:{node.lineno}", calls.get(node))


def uses_in(source: str, path: str) -> Iterator[Use]:
    """See `Reader`."""
    return Reader(source).uses(path)


def _is_called(name: str) -> bool:
    """Is this a module or a function? Then what is called by a variable of it is called by its own name."""
    return f"{name}.".startswith(LIBRARIES) and (inspect.ismodule(found := find(name)) or callable(found))


def find(name: str) -> Any:
    """The object of a dotted name; `AttributeError` where there is none."""
    first, *parts = name.split(".")
    return _within(importlib.import_module(first), first, parts)


def _within(found: Any, path: str, parts: list[str]) -> Any:
    """An attribute may hide the module of its name, and the other way round, so both are tried."""
    if not parts:
        return found
    path, rest = f"{path}.{parts[0]}", parts[1:]
    ways: list[Callable[[], Any]] = [lambda: getattr(found, parts[0]), lambda: importlib.import_module(path)]
    for way in ways:
        with contextlib.suppress(AttributeError, ModuleNotFoundError):
            return _within(way(), path, rest)
    raise AttributeError(f"{path} is not there")


STUBS = ("_distributed_c10d.pyi", "_VariableFunctions.pyi", "__init__.pyi")


def signatures_of(name: str, found: Any) -> list[inspect.Signature]:
    """Its own, or where C++ has none those of its stub in the wheel, one for each overload."""
    try:
        return [inspect.signature(found)]
    except ValueError:
        path = name.removeprefix("torch.").removeprefix("_C._distributed_c10d.").removeprefix("distributed.").split(".")
    for file in STUBS:
        nodes: list[ast.AST] = [ast.parse((TORCH / "_C" / file).read_text(encoding="utf-8"))]
        for part in [*path, *(["__init__"] if inspect.isclass(found) else [])]:
            nodes = [one for node in nodes for one in getattr(node, "body", ()) if getattr(one, "name", "") == part]
        if nodes:
            return [as_signature(node) for node in nodes if isinstance(node, ast.FunctionDef)]
    raise LookupError(f"{name} has neither a signature nor a stub")


def as_signature(node: ast.FunctionDef) -> inspect.Signature:
    """The signature of a function in a stub; of methods without `self`."""
    arguments, kinds = node.args, inspect.Parameter
    positional = [*arguments.posonlyargs, *arguments.args]
    needed = len(positional) - len(arguments.defaults)
    found = [
        kinds(one.arg, kinds.POSITIONAL_OR_KEYWORD, default=kinds.empty if number < needed else None)
        for number, one in enumerate(positional)
        if one.arg != "self"
    ]
    for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(kinds(one.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else None))
    return inspect.Signature(found)


def problem_of(signature: inspect.Signature, call: ast.Call) -> str | None:
    """Why a call doesn't fit a signature, or `None`. Names that only `**kwargs` would swallow don't fit."""
    starred = any(isinstance(one, ast.Starred) for one in call.args) or any(one.arg is None for one in call.keywords)
    positional = [None for one in call.args if not isinstance(one, ast.Starred)]
    named = {one.arg: None for one in call.keywords if one.arg is not None}
    try:
        (signature.bind_partial if starred else signature.bind)(*positional, **named)
    except TypeError as error:
        return str(error)
    unknown = [name for name in named if name not in signature.parameters]
    return f"nothing but **kwargs takes {', '.join(unknown)}" if unknown else None


def problem_with(name: str, call: ast.Call) -> str | None:
    """Why a call doesn't fit what has this name, or `None`."""
    problems = [problem_of(signature, call) for signature in signatures_of(name, find(name))]
    return None if None in problems else "; ".join(str(problem) for problem in problems)


USES = sorted(
    (
        use
        for path in (ROOT / "rm_scale").rglob("*.py")
        for use in uses_in(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    ),
    key=str,
)
NAMES = sorted({use.name for use in USES})
CALLS = [use for use in USES if use.call is not None]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_exists(name: str) -> None:
    find(name)


SWALLOWED = {
    "torch.distributed.rendezvous": "timeout",
    "torch._dynamo.config.patch": "recompile_limit",
    "torch.fx.experimental._config.patch": "use_duck_shape",
}
"""Arguments that a function hands on by `**kwargs`; other tests show that they arrive."""


@pytest.mark.parametrize("use", CALLS, ids=str)
def test_every_call_fits(use: Use) -> None:
    assert use.call is not None
    problem = problem_with(use.name, use.call)
    if use.name in SWALLOWED:
        assert problem == f"nothing but **kwargs takes {SWALLOWED[use.name]}"
    else:
        assert problem is None, f"{use}: {problem}"


TORCH_CUDA = {
    "Event": "two of them give the milliseconds between: enable_timing, record, synchronize, elapsed_time",
    "current_device": "an int",
    "device_count": "GPUs that CUDA_VISIBLE_DEVICES leaves visible; 0 in a build without CUDA",
    "empty_cache": "freed blocks go back to the driver",
    "get_device_capability": "(major, minor) of a device, or of the current one",
    "get_device_name": "the driver's name of a device, or of the current one",
    "get_device_properties": "an object with the attributes of DEVICE_PROPERTIES",
    "init": "raises RuntimeError with the driver's reason where a device can't be used",
    "is_available": "False, without an error, in a build without CUDA",
    "is_initialized": "False until a GPU was touched",
    "max_memory_allocated": "bytes, of the current device",
    "max_memory_reserved": "bytes, of the current device",
    "mem_get_info": "(free, total) bytes of the whole device, other processes counted",
    "memory_allocated": "bytes of live tensors of this process",
    "memory_reserved": "bytes that the allocator holds",
    "nccl.version": "a tuple of three numbers",
    "reset_peak_memory_stats": "both maxima start again",
    "set_device": "by number or device, for the process",
    "synchronize": "waits for a device, or for the current one",
}
"""What is relied on of each name of `torch.cuda` that the package uses."""


def test_torch_cuda_is_used_as_the_table_says() -> None:
    used = {name.removeprefix("torch.cuda.") for name in NAMES if name.startswith("torch.cuda.")}
    new = {name: [use.place for use in USES if use.name == f"torch.cuda.{name}"] for name in used - set(TORCH_CUDA)}
    assert not new, f"say in TORCH_CUDA what is relied on of {new}"
    assert not set(TORCH_CUDA) - used, f"no longer used: take {sorted(set(TORCH_CUDA) - used)} out of TORCH_CUDA"


def test_torch_cuda_gives_what_a_build_without_it_can_give() -> None:
    """The sentences of the table that hold on any machine."""
    if torch.version.cuda is not None:
        pytest.skip("a build with CUDA: tests/gpu")
    assert torch.cuda.device_count() == 0 and not torch.cuda.is_available() and not torch.cuda.is_initialized()
    assert torch.cuda.max_memory_allocated() == 0
    with pytest.raises((RuntimeError, AssertionError), match="not compiled with CUDA"):
        torch.cuda.init()


def test_events_have_what_is_asked_of_them() -> None:
    assert problem_with("torch.cuda.Event", parsed("f(enable_timing=True)")) is None
    for name, text in (("record", "f(self)"), ("synchronize", "f(self)"), ("elapsed_time", "f(self, other)")):
        assert problem_with(f"torch.cuda.Event.{name}", parsed(text)) is None


def parsed(text: str) -> ast.Call:
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    return call


# --- Stubs and headers: what C++ alone defines -----------------------------------------------------------------------

DEVICE_PROPERTIES = ("name", "major", "minor", "total_memory", "uuid")
"""Attributes of a device that we read (`torch._C._CudaDeviceProperties`, which a build for CPUs has as a stub only)."""


def stub_class(file: str, name: str) -> ast.ClassDef:
    tree = ast.parse((TORCH / "_C" / file).read_text(encoding="utf-8"))
    return next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)


def test_device_properties_are_in_the_stub() -> None:
    members = {
        node.target.id
        for node in stub_class("__init__.pyi", "_CudaDeviceProperties").body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert not set(DEVICE_PROPERTIES) - members


def test_nccl_is_a_backend_of_process_groups() -> None:
    """By its stub: the class is in builds with NCCL only. We give it a timeout alone, and no options."""
    from torch.distributed import Backend, distributed_c10d

    assert Backend.NCCL == "nccl" and "nccl" in Backend.backend_list
    assert Backend.backend_capability["nccl"] == ["cuda"]
    assert distributed_c10d.Backend.default_device_backend_map["cuda"] == "nccl"
    constructor = next(
        node
        for node in stub_class("_distributed_c10d.pyi", "ProcessGroupNCCL").body
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    )
    assert [one.arg for one in constructor.args.args] == ["self", "store", "rank", "size", "options"]
    # DeepSpeed hands our timeout on to torch under the same name.
    backend = find("deepspeed.comm.torch.TorchBackend")
    assert "timeout=timeout" in inspect.getsource(backend.init_process_group)


def test_a_rendezvous_takes_our_timeout() -> None:
    from torch.distributed import rendezvous as module

    handler = importlib.import_module(module.__module__)
    assert "timeout" in inspect.signature(handler._tcp_rendezvous_handler).parameters
    assert "timeout" in inspect.signature(handler._env_rendezvous_handler).parameters


SETTINGS_OF_TORCH = {
    "TORCH_FR_BUFFER_SIZE": "include/torch/csrc/distributed/c10d/FlightRecorder.hpp",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "include/torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "include/torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp",
    "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "lib/libtorch_cpu.so",
    "PYTORCH_ALLOC_CONF": "include/c10/core/AllocatorConfig.h",
    "PYTORCH_CUDA_ALLOC_CONF": "include/c10/core/AllocatorConfig.h",
    "PYTORCH_HIP_ALLOC_CONF": "include/c10/cuda/CUDAAllocatorConfig.h",
    # aten/src/ATen/native/cuda/jit_utils.cpp, so in libtorch_cuda.so, which this wheel may lack.
    "PYTORCH_KERNEL_CACHE_PATH": "lib/libtorch_cuda.so",
}
"""Variables of torch that the package or its job scripts set or read, and the file of the wheel that names each."""


def named_settings(pattern: str) -> set[str]:
    files = [*(ROOT / "rm_scale").rglob("*.py"), *(path for path in (ROOT / "slurm").rglob("*") if path.is_file())]
    return {name for path in files for name in re.findall(pattern, path.read_text(encoding="utf-8", errors="ignore"))}


def test_settings_of_torch_are_those_that_it_reads() -> None:
    found = named_settings(r"\b(?:TORCH_NCCL|TORCH_FR|PYTORCH)_[A-Z0-9_]*[A-Z]\b")
    assert found == set(SETTINGS_OF_TORCH), "say in SETTINGS_OF_TORCH where each is read"
    for name, file in SETTINGS_OF_TORCH.items():
        if "cuda.so" in file and not (TORCH / file).exists():
            continue
        with (TORCH / file).open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            assert content.find(name.encode()) >= 0, f"{name} is not in {file}"
    assert "expandable_segments" in (TORCH / "include/c10/core/AllocatorConfig.h").read_text(encoding="utf-8")


SETTINGS_OF_NCCL = {
    "NCCL_DEBUG",
    "NCCL_IB_DISABLE",
    "NCCL_IB_HCA",
    "NCCL_P2P_DISABLE",
    "NCCL_SHM_DISABLE",
    "NCCL_SOCKET_IFNAME",
}
"""NCCL's own, none of which torch knows; its manual lists them (docs.nvidia.com, NCCL, "Environment Variables")."""


def test_settings_of_nccl_are_in_its_manual() -> None:
    assert named_settings(r"(?<![A-Z_])NCCL_[A-Z0-9_]*[A-Z]\b") == SETTINGS_OF_NCCL


# --- Attention: operators by their schemas ---------------------------------------------------------------------------


def schema_names(operator: Any) -> list[str]:
    return [argument.name for argument in operator.default._schema.arguments]


def test_flash_attention_takes_what_varlen_gives_it() -> None:
    """The kernel behind `varlen_attn` has no code here; its schema and the wrapper's are registered all the same."""
    import torch.nn.attention.varlen

    wrapper = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "is_causal", "scale", "window_size"]
    wrapper += ["enable_gqa", "seqused_k", "block_table", "num_splits"]
    assert schema_names(torch.ops.torch_attn._varlen_attn) == wrapper
    shared = ["scale", "window_size_left", "window_size_right"]
    forward = ["query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"]
    forward += ["return_debug_mask", *shared, "seqused_k", "alibi_slopes", "block_table", "num_splits"]
    assert schema_names(torch.ops.aten._flash_attention_forward) == forward
    backward = ["grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q", "max_k"]
    backward += ["dropout_p", "is_causal", "rng_state", "unused", *shared]
    assert schema_names(torch.ops.aten._flash_attention_backward) == backward


def test_flex_attention_has_the_kernel_and_the_limit_that_we_ask_for() -> None:
    from torch.nn.attention import flex_attention as flex

    from rm_scale.batching.packed.index_arrays import flex_index
    from rm_scale.batching.packed.layout import GroupSpan, RowLayout

    assert "TRITON" in get_args(flex._Backend)
    assert "BACKEND" in get_type_hints(flex.FlexKernelOptions, {"NotRequired": Any})
    assert find("torch._dynamo.config").recompile_limit == 8, "a setting that there is"
    assert find("torch.fx.experimental._config").use_duck_shape is True, "a setting that there is, on unless patched"
    names = flex_index(RowLayout((GroupSpan(0, 0, (4,)),), 4), None).blocks
    assert set(names) <= set(inspect.signature(flex.BlockMask).parameters)
    assert list(names) == flex.BlockMask._TENSOR_ATTRS[: len(names)]


# --- bitsandbytes: what transformers and PEFT call for us on a GPU ---------------------------------------------------

BITSANDBYTES: dict[str, str] = {
    # transformers, to quantise while loading, and to load what was saved quantised
    "bitsandbytes.nn.Linear4bit": (
        "f(features, features, bias, dtype, compress_statistics=0, quant_type=0, quant_storage=0)"
    ),
    "bitsandbytes.nn.Params4bit.from_prequantized": (
        "f(data=0, quantized_stats=0, requires_grad=False, device=0, module=0)"
    ),
    # what such a weight carries, and is made again from: by transformers, by PEFT after a merge, by a copy
    "bitsandbytes.nn.Params4bit.__new__": (
        "f(cls, data, requires_grad=0, quant_state=0, blocksize=0, compress_statistics=0, quant_type=0, "
        "quant_storage=0, module=0, bnb_quantized=0)"
    ),
    # saving
    "bitsandbytes.functional.QuantState.as_dict": "f(self, packed=True)",
    "bitsandbytes.functional.QuantState.from_dict": "f(qs_dict=0, device=0)",
    # merging: PEFT's and transformers' dequantisation
    "bitsandbytes.functional.dequantize_4bit": "f(data, quant_state)",
    # forward and backward of a layer
    "bitsandbytes.matmul_4bit": "f(A, B, bias=0, quant_state=0)",
    "bitsandbytes.functional.quantize_4bit": (
        "f(A, blocksize=0, compress_statistics=0, quant_type=0, quant_storage=0)"
    ),
}
"""Calls on the way of QLoRA that stand in other libraries, as they write them."""


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_quantised_weights_are_made_saved_and_merged_by_these_calls(name: str) -> None:
    assert problem_with(name, parsed(BITSANDBYTES[name])) is None


def test_quantised_kernels_have_these_schemas() -> None:
    """Registered for CUDA and CPUs under one schema; only the CPUs' code can run here."""
    import bitsandbytes  # noqa: F401 (registers them)

    operators = torch.ops.bitsandbytes
    assert schema_names(operators.quantize_4bit) == ["A", "blocksize", "quant_type", "quant_storage"]
    assert schema_names(operators.dequantize_4bit) == ["A", "absmax", "blocksize", "quant_type", "shape", "dtype"]
    first = ["A", "B", "shapeB", "absmax", "blocksize", "quant_type"]
    assert schema_names(operators.gemm_4bit)[: len(first)] == first
    cuda = Path(find("bitsandbytes").__file__).parent / "backends" / "cuda" / "ops.py"
    for name in ("quantize_4bit", "dequantize_4bit", "gemm_4bit"):
        assert f'@register_kernel("bitsandbytes::{name}", "cuda")' in cuda.read_text(encoding="utf-8")


# --- The check itself ------------------------------------------------------------------------------------------------

SOURCE = """
import torch
import torch.distributed as dist
from torch import cuda
from torch.nn.attention.varlen import varlen_attn as attend
def run(device, *rest, **more):
    from bitsandbytes import functional
    limited = torch.compile
    cuda.synchronize(device)
    dist.all_reduce(device, group=None)
    functional.quantize_4bit(device, quant_type="nf4")
    attend(*rest, scale=1.0)
    limited(device, recompile_limit=3)
    wait = torch.cuda.current_stream
    device.cuda()
def other(dist, functional=None):
    from torch.cuda import nccl
    dist.broadcast(functional.dequantize_4bit(nccl.version()))
    return lambda cuda: cuda.empty_cache()
"""


def test_the_reader_follows_imports_and_assignments() -> None:
    found = {(use.name, use.call is not None) for use in uses_in(SOURCE, "x.py")}
    assert found == {
        ("torch.cuda.synchronize", True),
        ("torch.distributed.all_reduce", True),
        ("bitsandbytes.functional.quantize_4bit", True),
        ("torch.nn.attention.varlen.varlen_attn", True),
        ("torch.compile", True),
        ("torch.compile", False),
        ("torch.cuda.current_stream", False),
        ("torch.cuda.nccl.version", True),
    }
    assert {use.place for use in uses_in(SOURCE, "x.py") if use.name == "torch.cuda.synchronize"} == {"x.py:9"}


def takes(first: Any, *, scale: float = 1.0) -> None: ...


def takes_anything(first: Any, **more: Any) -> None: ...


@pytest.mark.parametrize(
    ("function", "text", "problem"),
    [
        (takes, "f(1, scale=2)", None),
        (takes, "f(*rest, scale=2)", None),
        (takes, "f(1, **more)", None),
        (takes, "f(1, softmax_scale=2)", "got an unexpected keyword argument 'softmax_scale'"),
        (takes, "f(*rest, softmax_scale=2)", "got an unexpected keyword argument 'softmax_scale'"),
        (takes, "f()", "missing a required argument: 'first'"),
        (takes, "f(1, 2)", "too many positional arguments"),
        (takes_anything, "f(1, scale=2)", "nothing but **kwargs takes scale"),
    ],
)
def test_a_call_that_no_longer_fits_is_found(function: Callable[..., None], text: str, problem: str | None) -> None:
    assert problem_of(inspect.signature(function), parsed(text)) == problem


def test_stubs_stand_for_what_has_no_signature() -> None:
    assert problem_with("torch.distributed.PrefixStore", parsed("f('name', store)")) is None
    assert (
        problem_with("torch.distributed.PrefixStore", parsed("f('name', store, 1)")) == "too many positional arguments"
    )
    with pytest.raises(LookupError, match="has neither a signature nor a stub"):
        signatures_of("torch.no_such_function", torch._C._get_tracing_state)

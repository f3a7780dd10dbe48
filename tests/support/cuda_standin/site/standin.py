"""The Python side of the stand-in: what `torch.cuda` and `torch.distributed` answer while there is no card."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import time
import traceback
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

NAME = "CUDA stand-in on the processor"
TOTAL_MEMORY = 80 * 10**9
# Flash attention and triton need 8.0; without them the package takes the paths for older cards.
CAPABILITY = (7, 5)

_native: Any = None


def load_kernels(torch_folder: str) -> None:
    """Load the kernels and the libraries they are linked to; before torch itself, which asks for CUDA only once."""
    libraries = ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so", "libtorch.so", "libtorch_python.so")
    for name in libraries:
        ctypes.CDLL(os.path.join(torch_folder, "lib", name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(os.environ["RM_SCALE_CUDA_STANDIN_LIBRARY"], mode=ctypes.RTLD_GLOBAL)


def num_devices() -> int:
    """As many as asked for, less those that CUDA_VISIBLE_DEVICES hides."""
    count = int(os.environ["RM_SCALE_CUDA_STANDIN"])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    return min(count, len([word for word in visible.split(",") if word.strip()]))


def install() -> None:
    """Put the stand-in's answers into `torch.cuda` and let process groups be called nccl."""
    global _native
    spec = importlib.util.spec_from_file_location("cuda_standin", os.environ["RM_SCALE_CUDA_STANDIN_LIBRARY"])
    assert spec is not None and spec.loader is not None
    _native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(_native)
    _native.install(max(1, num_devices()))
    _patch_cuda()
    _patch_storage()
    _patch_distributed()


_is_hidden = False


def hide_devices(unused: str) -> None:
    """bitsandbytes looks for a card to load its CUDA library, which there is none of; its portable kernels remain."""
    global _is_hidden
    _is_hidden = True


def show_devices() -> None:
    """The end of `hide_devices`."""
    global _is_hidden
    _is_hidden = False


def _index(device: Any = None) -> int:
    import torch

    if device is None:
        return int(_native.current_device())
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return int(_native.current_device()) if index is None else int(index)


def _patch_cuda() -> None:
    import torch

    class Stream(torch.Stream):
        """Work is done when a call returns, so a stream has nothing to order."""

        def __new__(cls, device: Any = None, priority: int = 0, **unused: Any) -> Any:
            return super().__new__(cls, device=torch.device("cuda", _index(device)), priority=priority)

        cuda_stream = 0

        def wait_event(self, event: Any) -> None:
            """It has happened."""

        def wait_stream(self, stream: Any) -> None:
            """It has no work left."""

        def record_event(self, event: Any = None) -> Any:
            """The moment is now."""
            event = event if event is not None else Event()
            event.record(self)
            return event

    class Event:
        """An event has happened as soon as it is recorded."""

        def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
            self.moment: float | None = None

        def record(self, stream: Any = None) -> None:
            self.moment = time.perf_counter()

        def wait(self, stream: Any = None) -> None:
            """It has happened."""

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            _native.report_wait("synchronize with an event")

        def elapsed_time(self, end: Any) -> float:
            assert self.moment is not None and end.moment is not None, "both events should have been recorded"
            return (float(end.moment) - self.moment) * 1e3

    @contextlib.contextmanager
    def on_device(device: Any) -> Iterator[None]:
        before = _native.current_device()
        _native.set_device(_index(device))
        try:
            yield
        finally:
            _native.set_device(before)

    def memory_stats(device: Any = None) -> dict[str, int]:
        now, peak = _native.memory()
        return {
            "allocated_bytes.all.current": now,
            "allocated_bytes.all.peak": peak,
            "reserved_bytes.all.current": now,
            "reserved_bytes.all.peak": peak,
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }

    def synchronize(device: Any = None) -> None:
        _native.report_wait("synchronize")

    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1,2,3,4,5,6,7").split(",")

    def properties(device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(
            name=NAME,
            total_memory=TOTAL_MEMORY,
            major=CAPABILITY[0],
            minor=CAPABILITY[1],
            multi_processor_count=2,
            uuid=f"00000000-0000-0000-0000-{int(visible[_index(device)]):012d}",
            gcnArchName="",
            is_integrated=False,
        )

    answers: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: num_devices() > 0 and not _is_hidden,
        "device_count": num_devices,
        "is_initialized": lambda: num_devices() > 0,
        "current_device": lambda: int(_native.current_device()),
        "set_device": lambda device: _native.set_device(_index(device)),
        "device": on_device,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_properties": properties,
        "get_arch_list": lambda: ["sm_75"],
        "is_bf16_supported": lambda including_emulation=True: True,
        "synchronize": synchronize,
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "memory_allocated": lambda device=None: _native.memory()[0],
        "memory_reserved": lambda device=None: _native.memory()[0],
        "max_memory_allocated": lambda device=None: _native.memory()[1],
        "max_memory_reserved": lambda device=None: _native.memory()[1],
        "memory_stats": memory_stats,
        "reset_peak_memory_stats": lambda device=None: _native.reset_peak(),
        "reset_max_memory_allocated": lambda device=None: _native.reset_peak(),
        "mem_get_info": lambda device=None: (TOTAL_MEMORY - _native.memory()[0], TOTAL_MEMORY),
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda device=None: Stream(device),
        "default_stream": lambda device=None: Stream(device),
        "stream": lambda stream: contextlib.nullcontext(),
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "is_current_stream_capturing": lambda: False,
        # Random numbers come from the processor's generator, which has a state of its own.
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)] * num_devices(),
        "set_rng_state": lambda state, device="cuda": None,
        "set_rng_state_all": lambda states: None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.cuda.random.get_rng_state_all = answers["get_rng_state_all"]
    torch.cuda.random.set_rng_state_all = answers["set_rng_state_all"]
    torch.cuda.random.get_rng_state = answers["get_rng_state"]
    torch.cuda.random.set_rng_state = answers["set_rng_state"]
    torch.cuda.nvtx.range_push = lambda text: 0
    torch.cuda.nvtx.range_pop = lambda: 0
    torch.cuda.nccl.version = lambda: (2, 27, 0)


def _patch_storage() -> None:
    """Let Python make storages on a device, for deep copies and for `torch.load(map_location=...)`."""
    import torch

    plain = torch.UntypedStorage.__new__

    def make(cls: Any, *args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            return torch.empty(args[0] if args else 0, dtype=torch.uint8, device=device).untyped_storage()
        return plain(cls, *args, **kwargs)

    torch.UntypedStorage.__new__ = make


def _patch_distributed() -> None:
    import torch.distributed
    from torch.distributed import distributed_c10d as c10d

    class _IsOurs(type):
        def __instancecheck__(cls, instance: Any) -> bool:
            return getattr(instance, "name", lambda: "")() == "nccl"

    class ProcessGroupNCCL(metaclass=_IsOurs):
        """Makes groups that take tensors on devices only, and lets gloo carry them."""

        class Options:
            """What torch sets on NCCL's options."""

            def __init__(self, *unused: Any, **also_unused: Any) -> None:
                self._timeout = c10d.default_pg_timeout

        def __new__(cls, store: Any, rank: int, size: int, options: Any = None, **unused: Any) -> Any:
            timeout = getattr(options, "_timeout", c10d.default_pg_timeout)
            gloo = c10d.ProcessGroupGloo(store, rank, size, timeout=timeout)
            return _native.make_backend(gloo, rank, size)

    c10d._NCCL_AVAILABLE = True
    c10d.ProcessGroupNCCL = ProcessGroupNCCL
    c10d.default_pg_nccl_timeout = c10d.default_pg_timeout
    torch.distributed.ProcessGroupNCCL = ProcessGroupNCCL


@contextlib.contextmanager
def listening(note: Callable[[str, str, int, list[traceback.FrameSummary]], None]) -> Iterator[None]:
    """Report what happens between host and devices in the block.

    Args:
        note: takes "wait" or "reduction"; what made the host wait; the bytes that a rank gave to a sum over ranks on
            devices; and the Python stack, innermost last.
    """
    _native.listen(lambda kind, what, size: note(kind, what, size, traceback.extract_stack()[:-1]))
    try:
        yield
    finally:
        _native.listen(None)

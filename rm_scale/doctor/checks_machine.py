"""Checks of a machine: accelerators, processor, memory, disk and limits."""

from __future__ import annotations

import os
import resource
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from rm_scale.doctor.checks_software import file_system
from rm_scale.doctor.findings import GB, Asked, Check
from rm_scale.doctor.storage import RunStorage, run_storage
from rm_scale.errors import ModelError
from rm_scale.files import existing_parent
from rm_scale.launch.devices import UnusedGpus, are_hidden, machine_gpus, unused_gpus
from rm_scale.launch.nvidia_smi import query_gpus
from rm_scale.modeling.model_shape import shape_of
from rm_scale.planning.hardware import GIB
from rm_scale.planning.parameters import count_parameters
from rm_scale.planning.shape import ModelShape, read_model_config
from rm_scale.texts import large_number

_DEFAULT_FREE_GB = 10.0
_MIN_SHARED_MEMORY_BYTES = GIB
_MIN_OPEN_FILES = 1024
_OPEN_FILES_PER_RANK = 64


@dataclass(frozen=True)
class Gpu:
    """An accelerator as torch sees it.

    Attributes:
        name: as the driver calls it.
        capability: compute capability, such as (9, 0).
        memory_bytes: all of its memory.
    """

    name: str
    capability: tuple[int, int]
    memory_bytes: int


@dataclass(frozen=True)
class DriverView:
    """An accelerator as `nvidia-smi` sees it, whatever CUDA_VISIBLE_DEVICES says.

    Attributes:
        driver: version.
        used_bytes: memory that is taken now.
        uncorrected_errors: memory errors since the driver was loaded; 0 where the card does not count them.
    """

    driver: str
    used_bytes: float
    uncorrected_errors: int


# --- Accelerators ----------------------------------------------------------------------------------------------------


def list_gpus() -> list[Gpu]:
    """Return the accelerators that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [Gpu(item.name, (item.major, item.minor), item.total_memory) for item in found]


def ask_driver() -> list[DriverView]:
    """Return the accelerators that `nvidia-smi` lists; none where it is missing or fails."""
    rows = query_gpus("driver_version", "memory.used", "ecc.errors.uncorrected.volatile.total")
    return [DriverView(driver, _number(used) * 2**20, int(_number(errors))) for driver, used, errors in rows]


def _number(text: str) -> float:
    """0 for "[N/A]", which cards without a counter answer."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def gpus(asked: Asked) -> list[Check]:
    """Check the accelerators, as torch and the driver see them, and NCCL."""
    import torch

    seen = list_gpus()
    if not seen:
        num_hidden = machine_gpus().num_known if are_hidden(os.environ) else 0
        return [judge_no_gpu(unused_gpus(), num_hidden), _nccl()]
    return [*compare_gpus(seen, ask_driver(), torch.version.cuda), _nccl()]


def compare_gpus(seen: Sequence[Gpu], by_driver: Sequence[DriverView], torch_cuda: str | None) -> list[Check]:
    """Check the accelerators that torch sees, with what the driver says of them.

    Args:
        seen: by torch.
        by_driver: by `nvidia-smi`.
        torch_cuda: the CUDA version that torch was built for, `None` for a build without.
    """
    kinds = sorted({f"{gpu.name}, {gpu.memory_bytes / GIB:.0f} GiB" for gpu in seen})
    text = f"{len(seen)} x {' and '.join(kinds)}"
    if len(kinds) > 1:
        return [Check("gpus", "warn", text, "Ranks wait for the slowest: choose alike ones by CUDA_VISIBLE_DEVICES.")]
    driver = f", driver {by_driver[0].driver}" if by_driver else ""
    checks = [Check("gpus", "pass", f"{text}{driver}, torch built for CUDA {torch_cuda}")]
    return [*checks, *_gpu_state(by_driver)]


def judge_no_gpu(unused: UnusedGpus | None, num_hidden: int) -> Check:
    """Say why torch sees no GPU: there is none, they are hidden on purpose, or a run would leave them unused.

    Args:
        unused: GPUs that torch leaves unused.
        num_hidden: GPUs that CUDA_VISIBLE_DEVICES keeps from torch.
    """
    if unused is not None:
        # A run refuses to start where it was given GPUs; else it has none, which may be meant.
        return Check("gpus", "fail" if unused.given else "warn", unused.seen, unused.fix[0].upper() + unused.fix[1:])
    if num_hidden:
        hidden = f"{num_hidden} hidden by CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')!r}"
        return Check("gpus", "warn", f"{hidden}: runs use the processor", "Unset CUDA_VISIBLE_DEVICES to use them.")
    return Check("gpus", "skip", "none: runs use the processor")


def _gpu_state(by_driver: Sequence[DriverView]) -> list[Check]:
    broken = [str(number) for number, gpu in enumerate(by_driver) if gpu.uncorrected_errors]
    used = max((gpu.used_bytes for gpu in by_driver), default=0.0)
    checks = []
    if broken:
        fix = "Reset the card (nvidia-smi -r) or have it replaced; until then leave it out by CUDA_VISIBLE_DEVICES."
        checks.append(Check("gpu memory", "fail", f"uncorrected memory errors on GPU {', '.join(broken)}", fix))
    elif used > GIB:
        fix = "End what else runs there (nvidia-smi lists it), or leave such cards out by CUDA_VISIBLE_DEVICES."
        checks.append(Check("gpu memory", "warn", f"{used / GIB:.1f} GiB of one GPU are in use already", fix))
    elif by_driver:
        checks.append(Check("gpu memory", "pass", "free, no uncorrected errors"))
    return checks


def _nccl() -> Check:
    import torch

    if not torch.cuda.is_available():
        return Check("nccl", "skip", "no GPU: ranks talk by gloo")
    version = ".".join(str(part) for part in torch.cuda.nccl.version())
    off = [name for name in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE") if os.environ.get(name) == "1"]
    if off:
        fix = f"unset {' '.join(off)}, unless you know why it is set: traffic takes a slower way."
        return Check("nccl", "warn", f"{version}, with {', '.join(off)}=1", fix)
    return Check("nccl", "pass", version)


def bfloat16(asked: Asked) -> Check:
    """Check that the accelerator, or the processor without one, multiplies bfloat16 in hardware."""
    return judge_bfloat16(list_gpus(), processor_flags())


def judge_bfloat16(seen: Sequence[Gpu], flags: frozenset[str]) -> Check:
    """Pass with compute capability 8 or more, or with a processor's bfloat16 instructions.

    Args:
        seen: accelerators.
        flags: of the processor, looked at where there is no accelerator.
    """
    if seen:
        worst = min(gpu.capability for gpu in seen)
        text = f"compute capability {worst[0]}.{worst[1]}"
        if worst >= (8, 0):
            return Check("bfloat16", "pass", text)
        return Check("bfloat16", "warn", f"{text}: emulated, slow", "Use --bf16 false --fp16 true.")
    found = sorted(flags & {"amx_bf16", "avx512_bf16", "avx_ne_convert", "bf16", "i8mm_bf16"})
    if found:
        return Check("bfloat16", "pass", f"processor has {', '.join(found)}")
    return Check("bfloat16", "warn", "the processor has no bfloat16 instructions: emulated, slow", "Use --bf16 false.")


def processor_flags() -> frozenset[str]:
    """Return the processor's features, as the kernel lists them for the first core."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    line = next((line for line in lines if line.lower().startswith(("flags", "features"))), ":")
    return frozenset(line.partition(":")[2].split())


# --- Processor, memory, limits ---------------------------------------------------------------------------------------


def cores(asked: Asked) -> Check:
    """Check the number of cores that this process may use; under Slurm it is often one."""
    usable = len(os.sched_getaffinity(0))
    ranks = "1 rank" if asked.ranks_on_node == 1 else f"{asked.ranks_on_node} ranks"
    seen = f"{usable} of {os.cpu_count()} usable, for {ranks}"
    if usable >= asked.ranks_on_node:
        return Check("cores", "pass", seen)
    fix = "Ask for more: srun --cpus-per-task N, at least one core per rank. Or start fewer ranks."
    return Check("cores", "warn", seen, fix)


def numa(asked: Asked) -> Check:
    """Check for `numactl`, by which DeepSpeed binds ranks to the memory nearest to their cores."""
    return judge_numa(len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))), shutil.which("numactl"))


def judge_numa(num_nodes: int, tool: str | None) -> Check:
    """Pass with a single memory region, where there is nothing to bind, or with the tool."""
    if num_nodes < 2:
        return Check("numactl", "pass", "one memory region: not needed")
    if tool is not None:
        return Check("numactl", "pass", f"{tool}, {num_nodes} memory regions")
    fix = "apt install numactl, for deepspeed --bind_cores_to_rank. Runs work without, at times slower."
    return Check("numactl", "warn", f"missing, with {num_nodes} memory regions", fix)


def memory(asked: Asked) -> Check:
    """Check free host memory against a save: rank 0 gathers the weights, and loads them once more to compare."""
    free = available_memory()
    seen = f"{free / GIB:.1f} GiB free"
    shape = _shape(asked)
    if shape is None:
        return Check("memory", "pass", f"{seen}; --model says how much a run needs")
    needed = 4.0 * count_parameters(shape)
    seen += f"; a save takes {needed / GIB:.1f} GiB (bfloat16 weights, twice)"
    if free >= needed:
        return Check("memory", "pass", seen)
    return Check(
        "memory", "warn", seen, "Ask for more (sbatch --mem), end what else runs here, or use a larger machine."
    )


def available_memory() -> float:
    """Return the bytes that this process can still take, of the machine and under its control group's limits."""
    free = float(psutil.virtual_memory().available)
    return min([free, *_bytes_under_limits()])


def _bytes_under_limits() -> list[float]:
    """Return the bytes left under each memory limit that Slurm or a container set for this process (cgroup v1, v2)."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            root, limit, usage = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"
        elif controllers == "":
            root, limit, usage = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        else:
            continue
        place = root / path.lstrip("/")
        for folder in [place, *place.parents]:
            if not folder.is_relative_to(root):
                break
            found += bytes_under_limit(folder, limit, usage)
    return found


def bytes_under_limit(folder: Path, limit: str, usage: str) -> list[float]:
    """Return the bytes left under the limit of one control group; empty when it has none.

    Args:
        folder: of the control group.
        limit, usage: names of the files that hold them.
    """
    try:
        allowed, used = int((folder / limit).read_text()), int((folder / usage).read_text())
        pages = (folder / "memory.stat").read_text()
    except (OSError, ValueError):  # "max", or no such file in this mount
        return []
    # What the kernel caches of files counts as used, but is given back when asked for.
    counts = dict(line.split() for line in pages.splitlines() if len(line.split()) == 2)
    cached = int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))
    return [float(max(0, allowed - used + cached))]


def shared_memory(asked: Asked) -> Check:
    """Check `/dev/shm`, through which NCCL and data workers of one machine talk; containers make it tiny."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return Check("shared memory", "skip", "there is no /dev/shm")
    return judge_shared_memory(shutil.disk_usage(place).free)


def judge_shared_memory(free_bytes: float) -> Check:
    """Pass with at least 1 GiB; containers start with 64 MiB."""
    seen = f"/dev/shm has {free_bytes / GIB:.2f} GiB free"
    if free_bytes >= _MIN_SHARED_MEMORY_BYTES:
        return Check("shared memory", "pass", seen)
    fix = "docker run --shm-size=16g or --ipc=host; elsewhere delete what lies in /dev/shm."
    return Check("shared memory", "warn", f"{seen}, wanted 1 GiB", fix)


def limits(asked: Asked) -> list[Check]:
    """Check the limits of open files and, where there is InfiniBand, of locked memory."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    has_infiniband = any(Path("/sys/class/infiniband").glob("*"))
    return [judge_open_files(files, asked.ranks_on_node), judge_locked_memory(locked, has_infiniband)]


def judge_open_files(limit: int, num_ranks: int) -> Check:
    """Pass with 64 files a rank, 1024 at least: sockets to other ranks, files, workers' pipes (a rule of thumb)."""
    wanted = max(_MIN_OPEN_FILES, _OPEN_FILES_PER_RANK * num_ranks)
    if limit == resource.RLIM_INFINITY or limit >= wanted:
        return Check("open files", "pass", "no limit" if limit == resource.RLIM_INFINITY else f"limit {limit}")
    return Check("open files", "warn", f"limit {limit}, wanted {wanted}", "ulimit -n 65536 before the run starts.")


def judge_locked_memory(limit: int, has_infiniband: bool) -> Check:
    """Pass without a limit, or without InfiniBand, which locks the memory that it sends from."""
    if not has_infiniband:
        return Check("locked memory", "skip", "no InfiniBand card here")
    if limit == resource.RLIM_INFINITY:
        return Check("locked memory", "pass", "no limit")
    fix = "ulimit -l unlimited; under Slurm the administrator sets PropagateResourceLimitsExcept=MEMLOCK."
    return Check("locked memory", "warn", f"limit {limit} bytes, with an InfiniBand card", fix)


# --- Model and disk --------------------------------------------------------------------------------------------------


def model(asked: Asked) -> Check:
    """Check that the model's shape can be read."""
    if asked.model is None:
        return Check("model", "skip", "no --model given")
    shape = shape_of(read_model_config(asked.model, or_known=True), asked.model)
    size = f"{large_number(count_parameters(shape))} parameters"
    return Check("model", "pass", f"{asked.model}: {shape.model_type}, {size}")


def _shape(asked: Asked) -> ModelShape | None:
    """Return the model's shape, `None` without a model or where it can't be read, which the check `model` reports."""
    try:
        return None if asked.model is None else shape_of(read_model_config(asked.model, or_known=True), asked.model)
    except ModelError:
        return None


def disk(asked: Asked) -> Check:
    """Check that a run can write into `output_dir`, and that its checkpoints fit."""
    place = existing_parent(Path(asked.output_dir))
    problem = _write_problem(place)
    if problem is not None:
        return Check("disk", "fail", f"{place}: {problem}", "Give an --output_dir that you may write to.")
    shape = _shape(asked)
    storage = None if shape is None else run_storage(shape, asked.method, asked.lora_r, asked.save_total_limit)
    free = shutil.disk_usage(place).free
    return judge_disk(f"{place} ({file_system(place) or 'unknown file system'})", free, asked.min_free_gb, storage)


def judge_disk(place: str, free_bytes: float, min_free_gb: float | None, storage: RunStorage | None) -> Check:
    """Compare free space with what was asked for, or with what a run of this model writes.

    Args:
        place: what is shown as the place.
        free_bytes: free there.
        min_free_gb: as asked, 1e9 bytes.
        storage: what a run writes, where the model is known.
    """
    needed = _DEFAULT_FREE_GB * GB if storage is None else storage.peak_bytes
    why = f"{_DEFAULT_FREE_GB:.0f} GB, a guess without --model" if storage is None else storage.describe()
    if min_free_gb is not None:
        needed, why = min_free_gb * GB, f"--min_free_gb {min_free_gb:g}"
    seen = f"{place}: {free_bytes / GB:.1f} GB free, wanted {needed / GB:.1f} GB ({why})"
    if free_bytes >= needed:
        return Check("disk", "pass", seen)
    fix = "Free space, give another --output_dir, or keep less: --save_total_limit 1, --save_only_model."
    # Without the model it is a guess, which must not stop anyone.
    return Check("disk", "warn" if storage is None and min_free_gb is None else "fail", seen, fix)


def _write_problem(place: Path) -> str | None:
    """Write a small file and remove it; return why that failed, `None` when it worked."""
    probe = place / f".rm_scale_doctor_{uuid.uuid4().hex}"
    try:
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
    except OSError as error:
        return f"can't be written ({error.strerror})"
    return None

"""Checks of a machine: accelerators, processor, memory, disk and limits."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from rm_scale.errors import ModelError
from rm_scale.launch.doctor.checks import GB, Asked, Check
from rm_scale.launch.doctor.checks_software import existing_parent, file_system
from rm_scale.launch.doctor.storage import RunStorage, run_storage
from rm_scale.planning.hardware import GIB
from rm_scale.planning.shape import ModelShape, read_model_config, shape_from_config

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
    """The accelerators that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [Gpu(item.name, (item.major, item.minor), item.total_memory) for item in found]


def ask_driver() -> list[DriverView]:
    """The accelerators that `nvidia-smi` lists; none where it is missing or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = "--query-gpu=driver_version,memory.used,ecc.errors.uncorrected.volatile.total"
    done = subprocess.run(
        [tool, query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=30, check=False
    )
    rows = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines() if line.count(",") == 2]
    return [DriverView(row[0], _number(row[1]) * 2**20, int(_number(row[2]))) for row in rows]


def _number(text: str) -> float:
    """0 for "[N/A]", which cards without a counter answer."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def gpus(asked: Asked) -> list[Check]:
    """Accelerators by torch and by the driver."""
    import torch

    return [*compare_gpus(list_gpus(), ask_driver(), torch.version.cuda), _nccl()]


def compare_gpus(seen: Sequence[Gpu], by_driver: Sequence[DriverView], torch_cuda: str | None) -> list[Check]:
    """What torch sees against what the driver has.

    Args:
        seen: by torch.
        by_driver: by `nvidia-smi`.
        torch_cuda: the CUDA version that torch was built for, `None` for a build without.
    """
    if not seen:
        return [_no_gpu(by_driver, torch_cuda)]
    kinds = sorted({f"{gpu.name}, {gpu.memory_bytes / GIB:.0f} GiB" for gpu in seen})
    text = f"{len(seen)} x {' and '.join(kinds)}"
    if len(kinds) > 1:
        return [Check("gpus", "warn", text, "Ranks wait for the slowest: choose alike ones by CUDA_VISIBLE_DEVICES.")]
    driver = f", driver {by_driver[0].driver}" if by_driver else ""
    checks = [Check("gpus", "pass", f"{text}{driver}, torch built for CUDA {torch_cuda}")]
    return [*checks, *_gpu_state(by_driver)]


def _no_gpu(by_driver: Sequence[DriverView], torch_cuda: str | None) -> Check:
    if not by_driver:
        return Check("gpus", "skip", "none: runs use the processor")
    text = f"the driver ({by_driver[0].driver}) has {len(by_driver)}, torch sees none"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch_cuda is None:
        fix = "This torch is a build without CUDA: install one with it (https://pytorch.org/get-started/locally)."
        return Check("gpus", "fail", text, fix)
    if hidden is not None and not hidden.strip(" -1"):
        return Check("gpus", "fail", f"{text} since CUDA_VISIBLE_DEVICES={hidden!r}", "unset CUDA_VISIBLE_DEVICES.")
    fix = f"The driver is probably too old for CUDA {torch_cuda}: update it, or install a torch for an older CUDA."
    return Check("gpus", "fail", text, fix)


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
    """Does the accelerator, or the processor, multiply bfloat16 in hardware?"""
    return judge_bfloat16(list_gpus(), processor_flags())


def judge_bfloat16(seen: Sequence[Gpu], flags: frozenset[str]) -> Check:
    """Compute capability 8 or more, or instructions for it.

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
    """The features that the kernel lists for the first core."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    line = next((line for line in lines if line.lower().startswith(("flags", "features"))), ":")
    return frozenset(line.partition(":")[2].split())


# --- Processor, memory, limits ---------------------------------------------------------------------------------------


def cores(asked: Asked) -> Check:
    """Cores that this process may use, which under Slurm are often one."""
    usable = len(os.sched_getaffinity(0))
    ranks = "1 rank" if asked.ranks_on_node == 1 else f"{asked.ranks_on_node} ranks"
    seen = f"{usable} of {os.cpu_count()} usable, for {ranks}"
    if usable >= asked.ranks_on_node:
        return Check("cores", "pass", seen)
    fix = "Ask for more: srun --cpus-per-task N, at least one core per rank. Or start fewer ranks."
    return Check("cores", "warn", seen, fix)


def numa(asked: Asked) -> Check:
    """`numactl`, which DeepSpeed needs to bind ranks to the memory beside their cores."""
    return judge_numa(len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))), shutil.which("numactl"))


def judge_numa(num_nodes: int, tool: str | None) -> Check:
    """With one memory region there is nothing to bind."""
    if num_nodes < 2:
        return Check("numactl", "pass", "one memory region: not needed")
    if tool is not None:
        return Check("numactl", "pass", f"{tool}, {num_nodes} memory regions")
    fix = "apt install numactl, for deepspeed --bind_cores_to_rank. Runs work without, at times slower."
    return Check("numactl", "warn", f"missing, with {num_nodes} memory regions", fix)


def memory(asked: Asked) -> Check:
    """Free host memory against what a save takes: rank 0 gathers the weights, and loads them once more to compare."""
    free = available_memory()
    seen = f"{free / GIB:.1f} GiB free"
    shape = _shape(asked)
    if shape is None:
        return Check("memory", "pass", f"{seen}; --model says how much a run needs")
    needed = 4.0 * shape.num_parameters
    seen += f"; a save takes {needed / GIB:.1f} GiB (bfloat16 weights, twice)"
    if free >= needed:
        return Check("memory", "pass", seen)
    return Check(
        "memory", "warn", seen, "Ask for more (sbatch --mem), end what else runs here, or use a larger machine."
    )


def available_memory() -> float:
    """Bytes that this process can still take: what the machine has, or what its control group is allowed."""
    free = float(psutil.virtual_memory().available)
    return min([free, *_control_group_room()])


def _control_group_room() -> list[float]:
    """Bytes left under each memory limit that Slurm or a container has put on this process (cgroup v1 and v2)."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    room = []
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
            room += room_under_limit(folder, limit, usage)
    return room


def room_under_limit(folder: Path, limit: str, usage: str) -> list[float]:
    """Bytes left under the limit of one control group; empty when it has none.

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
    """`/dev/shm`, through which NCCL and data workers of one machine talk; containers make it tiny."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return Check("shared memory", "skip", "there is no /dev/shm")
    return judge_shared_memory(shutil.disk_usage(place).free)


def judge_shared_memory(free_bytes: float) -> Check:
    """At least 1 GiB; containers start with 64 MiB."""
    seen = f"/dev/shm has {free_bytes / GIB:.2f} GiB free"
    if free_bytes >= _MIN_SHARED_MEMORY_BYTES:
        return Check("shared memory", "pass", seen)
    fix = "docker run --shm-size=16g or --ipc=host; elsewhere delete what lies in /dev/shm."
    return Check("shared memory", "warn", f"{seen}, wanted 1 GiB", fix)


def limits(asked: Asked) -> list[Check]:
    """Open files, and locked memory where there is InfiniBand."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    has_infiniband = any(Path("/sys/class/infiniband").glob("*"))
    return [judge_open_files(files, asked.ranks_on_node), judge_locked_memory(locked, has_infiniband)]


def judge_open_files(limit: int, num_ranks: int) -> Check:
    """Each rank holds sockets to others, files and workers' pipes: 64 a rank, 1024 at least (a rule of thumb)."""
    wanted = max(_MIN_OPEN_FILES, _OPEN_FILES_PER_RANK * num_ranks)
    if limit == resource.RLIM_INFINITY or limit >= wanted:
        return Check("open files", "pass", "no limit" if limit == resource.RLIM_INFINITY else f"limit {limit}")
    return Check("open files", "warn", f"limit {limit}, wanted {wanted}", "ulimit -n 65536 before the run starts.")


def judge_locked_memory(limit: int, has_infiniband: bool) -> Check:
    """InfiniBand pins the memory it sends from."""
    if not has_infiniband:
        return Check("locked memory", "skip", "no InfiniBand card here")
    if limit == resource.RLIM_INFINITY:
        return Check("locked memory", "pass", "no limit")
    fix = "ulimit -l unlimited; under Slurm the administrator sets PropagateResourceLimitsExcept=MEMLOCK."
    return Check("locked memory", "warn", f"limit {limit} bytes, with an InfiniBand card", fix)


# --- Model and disk --------------------------------------------------------------------------------------------------


def model(asked: Asked) -> Check:
    """Can the model's shape be read?"""
    if asked.model is None:
        return Check("model", "skip", "no --model given")
    shape = shape_from_config(read_model_config(asked.model))
    return Check("model", "pass", f"{asked.model}: {shape.model_type}, {shape.num_parameters / 1e6:,.0f}M parameters")


def _shape(asked: Asked) -> ModelShape | None:
    """The model's shape where there is one that can be read; `model` says why not."""
    try:
        return None if asked.model is None else shape_from_config(read_model_config(asked.model))
    except ModelError:
        return None


def disk(asked: Asked) -> Check:
    """Can a run write into `output_dir`, and will its checkpoints fit?"""
    place = existing_parent(Path(asked.output_dir))
    problem = _write_problem(place)
    if problem is not None:
        return Check("disk", "fail", f"{place}: {problem}", "Give an --output_dir that you may write to.")
    shape = _shape(asked)
    storage = None if shape is None else run_storage(shape, asked.method, asked.lora_r, asked.save_total_limit)
    free = shutil.disk_usage(place).free
    return judge_disk(f"{place} ({file_system(place) or 'unknown file system'})", free, asked.min_free_gb, storage)


def judge_disk(place: str, free_bytes: float, min_free_gb: float | None, storage: RunStorage | None) -> Check:
    """Free space against what was asked for or what a run of this model writes.

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
    """Write a small file and take it away again; gives why that failed."""
    probe = place / f".rm_scale_doctor_{uuid.uuid4().hex}"
    try:
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
    except OSError as error:
        return f"can't be written ({error.strerror})"
    return None

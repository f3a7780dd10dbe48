"""Who am I among the ranks, and the few collectives the package needs: sums, agreed failures, one rank first.

Ranks come from the launcher's environment (deepspeed, torchrun, srun, or none for a single process), so that they
are known before any process group exists. torch is imported only by the functions that need it.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rm_scale.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class World:
    """This process's place: global rank, number of ranks, rank within its node, who started it, ranks on its node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: str = "python"
    ranks_on_node: int = 1

    @property
    def is_main(self) -> bool:
        """True on the one rank that talks and writes shared files."""
        return self.rank == 0


def detect_world(environ: Mapping[str, str] | None = None) -> World:
    """Read the launcher's environment variables; under srun translate Slurm's into torch's.

    Raises:
        UserError: `RANK` and `WORLD_SIZE` are set to something that makes no sense.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
        if not 0 <= rank < size:
            raise UserError(f"RANK={rank} with WORLD_SIZE={size}: a rank lies in [0, size). Fix: check the launcher.")
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed"
        # torchrun and deepspeed name it differently.
        on_node = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or size)
        return World(rank, size, int(env.get("LOCAL_RANK", "0")), launcher, on_node)
    # Only a job *step* has SLURM_STEP_NUM_TASKS: plain `python` inside a batch script stays a single process.
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in env:
        rank, size = int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"])
        # "2(x3)" or "2,1": tasks per node; an upper bound is enough to share cores.
        per_node = max(int(part.split("(")[0]) for part in env.get("SLURM_STEP_TASKS_PER_NODE", str(size)).split(","))
        return World(rank, size, int(env.get("SLURM_LOCALID", "0")), "srun", per_node)
    return World()


def _num_visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise UserError(
            f"{name}={env[name]!r}: must be a whole number. Fix: unset it, or check the launcher."
        ) from None


def export_world(world: World) -> None:
    """Write the variables torch, accelerate and DeepSpeed read, for launchers that don't set them."""
    os.environ["RANK"] = str(world.rank)
    os.environ["WORLD_SIZE"] = str(world.size)
    os.environ["LOCAL_RANK"] = str(world.local_rank)
    if world.launcher == "srun":
        if _num_visible_gpus() == 1:
            os.environ["LOCAL_RANK"] = "0"  # --gpus-per-task=1 shows each task its own GPU alone
        os.environ.setdefault("MASTER_ADDR", _first_slurm_node())
        # The same on every node, and different for jobs that share a node.
        job = int(os.environ.get("SLURM_JOB_ID", "0")) + int(os.environ.get("SLURM_STEP_ID", "0"))
        os.environ.setdefault("MASTER_PORT", str(20_000 + job % 40_000))
    else:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        if "MASTER_PORT" not in os.environ:
            os.environ["MASTER_PORT"] = str(_free_port())


def _first_slurm_node() -> str:
    node_list = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    if "[" not in node_list and "," not in node_list:
        return node_list or "127.0.0.1"
    answer = subprocess.run(["scontrol", "show", "hostnames", node_list], capture_output=True, text=True, check=True)
    return answer.stdout.split()[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def has_gpu() -> bool:
    """True when torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def name_accelerator() -> None:
    """Tell DeepSpeed when there is no GPU; it would guess the same, with a warning on standard output."""
    if not has_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def prepare_environment(world: World) -> None:
    """Set what the libraries read at import: to be called before DeepSpeed is imported."""
    export_world(world)
    # Ranks on one machine share its cores; left alone each would start a thread per core and they would wait on
    # each other. Read when torch is imported, so it comes first.
    threads = max(1, len(os.sched_getaffinity(0)) // world.ranks_on_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    name_accelerator()
    if not has_gpu():
        _keep_freed_memory()
        # gloo connects over the interface that the host name resolves to, which on many laptops is none.
        all_here = os.environ["MASTER_ADDR"] in {"127.0.0.1", "localhost"}
        if all_here and os.path.exists("/sys/class/net/lo"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # as in malloc.h
_DEFAULT_MMAP_MAX = 65536
_keeps_freed_memory = False


def _keep_freed_memory() -> None:
    """Let glibc keep what was freed, instead of giving large blocks back and taking them again in every step.

    Tensors on a CPU are large blocks; each that comes fresh from the kernel is zeroed page by page, which took up to a
    third of a training step. Other C libraries are left alone, and so is M_ARENA_MAX: with one arena for all threads a
    step took half as long again.
    """
    global _keeps_freed_memory
    _keeps_freed_memory = _mallopt(_M_MMAP_MAX, 0)
    _mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    _mallopt(_M_TOP_PAD, 64 * 2**20)


@contextmanager
def giving_back_freed_memory() -> Iterator[None]:
    """Large blocks go back when they are freed, as glibc does by itself: for loading, whose blocks don't come again.

    Kept, they are cut up by what stays: a 7B model in 4 bits took 24 GB to load rather than 5.
    """
    if _keeps_freed_memory:
        _mallopt(_M_MMAP_MAX, _DEFAULT_MMAP_MAX)
    try:
        yield
    finally:
        if _keeps_freed_memory:
            _mallopt(_M_MMAP_MAX, 0)


def _mallopt(name: int, value: int) -> bool:
    """Set one of glibc's parameters; gives whether there is a glibc that took it."""
    try:
        return bool(ctypes.CDLL("libc.so.6").mallopt(name, value))
    except (OSError, AttributeError):
        return False


def init_process_group(world: World, uses_deepspeed: bool, timeout_seconds: int) -> bool:
    """Create the process group: NCCL on GPUs, gloo on CPUs. Gives True when there was none before.

    It must exist before the model is loaded, or ZeRO-3's `zero.Init` sees a world of one and shards nothing.

    Args:
        world: this process's place.
        uses_deepspeed: the run goes through DeepSpeed's engine, which needs a group even for one process.
        timeout_seconds: after this a collective that hangs ends the run.
    """
    # accelerate reads this when the training arguments are built; without it no engine is made.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true" if uses_deepspeed else "false"
    if _is_distributed():
        return False
    if world.size == 1 and not uses_deepspeed:
        # With it accelerate would wrap a lone process in DDP, which copies all gradients in every step for nothing.
        os.environ.pop("LOCAL_RANK", None)
        return False
    import torch

    gpu = has_gpu()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if gpu else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if uses_deepspeed:
        import deepspeed

        if not gpu:
            # A shared-memory all-reduce that ZeRO never calls would take a minute to compile on first use.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    else:
        torch.distributed.init_process_group(backend, timeout=timeout)
    return True


def _is_distributed() -> bool:
    import torch

    return torch.distributed.is_available() and torch.distributed.is_initialized()


def barrier() -> None:
    """Wait for all ranks."""
    if _is_distributed():
        import torch

        torch.distributed.barrier()


def sum_over_ranks(values: Sequence[float], device: torch.device | str = "cpu") -> list[float]:
    """Add up a few numbers over all ranks, in float64 so that counts stay exact."""
    import torch

    # MPS and some accelerators lack float64, but they have no multi-rank training either.
    total = torch.tensor(list(values), dtype=torch.float64, device=device)
    if _is_distributed():
        torch.distributed.all_reduce(total)
    return [float(value) for value in total.tolist()]


def max_over_ranks(values: Sequence[int], device: torch.device | str = "cpu") -> list[int]:
    """The largest of each number over all ranks."""
    if not _is_distributed():
        return list(values)
    import torch

    largest = torch.tensor(list(values), dtype=torch.int64, device=device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return [int(value) for value in largest.tolist()]


def gather_from_ranks(value: Any) -> list[Any]:
    """Every rank's picklable `value`, in rank order, on every rank."""
    if not _is_distributed():
        return [value]
    import torch

    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def raise_together(error: UserError | None) -> None:
    """Make a failure of one rank a failure of all: the first rank's error is raised everywhere.

    Without this, the ranks that saw nothing wait in the next collective until it times out.
    """
    for seen in gather_from_ranks(error):
        if seen is not None:
            seen.met_by = "world"
            raise seen


@contextmanager
def agreed_errors() -> Iterator[None]:
    """Run a block on every rank; a `UserError` on any of them is then raised on all.

    The block itself must hold no collective.
    """
    error: UserError | None = None
    try:
        yield
    except UserError as caught:
        error = caught
    raise_together(error)

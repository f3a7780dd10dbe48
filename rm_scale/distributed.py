"""Which rank this process is, the process group, and the few collectives the package needs: sums, agreed errors.

Ranks come from the launcher's environment (deepspeed, torchrun, srun, or none for a single process), so that they
are known before any process group exists. torch is imported only by the functions that need it.
"""

from __future__ import annotations

import ctypes
import os
import re
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from rm_scale.errors import UserError
from rm_scale.files import free_port
from rm_scale.meeting import EXIT_PORT_TAKEN as EXIT_PORT_TAKEN
from rm_scale.meeting import cannot_listen, hold_port, init_method, is_port_taken
from rm_scale.network import interface_for_gloo, plain_address
from rm_scale.texts import one_line


@dataclass(frozen=True)
class World:
    """This process's place among the ranks of a run.

    Attributes:
        rank: global rank, 0 to `size` - 1.
        size: number of ranks, the world size.
        local_rank: rank within its node.
        launcher: what started it: "deepspeed", "torchrun", "srun", or "python" for a single process.
        ranks_on_node: number of ranks on its node; an upper bound under srun.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: str = "python"
    ranks_on_node: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that logs and writes shared files."""
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
        on_node = _number(env, "LOCAL_WORLD_SIZE" if env.get("LOCAL_WORLD_SIZE") else "LOCAL_SIZE", size)
        return World(rank, size, _number(env, "LOCAL_RANK", 0), launcher, on_node)
    # Only a job *step* has SLURM_STEP_NUM_TASKS: plain `python` inside a batch script stays a single process.
    if _number(env, "SLURM_STEP_NUM_TASKS", 1) > 1 and "SLURM_PROCID" in env:
        rank, size = _number(env, "SLURM_PROCID"), _number(env, "SLURM_STEP_NUM_TASKS")
        # "2(x3)" or "2,1": tasks per node; an upper bound is enough to share cores.
        counts = re.findall(r"(?:^|,)(\d{1,9})", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
        return World(rank, size, _number(env, "SLURM_LOCALID", 0), "srun", max(map(int, counts), default=size))
    return World()


def _num_visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and not env.get(name):
        return default
    try:
        return int(env[name])
    except ValueError:
        raise _seen_by_the_node(
            f"{name}={env[name][:80]!r}: must be a whole number. Fix: unset it, or check the launcher."
        ) from None


def export_world(world: World, meets: bool = False) -> None:
    """Write the variables torch, accelerate and DeepSpeed read, for launchers that don't set them.

    Args:
        world: this process's place.
        meets: `init_process_group` follows.

    Raises:
        UserError: `MASTER_PORT` is no port, or another program has taken it.
    """
    os.environ["RANK"] = str(world.rank)
    os.environ["WORLD_SIZE"] = str(world.size)
    os.environ["LOCAL_RANK"] = str(world.local_rank)
    _name_meeting_point(world)
    if meets and world.rank == 0 and world.size > 1:
        hold_port(world.launcher)
    if _num_visible_gpus() == 1:
        os.environ["LOCAL_RANK"] = "0"  # srun --gpus-per-task=1 and wrappers show each rank its own GPU alone


def _name_meeting_point(world: World) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name, "").strip():
            os.environ.pop(name, None)  # set to nothing: as good as not set
    if world.launcher == "srun":
        os.environ.setdefault("MASTER_ADDR", _first_slurm_node())
        # The same on every node, and different for jobs that share a node.
        job = _number(os.environ, "SLURM_JOB_ID", 0) + _number(os.environ, "SLURM_STEP_ID", 0)
        os.environ.setdefault("MASTER_PORT", str(20_000 + job % 40_000))
    else:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        if "MASTER_PORT" not in os.environ:
            os.environ["MASTER_PORT"] = str(free_port())
    os.environ["MASTER_ADDR"] = plain_address(os.environ["MASTER_ADDR"])  # torch takes no [::1]
    port = _number(os.environ, "MASTER_PORT")
    if not 0 < port <= 65_535:
        raise _seen_by_the_node(
            f"MASTER_PORT={one_line(str(port), 40)}: a port lies from 1 to 65535. Fix: unset it, or check the launcher."
        )


def _first_slurm_node() -> str:
    node_list = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    if "[" not in node_list and "," not in node_list:
        return node_list or "127.0.0.1"
    answer = subprocess.run(["scontrol", "show", "hostnames", node_list], capture_output=True, text=True, check=True)
    return answer.stdout.split()[0]


def has_gpu() -> bool:
    """Return whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def name_accelerator() -> None:
    """Tell DeepSpeed when there is no GPU; it would guess the same, with a warning on standard output.

    Raises:
        UserError: `DS_ACCELERATOR` names what this package does not run on.
    """
    if not os.environ.get("DS_ACCELERATOR", "").strip():
        os.environ.pop("DS_ACCELERATOR", None)
    if not has_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    named = os.environ.get("DS_ACCELERATOR", "cuda")
    if named not in _ACCELERATORS:
        raise _seen_by_the_node(
            f"DS_ACCELERATOR={named[:80]!r}: must be one of {', '.join(_ACCELERATORS)}. Fix: unset it."
        )


_ACCELERATORS = ("cuda", "cpu")


def _seen_by_the_node(text: str) -> UserError:
    """Return an error in the environment, which is the same for all ranks of a node: one of them tells it."""
    error = UserError(text)
    error.met_by = "node"
    return error


_ALLOCATOR_VARIABLES = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}


def prepare_environment(world: World, meets: bool = False) -> None:
    """Set what the libraries read at import: to be called before DeepSpeed is imported.

    Args:
        world: this process's place.
        meets: `init_process_group` follows, so rank 0 takes the port now.
    """
    # Ranks on one machine share its cores; left alone each would start a thread per core and they would wait on
    # each other. Read when torch is imported, as the allocator's settings are, so both come before all that does.
    threads = max(1, len(os.sched_getaffinity(0)) // world.ranks_on_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if not _ALLOCATOR_VARIABLES & os.environ.keys():
        # Rows differ in every step, and memory cut up by earlier ones can't be used for a longer one otherwise.
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    export_world(world, meets)
    name_accelerator()
    _name_gloo_interface(world)
    if not has_gpu():
        _keep_freed_memory()


def _name_gloo_interface(world: World) -> None:
    """Choose gloo's interface where nobody has: it takes the one that the host name resolves to, often none."""
    interface = gloo_interface(os.environ, several_nodes=world.size > world.ranks_on_node)
    if interface:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    else:
        os.environ.pop("GLOO_SOCKET_IFNAME", None)


def gloo_interface(environ: Mapping[str, str], several_nodes: bool) -> str:
    """Return the interface for gloo: the one named, or chosen by what else is known; empty where the host name will do.

    On one machine it is the loopback. Over several it is the one that NCCL was told, if that is a single one, or the
    one on the way to the other machines where the host name does not lead them here.

    Args:
        environ: MASTER_ADDR, and what was named: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, RM_SCALE_NODES.
        several_nodes: there are ranks on other machines.
    """
    if environ.get("GLOO_SOCKET_IFNAME", "").strip():
        return environ["GLOO_SOCKET_IFNAME"]
    if environ["MASTER_ADDR"] in {"127.0.0.1", "localhost"} and os.path.exists("/sys/class/net/lo"):
        return "lo"
    named = environ.get("NCCL_SOCKET_IFNAME", "")
    present = os.listdir("/sys/class/net") if os.path.isdir("/sys/class/net") else []
    # To NCCL a name is the beginning of one, unless "=" stands before it; gloo knows whole names only.
    is_whole, beginning = named.startswith("="), named.removeprefix("=")
    meant = [name for name in present if name == beginning or (named and not is_whole and name.startswith(beginning))]
    if len(meant) == 1:
        return meant[0]
    return (
        interface_for_gloo(environ["MASTER_ADDR"], *environ.get("RM_SCALE_NODES", "").split()) if several_nodes else ""
    )


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
    """Give freed blocks back to the system within the block, as glibc does by itself: for loading a model.

    Its large blocks are not needed again. Kept, they are cut up by what stays: a 7B model in 4 bits took 24 GB to load
    rather than 5.
    """
    if _keeps_freed_memory:
        _mallopt(_M_MMAP_MAX, _DEFAULT_MMAP_MAX)
    try:
        yield
    finally:
        if _keeps_freed_memory:
            _mallopt(_M_MMAP_MAX, 0)


def _mallopt(name: int, value: int) -> bool:
    """Set one of glibc's parameters; return whether there is a glibc that took it."""
    try:
        return bool(ctypes.CDLL("libc.so.6").mallopt(name, value))
    except (OSError, AttributeError):
        return False


def own_gpu(world: World) -> int:
    """Return the number of this rank's GPU: the only one that it sees, or the one of its place on the node.

    Raises:
        UserError: there are more ranks on this node than GPUs.
    """
    visible = _num_visible_gpus()
    number = 0 if visible == 1 else world.local_rank
    if number < visible:
        return number
    raise UserError(
        f"rank {world.rank} is number {world.local_rank} on its node, and it sees {visible} GPUs: each rank takes one. "
        f"Fix: start {visible} ranks a node, or show each its own GPU (srun --gpus-per-task 1)."
    )


def init_process_group(world: World, uses_deepspeed: bool, timeout_seconds: int) -> bool:
    """Create the process group: NCCL on GPUs, gloo on CPUs. Return True when there was none before.

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
        torch.cuda.set_device(own_gpu(world))
    if world.size == 1:
        os.environ["MASTER_PORT"] = str(free_port())  # it meets nobody: any port will do
    timeout = timedelta(seconds=timeout_seconds)
    try:
        _create_group("nccl" if gpu else "gloo", uses_deepspeed, timeout)
    except RuntimeError as error:
        if is_port_taken(error):
            raise cannot_listen(world.launcher, error) from error
        raise
    host_group(timeout)
    if gpu:
        _refuse_shared_gpus()
    return True


def _create_group(backend: str, uses_deepspeed: bool, timeout: timedelta) -> None:
    import torch

    if not uses_deepspeed:
        torch.distributed.init_process_group(backend, init_method=init_method(timeout), timeout=timeout)
        return
    if backend == "gloo" and os.environ.get("DS_ACCELERATOR", "cpu") != "cpu":
        raise _seen_by_the_node(
            f"DS_ACCELERATOR={os.environ['DS_ACCELERATOR']}: torch sees no GPU here. Fix: unset it, or see why: "
            "rm-scale doctor."
        )
    import deepspeed

    if backend == "gloo":
        # A shared-memory all-reduce that ZeRO never calls would take a minute to compile on first use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, init_method=init_method(timeout), timeout=timeout, verbose=False)


def _is_distributed() -> bool:
    import torch

    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _refuse_shared_gpus() -> None:
    """See that each rank has a GPU of its own; NCCL would only say that a call was invalid.

    Raises:
        UserError: on every rank, when two of a node share one.
    """
    import torch

    own = (socket.gethostname(), str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid))
    places = gather_from_ranks(own)
    shared = next(
        ([r for r, place in enumerate(places) if place == one] for one in places if places.count(one) > 1), []
    )
    if shared:
        error = UserError(
            f"ranks {', '.join(map(str, shared))} share one GPU of {places[shared[0]][0]}: each rank takes one of its "
            "own. Fix: start as many ranks as there are GPUs."
        )
        error.met_by = "world"
        raise error


_host_group: tuple[Any, Any] | None = None
"""The default group that it belongs to, and the group."""


def host_group(timeout: timedelta | None = None) -> Any:
    """Return the process group of all ranks for numbers and objects that lie on the host.

    Beside NCCL, which takes tensors on GPUs only, it is a gloo group of its own: a number that goes through NCCL makes
    the host wait for all work on the GPU. A collective when it is called for the first time. `None`, torch's name for
    the default group, where that is gloo itself.

    Args:
        timeout: of its collectives; default the default group's.

    Raises:
        UserError: gloo finds no network interface over which the ranks reach each other.
    """
    global _host_group
    import torch

    world = torch.distributed.group.WORLD
    if world is None or torch.distributed.get_backend() == "gloo":
        return None
    if _host_group is None or _host_group[0] is not world:
        try:
            _host_group = (world, torch.distributed.new_group(backend="gloo", timeout=timeout))
        except RuntimeError as error:
            raise UserError(
                f"gloo, which carries numbers between ranks, can't connect them ({one_line(error, 160)}). "
                "Fix: name the interface that all nodes share, GLOO_SOCKET_IFNAME=eth0 for instance; rm-scale doctor "
                "lists them."
            ) from error
    return _host_group[1]


def barrier() -> None:
    """Wait for all ranks."""
    if _is_distributed():
        import torch

        torch.distributed.barrier(group=host_group())


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Return the sums of a few numbers over all ranks, in float64 so that counts stay exact."""
    if not _is_distributed():
        return [float(value) for value in values]
    import torch

    total = torch.tensor(list(values), dtype=torch.float64)
    torch.distributed.all_reduce(total, group=host_group())
    return [float(value) for value in total.tolist()]


def max_over_ranks(values: Sequence[int]) -> list[int]:
    """Return the largest of each number over all ranks."""
    if not _is_distributed():
        return list(values)
    import torch

    largest = torch.tensor(list(values), dtype=torch.int64)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=host_group())
    return [int(value) for value in largest.tolist()]


def gather_from_ranks(value: Any) -> list[Any]:
    """Return every rank's picklable `value`, in rank order, on every rank."""
    if not _is_distributed():
        return [value]
    import torch

    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value, group=host_group())
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
    try:
        raise_together(error)
    except RuntimeError:
        if error is None:
            raise
        raise error from None  # a rank that is gone can't agree; it may be the very thing that the error says

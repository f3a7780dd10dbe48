"""Checks across ranks: they find each other, have the same versions, disk and time, and collectives work.

What each rank found travels through the rendezvous store, a plain TCP connection, so that it arrives even where NCCL
or gloo does not work.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import socket
import statistics
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

from rm_scale.distributed import World, has_gpu, host_group, sum_over_ranks
from rm_scale.doctor.checks_software import STACK
from rm_scale.doctor.findings import GB, Asked, Check
from rm_scale.errors import UserError
from rm_scale.files import existing_parent
from rm_scale.launch.devices import device_number
from rm_scale.version import __version__

_ATTRIBUTE_CACHE_SECONDS = 10.0
"""Network file systems may show a new file this much later; a folder with a new name is mostly seen at once."""
_SKEW_WARN_SECONDS = 1.0
_SKEW_FAIL_SECONDS = 60.0
# Below these rates traffic has fallen back to a slow path: tens of times too slow, not a matter of tuning.
_SLOW_BYTES_PER_SECOND = {"nccl": 1.0e9, "gloo": 0.02e9}
_COLLECTIVE_BYTES = {"nccl": 64 * 2**20, "gloo": 8 * 2**20}


@dataclass(frozen=True)
class Ranks:
    """One rank's connection to all ranks.

    Attributes:
        world: this rank's place.
        node: this machine's name.
        store: torch's rendezvous store.
        answer_seconds: how long the others may take to answer.
        lost: ranks that did not answer; once there is one, the checks that follow are skipped.
    """

    world: World
    node: str
    store: Any
    answer_seconds: float
    lost: list[int] = field(default_factory=list)

    @property
    def leads_node(self) -> bool:
        """Whether this rank makes the checks of its node."""
        return self.world.local_rank == 0

    def gather(self, name: str, value: Any) -> list[Any]:
        """Return every rank's value, in rank order, on rank 0; an empty list on the others.

        Raises:
            UserError: a rank did not give its value in time.
        """
        self.store.set(f"{name}/{self.world.rank}", json.dumps(value))
        if not self.world.is_main:
            return []
        return [json.loads(self.get(f"{name}/{rank}", rank)) for rank in range(self.world.size)]

    def share(self, name: str, make: Callable[[], Any]) -> Any:
        """Return rank 0's value on every rank; `None` on the others when rank 0 could not make it."""
        if not self.world.is_main:
            return json.loads(self.get(name, 0))
        value = None
        try:
            value = make()
        finally:
            self.store.set(name, json.dumps(value))
        return value

    def get(self, key: str, rank: int) -> str:
        """Wait for the value that a rank sets under a key, and return it.

        Raises:
            UserError: it did not in time.
        """
        text = wait_for(self.store, key, self.answer_seconds)
        if text is None:
            self.lost.append(rank)
            raise UserError(
                f"rank {rank} did not answer within {self.answer_seconds:.0f} s. Fix: Look at that rank's node and at "
                "what it printed; --timeout_seconds gives slow ones more time."
            )
        return text


def wait_for(store: Any, key: str, timeout_seconds: float) -> str | None:
    """Return the value of a key in the store, `None` when nobody sets it in time."""
    import torch.distributed

    try:
        store.wait([key], timedelta(seconds=max(0.1, timeout_seconds)))
        return str(store.get(key), "utf-8")
    except torch.distributed.DistError:
        return None


def meet(world: World, timeout_seconds: float) -> Ranks:
    """Connect to the store at MASTER_ADDR and wait for all ranks.

    Raises:
        RuntimeError: torch's own, when they did not come in time.
    """
    import torch.distributed

    timeout = timedelta(seconds=timeout_seconds)
    store, _, _ = next(torch.distributed.rendezvous("env://", world.rank, world.size, timeout=timeout))
    # Shorter than the time limit of a check, so that a reason can be reported before the check is given up.
    answer_seconds = 0.8 * timeout_seconds
    return Ranks(world, socket.gethostname(), torch.distributed.PrefixStore("rm_scale_doctor", store), answer_seconds)


def no_meeting(world: World, checks: list[Check]) -> list[Check]:
    """Report that the ranks did not find each other, with the usual reason."""
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    fix = (
        "All nodes must reach that address: set MASTER_ADDR to the first node's name as the others resolve it and "
        "MASTER_PORT to a port that no firewall closes; look whether every rank started."
    )
    return [Check("ranks", "fail", f"rank {world.rank} at {where}: {check.seen}", fix) for check in checks]


def size(ranks: Ranks, seconds: float) -> list[Check]:
    """Report how many ranks found each other, on how many machines.

    Args:
        ranks: this rank's view.
        seconds: the time that took.
    """
    nodes = ranks.gather("nodes", ranks.node)
    if not nodes:
        return []
    num = len(set(nodes))
    world = f"{ranks.world.size} ranks on {num} node{'s' if num > 1 else ''}"
    return [Check("ranks", "pass", f"{world} met after {seconds:.1f} s (started by {ranks.world.launcher})")]


def versions(ranks: Ranks) -> list[Check]:
    """Check that software and accelerators are the same on every rank."""
    return compare_versions(ranks.gather("versions", {"node": ranks.node, **_software(ranks.world)}))


def _software(world: World) -> dict[str, str]:
    import torch

    found = {name: _version(name) for name in STACK}
    found |= {"python": platform.python_version(), "rm_scale": __version__, "cuda": str(torch.version.cuda)}
    if has_gpu():
        found["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
        number = device_number(world.local_rank, torch.cuda.device_count())
        found["gpu"] = "none" if number is None else torch.cuda.get_device_name(number)
    return found


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def compare_versions(seen: list[dict[str, str]]) -> list[Check]:
    """Report the versions that differ between ranks.

    Args:
        seen: versions by name of each rank, with its "node"; empty on other ranks than the first.
    """
    if not seen:
        return []
    differing = []
    for name in sorted({key for one in seen for key in one} - {"node"}):
        by_value: dict[str, str] = {}
        for one in seen:
            by_value.setdefault(one.get(name, "missing"), one["node"])
        if len(by_value) > 1:
            differing.append(f"{name} {' and '.join(f'{value} ({node})' for value, node in by_value.items())}")
    if not differing:
        return [Check("same versions", "pass", f"on all {len(seen)} ranks")]
    fix = "Use one environment on a disk that all nodes share, or install the same versions on each."
    return [Check("same versions", "fail", f"ranks differ: {'; '.join(differing)}", fix)]


# --- Disk ------------------------------------------------------------------------------------------------------------


def output_directory(ranks: Ranks, asked: Asked) -> list[Check]:
    """Check the shared folder: every node must read a file of rank 0's, and rank 0 one of every node's."""
    folder = ranks.share("folder", lambda: _make_token(Path(asked.output_dir)))
    if folder is None:
        return []  # rank 0 says why
    try:
        problem = _answer_token(Path(folder), ranks) if ranks.leads_node else None
        seen = ranks.gather("token", {"node": ranks.node, "leads": ranks.leads_node, "problem": problem})
        return _judge_answers(Path(folder), seen) if ranks.world.is_main else []
    finally:
        if ranks.world.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _judge_answers(folder: Path, seen: list[dict[str, Any]]) -> list[Check]:
    """Check, on rank 0, that the file of each node has arrived."""
    leaders = [(rank, one) for rank, one in enumerate(seen) if one["leads"]]
    problems = [f"{one['node']} {one['problem']}" for _, one in leaders if one["problem"]]
    for rank, one in leaders:
        if not one["problem"] and _read(folder / f"node-{rank}") != one["node"]:
            problems.append(f"rank 0 can't see what {one['node']} wrote")
    return [judge_output_directory(str(folder.parent), len(leaders), problems)]


def judge_output_directory(place: str, num_nodes: int, problems: list[str]) -> Check:
    """Report on the shared folder."""
    name = "output directory"
    if problems:
        fix = "Give an --output_dir on a file system that all nodes mount at the same place."
        return Check(name, "fail", f"{place}: {'; '.join(problems)}", fix)
    if num_nodes == 1:
        return Check(name, "pass", f"{place}: written and read on one node")
    return Check(name, "pass", f"{place}: all {num_nodes} nodes see what the others write")


def _make_token(output_dir: Path) -> str:
    """Make a folder with a token in it, in `output_dir` or the nearest folder above that exists; return its path."""
    folder = existing_parent(output_dir) / f".rm_scale_doctor_{uuid.uuid4().hex}"
    folder.mkdir()
    (folder / "token").write_text(folder.name, encoding="utf-8")
    return str(folder)


def _answer_token(folder: Path, ranks: Ranks) -> str | None:
    """Read the token and write an answer; return what went wrong, `None` when nothing did."""
    if _read(folder / "token") != folder.name:
        return "can't see what rank 0 wrote"
    try:
        (folder / f"node-{ranks.world.rank}").write_text(ranks.node, encoding="utf-8")
    except OSError as error:
        return f"can't write there ({error.strerror})"
    return None


def _read(path: Path) -> str | None:
    """Return the file's text, waiting as long as a network file system may take to show it; `None` after that."""
    deadline = time.monotonic() + _ATTRIBUTE_CACHE_SECONDS
    while True:
        with contextlib.suppress(OSError):
            text = path.read_text(encoding="utf-8")
            if text:
                return text
        if time.monotonic() > deadline:
            return None
        # Reading the folder makes NFS ask the server again.
        with contextlib.suppress(OSError):
            os.listdir(path.parent)
        time.sleep(0.2)


# --- Time ------------------------------------------------------------------------------------------------------------


def clocks(ranks: Ranks) -> list[Check]:
    """Measure how far each node's clock is from rank 0's, by asking rank 0 for the time."""
    leaders = ranks.gather("leaders", ranks.leads_node)
    for rank in [rank for rank, leads in enumerate(leaders) if leads and rank]:
        _answer_time(ranks, rank)
    asks = ranks.leads_node and not ranks.world.is_main
    ahead = ranks.gather("ahead", {"node": ranks.node, "seconds": _ask_time(ranks) if asks else None})
    return judge_clocks({one["node"]: one["seconds"] for one in ahead if one["seconds"] is not None}) if ahead else []


def _ask_time(ranks: Ranks) -> float:
    """Return the seconds that this clock is ahead of rank 0's, taking both ways of the message to be equally long."""
    rank = ranks.world.rank
    ranks.get(f"go/{rank}", 0)
    before = time.time()
    ranks.store.set(f"ask/{rank}", "")
    theirs = float(ranks.get(f"time/{rank}", 0))
    return (before + time.time()) / 2 - theirs


def _answer_time(ranks: Ranks, rank: int) -> None:
    """Tell one rank the time; one at a time, so that no rank waits in a queue while its clock is compared."""
    ranks.store.set(f"go/{rank}", "")
    ranks.get(f"ask/{rank}", rank)
    ranks.store.set(f"time/{rank}", repr(time.time()))


def judge_clocks(ahead: dict[str, float]) -> list[Check]:
    """Warn of clocks that differ: files then look newer or older than they are.

    Args:
        ahead: by node, the seconds by which its clock is ahead of rank 0's.
    """
    if not ahead:
        return [Check("clocks", "pass", "one node")]
    node, worst = max(ahead.items(), key=lambda item: abs(item[1]))
    seen = f"{node} is {abs(worst):.3f} s {'ahead of' if worst > 0 else 'behind'} rank 0's node, the furthest of all"
    if abs(worst) <= _SKEW_WARN_SECONDS:
        return [Check("clocks", "pass", seen)]
    fix = "Let the nodes follow one time server (chrony, systemd-timesyncd)."
    return [Check("clocks", "fail" if abs(worst) > _SKEW_FAIL_SECONDS else "warn", seen, fix)]


# --- Collectives -----------------------------------------------------------------------------------------------------


def collective(ranks: Ranks, timeout_seconds: float) -> list[Check]:
    """Check the results of all-reduce, all-gather and reduce-scatter over all ranks, and the speed of the first.

    Args:
        ranks: this rank's view.
        timeout_seconds: after this gloo gives up with a reason. NCCL would abort the process, so it gets longer than
            the time after which this check is given up.
    """
    import torch
    from torch import distributed as dist

    backend = "nccl" if has_gpu() else "gloo"
    device = torch.device("cpu")
    if backend == "nccl":
        number = device_number(ranks.world.local_rank, torch.cuda.device_count())
        if number is None:
            return [_no_device(ranks, torch.cuda.device_count())]
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    seconds = timeout_seconds * (10 if backend == "nccl" else 0.8)
    store = dist.PrefixStore("collective", ranks.store)
    dist.init_process_group(
        backend, store=store, rank=ranks.world.rank, world_size=ranks.world.size, timeout=timedelta(seconds=seconds)
    )
    if backend == "nccl":
        try:
            host_group(timedelta(seconds=0.8 * timeout_seconds))  # what ranks tell each other goes over gloo
        except UserError as error:
            text, _, fix = str(error).partition(" Fix: ")
            return [Check("collectives", "fail", text, fix)]
    wrong = _wrong_results(ranks.world, device)
    if backend == "nccl" and sum_over_ranks([1.0]) != [float(ranks.world.size)]:
        wrong.append("gloo's all_reduce")
    if wrong:
        fix = "Memory or a link is broken: find the machine by starting on fewer of them. NCCL_DEBUG=INFO shows links."
        return [Check("collectives", "fail", f"wrong results of {', '.join(wrong)} ({backend})", fix)]
    rate = _all_reduce_rate(ranks.world, device, _COLLECTIVE_BYTES[backend])
    return [judge_rate(backend, rate, ranks.world.size)] if ranks.world.is_main else []


def _no_device(ranks: Ranks, count: int) -> Check:
    fix = (
        "Start one rank per GPU: each task must see all GPUs of its node (srun --gpus-per-node N), or its own alone "
        "(srun --gpus-per-task 1)."
    )
    wanted = f"rank {ranks.world.rank} wants GPU {ranks.world.local_rank}, but sees {count}"
    return Check("collectives", "fail", wanted, fix)


def _wrong_results(world: World, device: Any) -> list[str]:
    """Return the names of the collectives with wrong results; the small whole numbers used here are exact."""
    import torch
    from torch import distributed as dist

    length = 1024
    total = float(world.size * (world.size + 1) // 2)
    one = torch.full((length,), float(world.rank + 1), device=device)
    summed = one.clone()
    dist.all_reduce(summed)
    gathered = torch.empty(world.size * length, device=device)
    dist.all_gather_single(gathered, one)
    expected = torch.arange(1, world.size + 1, device=device, dtype=torch.float32).repeat_interleave(length)
    scattered = torch.empty(length, device=device)
    dist.reduce_scatter_single(scattered, one.repeat(world.size))
    results = {
        "all-reduce": bool((summed == total).all()),
        "all-gather": bool(torch.equal(gathered, expected)),
        "reduce-scatter": bool((scattered == total).all()),
    }
    return [name for name, right in results.items() if not right]


def _all_reduce_rate(world: World, device: Any, num_bytes: int) -> float:
    """Return the bytes per second over each rank's link in an all-reduce: median of three after a warm-up.

    A ring sends 2 (n - 1) / n of the tensor over each link.
    """
    import torch
    from torch import distributed as dist

    tensor = torch.zeros(num_bytes // 4, device=device)
    seconds = []
    for _ in range(4):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * (world.size - 1) / world.size * num_bytes / statistics.median(seconds[1:])


def judge_rate(backend: str, rate: float, num_ranks: int) -> Check:
    """Warn of links, in bytes/s, so slow that only a wrong path through the network explains it."""
    size = _COLLECTIVE_BYTES[backend] // 2**20
    seen = f"results right on {num_ranks} ranks; all-reduce of {size} MiB over {backend}: {rate / GB:.2f} GB/s a link"
    if rate >= _SLOW_BYTES_PER_SECOND[backend]:
        return Check("collectives", "pass", seen)
    fix = (
        "Traffic takes a slow way: NCCL_DEBUG=INFO says which; name the fast interface (NCCL_SOCKET_IFNAME, "
        "NCCL_IB_HCA; on CPUs GLOO_SOCKET_IFNAME)."
    )
    return Check("collectives", "warn", f"{seen}, slow", fix)

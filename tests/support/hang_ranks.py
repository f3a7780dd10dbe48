"""Two real ranks that hang in a chosen way, under the watchdog: what `tests/distributed/test_watchdog.py` starts.

    python -m tests.support.hang_ranks FOLDER CASE...

Each case forks two ranks and leaves in FOLDER/CASE what they printed (`rank-N.log`), the reason that was noted
(`reason.txt`) and the watchdog's own reports. The backend is nccl where there are GPUs, or their stand-in; otherwise
gloo. A rank that waits does so as NCCL's host does: in plain code that polls, outside torch, so that its stack looks
like that of a rank at work.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import distributed
from torch.profiler import ProfilerActivity, profile

from rm_scale.training.collective_progress import count_collectives, since
from rm_scale.training.watchdog import Watchdog, collective_failure

NUM_RANKS = 2
LIMIT_SECONDS = 2.0
GRACE_SECONDS = {"frozen": 3.0, "killed": 3.0}
"""Where a rank never answers the wait is in full; otherwise it ends with the last report, however slow the machine."""


def wait_like_a_gpu(work: Any) -> None:
    """Until the collective is over, without a frame of torch on the stack: as `.item()` waits under NCCL."""
    while not work.is_completed():
        time.sleep(0.01)
    work.wait()  # an error is raised here


def read_data_for_ever(watchdog: Watchdog | None = None) -> None:
    """The host's work has no end; with a watchdog the main thread still says that it moves."""
    while True:
        time.sleep(0.01)
        if watchdog is not None:
            watchdog.beat("reading the step's groups")


def numbers(*shape: int) -> torch.Tensor:
    """Something to reduce or to train on, where the backend takes it."""
    return torch.ones(*shape, device="cuda" if torch.cuda.is_available() else "cpu")


def all_reduce(group: distributed.ProcessGroup | None = None) -> Any:
    """One that returns at once."""
    return distributed.all_reduce(numbers(1), group=group, async_op=True)


def never_called(rank: int, watchdog: Watchdog) -> None:
    """Rank 1 never calls what rank 0 waits for."""
    if rank == 1:
        read_data_for_ever()
    wait_like_a_gpu(all_reduce())


def busy(rank: int, watchdog: Watchdog) -> None:
    """Rank 0 is busy for ever, and moves; rank 1 waits for it."""
    if rank == 0:
        read_data_for_ever(watchdog)
    wait_like_a_gpu(all_reduce())


def own_group(rank: int, watchdog: Watchdog) -> None:
    """As `never_called`, in a group beside the first, after sends that gloo counts on the sender alone."""
    group = distributed.new_group(list(range(NUM_RANKS)))
    wait_like_a_gpu(all_reduce(group))
    if rank == 1:
        read_data_for_ever()
    wait_like_a_gpu(all_reduce(group))


def same_numbers(rank: int, watchdog: Watchdog) -> None:
    """Both hang, and nobody waits for the other."""
    read_data_for_ever()


def frozen(rank: int, watchdog: Watchdog) -> None:
    """Rank 1 is stopped by a signal."""
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    wait_like_a_gpu(all_reduce())


def killed(rank: int, watchdog: Watchdog) -> None:
    """Rank 1 dies, and rank 0 gets an error from gloo."""
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        distributed.all_reduce(numbers(1))


def ddp(rank: int, watchdog: Watchdog) -> None:
    """Rank 1 never begins its backward pass; in rank 0's, C++ calls the collective and, with gloo, waits for it."""
    data = numbers(2, 4)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4).to(data.device))
    loss = model(data).sum()
    if rank == 1:
        read_data_for_ever()
    loss.backward()
    wait_like_a_gpu(all_reduce())  # where the backward pass doesn't block the host, the step's next collective does


CASES: dict[str, Callable[[int, Watchdog], None]] = {
    case.__name__: case for case in (never_called, busy, own_group, same_numbers, frozen, killed, ddp)
}


def hang(case: str, rank: int, folder: Path) -> NoReturn:
    """Be one rank of a case: agree on a few collectives, then hang; errors end as in `RewardTrainer.train`."""
    if case == "own_group":
        (distributed.send if rank == 0 else distributed.recv)(torch.ones(1), 1 - rank)
        if rank == 1:
            distributed.isend(torch.ones(1), 0)  # gloo counts it on this rank alone, which then has more than the other
    watchdog = Watchdog(folder, rank, NUM_RANKS, 2 * LIMIT_SECONDS, 1, lambda: True, (folder / "reason.txt").write_text)
    watchdog.limit, watchdog.grace = LIMIT_SECONDS, GRACE_SECONDS.get(case, 60.0)
    watchdog.start()
    try:
        for step in range(1, 4):
            watchdog.beat("micro-batch 1 of 1", step)
            wait_like_a_gpu(all_reduce())
        CASES[case](rank, watchdog)
    except RuntimeError as error:
        what = collective_failure(error)
        assert what is not None, error
        watchdog.report_and_leave(what)
    raise AssertionError(f"{case}: rank {rank} did not hang")


def count(rank: int, folder: Path) -> NoReturn:
    """Write down how many collectives DDP and each ZeRO stage call in three steps, and how many torch has counted."""
    found = {}
    for stage in range(4):
        step = ddp_step() if stage == 0 else zero_step(stage)
        step()
        before = count_collectives()
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            for _ in range(3):
                step()
        given = {group.key: group.given for group in since(count_collectives(), before)}
        called = [event.name for event in seen.events() if event.name.startswith("c10d::")]
        found[f"zero{stage}" if stage else "ddp"] = {"given": given, "called": called}
    (folder / f"counts-{rank}.json").write_text(json.dumps(found))
    os._exit(0)


def _layers() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(*[torch.nn.Linear(32, 32) for _ in range(4)])


def ddp_step() -> Callable[[], None]:
    """A training step under DDP."""
    model = torch.nn.parallel.DistributedDataParallel(_layers())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step() -> None:
        model(torch.ones(2, 32)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def zero_step(stage: int) -> Callable[[], None]:
    """A training step under one of DeepSpeed's ZeRO stages."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero, "optimizer": optimizer}
    with deepspeed.zero.Init(config_dict_or_path=config) if stage == 3 else contextlib.nullcontext():
        layers = _layers()
    engine, *_ = deepspeed.initialize(model=layers, model_parameters=layers.parameters(), config=config)

    def step() -> None:
        engine.backward(engine(torch.ones(2, 32)).sum())
        engine.step()

    return step


def be_rank(case: str, rank: int, folder: Path) -> NoReturn:
    """In a forked process: join the other rank, and do what the case says."""
    log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_RANKS)}
        backend = "gloo"
        if torch.cuda.is_available():  # not to be asked before the fork
            torch.cuda.set_device(rank)
            backend = "nccl"
        distributed.init_process_group(backend, f"file://{folder}/store", rank=rank, world_size=NUM_RANKS)
        (count(rank, folder) if case == "count" else hang(case, rank, folder))
    except BaseException as error:
        print(f"{case} on rank {rank}: {error!r}", flush=True)
        os._exit(3)


def fork_ranks(case: str, folder: Path) -> list[int]:
    """Start the ranks of a case; gives their process ids."""
    folder.mkdir(parents=True)
    pids = []
    for rank in range(NUM_RANKS):
        pid = os.fork()
        if pid == 0:
            be_rank(case, rank, folder)
        pids.append(pid)
    return pids


def wait_for(case: str, pids: list[int]) -> list[int]:
    """The exit codes of a case's ranks; the one that is frozen is killed when the other has ended."""
    codes = []
    for rank, pid in enumerate(pids):
        if case == "frozen" and rank == 1:
            os.kill(pid, signal.SIGKILL)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    return codes


def main(folder: Path, cases: list[str]) -> None:
    """All cases at a time: their ranks do nothing but wait."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    ranks = {case: fork_ranks(case, folder / case) for case in cases}
    print(json.dumps({case: wait_for(case, pids) for case, pids in ranks.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

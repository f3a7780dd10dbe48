"""The checks that one rank makes: those of its machine, its own, and those that all ranks make together."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from rm_scale.distributed import World, has_gpu, prepare_environment
from rm_scale.doctor import checks_machine as machine
from rm_scale.doctor import checks_model, checks_network, checks_ranks, checks_software
from rm_scale.doctor.checks_ranks import Ranks, wait_for
from rm_scale.doctor.findings import Asked, Check, CheckFunction, Finding, run_check
from rm_scale.launch.devices import rank_device
from rm_scale.launch.extensions import prepare_extensions
from rm_scale.logs import get_logger

logger = get_logger(__name__)

NodeCheck = Callable[[Asked], Check | list[Check]]

# The order is that of the table.
NODE_CHECKS: tuple[tuple[str, NodeCheck], ...] = (
    ("python", checks_software.python_version),
    ("packages", checks_software.package_versions),
    ("gpus", machine.gpus),
    ("bfloat16", machine.bfloat16),
    ("c++ compiler", checks_software.compiler),
    ("ninja", checks_software.ninja),
    ("cuda toolkit", checks_software.cuda_toolkit),
    ("operator builds", checks_software.operator_builds),
    ("cores", machine.cores),
    ("numactl", machine.numa),
    ("model", machine.model),
    ("memory", machine.memory),
    ("shared memory", machine.shared_memory),
    ("limits", machine.limits),
    ("disk", machine.disk),
    ("host name", checks_network.host_name),
    ("interface", checks_network.interface),
    ("slurm", checks_network.allocation),
)

WORLD_CHECKS = frozenset({"ranks", "same versions", "output directory", "clocks"})
"""Checks that rank 0 reports for all ranks."""

NUM_TIMEOUTS = 12
"""A rank that has not ended after this many times the time limit of one check is ended, whatever its checks do."""


def check_node(asked: Asked, more: Sequence[tuple[str, NodeCheck]] = ()) -> list[Finding]:
    """Make all checks of this machine.

    Args:
        asked: what the doctor was asked.
        more: further checks, made last.
    """
    findings = []
    for name, check in (*NODE_CHECKS, *more):
        checks = run_check(name, partial(check, asked), asked.timeout_seconds)
        findings += [Finding(socket.gethostname(), found) for found in checks]
    return findings


class RankExamination:
    """The checks of one rank.

    Args:
        world: this rank's place.
        asked: what the doctor was asked.
        tell: is handed each finding as soon as it is made, since a later check may take the process with it.
    """

    def __init__(self, world: World, asked: Asked, tell: Callable[[Finding], None]) -> None:
        self.world = world
        self.asked = replace(asked, ranks_on_node=world.ranks_on_node, spans_nodes=world.size > world.ranks_on_node)
        self.tell = tell
        self.ranks: Ranks | None = None

    def run(self, with_node_checks: bool) -> None:
        """Make all checks, in their order.

        Args:
            with_node_checks: the rank that leads its node makes those of the machine too.
        """
        self._check("environment", self._prepare)
        if with_node_checks and self.world.local_rank == 0:
            for finding in check_node(self.asked):
                self.tell(finding)
        if self.world.size > 1:
            self._meet()
        else:
            self._keep([Check("ranks", "skip", "one alone; --nproc N, --hostfile FILE or srun start more")])
        self._check("imports", checks_model.imports)
        self._check("model forward", lambda: checks_model.forward(self._device()))
        if self.asked.method == "qlora":
            self._check("4-bit weights", lambda: checks_model.four_bits(self._device()))
        if self.ranks is not None:
            self._check_together(self.ranks)

    def _prepare(self) -> list[Check]:
        prepare_environment(self.world)
        # Local rank 0 would remove old locks of builds; the doctor changes nothing.
        prepare_extensions(local_rank=1)
        return []

    def _meet(self) -> None:
        started = time.perf_counter()

        def meet() -> list[Check]:
            self.ranks = checks_ranks.meet(self.world, self.asked.timeout_seconds)
            return checks_ranks.size(self.ranks, time.perf_counter() - started)

        # The store gives up by itself, with a reason; the guard is for the case that it does not.
        found = run_check("ranks", meet, self.asked.timeout_seconds + 15)
        self._keep(found if self.ranks is not None else checks_ranks.no_meeting(self.world, found))

    def _check_together(self, ranks: Ranks) -> None:
        together: tuple[tuple[str, CheckFunction], ...] = (
            ("same versions", lambda: checks_ranks.versions(ranks)),
            ("output directory", lambda: checks_ranks.output_directory(ranks, self.asked)),
            ("clocks", lambda: checks_ranks.clocks(ranks)),
            # Last, since NCCL can take the process with it.
            ("collectives", lambda: checks_ranks.collective(ranks, self.asked.timeout_seconds)),
        )
        for name, check in together:
            if ranks.lost:
                self._keep([Check(name, "skip", f"rank {ranks.lost[0]} is lost")])
            else:
                self._check(name, check)

    def _check(self, name: str, check: CheckFunction) -> None:
        self._keep(run_check(name, check, self.asked.timeout_seconds))

    def _keep(self, checks: list[Check]) -> None:
        for check in checks:
            self.tell(Finding(self._where(check), check))

    def _where(self, check: Check) -> str:
        if self.world.size == 1 or (self.world.is_main and check.name in WORLD_CHECKS):
            return ""
        return f"rank {self.world.rank} on {socket.gethostname()}"

    def _device(self) -> str:
        return rank_device(None, self.world) if has_gpu() else "cpu"


def collect(ranks: Ranks, own: Sequence[Finding], timeout_seconds: float) -> list[Finding]:
    """Return all ranks' findings on rank 0, with a failure for each rank that sent none; nothing on the others.

    Args:
        ranks: this rank's view.
        own: this rank's findings.
        timeout_seconds: that the slowest rank may need longer than rank 0.
    """
    if not ranks.world.is_main:
        values = [finding.to_dict() for finding in own]
        _set_if_possible(ranks, f"findings/{ranks.world.rank}", json.dumps(values))
        return []
    deadline = time.monotonic() + timeout_seconds
    findings = list(own)
    for rank in range(1, ranks.world.size):
        seconds = 1.0 if rank in ranks.lost else deadline - time.monotonic()
        text = wait_for(ranks.store, f"findings/{rank}", seconds)
        if text is None:
            fix = "Read what it printed: it ended in the middle, or its machine is out of reach."
            findings.append(Finding("", Check("ranks", "fail", f"rank {rank} did not report", fix)))
        else:
            findings += [Finding.from_dict(values) for values in json.loads(text)]
    return findings


def leave_together(ranks: Ranks, code: int, timeout_seconds: float) -> int:
    """Return rank 0's exit code on every rank. Rank 0 waits until the others have it, since it holds the store.

    Args:
        ranks: this rank's view.
        code: this rank's own; what counts where rank 0 can't be asked any more.
        timeout_seconds: that the slowest rank may need longer than this one.
    """
    if ranks.world.is_main:
        ranks.store.set("code", str(code))
        deadline = time.monotonic() + timeout_seconds
        for rank in range(1, ranks.world.size):
            wait_for(ranks.store, f"bye/{rank}", deadline - time.monotonic())
        return code
    text = wait_for(ranks.store, "code", timeout_seconds)
    _set_if_possible(ranks, f"bye/{ranks.world.rank}", "")
    return code if text is None else int(text)


def _set_if_possible(ranks: Ranks, key: str, value: str) -> None:
    """Set a key, unless the store has ended with rank 0: then nobody is left to read it."""
    import torch.distributed

    with contextlib.suppress(torch.distributed.DistError):
        ranks.store.set(key, value)

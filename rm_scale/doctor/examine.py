"""`rm-scale doctor`: run the checks on this machine, on ranks or on other machines, and gather what they find."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from rm_scale.distributed import World, detect_world
from rm_scale.doctor import checks_network
from rm_scale.doctor.findings import Asked, Check, Finding, run_check
from rm_scale.doctor.findings_table import as_json, as_table, exit_code
from rm_scale.doctor.one_rank import NUM_TIMEOUTS, RankExamination, check_node, collect, leave_together
from rm_scale.doctor.worker import job_text, read_findings
from rm_scale.errors import UserError
from rm_scale.guard import leave
from rm_scale.launch.hostfile import read_hostfile
from rm_scale.launch.ranks import Ended, num_local_ranks, start_ranks
from rm_scale.logs import get_logger
from rm_scale.texts import one_line

logger = get_logger(__name__)

_SSH_SECONDS = 15


def run(options: argparse.Namespace) -> int:
    """Make all checks and print them; return 0 when none fails, else 1.

    Inside `srun` or `torchrun` every process is a rank and rank 0 prints; such a process does not return but ends.

    Raises:
        UserError: an option makes no sense.
    """
    _check_options(options)
    asked = Asked(
        output_dir=os.path.abspath(os.path.expanduser(options.output_dir)),
        model=_absolute_if_local(options.model),
        method=options.method,
        lora_r=options.lora_r,
        save_total_limit=options.save_total_limit,
        min_free_gb=options.min_free_gb,
        timeout_seconds=options.timeout_seconds,
    )
    world = detect_world()
    if world.size > 1:
        leave(_examine_as_rank(world, asked, options.json))
    findings, started = _examine_from_here(asked, options.nproc, options.hostfile)
    _show(findings, started, options.json)
    return exit_code(findings)


def _check_options(options: argparse.Namespace) -> None:
    if options.timeout_seconds <= 0:
        raise UserError(f"timeout_seconds={options.timeout_seconds:g}: must be above 0. Fix: leave it out, or 60.")
    for name in ("lora_r", "save_total_limit"):
        if getattr(options, name) < 1:
            raise UserError(f"{name}={getattr(options, name)}: must be at least 1. Fix: give what the run will have.")


def _absolute_if_local(model: str | None) -> str | None:
    """Return a local folder's absolute path, since ranks may start in another folder; else the name as it is."""
    return os.path.abspath(model) if model is not None and Path(model).exists() else model


# --- From one process ------------------------------------------------------------------------------------------------


def _examine_from_here(asked: Asked, nproc: int | None, hostfile: str | None) -> tuple[list[Finding], dict[str, Any]]:
    """Check this machine, or those of the hostfile, and start ranks; return the findings and what was started."""
    if hostfile is not None:
        hosts = read_hostfile(hostfile)
        started = {"size": sum(hosts.values()), "launcher": "deepspeed", "hostfile": hostfile}
        findings = [Finding("", check) for check in run_check("hosts", lambda: reach(hosts), 60 + _SSH_SECONDS)]
        if exit_code(findings):
            return findings, started
        return [*findings, *_from_ranks(asked, 1, hostfile)], started
    try:
        num_ranks = num_local_ranks(nproc, default_on_cpu=1)
    except (ImportError, OSError):
        num_ranks = 0  # torch is broken, which the checks below will say
    started = {"size": num_ranks, "launcher": "deepspeed" if num_ranks > 1 else "python", "hostfile": None}
    findings = check_node(replace(asked, ranks_on_node=max(1, num_ranks)), more=[("port", checks_network.port)])
    if num_ranks == 0:
        return [*findings, Finding("", Check("ranks", "skip", "torch can't be imported"))], started
    return [*findings, *_from_ranks(asked, num_ranks, None)], started


def _from_ranks(asked: Asked, num_ranks: int, hostfile: str | None) -> list[Finding]:
    """Start the ranks and read what they found."""
    logger.info("starting ranks (some 20 seconds)")
    job = job_text(asked, with_node_checks=hostfile is not None)
    timeout_seconds = (NUM_TIMEOUTS + 1) * asked.timeout_seconds
    ended = start_ranks("rm_scale.doctor.worker", [job], num_ranks, timeout_seconds, hostfile)
    findings, rest = read_findings(ended.output)
    logger.debug(rest)
    return [*findings, *judge_end(ended, rest, len(findings))]


def judge_end(ended: Ended, printed: str, num_findings: int) -> list[Finding]:
    """Report a failure, with the last lines printed, when the ranks did not end by themselves with code 0.

    Args:
        ended: how they ended.
        printed: what they printed beside findings.
        num_findings: how many findings they reported.
    """
    if ended.code == 0 and num_findings:
        return []
    how = "were ended, out of time" if ended.code is None else f"ended with code {ended.code}"
    tail = Ended(ended.code, printed).tail() or "nothing"
    fix = "The last lines say why; `rm-scale --debug doctor` prints all of them."
    return [Finding("", Check("ranks", "fail", f"the ranks {how}; they printed: {tail[-700:]}", fix))]


def reach(hosts: Sequence[str] | dict[str, int]) -> Check:
    """Check that ssh reaches every machine without asking for a password, and that pdsh is there to start ranks."""
    missing = [tool for tool in ("ssh", "pdsh") if shutil.which(tool) is None]
    if missing:
        fix = "Install them on this machine (apt install pdsh openssh-client); under Slurm use srun rm-scale doctor."
        return Check("hosts", "fail", f"{' and '.join(missing)} missing, by which deepspeed starts ranks", fix)
    with ThreadPoolExecutor(max_workers=32) as pool:
        answers = dict(zip(hosts, pool.map(_ssh_problem, hosts), strict=True))
    bad = [f"{host} ({problem})" for host, problem in answers.items() if problem]
    if bad:
        fix = "Make `ssh HOST true` work without a password for each (ssh-copy-id), from this machine."
        return Check("hosts", "fail", f"ssh does not reach {', '.join(bad[:8])}", fix)
    return Check("hosts", "pass", f"ssh reaches all {len(answers)}")


def _ssh_problem(host: str) -> str | None:
    command = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", host, "true"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SSH_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer in {_SSH_SECONDS} s"
    return None if done.returncode == 0 else one_line(done.stderr, 120) or f"code {done.returncode}"


# --- As one of the ranks ---------------------------------------------------------------------------------------------


def _examine_as_rank(world: World, asked: Asked, json_wanted: bool) -> int:
    """Examine as a rank of a running step; rank 0 prints what all found. Return the exit code that all ranks share."""
    # Loading the tiny model is not worth a line.
    logging.getLogger("rm_scale").setLevel(logging.ERROR)
    faulthandler.dump_traceback_later(NUM_TIMEOUTS * asked.timeout_seconds, exit=True)
    own: list[Finding] = []
    examination = RankExamination(world, asked, own.append)
    with _libraries_print_to_stderr():
        examination.run(with_node_checks=True)
    ranks = examination.ranks
    if ranks is None and not world.is_main:
        # Without a connection rank 0 can't print what this rank has found.
        bad = [finding for finding in own if finding.check.status in {"warn", "fail"}]
        print(f"rank {world.rank}:\n{as_table(bad)}", file=sys.stderr, flush=True)
        return 1
    findings = own if ranks is None else collect(ranks, own, 2 * asked.timeout_seconds)
    if world.is_main:
        _show(findings, {"size": world.size, "launcher": world.launcher, "hostfile": None}, json_wanted)
    if ranks is None:
        return 1
    return leave_together(ranks, exit_code(findings or own), asked.timeout_seconds)


@contextlib.contextmanager
def _libraries_print_to_stderr() -> Iterator[None]:
    """Keep standard output for the report: some libraries print to it when they are imported."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _show(findings: Sequence[Finding], world: dict[str, Any], json_wanted: bool) -> None:
    print(as_json(findings, world) if json_wanted else as_table(findings), flush=True)

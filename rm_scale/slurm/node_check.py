"""The check of all nodes before any rank starts: do they answer, see one disk, and reach the first node?

Every node reads a mark on the disk and reports to the first node over the port that rank 0 will use. The first node
then names what is wrong: a node that is out of reach, a disk that isn't shared, a port that is blocked. It takes a
second, without torch.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rm_scale.distributed import gloo_interface
from rm_scale.files import read_json_object, write_whole
from rm_scale.meeting import EXIT_PORT_TAKEN
from rm_scale.network import address_of_interface, address_of_own_name, interfaces, is_ipv6, is_loopback, is_usable
from rm_scale.slurm.check_meeting import hear_nodes, report
from rm_scale.slurm.job_start import Start


def wait_seconds() -> float:
    """Return how long nodes may take to answer."""
    return float(os.environ.get("RM_SCALE_CHECK_SECONDS", "60"))


def check_node(start: Start, place: int) -> int:
    """Take part as node `place`. The first node prints what is wrong.

    Returns:
        2 on the first node if anything is wrong; `EXIT_PORT_TAKEN` there if another program has taken the port since it
        was chosen; else 0.
    """
    findings = look_around(start, place)
    if place > 0:
        return _say_hello(start, findings)
    code = 0
    try:
        others = hear_nodes(start, time.monotonic() + 0.8 * wait_seconds()) if len(start.nodes) > 1 else {}
        problems = judge(start, {start.nodes[0]: findings} | others)
        code = 2 if problems else 0
    except OSError as error:
        problems = [f"port {start.master_port} on {start.nodes[0]}: {error.strerror}. Fix: submit again."]
        code = EXIT_PORT_TAKEN if error.errno == errno.EADDRINUSE else 2
    for folder in folders(start).values():
        token_path(folder, start).unlink(missing_ok=True)
    if problems:
        print("rm_scale: " + "\n".join(problems), file=sys.stderr, flush=True)
    return code


def look_around(start: Start, place: int) -> dict[str, Any]:
    """Return what this node sees: the job's folder, the output directory, its GPUs, its network."""
    name = start.nodes[place]
    findings: dict[str, Any] = {"node": name, "gpus": num_gpus(os.environ), "shared": {}}
    for what, folder in folders(start).items():
        findings["shared"][what] = _sees_token(folder, start, name)
    findings["train"] = Path(start.train).is_file()
    if len(start.nodes) > 1:
        findings["gloo"] = gloo_of_ranks(start, os.environ)
    return findings


def folders(start: Start) -> dict[str, Path]:
    """Return the folders that all nodes must share, by their purpose."""
    return {"logs": Path(start.folder), "output_dir": Path(start.output_dir)}


def token_path(folder: Path, start: Start) -> Path:
    """Return the file by which the job's script marks a folder that must be shared."""
    return folder / f".shared-{start.job_id}-{start.attempt}"


def _sees_token(folder: Path, start: Start, node: str) -> str:
    """Look for the mark of the job's script; return what is wrong, empty when nothing is."""
    try:
        text = token_path(folder, start).read_text(encoding="utf-8")
    except OSError as error:
        return f"{node} can't see what {start.nodes[0]} wrote there ({error.strerror})"
    if text != token(start):
        return f"{node} sees another content there than {start.nodes[0]} wrote"
    try:
        probe = folder / f".probe-{node}-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        return f"{node} can't write there ({error.strerror})"
    return ""


def token(start: Start) -> str:
    """Return the mark's content."""
    return f"job {start.job_id} attempt {start.attempt}"


def mark_folders(start: Start) -> None:
    """Write the mark into the folders that must be shared; called by the job's script."""
    for folder in folders(start).values():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(token_path(folder, start), token(start))


def num_gpus(environ: Any) -> int:
    """Return how many GPUs Slurm gave the job on this node."""
    return int(environ.get("SLURM_GPUS_ON_NODE") or 0)


def gloo_of_ranks(start: Start, environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the interface that gloo, which carries numbers between ranks, will use on this node, and its address.

    The interface is empty where gloo goes by the node's host name; the address where the interface has none.
    """
    interface = gloo_interface({**environ, "MASTER_ADDR": start.master_addr}, several_nodes=True)
    address = address_of_interface(interface.partition(",")[0]) if interface else address_of_own_name()
    present = {name: address_of_interface(name) for name in interfaces()}
    return {"interface": interface, "address": address, "present": [name for name in present if present[name]]}


# --- Meeting ---------------------------------------------------------------------------------------------------------


def _say_hello(start: Start, findings: dict[str, Any]) -> int:
    """Report to the first node; return 0 even when it can't be reached, since the first node names who is missing."""

    def failed(trouble: str) -> None:
        _leave_note(start, {**findings, "trouble": trouble})

    report(start, findings, time.monotonic() + wait_seconds(), failed)
    return 0


def _leave_note(start: Start, findings: dict[str, Any]) -> None:
    """Write the findings to the disk, which a node that can't connect may still reach."""
    with contextlib.suppress(OSError):
        write_whole(Path(start.folder) / f"{findings['node']}.check.json", json.dumps(findings))


def judge(start: Start, heard: dict[str, dict[str, Any]]) -> list[str]:
    """Return a message for each thing that would break the run, from what the first node has heard."""
    problems = [_missing(start, node) for node in start.nodes if node not in heard]
    for what, folder in folders(start).items():
        blind = [findings["shared"][what] for findings in heard.values() if findings["shared"].get(what)]
        if blind:
            problems.append(
                f"{what}={folder}: {'; '.join(blind[:4])}. All nodes must share it. Fix: choose a folder on the "
                f"cluster's shared disk ({_fix_for(what)})."
            )
    lacking = [node for node, findings in heard.items() if not findings.get("train", True)]
    if lacking:
        problems.append(
            f"{start.train}: not on {', '.join(lacking)}. Fix: install rm_scale on the shared disk, or on every node."
        )
    counts = {node: findings["gpus"] for node, findings in heard.items()}
    if start.gpus_per_node and len(set(counts.values())) > 1:
        told = ", ".join(f"{node} has {count}" for node, count in counts.items())
        problems.append(f"GPUs per node: {told}. Fix: ask for --gpus-per-node=N rather than --gpus=N.")
    if not is_loopback(start.master_addr):
        problems += _judge_network({node: findings["gloo"] for node, findings in heard.items() if "gloo" in findings})
    return problems


def _judge_network(gloo: dict[str, dict[str, Any]]) -> list[str]:
    """Return a message for each way in which ranks of different nodes could not connect over gloo."""
    problems = []
    fix = "Fix: name the interface that all nodes share, RM_SCALE_INTERFACE in slurm/site.env"
    for node, seen in gloo.items():
        has = f"{node} has {', '.join(seen['present']) or 'none'}"
        if not seen["address"]:
            problems.append(
                f"GLOO_SOCKET_IFNAME={seen['interface']}: {node} has no such interface with an address that others "
                f"reach. {fix}; {has}."
            )
        elif not is_usable(seen["address"]):
            problems.append(
                f"{node}: its host name stands for {seen['address']}, where others don't reach it. {fix}; {has}."
            )
    families = {node: "IPv6" if is_ipv6(seen["address"]) else "IPv4" for node, seen in gloo.items()}
    if not problems and len(set(families.values())) > 1:
        told = ", ".join(f"{node} has {family} ({gloo[node]['address']})" for node, family in families.items())
        problems.append(f"addresses for gloo: {told}; ranks of both don't connect. {fix} with addresses of one kind.")
    return problems


def _fix_for(what: str) -> str:
    return "RM_SCALE_LOGS in slurm/site.env" if what == "logs" else "--output_dir"


def _missing(start: Start, node: str) -> str:
    """Say why a node was not heard, by the note that it may have left on the disk."""
    note = read_json_object(Path(start.folder) / f"{node}.check.json")
    if not note:
        return (
            f"{node}: did not answer within {wait_seconds():.0f} s and left no sign in {start.folder}. Fix: sinfo -n "
            f"{node} -R says whether it is down; leave it out with sbatch --exclude={node}."
        )
    return (
        f"{node}: runs, but can't reach {start.master_addr} on port {start.master_port} ({note.get('trouble')}). Fix: "
        "name the interface that nodes share (RM_SCALE_INTERFACE in slurm/site.env), or open the port range."
    )

"""The check of all nodes before any rank starts: do they answer, see one disk, and reach the first node?

Every node reads a mark on the disk and reports to the first node over the port that rank 0 will use. The first node
then names what is wrong: a node that is out of reach, a disk that isn't shared, a port that is blocked. It takes a
second, without torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from rm_scale.files import read_json_object, write_whole
from rm_scale.slurm.job_start import Start


def wait_seconds() -> float:
    """Return how long nodes may take to answer."""
    return float(os.environ.get("RM_SCALE_CHECK_SECONDS", "60"))


def check_node(start: Start, place: int) -> int:
    """Take part as node `place`. The first node prints what is wrong, and returns 2 if anything is; else return 0."""
    findings = look_around(start, place)
    if place > 0:
        return _say_hello(start, findings)
    try:
        others = _listen(start) if len(start.nodes) > 1 else {}
        problems = judge(start, {start.nodes[0]: findings} | others)
    except OSError as error:
        problems = [f"port {start.master_port} on {start.nodes[0]}: {error.strerror}. Fix: submit again."]
    for folder in folders(start).values():
        token_path(folder, start).unlink(missing_ok=True)
    if problems:
        print("rm_scale: " + "\n".join(problems), file=sys.stderr, flush=True)
    return 2 if problems else 0


def look_around(start: Start, place: int) -> dict[str, Any]:
    """Return what this node sees: the job's folder, the output directory, its GPUs."""
    name = start.nodes[place]
    findings: dict[str, Any] = {"node": name, "gpus": num_gpus(os.environ), "shared": {}}
    for what, folder in folders(start).items():
        findings["shared"][what] = _sees_token(folder, start, name)
    findings["train"] = Path(start.train).is_file()
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


# --- Meeting ---------------------------------------------------------------------------------------------------------


def _say_hello(start: Start, findings: dict[str, Any]) -> int:
    """Report to the first node; return 0 even when it can't be reached, since the first node names who is missing."""
    deadline = time.monotonic() + wait_seconds()
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((start.master_addr, start.master_port), timeout=5) as link:
                link.sendall(json.dumps(findings).encode() + b"\n")
                link.settimeout(max(1.0, deadline - time.monotonic()))
                link.recv(1)  # returns when the first node has heard all and closes the connection
            return 0
        except OSError as error:
            findings["trouble"] = str(error)
            _leave_note(start, findings)
            time.sleep(0.2)
    return 0


def _leave_note(start: Start, findings: dict[str, Any]) -> None:
    """Write the findings to the disk, which a node that can't connect may still reach."""
    with contextlib.suppress(OSError):
        write_whole(Path(start.folder) / f"{findings['node']}.check.json", json.dumps(findings))


def _listen(start: Start) -> dict[str, dict[str, Any]]:
    """Return the findings of the other nodes, of as many as answer in time."""
    heard: dict[str, dict[str, Any]] = {}
    links = []
    deadline = time.monotonic() + 0.8 * wait_seconds()
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", start.master_port))
        server.listen(len(start.nodes))
        while len(heard) < len(start.nodes) - 1 and time.monotonic() < deadline:
            server.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                link, _ = server.accept()
                link.settimeout(5)
                with link.makefile("r", encoding="utf-8") as lines:
                    findings = json.loads(lines.readline(65536))
                heard[str(findings["node"])] = findings
                links.append(link)
            except (OSError, ValueError, KeyError, TypeError):
                continue  # a connection that is not from a node of this job
    for link in links:
        link.close()
    return heard


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

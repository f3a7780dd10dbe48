"""Checks of how ranks will find each other: host name, port, interface, and the Slurm allocation."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

import psutil

from rm_scale.doctor.findings import Asked, Check
from rm_scale.files import free_port

_DEFAULT_PORT = 29500
"""Default of deepspeed and torchrun."""
_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_VIRTUAL = ("lo", "docker", "veth", "virbr", "br-", "cni", "flannel", "ifb", "tap", "tun", "bond0.", "podman", "dummy")


def host_name(asked: Asked) -> Check:
    """Check that this machine's own name resolves: gloo connects over the address."""
    name = socket.gethostname()
    fix = "Let it resolve to an address that all nodes reach, or set GLOO_SOCKET_IFNAME (GPUs: NCCL_SOCKET_IFNAME)."
    # With the interface named, no name is resolved.
    matters = asked.spans_nodes and not any(os.environ.get(variable) for variable in _INTERFACE_VARIABLES)
    try:
        addresses = sorted({str(item[4][0]) for item in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})
    except OSError as error:
        seen = f"{name} does not resolve ({error.strerror or error})"
        if matters:
            return Check("host name", "fail", seen, fix)
        return Check("host name", "warn", seen, f"Add '127.0.0.1 {name}' to /etc/hosts.")
    seen = f"{name} is {', '.join(addresses)}"
    if matters and all(address.startswith("127.") or address == "::1" for address in addresses):
        return Check("host name", "warn", f"{seen}, which other nodes can't reach", fix)
    return Check("host name", "pass", seen)


def port(asked: Asked) -> Check:
    """Check, before any rank starts, that the port is free over which ranks find each other."""
    chosen = os.environ.get("MASTER_PORT")
    if chosen is not None:
        if chosen.isdigit() and _is_free(int(chosen)):
            return Check("port", "pass", f"MASTER_PORT={chosen} is free")
        fix = "unset MASTER_PORT, or set it to a free port."
        return Check("port", "fail", f"MASTER_PORT={chosen} can't be used here", fix)
    if _is_free(_DEFAULT_PORT):
        return Check("port", "pass", f"{_DEFAULT_PORT}, the launchers' default, is free")
    fix = f"deepspeed --master_port {free_port()} ..., or torchrun --standalone ..."
    return Check("port", "warn", f"{_DEFAULT_PORT}, the launchers' default, is in use", fix)


def _is_free(number: int) -> bool:
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", number))
    except (OSError, OverflowError):
        return False
    return True


def interface(asked: Asked) -> list[Check]:
    """Check the interfaces that gloo and NCCL are told to use, or may choose from."""
    up = [name for name, state in psutil.net_if_stats().items() if state.isup]
    named = [name for name in _INTERFACE_VARIABLES if os.environ.get(name)]
    if named:
        return [judge_named_interface(name, os.environ[name], up, asked.spans_nodes) for name in named]
    return [judge_interfaces([name for name in up if not name.startswith(_VIRTUAL)], asked.spans_nodes)]


def judge_named_interface(variable: str, value: str, up: list[str], spans_nodes: bool) -> Check:
    """Check that the interface that a variable names exists and is up.

    To NCCL a name is the beginning of one; "=" before it asks for the whole name, "^" leaves it out. gloo takes whole
    names only.
    """
    named = [word for word in value.lstrip("^=").split(",") if word]
    if spans_nodes and not value.startswith("^") and all(word == "lo" for word in named):
        fix = f"unset {variable}, or name the interface that all nodes share."
        return Check("interface", "fail", f"{variable}={value}: no other node is reached over loopback", fix)
    if variable == "GLOO_SOCKET_IFNAME" or value.startswith("="):
        good = all(word in up for word in named)
    elif value.startswith("^"):
        good = any(not name.startswith(tuple(named)) for name in up)
    else:
        good = any(name.startswith(tuple(named)) for name in up)
    if good:
        return Check("interface", "pass", f"{variable}={value}")
    fix = f"Set it to one that is up: {', '.join(up)}."
    return Check("interface", "fail", f"{variable}={value}: no such interface is up here", fix)


def judge_interfaces(real: list[str], spans_nodes: bool) -> Check:
    """Warn where several interfaces are up and ranks are on several nodes: the nodes may choose differently."""
    if not spans_nodes:
        return Check("interface", "pass", f"one machine: loopback; up beside it: {', '.join(real) or 'none'}")
    if len(real) == 1:
        return Check("interface", "pass", real[0])
    if not real:
        return Check("interface", "fail", "none is up beside loopback", "Bring up the one that all nodes share.")
    fix = f"Name the one that all nodes share: GLOO_SOCKET_IFNAME={real[0]} (GPUs: NCCL_SOCKET_IFNAME)."
    return Check("interface", "warn", f"several are up: {', '.join(real)}", fix)


def allocation(asked: Asked) -> Check:
    """Warn inside an allocation of several nodes when the doctor was started on one of them alone."""
    return judge_allocation(os.environ, asked.spans_nodes)


def judge_allocation(env: Mapping[str, str], spans_nodes: bool) -> Check:
    """Compare Slurm's variables with what is examined."""
    job, num_nodes = env.get("SLURM_JOB_ID"), env.get("SLURM_JOB_NUM_NODES", "1")
    if job is None:
        return Check("slurm", "skip", "not inside a job")
    if num_nodes == "1" or spans_nodes:
        return Check("slurm", "pass", f"job {job}, {num_nodes} nodes")
    seen = f"job {job} has {num_nodes} nodes, and only this one is looked at"
    return Check("slurm", "warn", seen, "srun rm-scale doctor, with as many tasks as the run will have.")

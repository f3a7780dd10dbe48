"""Where the ranks of a job meet: an address of the first node, and a port of it that nobody listens on."""

from __future__ import annotations

import socket

from rm_scale.errors import UserError
from rm_scale.logs import get_logger
from rm_scale.slurm.allocation import Allocation

logger = get_logger(__name__)

FIRST_PORT, NUM_PORTS = 20_000, 12_000
"""Ports below the range that Linux hands out by itself (32768 and up)."""


def master_address(allocation: Allocation, interface: str) -> str:
    """Return the first node's name, or its address on the interface that all nodes share.

    Raises:
        UserError: it has no such interface.
    """
    if not interface:
        return allocation.nodes[0]
    import psutil

    addresses = psutil.net_if_addrs()
    found = [item.address for item in addresses.get(interface, []) if item.family == socket.AF_INET]
    if not found:
        names = ", ".join(name for name in addresses if name != "lo") or "none"
        raise UserError(
            f"RM_SCALE_INTERFACE={interface}: {allocation.nodes[0]} has no such interface with an IPv4 address. Fix: "
            f"one of {names}."
        )
    return str(found[0])


def port_of_job(number: int) -> int:
    """Return a port that nobody listens on here, the same one for the same job where possible.

    Args:
        number: differs between jobs, which may share a node.

    Raises:
        UserError: a hundred ports in a row are taken.
    """
    for attempt in range(100):
        port = FIRST_PORT + (number * 7 + attempt) % NUM_PORTS
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                logger.info(f"port {port} is taken: the next one")
                continue
        return port
    raise UserError(
        f"ports {FIRST_PORT} to {FIRST_PORT + NUM_PORTS - 1}: a hundred in a row are taken on {socket.gethostname()}. "
        "Fix: look for jobs that were left behind (ss -ltnp)."
    )

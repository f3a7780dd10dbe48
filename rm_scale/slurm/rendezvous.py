"""Where the ranks of a job meet: an address of the first node, and a port of it that nobody listens on."""

from __future__ import annotations

import socket
from collections.abc import Mapping

from rm_scale.errors import UserError
from rm_scale.logs import get_logger
from rm_scale.network import (
    address_of_interface,
    address_towards,
    addresses_of,
    interfaces,
    is_usable,
    listen,
    plain_address,
)
from rm_scale.slurm.allocation import Allocation

logger = get_logger(__name__)

FIRST_PORT, NUM_PORTS = 20_000, 12_000
"""Ports below the range that Linux hands out by itself (32768 and up)."""


def master_address(allocation: Allocation, interface: str, environ: Mapping[str, str]) -> str:
    """Return where the nodes of a job reach its first node, on which this is called.

    In this order: its address on the interface that all nodes share; the loopback for a job of one node; the address
    by which Slurm reaches it; its name; and where that is unknown here or leads back into the node itself
    (`127.0.1.1 NAME` in /etc/hosts), its address on the way to another node. The check of the nodes tries it.

    Args:
        allocation: of the job.
        interface: that of RM_SCALE_INTERFACE, or empty.
        environ: RM_SCALE_NODE_ADDRESS is the NodeAddr that Slurm has of the first node.

    Raises:
        UserError: this node has no such interface.
    """
    first, *others = allocation.nodes
    if interface:
        return _on_interface(first, interface)
    if not others:
        return "127.0.0.1"
    told = plain_address(environ.get("RM_SCALE_NODE_ADDRESS", ""))
    for name in (told, first):
        if name and any(is_usable(address) for address in addresses_of(name)):
            return name
    return next((found for found in map(address_towards, others) if is_usable(found)), first)


def _on_interface(node: str, interface: str) -> str:
    found = address_of_interface(interface)
    if found:
        return found
    present = {name: address_of_interface(name) for name in interfaces()}
    names = ", ".join(f"{name} ({address})" for name, address in present.items() if address) or "none"
    raise UserError(
        f"RM_SCALE_INTERFACE={interface}: {node} has no such interface with an address that other nodes reach "
        f"(IPv4, or IPv6 that is not fe80::). Fix: one of {names}."
    )


def port_of_job(number: int, tried: int = 0) -> int:
    """Return a port that nobody listens on here, the same one for the same job where possible.

    Args:
        number: differs between jobs, which may share a node.
        tried: ports that were free a moment before, and taken when rank 0 came to listen.

    Raises:
        UserError: a hundred ports in a row are taken.
    """
    for place in range(tried, tried + 100):
        port = FIRST_PORT + (number * 7 + place) % NUM_PORTS
        try:
            listen(port).close()
        except OSError:
            logger.info(f"port {port} is taken: the next one")
            continue
        return port
    raise UserError(
        f"ports {FIRST_PORT} to {FIRST_PORT + NUM_PORTS - 1}: a hundred in a row are taken on {socket.gethostname()}. "
        "Fix: look for jobs that were left behind (ss -ltnp)."
    )

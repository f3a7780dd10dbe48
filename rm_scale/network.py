"""This machine's addresses, of IPv4 and IPv6: which one other machines reach, and on which interface; and a port."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket

_ANYWHERE = ("192.0.2.1", "2001:db8::1")
"""Addresses that nobody has (RFC 5737, RFC 3849): the way to them is the way out of this machine."""


def is_usable(address: str) -> bool:
    """Return whether other machines can reach this address: not a loopback one, and not one of a single link."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    return not (parsed.is_loopback or parsed.is_link_local or parsed.is_unspecified or parsed.is_multicast)


def is_loopback(address: str) -> bool:
    """Return whether an address leads back into the machine that uses it."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def is_ipv6(address: str) -> bool:
    """Return whether an address is of IPv6."""
    return ":" in address


def plain_address(address: str) -> str:
    """Return an address without the brackets of a URL, and an IPv4 address that IPv6 carries as it is."""
    bare = address.strip().removeprefix("[").removesuffix("]")
    return bare.removeprefix("::ffff:") if "." in bare else bare


def addresses_of(name: str) -> list[str]:
    """Return what a name stands for, in the system's order; nothing where it is unknown."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(item[4][0]) for item in found))


def interfaces() -> dict[str, list[str]]:
    """Return the addresses of each interface of this machine, those of IPv4 first."""
    import psutil

    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [item.address.partition("%")[0] for family in families for item in items if item.family == family]
        for name, items in psutil.net_if_addrs().items()
    }


def address_of_interface(name: str) -> str:
    """Return the address by which others reach this machine on an interface, empty where it has none.

    It is the one that gloo takes, too: IPv4 where there is both.
    """
    return next((address for address in interfaces().get(name, []) if is_usable(address)), "")


def interface_of(address: str) -> str:
    """Return the interface that has an address, empty where none has."""
    return next((name for name, addresses in interfaces().items() if address in addresses), "")


def address_towards(host: str) -> str:
    """Return this machine's address on the way to another, empty where there is no way. Nothing is sent."""
    for address in addresses_of(host):
        with contextlib.suppress(OSError), _datagram_socket(address) as probe:
            probe.connect((address, 9))
            return str(probe.getsockname()[0])
    return ""


def _datagram_socket(address: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if is_ipv6(address) else socket.AF_INET, socket.SOCK_DGRAM)


def address_of_own_name() -> str:
    """Return the address that gloo tells other ranks where no interface is named: of this machine's host name.

    It is the first that the name resolves to and that is this machine's. Without one gloo takes the loopback.
    """
    for address in addresses_of(socket.gethostname()):
        with contextlib.suppress(OSError), _datagram_socket(address) as probe:
            probe.bind((address, 0))
            return address
    return "127.0.0.1"


def interface_for_gloo(*hosts: str) -> str:
    """Return the interface that gloo must be told of, empty where this machine's host name leads others to it.

    On many machines the name is one of the loopback: Debian writes `127.0.1.1 NAME` into /etc/hosts.

    Args:
        hosts: other machines of the run, or this one's address; the first to which a way leads decides.
    """
    if is_usable(address_of_own_name()):
        return ""
    for host in (*hosts, *_ANYWHERE):
        address = address_towards(host)
        if is_usable(address):
            return interface_of(address)
    return ""


def listen(port: int, backlog: int = 1024) -> socket.socket:
    """Listen on a port at all addresses of this machine, of IPv6 too where it has that.

    Raises:
        OSError: somebody listens there at one of them.
    """
    if socket.has_dualstack_ipv6():
        try:
            return _listen(socket.AF_INET6, port, backlog)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
    return _listen(socket.AF_INET, port, backlog)  # the kernel has no IPv6, or was told not to use it


def _listen(family: socket.AddressFamily, port: int, backlog: int) -> socket.socket:
    server = socket.socket(family, socket.SOCK_STREAM)
    try:
        # A port whose last connections were closed a moment ago is free.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.bind(("", port))
        server.listen(backlog)
    except OSError:
        server.close()
        raise
    return server

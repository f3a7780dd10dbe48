"""Where the ranks of a Slurm job meet: the first node's address, and a free port of it."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import pytest

from rm_scale.errors import UserError
from rm_scale.slurm.allocation import Allocation
from rm_scale.slurm.rendezvous import FIRST_PORT, NUM_PORTS, master_address, port_of_job

ONE = Allocation(job_id=7, attempt=0, nodes=("node1",), gpus_per_node=0, array_task=None)
TWO = Allocation(job_id=7, attempt=0, nodes=("node1", "node2"), gpus_per_node=0, array_task=None)


def test_a_taken_port_is_passed_over() -> None:
    port = port_of_job(77)
    assert FIRST_PORT <= port < FIRST_PORT + NUM_PORTS
    with socket.socket() as taken:
        taken.bind(("", port))
        assert port_of_job(77) == port + 1


def test_ports_that_were_tried_are_not_tried_again() -> None:
    """Another program listened there when rank 0 came, and may have closed it since."""
    first = port_of_job(91)
    assert [port_of_job(91, tried) > first for tried in range(3)] == [False, True, True]
    assert port_of_job(91, 2) > port_of_job(91, 1)


def test_a_port_taken_over_ipv6_alone_is_passed_over() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    port = port_of_job(78)
    with socket.create_server(("::", port), family=socket.AF_INET6):
        assert port_of_job(78) == port + 1


def test_all_ports_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(port: int) -> socket.socket:
        raise OSError(98, "Address already in use")

    monkeypatch.setattr("rm_scale.slurm.rendezvous.listen", taken)
    with pytest.raises(UserError, match=r"a hundred in a row are taken"):
        port_of_job(1)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What names stand for here; the way to node2 begins at 10.0.0.7."""
    names: dict[str, list[str]] = {"node1": ["10.0.0.1"], "node2": ["10.0.0.2"], "10.1.0.1": ["10.1.0.1"]}
    present = {
        "lo": ["127.0.0.1", "::1"],
        "eth0": ["10.0.0.7", "fe80::7"],
        "ib0": ["fe80::8", "fd00::8"],
        "ib1": ["fe80::9"],
    }
    monkeypatch.setattr("rm_scale.slurm.rendezvous.addresses_of", lambda name: names.get(name, []))
    monkeypatch.setattr("rm_scale.slurm.rendezvous.address_towards", lambda host: "10.0.0.7" if host in names else "")
    for module in ("rm_scale.network", "rm_scale.slurm.rendezvous"):
        monkeypatch.setattr(f"{module}.interfaces", lambda: present)
    return names


@pytest.mark.parametrize(
    ("allocation", "interface", "environ", "expected"),
    [
        (TWO, "", {}, "node1"),
        (ONE, "", {}, "127.0.0.1"),  # whatever its name resolves to
        (ONE, "", {"RM_SCALE_NODE_ADDRESS": "10.1.0.1"}, "127.0.0.1"),
        (TWO, "", {"RM_SCALE_NODE_ADDRESS": "node1"}, "node1"),
        (TWO, "", {"RM_SCALE_NODE_ADDRESS": "10.1.0.1"}, "10.1.0.1"),
        (TWO, "", {"RM_SCALE_NODE_ADDRESS": "127.0.0.1"}, "node1"),
        (TWO, "eth0", {"RM_SCALE_NODE_ADDRESS": "10.1.0.1"}, "10.0.0.7"),
        (TWO, "ib0", {}, "fd00::8"),
    ],
)
def test_the_address(
    network: dict[str, list[str]], allocation: Allocation, interface: str, environ: Mapping[str, str], expected: str
) -> None:
    assert master_address(allocation, interface, environ) == expected


@pytest.mark.parametrize("seen", [["127.0.1.1"], ["::1", "127.0.0.1"], [], ["fe80::7%eth0"]])
def test_a_name_that_leads_nowhere_is_replaced_by_the_address_towards_another_node(
    network: dict[str, list[str]], seen: list[str]
) -> None:
    network["node1"] = seen
    assert master_address(TWO, "", {}) == "10.0.0.7"
    del network["node2"]
    assert master_address(TWO, "", {}) == "node1", "nothing better is known: the check of the nodes says so"


def test_an_interface_without_an_address_for_others_is_refused(network: dict[str, list[str]]) -> None:
    told = r"RM_SCALE_INTERFACE={}: node1 has no such interface with an address that other nodes reach .*Fix: one of {}"
    present = r"eth0 \(10\.0\.0\.7\), ib0 \(fd00::8\)"
    for interface in ("ib9", "ib1", "lo"):
        with pytest.raises(UserError, match=told.format(interface, present)):
            master_address(ONE, interface, {})

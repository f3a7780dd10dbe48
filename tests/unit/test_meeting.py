"""The port where ranks meet, with real ranks: taken by another program, held from the start, over IPv6."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rm_scale.files import free_port
from rm_scale.meeting import EXIT_PORT_TAKEN
from rm_scale.network import listen
from tests.support.launching import REPOSITORY, TRAIN, environment

RANK = """
import sys
from rm_scale.distributed import detect_world, init_process_group, prepare_environment, sum_over_ranks
from rm_scale.guard import leave, run_guarded

def main():
    world = detect_world()
    prepare_environment(world, meets="late" not in sys.argv)
    init_process_group(world, "deepspeed" in sys.argv, 600)
    print("sum", sum_over_ranks([world.rank + 1.0]), flush=True)
    return 0

leave(run_guarded(main))
"""


def begin(rank: int, size: int, port: int, *words: str, **extra: str) -> subprocess.Popen[str]:
    """One rank, as a launcher starts it."""
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_SIZE": size, "MASTER_PORT": port}
    env = environment(MASTER_ADDR="127.0.0.1", **{name: str(value) for name, value in place.items()}) | extra
    return subprocess.Popen(
        [sys.executable, "-c", RANK, *words],
        env=env,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and output."""
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


@pytest.mark.parametrize("words", [(), ("late",), ("late", "deepspeed")])
def test_rank_0_says_that_another_program_has_the_port(words: tuple[str, ...]) -> None:
    """At its start, and where only torch notices since no time to take it was left."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, output = ended(begin(0, 2, port, *words))
        assert code == 2 and "Traceback" not in output, output
        assert f"MASTER_PORT={port}: rank 0 can't listen there on" in output
        assert "Fix: start again with another port, deepspeed --master_port N" in output


@pytest.mark.parametrize("words", [(), ("late",)])
def test_who_can_choose_another_port_is_told_by_the_exit_code(words: tuple[str, ...]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, output = ended(begin(0, 2, taken.getsockname()[1], *words, RM_SCALE_PORTS_TRIED="0"))
    assert code == EXIT_PORT_TAKEN and "another one is tried" in output and "Traceback" not in output


def test_training_says_it_before_anything_is_imported_or_written(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        env = environment(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_PORT=str(taken.getsockname()[1]))
        command = [sys.executable, str(TRAIN), "--dataset_path", "none.jsonl", "--output_dir", str(tmp_path / "out")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 2 and "rank 0 can't listen there" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("address", "words"),
    [("127.0.0.1", ()), ("127.0.0.1", ("deepspeed",)), ("::1", ()), ("[::1]", ())],
)
def test_ranks_meet_at_the_port_that_rank_0_holds(address: str, words: tuple[str, ...]) -> None:
    if address != "127.0.0.1" and not _has_ipv6():
        pytest.skip("no IPv6 here")
    port = free_port()
    ranks = [begin(rank, 2, port, *words, MASTER_ADDR=address, GLOO_SOCKET_IFNAME="lo") for rank in range(2)]
    for code, output in map(ended, ranks):
        assert code == 0 and "sum [3.0]" in output, output


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_a_port_is_taken_whoever_listens_on_either_family() -> None:
    with listen(0) as server:
        port = server.getsockname()[1]
        for address in ["127.0.0.1", *(["::1"] if _has_ipv6() else [])]:
            socket.create_connection((address, port), timeout=600).close()
    for family, address in [(socket.AF_INET, "127.0.0.1"), *([(socket.AF_INET6, "::1")] if _has_ipv6() else [])]:
        with socket.create_server((address, 0), family=family) as taken, pytest.raises(OSError, match="in use"):
            listen(taken.getsockname()[1])

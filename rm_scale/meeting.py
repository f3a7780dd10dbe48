"""The port where the ranks of a run meet: rank 0 takes it at its start, and what is said where another program has it.

torch comes to listen only after ten seconds of imports. Whoever has chosen the port saw it free before that: in between
another program may take it, or another job, whose ranks ours would then talk to.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from rm_scale.errors import UserError
from rm_scale.network import listen

EXIT_PORT_TAKEN = 86
"""Exit code of rank 0 where another program listens at the port, and who started the ranks can choose another."""

PORTS_TRIED = "RM_SCALE_PORTS_TRIED"
"""Set by who starts the ranks anew with another port on `EXIT_PORT_TAKEN`: how many were tried before."""

_SCHEME = "rm-scale-held"
_OPTIONS = {"deepspeed": "deepspeed --master_port N", "torchrun": "torchrun --master_port N"}
_held: socket.socket | None = None


def hold_port(launcher: str) -> None:
    """Listen at MASTER_PORT from now on; called by rank 0 of several ranks. Ranks that connect wait to be answered.

    Nothing is done where torch may listen there already: it has been imported.

    Raises:
        UserError: another program listens there.
    """
    global _held
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's agent listens, before any rank
    if by_agent or _held is not None or "torch" in sys.modules:
        return
    try:
        _held = listen(int(os.environ["MASTER_PORT"]))
    except OSError as error:
        raise cannot_listen(launcher, error) from error


def init_method(timeout: timedelta) -> str | None:
    """Return torch's `init_method` for the port that this process holds; `None`, its default, where it holds none."""
    if _held is None:
        return None
    from torch.distributed import TCPStore, register_rendezvous_handler

    def meet(url: str, timeout: timedelta = timeout, **_: Any) -> Iterator[tuple[Any, int, int]]:
        global _held
        assert _held is not None
        held, _held = _held, None
        # The store that torch makes on rank 0 for env://, by which the other ranks come.
        host, port, size = (os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"))
        store = TCPStore(host, int(port), int(size), True, timeout, multi_tenant=True, master_listen_fd=held.detach())
        yield store, 0, int(size)
        raise RuntimeError("ranks meet once")

    register_rendezvous_handler(_SCHEME, meet)
    return f"{_SCHEME}://"


def is_port_taken(error: BaseException) -> bool:
    """Return whether torch says that it can't listen since another program does."""
    return "EADDRINUSE" in str(error)


def cannot_listen(launcher: str, error: BaseException) -> UserError:
    """Return what rank 0 says and ends with where another program listens at the port.

    Args:
        launcher: what started the ranks, as in `World`.
        error: of the system, or torch's.
    """
    why = error.strerror if isinstance(error, OSError) and error.strerror else "address already in use"
    seen = (
        f"MASTER_PORT={os.environ['MASTER_PORT']}: rank 0 can't listen there on {socket.gethostname()} ({why.lower()})"
    )
    is_taken = not isinstance(error, OSError) or error.errno == errno.EADDRINUSE
    if os.environ.get(PORTS_TRIED) and is_taken:
        again = UserError(f"{seen}: another program has taken the port. Fix: none needed, another one is tried.")
        again.exit_code = EXIT_PORT_TAKEN
        return again
    option = _OPTIONS.get(launcher, "export MASTER_PORT=N")
    return UserError(f"{seen}. Fix: start again with another port, {option}; ss -ltnp says which program has this one.")

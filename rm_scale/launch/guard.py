"""What every entry point does with errors: a user's is one plain message, ours keeps its traceback."""

from __future__ import annotations

import atexit
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from rm_scale.errors import UserError

EXIT_USER_ERROR = 2
EXIT_DEFECT = 1
HEAD_START_SECONDS = 3.0


def leave(code: int) -> NoReturn:
    """End the process with this exit code, without taking the interpreter apart.

    After a success, threads of the communication libraries that still run then can abort the process ("terminate
    called without an active exception"), so that a good run ends with a bad code. After a failure the other ranks may
    be waiting in a collective, and a process that takes its group apart can wait for them.
    """
    if code == 0:
        atexit._run_exitfuncs()  # experiment loggers finish here
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_guarded(main: Callable[[], int], debug: bool = False) -> int:
    """Run `main` and turn a `UserError` into a message and exit code 2, anything else into a traceback and 1.

    An error that several ranks meet is printed by the first of them; one that a single rank meets, by that rank.

    Args:
        main: the program.
        debug: print the traceback too, on every rank.
    """
    try:
        return main()
    except UserError as error:
        if debug:
            traceback.print_exc()
        elif _speaks_for(error):
            rank = "" if _number("RANK", "SLURM_PROCID") == 0 else f" (rank {_number('RANK', 'SLURM_PROCID')})"
            print(f"rm_scale{rank}: {error}", file=sys.stderr, flush=True)
        else:
            # The launcher ends all ranks when one has left: the one that speaks needs the time to do so.
            time.sleep(HEAD_START_SECONDS)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return 130
    except Exception:  # a defect of ours, shown whole; the process must still leave its ranks at once
        traceback.print_exc()
        return EXIT_DEFECT


def _speaks_for(error: UserError) -> bool:
    """Is it this rank that prints the error?"""
    if error.met_by == "world":
        return _number("RANK", "SLURM_PROCID") == 0
    return error.met_by == "rank" or _number("LOCAL_RANK", "SLURM_LOCALID") == 0


def _number(*names: str) -> int:
    """The first of these environment variables that holds a number, 0 without one."""
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), 0)

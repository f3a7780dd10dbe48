"""What every entry point does with errors: a `UserError` becomes one plain message, a defect keeps its traceback.

A command writes the traceback of a defect to a log file, since it helps the user little; a training rank prints it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from rm_scale.errors import UserError, system_fault
from rm_scale.texts import printable, typed_line
from rm_scale.version import __version__

EXIT_DEFECT = 1
EXIT_COMMAND_DEFECT = 70
"""A defect met by a command; sysexits.h calls it EX_SOFTWARE. 1 is what `rm-scale report --baseline` answers with."""
HEAD_START_SECONDS = 3.0

Guard = Callable[[Callable[[], int], bool], int]
"""Run a program that returns an exit code, with `debug` or without, and decide what becomes of its errors."""


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


def run_guarded(main: Callable[[], int], debug: bool = False, command: str = "") -> int:
    """Run `main` and turn a `UserError` into a message and exit code 2, anything else into a traceback and 1.

    What the operating system refuses (a full disk, a file that may not be written) counts as a `UserError`. An error
    that several ranks meet is printed by the first of them; one that a single rank meets, by that rank.

    Args:
        main: the program.
        debug: print the traceback too, on every rank.
        command: its name, such as "rm-scale score". The traceback of a defect then goes to a log file, and the exit
            code is 70.
    """
    try:
        return main()
    except UserError as error:
        return _tell(error, debug)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # the process must leave its ranks at once, whatever it was
        fault = system_fault(error)
        if fault is not None:
            return _tell(UserError(fault), debug)
        # A defect of ours.
        log = _write_log(command) if command and not debug else None
        if log is None:
            traceback.print_exc()
        else:
            _say(
                f"unexpected {typed_line(error, 300)}. This is a fault of rm_scale; the traceback is in {log}. Fix: "
                "report it with that file (rm-scale --debug ... shows it here)."
            )
        return EXIT_COMMAND_DEFECT if command else EXIT_DEFECT


def _tell(error: UserError, debug: bool) -> int:
    """Print what a user can put right, once for all ranks that met it; return the exit code."""
    if debug:
        traceback.print_exc()
    elif _speaks_for(error):
        _say(str(error))
    else:
        # The launcher ends all ranks when one has left: the one that speaks needs the time to do so.
        time.sleep(HEAD_START_SECONDS)
    return error.exit_code


def _say(message: str) -> None:
    rank = _number("RANK", "SLURM_PROCID")
    # Standard error may be a file on the very disk that is full: the exit code must be right all the same.
    with contextlib.suppress(OSError):
        print(f"rm_scale{'' if rank == 0 else f' (rank {rank})'}: {printable(message)}", file=sys.stderr, flush=True)


def _write_log(command: str) -> str | None:
    """Write the traceback of the error at hand to a new temporary file; return its name, `None` if that fails."""
    try:
        with tempfile.NamedTemporaryFile(
            "w",
            prefix=f"{command.replace(' ', '-')}-",
            suffix=".log",
            delete=False,
            encoding="utf-8",
            errors="backslashreplace",
        ) as file:
            file.write(f"{command}, version {__version__}, Python {platform.python_version()}\n")
            traceback.print_exc(file=file)
            return file.name
    except OSError:
        return None


def _speaks_for(error: UserError) -> bool:
    """Return whether this rank is the one that prints the error."""
    if error.met_by == "world":
        return _number("RANK", "SLURM_PROCID") == 0
    return error.met_by == "rank" or _local_rank() == 0


def _local_rank() -> int:
    """Return this rank's place on its node.

    Where every rank is a Slurm task it is Slurm's: LOCAL_RANK is then 0 for each rank that sees a GPU of its own alone
    (`srun --gpus-per-task=1`), since it names the rank's GPU among those it sees.
    """
    place = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    if place == [os.environ.get(name) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")]:
        return _number("SLURM_LOCALID")
    return _number("LOCAL_RANK", "SLURM_LOCALID")


def _number(*names: str) -> int:
    """Return the first of these environment variables that holds a number, 0 without one."""
    return next((int(os.environ[name]) for name in names if _is_number(os.environ.get(name, ""))), 0)


def _is_number(text: str) -> bool:
    # Not `isdigit` alone, which takes "²" for one; and Python refuses to read thousands of digits.
    return text.isascii() and text.isdigit() and len(text) < 10

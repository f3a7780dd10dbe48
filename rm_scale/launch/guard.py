"""What every entry point does with errors: a user's is one plain message, ours keeps its traceback."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from rm_scale.errors import UserError

EXIT_USER_ERROR = 2


def leave(code: int) -> None:
    """End the process with this exit code.

    After a failure the other ranks may be waiting in a collective, and a process that takes its group apart while they
    do can wait for them, or be aborted with another exit code. So a failed process leaves at once.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    sys.exit(code)


def run_guarded(main: Callable[[], int], debug: bool = False) -> int:
    """Run `main` and turn a `UserError` into a message and exit code 2. Of several ranks only the first prints it.

    Args:
        main: the program.
        debug: print the traceback too, on every rank.
    """
    try:
        return main()
    except UserError as error:
        if debug:
            traceback.print_exc()
        elif os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(f"rm_scale: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return 130

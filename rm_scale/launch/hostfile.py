"""Read DeepSpeed's hostfile: the machines of a run, and how many ranks each takes."""

from __future__ import annotations

import re

from rm_scale.errors import UserError
from rm_scale.files import read_small_text
from rm_scale.texts import one_line

_MAX_BYTES = 10_000_000


def read_hostfile(file: str) -> dict[str, int]:
    """Return the number of slots, that is of ranks, of each host, in the file's order.

    Args:
        file: lines `HOST slots=N`; what follows a "#" is a comment.

    Raises:
        UserError: the file can't be read, or a line is not `HOST slots=N`. DeepSpeed itself would go on without it, on
            this machine alone.
    """
    try:
        lines = read_small_text(file, _MAX_BYTES).splitlines()
    except ValueError as error:
        raise UserError(f"hostfile={file}: can't be read ({error}). Fix: check the path.") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        fields = line.split("#")[0].split()
        if not fields:
            continue
        slots = fields[1].removeprefix("slots=") if len(fields) == 2 and fields[1].startswith("slots=") else ""
        if not re.fullmatch("[1-9][0-9]{0,5}", slots) or fields[0] in hosts:
            raise UserError(
                f"hostfile={file}, line {number}: {one_line(line, 200)!r} is not one new host. "
                "Fix: write 'HOST slots=N'."
            )
        hosts[fields[0]] = int(slots)
    if not hosts:
        raise UserError(f"hostfile={file}: names no host. Fix: write 'HOST slots=N' lines.")
    return hosts

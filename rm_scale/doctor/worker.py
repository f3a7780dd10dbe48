"""The checks of one rank, which `rm-scale doctor --nproc N` starts; prints each finding as a line for the parent.

Its exit code is always 0, since a launcher ends all ranks when one of them leaves with another.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from dataclasses import asdict, replace

from rm_scale.distributed import detect_world
from rm_scale.doctor.findings import Asked, Finding
from rm_scale.doctor.one_rank import NUM_TIMEOUTS, RankExamination, leave_together
from rm_scale.guard import leave
from rm_scale.logs import setup_logging

_MARK = "RM_SCALE_DOCTOR "
_MAX_TEXT = 900
"""Characters; a line of up to 4096 bytes goes through a pipe in one piece, whoever else writes to it."""


def main() -> int:
    """Examine this rank; the only argument is what `job_text` returned."""
    job = json.loads(sys.argv[1])
    asked = Asked(**job["asked"])
    world = detect_world()
    setup_logging(world.rank)
    # If even the guards of the checks hang, this says where and ends the process.
    faulthandler.dump_traceback_later(NUM_TIMEOUTS * asked.timeout_seconds, exit=True)
    examination = RankExamination(world, asked, _print)
    examination.run(with_node_checks=job["with_node_checks"])
    if examination.ranks is not None:
        leave_together(examination.ranks, 0, asked.timeout_seconds)
    return 0


def job_text(asked: Asked, with_node_checks: bool) -> str:
    """Return the worker's argument."""
    return json.dumps({"asked": asdict(asked), "with_node_checks": with_node_checks})


def _print(finding: Finding) -> None:
    check = replace(finding.check, seen=finding.check.seen[:_MAX_TEXT], fix=finding.check.fix[:_MAX_TEXT])
    line = _MARK + json.dumps(Finding(finding.where, check).to_dict(), ensure_ascii=False) + "\n"
    sys.stdout.flush()
    os.write(1, line.encode())


def read_findings(output: str) -> tuple[list[Finding], str]:
    """Return the findings among what the ranks printed, and the rest.

    Launchers put the machine's name before each line.
    """
    findings, rest = [], []
    for line in output.splitlines():
        text = line.partition(_MARK)[2]
        try:
            findings.append(Finding.from_dict(json.loads(text)))
        except ValueError:  # another line, or one that a remote shell has torn
            rest.append(line)
    return findings, "\n".join(rest)


if __name__ == "__main__":
    leave(main())

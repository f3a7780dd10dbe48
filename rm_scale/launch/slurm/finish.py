"""Inside a job, after its ranks: from what each node wrote down, the code that the job's script acts on.

`python -m rm_scale.launch.slurm.finish FOLDER SRUN_CODE` prints the code; reasons go to standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rm_scale.launch.slurm.node import EXIT_REPLACED, describe
from rm_scale.launch.slurm.start import START_FILE, Start, read_start
from rm_scale.training.preemption import EXIT_REQUEUE


def main(argv: Sequence[str] | None = None) -> int:
    """Print the code; always gives 0."""
    words = list(sys.argv[1:] if argv is None else argv)
    folder, srun_code = Path(words[0]), int(words[1])
    start = read_start(folder / START_FILE)
    code, reason = judge(start, read_ends(folder), srun_code)
    if reason:
        print(f"rm_scale: {reason}", file=sys.stderr, flush=True)
    print(code)
    return 0


def read_ends(folder: Path) -> dict[str, dict[str, Any]]:
    """How each node ended, by its name; a node that was lost wrote nothing."""
    ends = {}
    for path in sorted(folder.glob("*.end.json")):
        try:
            end = json.loads(path.read_text(encoding="utf-8"))
            ends[str(end["node"])] = end
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return ends


def judge(start: Start, ends: dict[str, dict[str, Any]], srun_code: int) -> tuple[int, str]:
    """The job's exit code, and why.

    The first rank that failed decides: what srun reports is the largest code of any task, which is that of those it
    killed because of the first.
    """
    failed = [end for end in ends.values() if end["code"] not in (0, EXIT_REQUEUE, EXIT_REPLACED)]
    if failed:
        first = min(failed, key=lambda end: end["failed_at"] or end["time"])
        return int(first["code"]), f"{first['node']}: {first['reason']}"
    missing = [node for node in start.nodes if node not in ends]
    if missing:
        return srun_code or 1, f"{', '.join(missing)}: lost or killed before saying how it ended; {_srun(srun_code)}"
    codes = {int(end["code"]) for end in ends.values()}
    for code in (EXIT_REPLACED, EXIT_REQUEUE):
        if code in codes:
            return code, ""
    return srun_code, "" if srun_code == 0 else _srun(srun_code)


def _srun(code: int) -> str:
    return f"srun {describe(code)}"


if __name__ == "__main__":
    sys.exit(main())

"""Log lines that carry rank and step; only rank 0 talks unless asked.

This is also the place that says what a "rank" is before any process group exists: the launcher's environment.
"""

from __future__ import annotations

import logging
import os
import sys

_STEP: dict[str, int | None] = {"value": None}


def set_log_step(step: int | None) -> None:
    """Tell every later log line which optimizer step it belongs to (`None`: before or after training)."""
    _STEP["value"] = step


class _RankAndStep(logging.Filter):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        step = _STEP["value"]
        record.where = f"rank {self.rank}" if step is None else f"rank {self.rank} step {step}"
        return True


def get_logger(name: str) -> logging.Logger:
    """The logger of one module; `name` is the module's `__name__`."""
    return logging.getLogger(name if name.startswith("rm_scale") else f"rm_scale.{name}")


def setup_logging(rank: int = 0, debug: bool = False) -> None:
    """Send rm_scale's log lines to standard error, and quieten the libraries below us on every rank but 0.

    Args:
        rank: global rank of this process; ranks above 0 only print errors.
        debug: print debug lines too, from every rank.
    """
    root = logging.getLogger("rm_scale")
    root.handlers.clear()
    root.propagate = False
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_RankAndStep(rank))
    handler.setFormatter(logging.Formatter("[rm_scale %(where)s] %(levelname)s %(message)s", "%H:%M:%S"))
    root.addHandler(handler)
    if debug:
        root.setLevel(logging.DEBUG)
        return
    root.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    # Libraries that log at import or at every save; their warnings still reach the user on rank 0.
    noisy = ("transformers", "datasets", "accelerate", "peft", "trl", "DeepSpeed", "httpx", "filelock")
    for library in noisy:
        logging.getLogger(library).setLevel(logging.WARNING if rank == 0 else logging.ERROR)
    # accelerate warns that transformers counts micro-steps itself; nothing is wrong.
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

"""Log lines that carry rank and step; ranks above 0 print errors only, unless debug lines are asked for.

The rank comes from the caller, which knows it from the launcher's variables (`rm_scale.distributed.detect_world`), so
that lines carry it before any process group exists.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator

from rm_scale.texts import printable

KEPT = {"kept": True}
"""`extra` of a line that is no warning but belongs into `run/warnings.jsonl` with them."""

_STEP: dict[str, int | None] = {"value": None}
_LOADING = "transformers.modeling_utils"
"""The logger of transformers that tells what came of loading weights."""


def set_log_step(step: int | None) -> None:
    """Tell every later log line which optimizer step it belongs to (`None`: before or after training)."""
    _STEP["value"] = step


def current_step() -> int | None:
    """Return the optimizer step that log lines belong to, `None` before and after training."""
    return _STEP["value"]


class _WithoutLoadReport(logging.Filter):
    """Leave out transformers' table of what a checkpoint lacks: `rm_scale.modeling.loading` judges it, in one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()


@contextlib.contextmanager
def without_load_report() -> Iterator[None]:
    """Leave that table out while a model is loaded, whether or not this process logs as `setup_logging` says.

    It quotes the names of a stranger's tensors as they are, and these may hold what a terminal obeys.
    """
    loading, filtering = logging.getLogger(_LOADING), _WithoutLoadReport()
    loading.addFilter(filtering)
    try:
        yield
    finally:
        loading.removeFilter(filtering)


class _RankAndStep(logging.Filter):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        step = _STEP["value"]
        record.where = f"rank {self.rank}" if step is None else f"rank {self.rank} step {step}"
        return True


class _PrintableFormatter(logging.Formatter):
    """Lines may quote data: nothing in them may do anything to the terminal that shows them."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def get_logger(name: str) -> logging.Logger:
    """Return the logger of one module; `name` is the module's `__name__`."""
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
    handler.setFormatter(_PrintableFormatter("[rm_scale %(where)s] %(levelname)s %(message)s", "%H:%M:%S"))
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
    loading = logging.getLogger(_LOADING)
    if not any(isinstance(present, _WithoutLoadReport) for present in loading.filters):
        loading.addFilter(_WithoutLoadReport())
    # DeepSpeed, PEFT and transformers call names of torch and transformers that these deprecate: theirs to mend.
    for module in ("torch.distributed", "torch.jit", "transformers.modeling_utils", "transformers.training_args"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=re.escape(module))
    # bitsandbytes asks for a kernel that no wheel ships for this processor, and goes on without it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        _hide_progress_bars()


def _hide_progress_bars() -> None:
    """Leave the libraries' bars, which draw themselves again and again, out of a log file."""
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):  # read at their import
        os.environ.setdefault(name, "1")
    for module, function in (
        ("transformers.utils.logging", "disable_progress_bar"),
        ("datasets", "disable_progress_bars"),
    ):
        if module in sys.modules:
            getattr(sys.modules[module], function)()

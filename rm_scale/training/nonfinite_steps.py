"""Steps with a NaN or infinite loss or gradient: their rows are recorded, and they are left out or end the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import torch

from rm_scale.batching.stream_steps import StepStream
from rm_scale.distributed import gather_from_ranks
from rm_scale.errors import TrainingError
from rm_scale.logs import get_logger
from rm_scale.training.records import RecordFile

logger = get_logger(__name__)


class NonFiniteSteps:
    """Decide what becomes of a step whose loss or gradient is not finite.

    Args:
        groups: the training groups, whose ids are named.
        path: `run/nonfinite.jsonl`, one line per such step.
        most_skipped: so many may be left out; the next one ends the run.
        is_main: this process writes the file.
    """

    def __init__(self, groups: datasets.Dataset | StepStream, path: Path, most_skipped: int, is_main: bool) -> None:
        self.groups = groups
        self.path = path
        self._file = RecordFile(path)
        self.records = (self._file,)
        self.most_skipped = most_skipped
        self.is_main = is_main
        self.num_skipped = 0
        self._rows: list[int] = []
        self._rewards: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def begin_step(self, batches: list[dict[str, Any]]) -> None:
        """Forget the step before, and remember which rows are in this rank's micro-batches."""
        self._rows = [int(row) for batch in batches for row in batch["group_index"]]
        self._rewards = []

    def add(self, rewards: torch.Tensor, batch: dict[str, Any]) -> None:
        """Remember the rewards `(N,)` of a micro-batch, on their device."""
        self._rewards.append((rewards.detach(), batch))

    def skip_or_stop(self, step: int, num_bad_losses: int, norm: float | None, is_untouched: bool) -> None:
        """Record the step's rows, and leave the step out if that may be. A collective.

        Args:
            step: optimizer step.
            num_bad_losses: ranks whose loss is not finite.
            norm: of the gradient, if known.
            is_untouched: this rank's weights are still those before the step.

        Raises:
            TrainingError: on every rank, when enough steps were left out before, or a rank's weights have changed.
        """
        suspects = self._record(step, num_bad_losses, norm)
        untouched = all(gather_from_ranks(is_untouched))
        if self.num_skipped >= self.most_skipped or not untouched:
            raise not_finite_error(num_bad_losses, norm, step, suspects, self.num_skipped, self.path)
        self.num_skipped += 1
        logger.error(
            f"step {step} is left out: the loss is not finite on {num_bad_losses} ranks (gradient norm {norm}); "
            f"{self.num_skipped} of at most {self.most_skipped} such steps. Rows: {self.path}"
        )

    def _record(self, step: int, num_bad_losses: int, norm: float | None) -> list[str]:
        """Write all rows of the step; return the names of the groups whose rewards are not finite, of all ranks."""
        bad: set[int] = set()
        for rewards, batch in self._rewards:
            groups = batch["row_group"][~rewards.isfinite()]
            index = torch.as_tensor(batch["group_index"])
            bad |= {int(index[place]) for place in groups[groups >= 0].tolist()}
        ranks = gather_from_ranks((self._rows, sorted(bad)))
        names = {row: self.groups[row]["id"] or f"row {row}" for rows, _ in ranks for row in rows}
        suspects = [names.get(row, f"row {row}") for _, rows in ranks for row in rows]
        if self.is_main:
            rows = [{"rank": rank, "row": row, "id": names[row]} for rank, (of, _) in enumerate(ranks) for row in of]
            entry = {"step": step, "num_ranks": num_bad_losses, "grad_norm": str(norm)}
            self._file.append({**entry, "suspects": suspects, "rows": rows})
        return suspects


def read_numbers(norm: Any, loss: torch.Tensor) -> tuple[float | None, float]:
    """Return the gradient norm and the loss as numbers; on a GPU the host waits for both at once."""
    if not isinstance(norm, torch.Tensor):
        return None if norm is None else float(norm), float(loss)
    both = torch.stack([norm.detach().to(loss.device).double().reshape(()), loss.double().reshape(())])
    norm_value, loss_value = both.tolist()
    return norm_value, loss_value


def not_finite_error(
    num_bad_losses: int, grad_norm: Any, step: int, suspects: list[str], num_skipped: int, record: Path
) -> TrainingError:
    """Return the error that ends a run at a NaN or infinite loss or gradient.

    Args:
        num_bad_losses: ranks whose loss is not finite.
        grad_norm: the step's gradient norm, if known.
        step: optimizer step.
        suspects: the groups of the step whose rewards are not finite, of all ranks.
        num_skipped: such steps that were skipped before.
        record: where all rows of the step are listed.
    """
    named = f"Groups with such rewards: {', '.join(suspects[:8])}. " if suspects else ""
    before = f" ({num_skipped} such steps were skipped before, as max_nonfinite_steps allows)" if num_skipped else ""
    return TrainingError(
        f"step {step}: the loss is not finite on {num_bad_losses} ranks (gradient norm {grad_norm}){before}: the "
        f"weights can't be trusted from here on. {named}Rows of this step: {record}. "
        "Fix: lower learning_rate, check these rows, resume from the last checkpoint, or skip such steps with "
        "--max_nonfinite_steps."
    )

"""Loss, accuracy and groups of each source of a mixture, counted on each rank and summed over all at each log line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rm_scale.distributed import gather_from_ranks
from rm_scale.training.losses import LossSettings, loss_terms

_NUM_SUMS = 4


class SourceMeter:
    """Sums per source since the last log line on this rank; those of rewards stay on the device until they are read.

    Args:
        names: S names of sources; with none, nothing is counted.
        settings: which loss.
    """

    def __init__(self, names: Sequence[str], settings: LossSettings) -> None:
        self.names = tuple(names)
        self._settings = settings
        self._groups = np.zeros(len(self.names), dtype=np.int64)
        self._sums: torch.Tensor | None = None

    @torch.no_grad()
    def add(self, rewards: torch.Tensor, batch: dict[str, Any]) -> None:
        """Count one micro-batch.

        Args:
            rewards: `(N,)`, one per response.
            batch: the collator's batch, with what `rm_scale.batching.sampler.StepCollator` adds for a mixture.
        """
        if not self.names:
            return
        # As for the figures of the whole: a step that is not finite is named elsewhere and must not spoil these.
        rewards = rewards.detach().float().nan_to_num(0.0, 0.0, 0.0)
        terms, rows, counted = loss_terms(rewards, batch, self._settings)
        labelled = batch["pair_target"] != 0.5
        right = labelled & (rewards[batch["pair_better"]] > rewards[batch["pair_worse"]])
        sums = torch.cat(
            [
                self._by_source(batch["row_source"][rows], terms, counted),
                self._by_source(batch["row_source"][batch["pair_better"]], right, labelled),
            ],
            dim=1,
        )
        self._sums = sums if self._sums is None else self._sums + sums
        self._groups += batch["source_groups"]

    def _by_source(self, source: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        """Sum each of a few `(T,)` values by source, `(S, len(values))`; a product gives the same bits always."""
        numbers = torch.arange(len(self.names), device=source.device)
        return (source == numbers[:, None]).double() @ torch.stack([value.double() for value in values], dim=1)

    def read(self) -> dict[str, Any]:
        """Return the figures of all ranks as logged metrics, and count anew. A collective: every rank must call it."""
        if not self.names:
            return {}
        sums = self._sums.tolist() if self._sums is not None else [[0.0] * _NUM_SUMS] * len(self.names)
        ranks = gather_from_ranks({"sums": sums, "groups": self._groups.tolist()})
        self._sums, self._groups = None, np.zeros(len(self.names), dtype=np.int64)
        total = np.sum([rank["sums"] for rank in ranks], axis=0)
        groups = np.sum([rank["groups"] for rank in ranks], axis=0)
        figures: dict[str, Any] = {}
        for name, (loss, terms, right, pairs), count in zip(self.names, total.tolist(), groups.tolist(), strict=True):
            if terms:
                figures[f"source/{name}/loss"] = loss / terms
            if pairs:
                figures[f"source/{name}/accuracy"] = right / pairs
            figures[f"source/{name}/groups"] = int(count)
        return figures

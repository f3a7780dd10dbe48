"""What a run does per second and how its rewards move, counted on each rank and summed over all when logged."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rm_scale.distributed import gather_from_ranks
from rm_scale.planning.compute import StepFlops

_SUMS = (
    "pairs",
    "correct",
    "ties",
    "margin_sum",
    "reward_sum",
    "responses",
    "real_tokens",
    "processed_tokens",
    "unshared_tokens",
    "useful_flops",
    "attended",
    "squares",
)


@dataclass
class StepMeter:
    """Counts since the last log line on this rank. Reward statistics stay on the device until they are read.

    Attributes:
        counts: plain sums by name.
        seconds: time spent training, without evaluation and saving.
        flops: what the model's steps cost, to count useful operations; `None` leaves them out.
        peak_flops: the device's peak rate in FLOP/s, if known.
    """

    flops: StepFlops | None = None
    peak_flops: float | None = None
    counts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_SUMS, 0.0))
    seconds: float = 0.0
    _device_sums: torch.Tensor | None = None
    _extremes: torch.Tensor | None = None
    _running_since: float | None = None

    def resume(self) -> None:
        """Start or go on with the clock."""
        if self._running_since is None:
            self._running_since = time.perf_counter()

    def pause(self) -> None:
        """Stop the clock, for evaluation and saving."""
        if self._running_since is not None:
            self.seconds += time.perf_counter() - self._running_since
            self._running_since = None

    @property
    def is_running(self) -> bool:
        """True between `resume` and `pause`."""
        return self._running_since is not None

    def running_seconds(self) -> float:
        """Time spent training since the last reading."""
        since = self._running_since
        return self.seconds + (time.perf_counter() - since if since is not None else 0.0)

    @torch.no_grad()
    def add(self, rewards: torch.Tensor, batch: dict[str, Any]) -> None:
        """Count one micro-batch.

        Args:
            rewards: `(N,)`, one per response.
            batch: the collator's batch.
        """
        # A step with NaN or infinite rewards stops the run or is left out; it must not spoil the figures of others.
        rewards = rewards.detach().float().nan_to_num(0.0, 0.0, 0.0)
        real = batch["row_group"] >= 0
        labelled = batch["pair_target"] != 0.5
        difference = (rewards[batch["pair_better"]] - rewards[batch["pair_worse"]])[labelled]
        counted = rewards[real]
        sums = torch.stack(
            [
                (difference > 0).sum().float(),
                (difference == 0).sum().float(),
                difference.sum(),
                counted.sum(),
                labelled.sum().float(),
            ]
        ).double()
        self._device_sums = sums if self._device_sums is None else self._device_sums + sums
        if counted.numel():
            low, high = counted.aminmax()
            extremes = torch.stack([-low, high])
            self._extremes = extremes if self._extremes is None else torch.maximum(self._extremes, extremes)
        self.counts["responses"] += float(counted.numel())
        tokens = batch["tokens"]
        self.counts["processed_tokens"] += tokens.processed
        self.counts["real_tokens"] += tokens.real
        self.counts["unshared_tokens"] += tokens.unshared
        self.counts["attended"] += tokens.attended
        self.counts["squares"] += tokens.squares
        if self.flops is not None:
            self.counts["useful_flops"] += self.flops.of(tokens.unshared, tokens.squares)

    def read(self) -> dict[str, Any]:
        """World totals as logged metrics, and start counting afresh. A collective: every rank must call it."""
        was_running = self._running_since is not None
        self.pause()
        mine = dict(self.counts)
        if self._device_sums is not None:
            names = ("correct", "ties", "margin_sum", "reward_sum", "pairs")
            mine.update(zip(names, self._device_sums.tolist(), strict=True))
        low, high = (
            (-self._extremes[0].item(), self._extremes[1].item()) if self._extremes is not None else (None, None)
        )
        ranks = gather_from_ranks(
            {**mine, "min": low, "max": high, "seconds": self.seconds, "memory": peak_memory_bytes()}
        )
        self.counts = dict.fromkeys(_SUMS, 0.0)
        self.seconds, self._device_sums, self._extremes = 0.0, None, None
        if was_running:
            self.resume()
        return _as_metrics(ranks, self.peak_flops)


def _as_metrics(ranks: list[dict[str, Any]], peak: float | None) -> dict[str, Any]:
    total = {name: sum(rank[name] for rank in ranks) for name in _SUMS}
    seconds = max(rank["seconds"] for rank in ranks)
    metrics: dict[str, Any] = {"peak_memory_bytes": max(rank["memory"] for rank in ranks)}
    if total["pairs"]:
        metrics["accuracy"] = total["correct"] / total["pairs"]
        metrics["margin"] = total["margin_sum"] / total["pairs"]
        metrics["num_pairs"] = int(total["pairs"])
        metrics["num_ties"] = int(total["ties"])
    if total["responses"]:
        metrics["mean_reward"] = total["reward_sum"] / total["responses"]
        metrics["min_reward"] = min(rank["min"] for rank in ranks if rank["min"] is not None)
        metrics["max_reward"] = max(rank["max"] for rank in ranks if rank["max"] is not None)
    if seconds > 0 and total["responses"]:
        metrics["pairs_per_second"] = total["pairs"] / seconds
        metrics["real_tokens_per_second"] = total["real_tokens"] / seconds
        metrics["processed_tokens_per_second"] = total["processed_tokens"] / seconds
        if total["useful_flops"]:
            metrics["useful_flops_per_second_per_device"] = total["useful_flops"] / seconds / len(ranks)
            if peak is not None:
                metrics["mfu"] = metrics["useful_flops_per_second_per_device"] / peak
        metrics["num_tokens"] = {
            "real": int(total["real_tokens"]),
            "processed": int(total["processed_tokens"]),
            "effective": int(total["unshared_tokens"]),
            "attended_pairs": int(total["attended"]),
            "squares": int(total["squares"]),
        }
        metrics["effective_tokens_per_second"] = total["unshared_tokens"] / seconds
        metrics["padding_share"] = 1.0 - total["real_tokens"] / total["processed_tokens"]
        metrics["shared_share"] = 1.0 - total["real_tokens"] / total["unshared_tokens"]
    return metrics


def peak_memory_bytes() -> int:
    """Most memory this rank has held: allocated on its GPU, or resident in the process on a CPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resident_peak_bytes()


def resident_peak_bytes() -> int:
    """Most bytes that were resident in this process, since its start or since the peak was last forgotten.

    Not `ru_maxrss` where the kernel tells more: that figure is inherited from the process that started this one, and
    can't be forgotten.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

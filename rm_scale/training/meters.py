"""Speed and rewards of a run, counted on each rank and summed over all ranks at each log line."""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from rm_scale.distributed import gather_from_ranks
from rm_scale.errors import ModelError
from rm_scale.modeling.exact_shape import shape_of_loaded
from rm_scale.modeling.head import HEAD_NAMES
from rm_scale.planning.flops import StepFlops, linear_parameters, step_flops
from rm_scale.planning.hardware import peak_flops

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
        """Let the clock run, if it does not."""
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
        """Return the seconds spent training since the last `read`."""
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
        # Zeros stand for what doesn't count: to leave it out, a GPU would have to tell the host how much is left.
        real = batch["row_group"] >= 0
        labelled = batch["pair_target"] != 0.5
        difference = torch.where(labelled, rewards[batch["pair_better"]] - rewards[batch["pair_worse"]], 0.0)
        sums = torch.stack(
            [
                (difference > 0).sum().float(),
                (labelled & (difference == 0)).sum().float(),
                difference.sum(),
                torch.where(real, rewards, 0.0).sum(),
                labelled.sum().float(),
                real.sum().float(),
            ]
        ).double()
        self._device_sums = sums if self._device_sums is None else self._device_sums + sums
        if rewards.numel():
            highest = torch.stack([torch.where(real, sign * rewards, -torch.inf).max() for sign in (-1.0, 1.0)])
            self._extremes = highest if self._extremes is None else torch.maximum(self._extremes, highest)
        tokens = batch["tokens"]
        self.counts["processed_tokens"] += tokens.processed
        self.counts["real_tokens"] += tokens.real
        self.counts["unshared_tokens"] += tokens.unshared
        self.counts["attended"] += tokens.attended
        self.counts["squares"] += tokens.squares
        if self.flops is not None:
            self.counts["useful_flops"] += self.flops.of(tokens.unshared, tokens.squares)

    def read(self) -> dict[str, Any]:
        """Return the totals of all ranks as logged metrics, and count anew. A collective: every rank must call it."""
        was_running = self._running_since is not None
        self.pause()
        mine = {**self.counts, **self._device_counts()}
        ranks = gather_from_ranks({**mine, "seconds": self.seconds, "memory": peak_memory_bytes()})
        self.counts = dict.fromkeys(_SUMS, 0.0)
        self.seconds, self._device_sums, self._extremes = 0.0, None, None
        if was_running:
            self.resume()
        return _as_metrics(ranks, self.peak_flops)

    def _device_counts(self) -> dict[str, float | None]:
        """Return what was counted on the device; on a GPU the host waits for it, once."""
        if self._device_sums is None or self._extremes is None:
            return {"min": None, "max": None}
        *sums, negative_low, high = torch.cat([self._device_sums, self._extremes.double()]).tolist()
        names = ("correct", "ties", "margin_sum", "reward_sum", "pairs", "responses")
        counted = {"min": -negative_low, "max": high} if math.isfinite(high) else {"min": None, "max": None}
        return {**dict(zip(names, sums, strict=True)), **counted}


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


def flops_of_steps(model: PreTrainedModel | PeftModel) -> StepFlops | None:
    """Return what the model's steps cost by their tokens; `None` for a shape that can't be read."""
    counts = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        if not any(part in name for part in ("embed", *HEAD_NAMES)):
            counts[parameter.requires_grad] += getattr(parameter, "ds_numel", parameter.numel())
    try:
        shape = shape_of_loaded(model)
        return step_flops(shape, counts[True], linear_parameters(shape) if counts[False] else 0)
    except ModelError:
        return None


def device_peak_flops() -> float | None:
    """Return the GPU's peak rate in FLOP/s; `None` without one, or when its name is not known."""
    return peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def peak_memory_bytes() -> int:
    """Return the most bytes this rank has held: allocated on its GPU, or resident in the process on a CPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resident_peak_bytes()


def resident_peak_bytes() -> int:
    """Return the most bytes that were resident in this process, since its start or since the peak was last reset.

    `ru_maxrss` is used only where the kernel has no better figure: it is inherited from the process that started this
    one, and can't be reset.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

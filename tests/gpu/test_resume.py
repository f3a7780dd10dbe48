"""Killed after a checkpoint and started again on CUDA, a run goes on as if nothing had happened: how exactly, and when.

Bit for bit only with `--deterministic`. Without it the backward passes of attention and of index reads add up in the
order in which threads finish, and cuBLAS may split a product differently; a resume is then as far from the whole run as
two whole runs are from each other.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.gpu import METHODS, launched, needs_gpu, run, small_run
from tests.support.launching import FAULT_RUNNER, losses, scores, weights

pytestmark = [*needs_gpu, pytest.mark.timeout(2400)]

STEPS, SAVED, KILLED = 12, 4, 6
MODES = {
    "deterministic": ["--deterministic", "true", "--deepspeed", "zero3"],
    "fast": ["--deepspeed", "zero2"],
}


def attempts(folder: Path, cases: dict[str, dict[str, Any]]) -> tuple[int, dict[str, int], str]:
    """Train cases on one device; gives the launcher's code, the code of each case that ended, and the output."""
    folder.mkdir(parents=True, exist_ok=True)
    todo = {
        name: {"faults": [], **case, "flags": [*case["flags"], "--output_dir", str(folder / case.get("in", name))]}
        for name, case in cases.items()
    }
    (folder / "cases.json").write_text(json.dumps(todo))
    codes = folder / "codes-0.json"
    codes.unlink(missing_ok=True)
    done = run(launched(FAULT_RUNNER, str(folder / "cases.json"), ranks=1), timeout=900)
    return done.code, json.loads(codes.read_text()) if codes.is_file() else {}, done.output


@pytest.fixture(scope="module", params=MODES)
def runs(
    request: pytest.FixtureRequest, tiny_model: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """Each method trained whole, and once more with SIGKILL in step 6 and a second attempt from checkpoint-4.

    LoRA's dropout is on: the device's random numbers have to go on as well.
    """
    folder = tmp_path_factory.mktemp(request.param)
    words = [*small_run(tiny_model, pairs_file), "--max_steps", str(STEPS), "--learning_rate", "3e-3"]
    words += ["--save_strategy", "steps", "--save_steps", str(SAVED), *MODES[request.param]]
    whole = {f"{method}_whole": {"flags": [*words, *flags]} for method, flags in METHODS.items()}
    code, codes, output = attempts(folder, whole)
    assert code == 0 and codes == dict.fromkeys(whole, 0), output[-6000:]
    kill = [{"do": "signal", "name": "SIGKILL", "step": KILLED, "rank": 0}]
    for method, flags in METHODS.items():
        code, codes, output = attempts(folder, {method: {"flags": [*words, *flags], "faults": kill}})
        assert code != 0 and codes == {}, "killed before its end"
        assert (folder / method / f"checkpoint-{SAVED}").is_dir(), output[-4000:]
        assert not (folder / method / f"checkpoint-{2 * SAVED}").exists()
    resume = ["--resume_from_checkpoint", "auto"]
    again = {f"{method}_again": {"in": method, "flags": [*words, *flags, *resume]} for method, flags in METHODS.items()}
    code, codes, output = attempts(folder, again)
    assert code == 0 and codes == dict.fromkeys(again, 0), output[-6000:]
    assert output.count(f"checkpoint-{SAVED}") >= len(METHODS), "each went on from its checkpoint"
    return request.param, folder


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_as_the_whole_one(method: str, runs: tuple[str, Path]) -> None:
    """The killed attempt's first steps are a second run of the whole one, and the second attempt's are the resume."""
    mode, folder = runs
    whole, resumed = losses(folder / f"{method}_whole"), losses(folder / method)
    assert len(whole) == len(resumed) == STEPS and all(math.isfinite(loss) for loss in whole)
    apart = [abs(a - b) / abs(a) for a, b in zip(whole, resumed, strict=True)]
    print(
        f"{method}, {mode}: losses differ by {max(apart[:SAVED]):.1e} before the kill, {max(apart[SAVED:]):.1e} after"
    )
    if mode == "deterministic":
        assert resumed == whole
        first, second = weights(folder / f"{method}_whole"), weights(folder / method)
        assert first.keys() == second.keys()
        assert [name for name in first if not torch.equal(first[name], second[name])] == []
        assert scores(folder / method) == scores(folder / f"{method}_whole")
    else:
        assert resumed == pytest.approx(whole, rel=1e-3)

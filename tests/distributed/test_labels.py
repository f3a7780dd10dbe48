"""Labels reach the loss in the collator's types, whatever type the engine computes in."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.launching import REPOSITORY, environment, read_json, run

pytestmark = pytest.mark.distributed

RUNNER = """
import json, sys
from rm_scale.guard import leave
from rm_scale.train import main
from rm_scale.training import trainer

seen = []
plain = trainer.preference_loss

def preference_loss(rewards, batch, settings):
    seen.append({name: [str(batch[name].dtype), batch[name].tolist()] for name in ("pair_target", "pair_margin")})
    return plain(rewards, batch, settings)

trainer.preference_loss = preference_loss
code = main(sys.argv[2:])
open(sys.argv[1], "w").write(json.dumps(seen))
leave(code)
"""


def test_targets_and_margins_stay_fp32_under_a_bf16_engine(tiny_model: Path, tmp_path: Path) -> None:
    """transformers casts what it moves to the engine's type: 0.9 became 0.8984, and a margin of 5.15 became 5.156."""
    rows = [
        {"prompt": f"{n} + 1 =", "response_0": f" {n + 1}", "response_1": " no", "soft_label": 0.9} for n in range(8)
    ]
    margins = [{"prompt": f"{n} + 2 =", "chosen": f" {n + 2}", "rejected": " no", "margin": 5.15} for n in range(8)]
    for name, lines, column, expected in (
        ("soft", rows, "pair_target", 0.9),
        ("margin", margins, "pair_margin", 5.15),
    ):
        data, script = tmp_path / f"{name}.jsonl", tmp_path / "runner.py"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        script.write_text(RUNNER)
        words = ["--model_name_or_path", str(tiny_model), "--dataset_path", str(data), "--deepspeed", "zero2"]
        words += ["--max_steps", "1", "--output_dir", str(tmp_path / name), "--sample_scores", "0", "--disable_tqdm"]
        command = [sys.executable, str(script), str(tmp_path / f"{name}.json"), *words]
        done = run(command, env=environment(PYTHONPATH=str(REPOSITORY)))
        assert done.code == 0, done.output[-3000:]
        plan = read_json(tmp_path / name / "run" / "plan.json")
        assert plan["compute_dtype"] == "bfloat16", "or nothing is shown"
        (first, *_) = read_json(tmp_path / f"{name}.json")
        dtype, values = first[column]
        assert dtype == "torch.float32"
        assert values and all(value == pytest.approx(expected, rel=1e-7) for value in values)

"""`load_best_model_at_end`: a run ends with the weights of its best checkpoint, and says so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.launching import read_json, read_lines, run_cases
from tests.support.tiny_runs import train_tiny

# Far too high a rate after good steps: the first evaluation is the best.
WORDS = ["--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "2"]
WORDS += ["--load_best_model_at_end", "--metric_for_best_model", "eval_loss", "--greater_is_better", "false"]
WORDS += ["--lr_scheduler_type", "constant", "--learning_rate", "0.05", "--logging_steps", "1"]


def evaluations(output: Path) -> dict[int, float]:
    """Loss by step, of the evaluations in the records."""
    lines = [line for line in read_lines(output / "run" / "metrics.jsonl") if "eval_loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6], "the best weights' evaluation is not logged a second time"
    return {line["step"]: line["eval_loss"] for line in lines}


def best_step(output: Path) -> int:
    losses = evaluations(output)
    return min(losses, key=losses.__getitem__)


def check(output: Path, file: str, metric: str, step: int, loss: float) -> None:
    """The model and its evaluation are those of the best checkpoint, which is not the last."""
    assert step < 6
    best, last = (load_file(output / f"checkpoint-{number}" / file) for number in (step, 6))
    ours = load_file(output / file)
    assert all(ours[name].equal(best[name]) for name in best)
    assert not all(ours[name].equal(last[name]) for name in last)
    assert read_json(output / "run" / "evaluation.json")["loss"] == pytest.approx(loss, rel=1e-6)
    assert f"weights of step {step}, the best {metric}" in (output / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "file"), [([], "model.safetensors"), (["--use_peft"], "adapter_model.safetensors")], ids=["full", "lora"]
)
def test_a_run_ends_with_its_best_weights(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, words: list[str], file: str
) -> None:
    output = train_tiny(tiny_model, pairs_file, tmp_path / "run", *WORDS, "--save_total_limit", "2", *words)
    step = best_step(output)
    check(output, file, "eval_loss", step, evaluations(output)[step])


@pytest.mark.long
def test_under_deepspeed_on_two_ranks(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    words = ["--model_name_or_path", str(tiny_model), "--dataset_path", str(pairs_file), "--eval_split_size", "12"]
    words += [*WORDS[:8], "--load_best_model_at_end", "--learning_rate", "5e-3", "--max_steps", "6", "--disable_tqdm"]
    # It never rises, so that the first evaluation stays the best.
    words += ["--metric_for_best_model", "num_pairs", "--sample_scores", "0"]
    cases = {"full": [*words, "--deepspeed", "zero3"], "lora": [*words, "--deepspeed", "zero2", "--use_peft"]}
    done = run_cases(tmp_path, cases)
    assert done.code == 0, done.output[-3000:]
    for name, file in (("full", "model.safetensors"), ("lora", "adapter_model.safetensors")):
        check(tmp_path / name, file, "num_pairs", 2, evaluations(tmp_path / name)[2])


def test_a_best_checkpoint_that_is_gone_leaves_the_last_weights_with_a_warning(
    tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """The checkpoint of a run that has ended is resumed at its last step, without the best one."""
    output = train_tiny(tiny_model, pairs_file, tmp_path / "run", *WORDS)
    step = best_step(output)
    (output / f"checkpoint-{step}" / "manifest.json").unlink()
    train_tiny(tiny_model, pairs_file, output, *WORDS, "--resume_from_checkpoint", "last")
    last, ours = (load_file(folder / "model.safetensors") for folder in (output / "checkpoint-6", output))
    assert all(ours[name].equal(last[name]) for name in last)
    card = (output / "README.md").read_text()
    assert re.search(rf"load_best_model_at_end: .*checkpoint-{step}.*The run ends with its last weights", card)
    assert "weights of step" not in card
    assert json.loads((output / "checkpoint-6" / "trainer_state.json").read_text())["best_global_step"] == step

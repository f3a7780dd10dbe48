"""Several evaluation files: metrics of their own while training, equal to those of the file alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from rm_scale.data.splits import Origins
from rm_scale.demo.synthetic_preferences import generate_pairs
from rm_scale.training.evaluation_sets import names_of_sets
from tests.support.launching import TRAIN, read_lines, run


def origins(*names: str) -> Origins:
    each = np.arange(len(names))
    return Origins(names, each, each, each)


def test_sets_are_called_like_their_files() -> None:
    assert names_of_sets(origins("a/chat.jsonl.gz", "code.v2.jsonl"), []) == ["chat", "code"]
    assert names_of_sets(origins("a/chat.jsonl", "b/chat.jsonl"), []) == ["a/chat.jsonl", "b/chat.jsonl"]
    assert names_of_sets(origins("chat.jsonl", "code.jsonl"), ["code"]) == ["chat", "code.jsonl"]
    assert names_of_sets(origins("chat.jsonl"), []) == []
    assert names_of_sets(None, []) == []


def test_each_file_has_the_metrics_it_has_alone(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    files = {}
    for name, seed in (("chat", 11), ("code", 12)):
        files[name] = tmp_path / f"{name}.jsonl"
        rows = generate_pairs(9 if name == "chat" else 14, seed=seed, split="train")
        files[name].write_text("".join(json.dumps({**row, "subset": ""}) + "\n" for row in rows))
    words = ["--model_name_or_path", tiny_model, "--dataset_path", pairs_file, "--bf16", "false", "--max_steps", "2"]
    words += ["--learning_rate", "5e-3", "--eval_strategy", "steps", "--eval_steps", "1", "--sample_scores", "0"]
    words += ["--disable_tqdm", "--save_strategy", "steps", "--save_steps", "1", "--metric_for_best_model", "code_loss"]

    def evaluated(folder: str, *paths: Path, metric: str = "loss") -> list[dict[str, float]]:
        more = ["--output_dir", tmp_path / folder, "--metric_for_best_model", metric, "--eval_dataset_path", *paths]
        done = run([str(word) for word in [sys.executable, TRAIN, *words, *more]])
        assert done.code == 0, done.output[-3000:]
        return [line for line in read_lines(tmp_path / folder / "run" / "metrics.jsonl") if "eval_loss" in line]

    both = evaluated("both", files["chat"], files["code"], metric="code_loss")
    alone = {name: evaluated(name, file) for name, file in files.items()}
    for step in range(2):
        for name in files:
            for figure in ("loss", "accuracy", "mean_margin", "num_pairs"):
                expected = alone[name][step][f"eval_{figure}"]
                assert both[step][f"eval_{name}_{figure}"] == pytest.approx(expected, rel=1e-5, abs=1e-7)
        assert both[step]["eval_num_pairs"] == 9 + 14
        assert not any(key.startswith("eval_chat") for key in alone["chat"][step])
    state = json.loads((tmp_path / "both" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_metric"] == pytest.approx(min(line["eval_code_loss"] for line in both))

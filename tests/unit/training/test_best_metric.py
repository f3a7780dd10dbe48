"""The best model is chosen by a subset of the evaluation data only where there is one of that name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rm_scale import training_run
from rm_scale.config_parsing import config_from_dict
from rm_scale.errors import ConfigError


def load(model: Path, folder: Path, metric: str, subsets: list[str]) -> None:
    rows = [{"prompt": "a", "chosen": f"yes {n}", "rejected": "no", "subset": one} for n, one in enumerate(subsets)]
    (folder / "eval.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    paths = {"dataset_path": str(folder / "eval.jsonl"), "eval_dataset_path": str(folder / "eval.jsonl")}
    more = {"output_dir": str(folder / "out"), "dataset_cache_dir": str(folder / "cache"), "eval_strategy": "epoch"}
    parsed = config_from_dict({"model_name_or_path": str(model), **paths, **more, "metric_for_best_model": metric})
    parsed.raise_problems()
    _, encoder = training_run.load_text_encoder(parsed.config)
    training_run.load_data(parsed.config, encoder)


def test_a_subset_that_is_there(tiny_model: Path, tmp_path: Path) -> None:
    load(tiny_model, tmp_path, "eval_maths_accuracy", ["maths", "chat"])
    load(tiny_model, tmp_path, "loss", ["maths", "chat"])


@pytest.mark.parametrize(("subsets", "has"), [(["maths", "chat"], "chat_accuracy, maths_accuracy"), (["", ""], "none")])
def test_a_subset_that_is_not_there(tiny_model: Path, tmp_path: Path, subsets: list[str], has: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tiny_model, tmp_path, "code_accuracy", subsets)
    (problem,) = caught.value.problems
    assert problem.startswith("metric_for_best_model=code_accuracy: the evaluation data has no such subset and no such")
    assert f"they have {has}. Fix: accuracy, loss" in problem

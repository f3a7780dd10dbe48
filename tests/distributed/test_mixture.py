"""A mixture of sources on one rank and on two: the same groups in each step, per-source figures that add up, and a run
that is resumed in the middle of an epoch and ends as the uninterrupted one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rm_scale.demo.synthetic_preferences import generate_pairs
from tests.support.launching import losses, read_json, read_lines, run_cases, weights

pytestmark = [pytest.mark.long, pytest.mark.distributed]

WEIGHTS = {"large": 0.5, "middle": 0.3, "small": 0.2}
STEPS, SAVED_AT, GROUPS = 8, 3, 10


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Output directories by case: whole and resumed, on two ranks and on one."""
    folder = tmp_path_factory.mktemp("mixture")
    entries = []
    for (name, weight), count in zip(WEIGHTS.items(), (40, 20, 9), strict=True):
        path = folder / f"{name}.jsonl"
        rows = generate_pairs(count, seed=count, split="train")
        path.write_text("".join(json.dumps({**row, "subset": ""}) + "\n" for row in rows))
        entries.append({"path": str(path), "weight": weight})
    words = ["--model_name_or_path", str(tiny_model), "--datasets", json.dumps(entries), "--eval_split_size", "12"]
    words += ["--bf16", "false", "--deepspeed", "zero2", "--max_steps", str(STEPS), "--global_batch_size", str(GROUPS)]
    words += ["--logging_steps", "1", "--save_strategy", "steps", "--save_steps", str(SAVED_AT)]
    words += ["--learning_rate", "1e-3", "--sample_scores", "0", "--disable_tqdm", "--per_device_train_batch_size", "3"]
    words += ["--gradient_checkpointing", "false", "--dataset_cache_dir", str(folder / "cache")]
    checkpoint = str(folder / "whole2" / f"checkpoint-{SAVED_AT}")
    resume = ["--resume_from_checkpoint", checkpoint]
    for ranks in (2, 1):
        cases = {f"whole{ranks}": words, f"resumed{ranks}": [*words, *resume]}
        finished = run_cases(folder, cases, ranks=ranks, timeout=600)
        assert finished.code == 0, finished.output[-5000:]
    return {name: folder / name for name in ("whole2", "resumed2", "whole1", "resumed1")}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(folder / "run" / "metrics.jsonl") if "loss" in line]


def test_each_step_has_its_shares_on_any_number_of_ranks(folders: dict[str, Path]) -> None:
    one, two = lines(folders["whole1"]), lines(folders["whole2"])
    assert len(one) == len(two) == STEPS
    total = dict.fromkeys(WEIGHTS, 0)
    for here, there in zip(one, two, strict=True):
        groups = {name: here[f"source/{name}/groups"] for name in WEIGHTS}
        assert (
            groups
            == {name: there[f"source/{name}/groups"] for name in WEIGHTS}
            == {"large": 5, "middle": 3, "small": 2}
        )
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)
        for name in WEIGHTS:
            total[name] += groups[name]
            assert here[f"source/{name}/loss"] == pytest.approx(there[f"source/{name}/loss"], rel=1e-5)
            assert here[f"source/{name}/accuracy"] == there[f"source/{name}/accuracy"]
    assert total == {name: round(weight * STEPS * GROUPS) for name, weight in WEIGHTS.items()}


def test_figures_of_sources_add_up_to_those_of_the_step(folders: dict[str, Path]) -> None:
    for name in folders:
        for line in lines(folders[name]):
            counts = np.array([line[f"source/{source}/groups"] for source in WEIGHTS])  # one pair in each group
            for figure in ("loss", "accuracy"):
                parts = np.array([line[f"source/{source}/{figure}"] for source in WEIGHTS])
                assert counts @ parts / counts.sum() == pytest.approx(line[figure], rel=1e-5)


def test_a_run_resumed_in_an_epoch_is_the_uninterrupted_run(folders: dict[str, Path]) -> None:
    whole, resumed = folders["whole2"], folders["resumed2"]
    assert losses(resumed) == losses(whole)[SAVED_AT:]
    expected, found = weights(whole), weights(resumed)
    assert expected.keys() == found.keys()
    assert all(bool((expected[name] == found[name]).all()) for name in expected)


def test_two_ranks_go_on_as_one_with_the_same_groups(folders: dict[str, Path]) -> None:
    rest, resumed = lines(folders["whole1"])[SAVED_AT:], lines(folders["resumed1"])
    assert [line["loss"] for line in resumed] == pytest.approx([line["loss"] for line in rest], rel=1e-4)
    for name in WEIGHTS:
        key = f"source/{name}/accuracy"
        assert [line[key] for line in resumed] == [line[key] for line in rest]


def test_the_final_evaluation_and_the_report_name_the_sources(folders: dict[str, Path]) -> None:
    evaluation = read_json(folders["whole1"] / "run" / "evaluation.json")
    assert {name: part["num_pairs"] for name, part in evaluation["sources"].items()} == {
        "large": 7,
        "middle": 3,
        "small": 2,
    }
    assert sum(part["num_pairs"] for part in evaluation["sources"].values()) == evaluation["num_pairs"] == 12
    shares = read_json(folders["whole1"] / "run" / "data_report.json")["mixture"]
    assert [(share["name"], share["weight"], share["share"], share["held_out"]) for share in shares] == [
        ("large", 0.5, 0.5, 7),
        ("middle", 0.3, 0.3, 3),
        ("small", 0.2, 0.2, 2),
    ]

"""A real model on a mixture of four public preference sets of different forms, each read by its columns or a preset."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.support.launching import TRAIN, environment, read_json, read_lines, run

pytestmark = [pytest.mark.long, pytest.mark.e2e, pytest.mark.network]

NAMES = ("llmbar", "topical_chat", "dpo_demo", "hh")
STEPS, PER_STEP = 50, 2


def test_smollm2_trains_on_four_public_sets_at_once(smollm2: Path, tmp_path: Path) -> None:
    sets = os.environ.get("RM_SCALE_PREFERENCE_DATA")
    if not sets:
        pytest.skip(
            "RM_SCALE_PREFERENCE_DATA is not set: it names a folder with llmbar, topical_chat, dpo_demo, hh-rlhf"
        )
    entries = [
        {"name": "llmbar", "path": f"{sets}/llmbar", "weight": 1},
        {"name": "topical_chat", "path": f"{sets}/topical_chat", "preset": "topical_chat", "weight": 1},
        {"name": "dpo_demo", "path": f"{sets}/dpo_demo/dpo_en_demo.json.gz", "weight": 1},
        {"name": "hh", "path": f"{sets}/hh-rlhf/harmless-base.jsonl.gz", "weight": 1, "max_samples": 200},
    ]
    words = ["--model_name_or_path", smollm2, "--datasets", json.dumps(entries), "--output_dir", tmp_path / "run"]
    words += ["--max_length", 192, "--max_rejected_share", 0.95, "--max_steps", STEPS, "--use_peft"]
    words += ["--global_batch_size", PER_STEP, "--logging_steps", 1, "--gradient_checkpointing", "false"]
    words += ["--dataset_cache_dir", tmp_path / "cache", "--sample_scores", 0, "--disable_tqdm"]
    # Rows of so few tokens gain little from a second thread, which on a busy machine makes a step ten times as long.
    done = run([str(word) for word in [sys.executable, TRAIN, *words]], env=environment(OMP_NUM_THREADS="1"))
    assert done.code == 0, done.output[-5000:]
    assert f"saved and verified {tmp_path / 'run'}" in done.output
    lines = [line for line in read_lines(tmp_path / "run" / "run" / "metrics.jsonl") if "source/hh/groups" in line]
    assert len(lines) == STEPS
    for line in lines:
        groups = [line[f"source/{name}/groups"] for name in NAMES]
        assert sum(groups) == PER_STEP and max(groups) == 1
        assert all(0 < line[f"source/{name}/loss"] < 5 for name, count in zip(NAMES, groups, strict=True) if count)
    assert [sum(line[f"source/{name}/groups"] for line in lines) for name in NAMES] == [STEPS * PER_STEP // 4] * 4
    # A new head on a real backbone starts near log 2, and a few steps don't lead it away.
    assert sum(line["loss"] for line in lines) / STEPS == pytest.approx(0.69, abs=0.3)
    report = read_json(tmp_path / "run" / "run" / "data_report.json")
    assert [(part["name"], part["share"]) for part in report["mixture"]] == [(name, 0.25) for name in NAMES]
    assert {part["name"]: part["rows_read"] for part in report["mixture"]} == {
        "llmbar": 419,
        "topical_chat": 60,
        "dpo_demo": 300,
        "hh": 1894,
    }

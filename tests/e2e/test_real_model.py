"""A real pretrained model on real preferences: full, LoRA and QLoRA under ZeRO-3 on two ranks, a step each."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.support.launching import TRAIN, losses, read_json, read_lines, run, run_cases

pytestmark = [pytest.mark.long, pytest.mark.e2e, pytest.mark.network]


@pytest.fixture(scope="module")
def hh_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 1,500 pairs of the file: reading the whole is tested with the data, and takes minutes each time."""
    path = os.environ.get("RM_SCALE_HH_DATA")
    if not path:
        pytest.skip("RM_SCALE_HH_DATA is not set: it names a file of HH preferences (.jsonl or .jsonl.gz)")
    file = tmp_path_factory.mktemp("hh") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in read_lines(Path(path))[:1500]))
    return file


def test_smollm2_trains_on_hh_pairs(smollm2: Path, hh_file: Path, tmp_path: Path) -> None:
    words = ["--model_name_or_path", str(smollm2), "--dataset_path", str(hh_file), "--deepspeed", "zero3"]
    words += ["--max_length", "128", "--overlong_policy", "drop", "--max_rejected_share", "0.95"]
    words += ["--eval_split_size", "16", "--max_eval_samples", "4", "--max_steps", "1"]
    words += ["--per_device_train_batch_size", "2", "--sample_scores", "0", "--disable_tqdm"]
    cases = {
        "full": words,
        "lora": [*words, "--use_peft"],
        "qlora": [*words, "--use_peft", "--load_in_4bit", "--use_bnb_nested_quant"],
    }
    num_rows = len(read_lines(hh_file))
    finished = run_cases(tmp_path, cases, timeout=900)
    assert finished.code == 0, finished.output[-5000:]
    assert "padding token: <|endoftext|>" in finished.output
    for name in cases:
        folder = tmp_path / name
        assert f"saved and verified {folder}" in finished.output
        report = read_json(folder / "run" / "data_report.json")
        assert report["rows_read"] == report["rows_used"] + report["rows_rejected"] == num_rows
        assert len(read_lines(folder / "run" / "evaluation_scores.jsonl")) == 4
        # A new head on a real backbone starts near log 2.
        assert losses(folder)[0] == pytest.approx(0.69, abs=0.35)


def test_full_fine_tuning_without_deepspeed_is_verified_in_its_own_precision(
    smollm2: Path, hh_file: Path, tmp_path: Path
) -> None:
    """fp32 weights under bfloat16 autocast: a reload scored in fp32 differs by 0.4 on this model."""
    words = [
        "--model_name_or_path",
        str(smollm2),
        "--dataset_path",
        str(hh_file),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    words += ["--max_length", "128", "--max_rejected_share", "0.95", "--max_steps", "1", "--global_batch_size", "2"]
    done = run([sys.executable, str(TRAIN), *words, "--sample_scores", "0", "--disable_tqdm"])
    assert done.code == 0, done.output[-3000:]
    assert f"saved and verified {tmp_path / 'run'}" in done.output

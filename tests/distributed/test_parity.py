"""The same number everywhere: fresh-process pipeline, one rank or two, one micro-batch or many. All in fp32."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.launching import REPOSITORY, losses, read_json, read_lines, run, run_cases, scores

pytestmark = pytest.mark.distributed

FP32 = ["--bf16", "false", "--force", "qlora_fp32", "--disable_tqdm", "--sample_scores", "0", "--logging_steps", "1"]
ACCUMULATE_4 = ["--gradient_accumulation_steps", "4"]


@pytest.fixture(scope="module")
def common(tiny_model: Path, pairs_file: Path) -> list[str]:
    flags = ["--model_name_or_path", str(tiny_model), "--dataset_path", str(pairs_file), "--eval_split_size", "19"]
    return [*flags, *FP32, "--learning_rate", "3e-3", "--max_steps", "6", "--lora_dropout", "0"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, common: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("two_ranks")
    split = ["--per_device_train_batch_size", "4", "--deepspeed", "zero3"]
    cases = {
        "full": [*common, *split],
        "lora": [*common, *split, "--use_peft", "--merge_adapter"],
        "qlora": [*common, *split, "--use_peft", "--load_in_4bit", "--merge_adapter"],
        "accumulated": [
            *common,
            "--deepspeed",
            "zero2",
            "--per_device_train_batch_size",
            "1",
            "--gradient_accumulation_steps",
            "4",
        ],
        "ddp": [*common, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"],
        # Two epochs of 101 groups in steps of 24: the last step of each epoch is smaller and needs fillers.
        "ragged": [
            *common,
            "--per_device_train_batch_size",
            "3",
            "--gradient_accumulation_steps",
            "4",
            "--deepspeed",
            "zero3",
            "--max_steps",
            "10",
        ],
    }
    finished = run_cases(folder, cases)
    assert finished.code == 0, finished.output[-6000:]
    return folder


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory, common: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("one_rank")
    cases = {
        "full": [*common, "--deepspeed", "zero3", "--per_device_train_batch_size", "8"],
        "accumulated": [
            *common,
            "--deepspeed",
            "zero3",
            "--per_device_train_batch_size",
            "1",
            "--gradient_accumulation_steps",
            "8",
        ],
        "ragged": [*common, "--deepspeed", "zero3", "--per_device_train_batch_size", "24", "--max_steps", "10"],
    }
    finished = run_cases(folder, cases, ranks=1)
    assert finished.code == 0, finished.output[-6000:]
    return folder


PIPELINE = """
import json, sys, torch
from transformers import BitsAndBytesConfig, pipeline
import bitsandbytes.nn.modules as bnb_modules
# bitsandbytes' own inference kernel for AVX512-BF16 CPUs rounds to bf16; without it 4-bit layers compute in fp32.
bnb_modules.has_avx512bf16 = lambda: False
folder, kind, texts = sys.argv[1], sys.argv[2], json.loads(sys.stdin.read() or open(sys.argv[3]).read())
extra = {}
if kind == "adapter":
    contract = json.load(open(folder + "/scoring_contract.json"))
    extra["model_kwargs"] = {"num_labels": 1}
    if contract["base_model"]["quantization"]:
        extra["model_kwargs"]["quantization_config"] = BitsAndBytesConfig(**contract["base_model"]["quantization"])
scorer = pipeline("text-classification", model=folder, function_to_apply="none", dtype=torch.float32, **extra)
print("SCORES " + json.dumps([scorer(text)[0]["score"] for text in texts]))
"""


def pipeline_scores(folder: Path, kind: str, texts: list[str], scratch: Path) -> list[float]:
    """Scores by transformers' own pipeline in a process that knows nothing of rm_scale."""
    (scratch / "texts.json").write_text(json.dumps(texts))
    (scratch / "score.py").write_text(PIPELINE)
    finished = run(
        [sys.executable, str(scratch / "score.py"), str(folder), kind, str(scratch / "texts.json")], cwd=scratch
    )
    lines = [line for line in finished.output.splitlines() if line.startswith("SCORES ")]
    assert finished.code == 0 and lines, finished.output[-3000:]
    return [float(score) for score in json.loads(lines[-1].removeprefix("SCORES "))]


@pytest.fixture(scope="module")
def texts(two_ranks: Path, pairs_file: Path) -> list[str]:
    """The evaluation texts as the scoring contract renders them, in the order of `scores`."""
    from rm_scale.inference.scoring.scorer import RewardScorer

    scorer = RewardScorer.from_pretrained(two_ranks / "full", device="cpu")
    rows = {row["id"]: row for row in map(json.loads, pairs_file.read_text().splitlines())}
    rendered = []
    for line in read_lines(two_ranks / "full" / "run" / "evaluation_scores.jsonl"):
        row = rows[line["id"]]
        rendered += [scorer.encoder.render(row["prompt"], row[side]) for side in ("chosen", "rejected")]
    return rendered


@pytest.mark.parametrize(
    ("case", "kind", "tolerance"),
    [
        ("full", "model", 1e-4),
        ("lora", "adapter", 1e-4),
        pytest.param("lora/merged", "model", 1e-4, marks=pytest.mark.long),
        pytest.param("qlora", "adapter", 1e-4, marks=pytest.mark.long),
    ],
)
def test_fresh_pipeline_gives_the_trainers_scores(
    two_ranks: Path, texts: list[str], tmp_path: Path, case: str, kind: str, tolerance: float
) -> None:
    expected = scores(two_ranks / case.split("/")[0])
    assert pipeline_scores(two_ranks / case, kind, texts, tmp_path) == pytest.approx(expected, abs=tolerance)


def test_one_rank_equals_two(one_rank: Path, two_ranks: Path) -> None:
    assert losses(one_rank / "full") == pytest.approx(losses(two_ranks / "full"), rel=1e-5)
    assert scores(one_rank / "full") == pytest.approx(scores(two_ranks / "full"), abs=1e-3)
    one, two = (read_json(folder / "full" / "run" / "evaluation.json") for folder in (one_rank, two_ranks))
    assert (one["accuracy"], one["num_pairs"]) == (two["accuracy"], two["num_pairs"])


@pytest.mark.parametrize("case", ["accumulated", "ddp"])
def test_splits_of_the_batch_agree(one_rank: Path, two_ranks: Path, case: str) -> None:
    assert losses(two_ranks / case) == pytest.approx(losses(one_rank / "full"), rel=1e-5)
    assert scores(two_ranks / case) == pytest.approx(scores(one_rank / "full"), abs=1e-3)


@pytest.mark.long
def test_hpz_agrees(two_ranks: Path, common: list[str], tmp_path: Path) -> None:
    """In a launch of its own: DeepSpeed makes hpZ's process groups once per process."""
    hpz = json.loads((REPOSITORY / "ds_configs" / "zero3_hpz.json").read_text())
    hpz["zero_optimization"]["zero_hpz_partition_size"] = 2
    (tmp_path / "hpz.json").write_text(json.dumps(hpz))
    flags = [*common, "--per_device_train_batch_size", "4", "--deepspeed", str(tmp_path / "hpz.json")]
    finished = run_cases(tmp_path, {"hpz": flags})
    assert finished.code == 0, finished.output[-5000:]
    assert losses(tmp_path / "hpz") == pytest.approx(losses(two_ranks / "full"), rel=1e-5)


def test_one_by_eight_equals_eight_by_one(one_rank: Path) -> None:
    assert losses(one_rank / "accumulated") == pytest.approx(losses(one_rank / "full"), rel=1e-5)
    assert scores(one_rank / "accumulated") == pytest.approx(scores(one_rank / "full"), abs=1e-3)


def test_smaller_last_step_of_an_epoch_agrees(one_rank: Path, two_ranks: Path) -> None:
    assert losses(two_ranks / "ragged") == pytest.approx(losses(one_rank / "ragged"), rel=1e-5)
    assert scores(two_ranks / "ragged") == pytest.approx(scores(one_rank / "ragged"), abs=1e-3)

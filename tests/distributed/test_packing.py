"""Contract 1 over packed rows: the same losses and scores as padded rows, whatever cuts up the batch. All in fp32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.launching import Launches, losses, read_lines, scores
from tests.support.marks import mostly_long

pytestmark = pytest.mark.distributed

LAYOUTS = ["none", "padding_free", "prefix_shared"]
STAGES = ["none", "zero2", "zero3"]


@pytest.fixture(scope="module")
def ranked_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Groups of two to five responses, with ties, of very different lengths."""
    path = tmp_path_factory.mktemp("data") / "ranked.jsonl"
    rows = []
    for number in range(75):
        count = 2 + number % 4
        prompt = "?" if number % 7 == 0 else f"Question {number}: " + "what is it? " * (number % 9)
        responses = [f"{which * number} is answer {'x' * (which * number % 23)}" for which in range(1, count + 1)]
        ranks = [which // 2 for which in range(count)] if count > 2 else [0, 1]
        rows.append({"prompt": prompt, "responses": responses, "ranks": ranks})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def common(tiny_model: Path, ranked_file: Path) -> list[str]:
    flags = ["--model_name_or_path", str(tiny_model), "--dataset_path", str(ranked_file), "--eval_split_size", "13"]
    flags += ["--dataset_format", "ranked", "--bf16", "false", "--disable_tqdm", "--sample_scores", "0"]
    flags += ["--logging_steps", "1", "--learning_rate", "3e-3", "--max_steps", "6", "--lora_dropout", "0"]
    return [*flags, "--global_batch_size", "12", "--per_device_train_batch_size", "3", "--max_length", "200"]


SHORT = ("full-none-none", "full-none-prefix_shared", "lora-none-none", "lora-zero3-prefix_shared")
"""The cases of `make test`: DDP and ZeRO-3, and what they are compared with."""


def cases(common: list[str]) -> dict[str, list[str]]:
    """Every layout, ZeRO stage and method; the budget makes two to four micro-steps out of each step."""
    made = {}
    for stage in STAGES:
        engine = [] if stage == "none" else ["--deepspeed", stage]
        for layout in LAYOUTS:
            budget = [] if layout == "none" else ["--max_tokens_per_device", "480"]
            flags = [*common, *engine, "--packing", layout, *budget]
            made[f"full-{stage}-{layout}"] = flags
            made[f"lora-{stage}-{layout}"] = [*flags, "--use_peft"]
    made["full-zero1-prefix_shared"] = [*common, "--deepspeed", "zero1", "--max_tokens_per_device", "480"]
    made["full-zero3_offload-prefix_shared"] = [
        *common,
        "--deepspeed",
        "zero3_offload",
        "--max_tokens_per_device",
        "480",
    ]
    return made


def groups(common: list[str]) -> dict[str, dict[str, list[str]]]:
    """Two launches: what `make test` needs, and the rest."""
    made = cases(common)
    short = {name: made.pop(name) for name in SHORT}
    return {"short": short, "long": made}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, common: list[str]) -> Launches:
    return Launches(tmp_path_factory.mktemp("two"), groups(common))


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory, common: list[str]) -> Launches:
    picked = groups(common)
    picked["long"] = {name: flags for name, flags in picked["long"].items() if "zero2" not in name}
    return Launches(tmp_path_factory.mktemp("one"), picked, ranks=1)


def assert_same(folder: Path, reference: Path) -> None:
    expected = losses(reference)
    assert losses(folder)[0] == pytest.approx(expected[0], rel=1e-5)
    assert losses(folder) == pytest.approx(expected, rel=1e-4)
    norms = [
        [line["grad_norm"] for line in read_lines(f / "run" / "metrics.jsonl") if "loss" in line]
        for f in (folder, reference)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    # Each update widens what two kernels round differently, by how much depends on the processor.
    assert scores(folder) == pytest.approx(scores(reference), abs=1e-3)


MATRIX = [f"{method}-{stage}-{layout}" for method in ("full", "lora") for stage in STAGES for layout in LAYOUTS]


@pytest.mark.parametrize("case", mostly_long(MATRIX, short=SHORT))
def test_two_ranks_equal_one_padded_rank(one_rank: Launches, two_ranks: Launches, case: str) -> None:
    assert_same(two_ranks[case], one_rank[f"{case.partition('-')[0]}-none-none"])


ON_ONE_RANK = [case for case in MATRIX if "zero2" not in case and not case.endswith("-none")]


@pytest.mark.parametrize("case", mostly_long(ON_ONE_RANK, short=SHORT))
def test_layouts_agree_on_one_rank(one_rank: Launches, case: str) -> None:
    assert_same(one_rank[case], one_rank[f"{case.partition('-')[0]}-none-none"])


@pytest.mark.long
@pytest.mark.parametrize("stage", ["zero1", "zero3_offload"])
def test_other_engines_agree(one_rank: Launches, two_ranks: Launches, stage: str) -> None:
    for launches in (one_rank, two_ranks):
        assert_same(launches[f"full-{stage}-prefix_shared"], one_rank["full-none-none"])

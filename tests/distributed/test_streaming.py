"""A streamed mixture on ranks: the same groups in each step on one rank and on two, and after a resume in the middle
of a block."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rm_scale.demo.synthetic_preferences import generate_pairs
from tests.support.launching import losses, read_lines, run_cases, weights

pytestmark = [pytest.mark.long, pytest.mark.distributed]

STEPS, SAVED_AT, GROUPS = 6, 4, 10


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Output directories by case: whole on two ranks, resumed on two, and resumed on one."""
    folder = tmp_path_factory.mktemp("streaming")
    entries = []
    for name, weight, count in (("large", 0.7, 40), ("small", 0.3, 9)):
        path = folder / f"{name}.jsonl"
        rows = [{**row, "subset": ""} for row in generate_pairs(count, seed=count, split="train")]
        rows.insert(3, {"prompt": "no answers"})
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        entries.append({"path": str(path), "weight": weight})
    words = ["--model_name_or_path", str(tiny_model), "--datasets", json.dumps(entries), "--streaming"]
    words += ["--shuffle_buffer_size", "16", "--max_rejected_share", "0.2", "--bf16", "false", "--deepspeed", "zero2"]
    words += ["--max_steps", str(STEPS), "--global_batch_size", str(GROUPS), "--per_device_train_batch_size", "3"]
    words += ["--logging_steps", "1", "--save_strategy", "steps", "--save_steps", str(SAVED_AT)]
    words += ["--learning_rate", "1e-3", "--sample_scores", "0", "--disable_tqdm", "--gradient_checkpointing", "false"]
    resumed = [*words, "--resume_from_checkpoint", str(folder / "whole" / f"checkpoint-{SAVED_AT}")]
    for ranks, cases in ((2, {"whole": words, "resumed": resumed}), (1, {"resumed_on_one": resumed})):
        finished = run_cases(folder, cases, ranks=ranks, timeout=600)
        assert finished.code == 0, finished.output[-5000:]
    return {name: folder / name for name in ("whole", "resumed", "resumed_on_one")}


def test_a_resumed_stream_is_the_uninterrupted_one(folders: dict[str, Path]) -> None:
    assert losses(folders["resumed"]) == losses(folders["whole"])[SAVED_AT:]
    expected, found = weights(folders["whole"]), weights(folders["resumed"])
    assert expected.keys() == found.keys()
    assert all(bool((expected[name] == found[name]).all()) for name in expected)


def test_two_ranks_go_on_as_one(folders: dict[str, Path]) -> None:
    expected = losses(folders["whole"])[SAVED_AT:]
    assert losses(folders["resumed_on_one"]) == pytest.approx(expected, rel=1e-4)


def test_shares_hold_in_each_step_and_refused_rows_are_on_record(folders: dict[str, Path]) -> None:
    for line in read_lines(folders["whole"] / "run" / "metrics.jsonl"):
        if "loss" in line:
            assert (line["source/large/groups"], line["source/small/groups"]) == (7, 3)
    first, *rest = read_lines(folders["whole"] / "run" / "stream-small.jsonl")
    assert set(first) == {"identity"}
    assert rest[0]["rejected"] == {"missing_key": 1} and rest[0]["following"] is None
    assert len(rest) >= 2, "the small source was read again"

"""Every mistake gives one clear message, a non-zero exit code, no traceback, and nothing half-written.

Through the function that the command calls; what only the command itself can show has tests with processes below.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.in_process import train_here
from tests.support.launching import TRAIN, Finished, deepspeed_command, run

pytestmark = pytest.mark.e2e

Command = Callable[..., Finished]


@pytest.fixture
def flags(tmp_path: Path, tiny_model: Path, pairs_file: Path) -> Callable[..., list[str]]:
    """Good settings, except for those given."""

    def write(**settings: Any) -> list[str]:
        values = {
            "model_name_or_path": tiny_model,
            "dataset_path": pairs_file,
            "output_dir": tmp_path / "out",
            "max_steps": 1,
            **settings,
        }
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]

    return write


@pytest.fixture
def train(flags: Callable[..., list[str]], capfd: pytest.CaptureFixture[str]) -> Command:
    """Train in this process."""
    return lambda **settings: train_here(flags(**settings), capfd)


def refuse(finished: Finished, tmp_path: Path, *parts: str) -> None:
    """Check exit code, message, absence of a traceback, and that no output was left."""
    assert finished.code == 2, finished.output[-3000:]
    for part in ("rm_scale: ", "Fix:", *parts):
        assert part in finished.output, finished.output[-3000:]
    assert "Traceback" not in finished.output
    assert finished.output.count("rm_scale: ") == 1
    assert not (tmp_path / "out").exists()


PAIR = {"prompt": "Say hi.", "chosen": " hi", "rejected": " no"}
BAD_ROWS: dict[str, list[Any]] = {
    "empty": [{**PAIR, "chosen": ""}],
    "missing_key": [{"prompt": "a", "chosen": "b"}],
    "identical_responses": [{**PAIR, "rejected": " hi"}],
    "wrong_type": [{**PAIR, "chosen": 7}],
    "bad_unicode": [{**PAIR, "chosen": "a\ud800b"}],
    "over_long": [{**PAIR, "chosen": " word" * 900}],
    "bad_conversation": [
        {
            "prompt": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
            "chosen": [{"role": "assistant", "content": "c"}],
            "rejected": [{"role": "assistant", "content": "d"}],
        }
    ],
    "prompt_mismatch": [{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}],
}
GOOD_ROWS: dict[str, dict[str, Any]] = {
    "bad_conversation": {
        "prompt": [{"role": "user", "content": "a"}],
        "chosen": [{"role": "assistant", "content": "c"}],
        "rejected": [{"role": "assistant", "content": "d"}],
    },
    "prompt_mismatch": {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_too_many_bad_rows_stop_the_run(train: Command, tmp_path: Path, reason: str) -> None:
    good = GOOD_ROWS.get(reason, PAIR)
    rows = [{**good, "id": f"good{i}"} for i in range(4)] + BAD_ROWS[reason]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refuse(train(dataset_path=path, max_length=256), tmp_path, reason, "4", "--max_rejected_share")


def test_bad_rows_within_the_share_are_counted_and_written(train: Command, tmp_path: Path, pairs_file: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(pairs_file.read_text() + json.dumps({**PAIR, "chosen": ""}) + "\nnot json\n")
    finished = train(dataset_path=path, per_device_train_batch_size=2, sample_scores=0)
    assert finished.code == 0, finished.output[-3000:]
    rejected = [json.loads(line) for line in (tmp_path / "out/run/rejected_rows.jsonl").read_text().splitlines()]
    assert {(row["row"], row["reason"]) for row in rejected} == {(120, "empty"), (121, "bad_json")}


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"dataset_path": "no_such_file.jsonl"}, ["dataset_path=no_such_file.jsonl: no such file"]),
        ({"model_name_or_path": "nobody/no-such-model"}, ["nobody/no-such-model", "the hub gave no config.json"]),
        ({"model_name_or_path": "./no/such/folder"}, ["there is no such folder"]),
        ({"output_dir": "/proc/nothing/here"}, ["output_dir=/proc/nothing/here: can't be written"]),
        ({"load_in_4bit": "true"}, ["load_in_4bit=True with use_peft=False"]),
        ({"load_in_4bit": "true", "use_peft": "true", "bf16": "false"}, ["full precision"]),
        ({"fp16": "true", "bf16": "false"}, ["rewards overflow at 65,504"]),
        ({"lora_rankk": 64, "learning_rat": 1}, ["2 problems", "lora_rankk", "did you mean learning_rate"]),
        ({"deepspeed": "zero33"}, ["deepspeed='zero33': no such file", "zero3_offload"]),
        ({"dataset_format": "ranked"}, ["ranked"]),
        ({"lr_scheduler_type": "wavy"}, ["lr_scheduler_type=wavy", "linear"]),
        ({"report_to": "nobody"}, ["report_to=nobody", "tensorboard"]),
        ({"pad_token": "</s>"}, ["pad_token"]),
        ({"lora_target_modules": "nothing", "use_peft": "true"}, ["lora_target_modules=['nothing']", "q_proj"]),
        ({"resume_from_checkpoint": "last"}, ["holds no checkpoint"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_mistakes_in_settings(train: Command, tmp_path: Path, settings: dict[str, Any], parts: list[str]) -> None:
    refuse(train(**settings), tmp_path, *parts)


def test_labels_that_the_loss_would_ignore(train: Command, tmp_path: Path) -> None:
    path = tmp_path / "margins.jsonl"
    path.write_text(json.dumps({**PAIR, "margin": 1.5}) + "\n")
    refuse(train(dataset_path=path, loss_type="plackett_luce"), tmp_path, "values for margin", "bradley_terry")


def test_unsafe_weights_are_refused(train: Command, tmp_path: Path, tiny_model: Path) -> None:
    import shutil

    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuse(train(model_name_or_path=folder), tmp_path, "safetensors")


def test_launcher_passes_the_message_and_the_code_on(tmp_path: Path, tiny_model: Path) -> None:
    finished = run(deepspeed_command(TRAIN, "--model_name_or_path", str(tiny_model), "--dataset_path", "gone.jsonl"))
    assert finished.code != 0
    assert finished.output.count("gone.jsonl: no such file") == 1
    assert "Traceback" not in finished.output


@pytest.mark.long
def test_a_full_output_directory_stops_all_ranks(tmp_path: Path, tiny_model: Path, pairs_file: Path) -> None:
    """Only one rank looks; the other must hear of it rather than wait."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    words = ["--model_name_or_path", str(tiny_model), "--dataset_path", str(pairs_file)]
    finished = run(
        deepspeed_command(TRAIN, *words, "--output_dir", str(tmp_path / "out"), "--max_steps", "1"), timeout=900
    )
    assert finished.code != 0
    assert finished.output.count("already holds files") == 1
    assert "Traceback" not in finished.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_the_command_ends_with_the_message_and_the_code(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    refuse(run([sys.executable, str(TRAIN), *flags(lora_rankk=64)]), tmp_path, "lora_rankk")


def test_debug_shows_the_traceback(flags: Callable[..., list[str]]) -> None:
    finished = run([sys.executable, str(TRAIN), *flags(dataset_path="gone.jsonl", debug="true")])
    assert finished.code == 2
    assert "Traceback" in finished.output and "gone.jsonl: no such file" in finished.output


def test_a_budget_below_the_longest_group_names_one_that_fits(train: Command, tmp_path: Path) -> None:
    refuse(
        train(max_tokens_per_device=16),
        tmp_path,
        "max_tokens_per_device=16: the longest group has",
        "a group is never cut",
    )


def test_packing_that_cant_be_had_is_said_before_anything_is_read(train: Command, tmp_path: Path) -> None:
    finished = train(packing="prefix_shared", attn_implementation="eager", padding_side="left", use_liger_kernel="true")
    refuse(
        finished,
        tmp_path,
        "packed rows have attention of their own",
        "rows are padded on the right",
        "written for GPUs",
    )

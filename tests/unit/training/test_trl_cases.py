"""Cases of TRL's own tests of its reward trainer that no other test of ours holds; the list is in docs/engines.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.in_process import train_here

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if tools %}{{ tools[0]['function']['name'] }}{{ eos_token }}{% endif %}"
)


def settings(model: Path, pairs: Path, output: Path) -> list[str]:
    words = ["--model_name_or_path", str(model), "--dataset_path", str(pairs), "--output_dir", str(output)]
    words += [
        "--bf16",
        "false",
        "--max_steps",
        "3",
        "--learning_rate",
        "5e-3",
        "--disable_tqdm",
        "--sample_scores",
        "0",
    ]
    return [*words, "--eval_split_size", "4", "--logging_steps", "1"]


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chosen and rejected conversations, half of them with tools: objects in some rows, JSON text in others."""
    tool = {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {"type": "object"}}}
    rows = []
    for number in range(24):
        prompt = [{"role": "user", "content": f"What is {number} + 1?"}]
        row = {"prompt": prompt}
        for side, answer in (("chosen", number + 1), ("rejected", number)):
            row[side] = [{"role": "assistant", "content": str(answer)}]  # type: ignore[assignment]
        rows.append({**row, "tools": json.dumps([tool]) if number % 2 else None})
    path = tmp_path_factory.mktemp("data") / "conversations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_full_training_changes_every_tensor_and_keeps_the_template_in_checkpoints(
    tiny_model: Path, conversations: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    words = [*settings(tiny_model, conversations, tmp_path / "out"), "--chat_template_path", str(template)]
    finished = train_here([*words, "--save_strategy", "steps", "--save_steps", "2"], capfd)
    assert finished.code == 0, finished.output[-3000:]
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_model, tmp_path / "out"))
    shared = before.keys() & after.keys()
    assert len(shared) > 10 and all(not torch.equal(before[name], after[name]) for name in shared)
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-2"):
        assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    tags = (tmp_path / "out" / "README.md").read_text().split("---")[1]
    assert all(f"- {tag}" in tags for tag in ("trl", "reward-trainer", "reward-model"))


def test_lora_is_the_same_whichever_way_layers_are_recomputed(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for name, words in {
        "kept": ["--gradient_checkpointing", "false"],
        "recomputed": [
            "--gradient_checkpointing",
            "true",
            "--gradient_checkpointing_kwargs",
            '{"use_reentrant": false}',
        ],
        "reentrant": ["--gradient_checkpointing", "true", "--gradient_checkpointing_kwargs", '{"use_reentrant": true}'],
    }.items():
        command = [*settings(tiny_model, pairs_file, tmp_path / name), "--use_peft", "--save_strategy", "no", *words]
        finished = train_here(command, capfd)
        assert finished.code == 0, finished.output[-3000:]
        found[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    assert all(tensor.any() for tensor in found["kept"].values()), "every adapter was trained"
    for name in ("recomputed", "reentrant"):
        for key, tensor in found["kept"].items():
            torch.testing.assert_close(found[name][key], tensor, rtol=1e-4, atol=1e-6)

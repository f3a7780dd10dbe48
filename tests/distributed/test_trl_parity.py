"""With padded rows and pairs, in fp32, training is TRL's own: same pairs, same order, same losses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from tests.support.launching import TRAIN, environment, losses, run
from tests.support.marks import mostly_long

pytestmark = pytest.mark.distributed

STEPS, BATCH = 20, 4

TRL_SCRIPT = """
import json, sys
from datasets import load_dataset
from transformers import AutoTokenizer
from trl import RewardConfig, RewardTrainer
model, data, output, steps, batch, extra = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
args = RewardConfig(
    output_dir=output, max_steps=int(steps), per_device_train_batch_size=int(batch), learning_rate=1e-3,
    bf16=False, use_cpu=True, logging_steps=1, report_to="none", gradient_checkpointing=False, seed=42,
    train_sampling_strategy="sequential", warmup_steps=0, max_length=512, save_strategy="no", disable_tqdm=True,
    **json.loads(extra),
)
columns = ["prompt", "chosen", "rejected"] + (["margin"] if "margin" in open(data).readline() else [])
trainer = RewardTrainer(
    model=model, args=args, processing_class=tokenizer,
    train_dataset=load_dataset("json", data_files=data, split="train").select_columns(columns),
)
trainer.train()
print("LOSSES " + json.dumps([line["loss"] for line in trainer.state.log_history if "loss" in line]))
"""


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """An existing reward model, so that both trainers start from the same head."""
    folder = tmp_path_factory.mktemp("reward_model")
    set_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", mostly_long(["plain", "margin and centring"], short=["plain"]))
def test_first_20_losses_equal_trls(reward_model: Path, pairs_file: Path, tmp_path: Path, case: str) -> None:
    data, flags, extra = pairs_file, [], {}  # type: Path, list[str], dict[str, Any]
    if case != "plain":
        rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
        data = tmp_path / "margins.jsonl"
        data.write_text("".join(json.dumps({**row, "margin": i % 3 / 2}) + "\n" for i, row in enumerate(rows)))
        flags, extra = ["--center_rewards_coefficient", "0.02"], {"center_rewards_coefficient": 0.02}
    ours, theirs = tmp_path / "ours", tmp_path / "theirs.py"
    theirs.write_text(TRL_SCRIPT)
    numbers = [str(STEPS), str(BATCH), json.dumps(extra)]
    peer = run([sys.executable, str(theirs), str(reward_model), str(data), str(tmp_path / "trl"), *numbers])
    assert peer.code == 0, peer.output[-3000:]
    expected = json.loads(peer.output.split("LOSSES ")[-1].splitlines()[0])
    settings = {"model_name_or_path": reward_model, "dataset_path": data, "output_dir": ours, "max_steps": STEPS}
    settings |= {"per_device_train_batch_size": BATCH, "learning_rate": 1e-3, "warmup_ratio": 0, "logging_steps": 1}
    settings |= {"bf16": "false", "shuffle_train": "false", "gradient_checkpointing": "false", "max_length": 512}
    settings |= {"pad_to_multiple_of": 1, "sample_scores": 0, "disable_tqdm": "true"}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    mine = run([sys.executable, str(TRAIN), *words, *flags], env=environment())
    assert mine.code == 0, mine.output[-3000:]
    assert len(expected) == STEPS
    assert losses(ours) == pytest.approx(expected, abs=1e-5)
    assert "reward head score: loaded from the checkpoint" in mine.output


def test_what_we_build_on_in_trl(tiny_model: Path) -> None:
    """TRL has renamed these before; when it does again this says so before a run goes wrong."""
    import inspect

    import trl
    from trl.trainer.reward_trainer import DataCollatorForPreference

    batch = DataCollatorForPreference(pad_token_id=0)([{"chosen_ids": [1, 2, 3], "rejected_ids": [4, 5]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert list(inspect.signature(trl.RewardTrainer.compute_loss).parameters) == [
        "self",
        "model",
        "inputs",
        "return_outputs",
        "num_items_in_batch",
    ]
    assert "dataset" in inspect.signature(trl.RewardTrainer._prepare_dataset).parameters
    assert trl.RewardTrainer.loss_is_scaled_for_ga is False

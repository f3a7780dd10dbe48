"""The same file under every launcher, dry runs, and a resumed run that is the uninterrupted one."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rm_scale.files import free_port
from tests.support.launching import (
    TRAIN,
    Launches,
    deepspeed_command,
    environment,
    losses,
    read_json,
    run,
    scores,
)
from tests.support.marks import mostly_long

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def flags(tiny_model: Path, pairs_file: Path) -> list[str]:
    words = ["--model_name_or_path", str(tiny_model), "--dataset_path", str(pairs_file), "--eval_split_size", "11"]
    words += ["--max_steps", "2", "--bf16", "false", "--learning_rate", "1e-3", "--logging_steps", "1"]
    return [*words, "--per_device_train_batch_size", "2", "--disable_tqdm", "--sample_scores", "2"]


def test_deepspeed_torchrun_and_srun_do_the_same(flags: list[str], tmp_path: Path) -> None:
    """Two ranks under ZeRO-2 each time; srun is played by two processes with Slurm's variables."""
    common = [*flags, "--deepspeed", "zero2"]
    done = run(deepspeed_command(TRAIN, *common, "--output_dir", str(tmp_path / "deepspeed")))
    assert done.code == 0, done.output[-4000:]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    done = run([*torchrun, str(TRAIN), *common, "--output_dir", str(tmp_path / "torchrun")])
    assert done.code == 0, done.output[-4000:]
    outputs = _run_as_slurm_step([*common, "--output_dir", str(tmp_path / "srun")])
    assert all(code == 0 for code, _ in outputs), outputs
    expected = losses(tmp_path / "deepspeed")
    assert len(expected) == 2
    assert losses(tmp_path / "torchrun") == losses(tmp_path / "srun") == expected
    assert scores(tmp_path / "torchrun") == scores(tmp_path / "srun") == scores(tmp_path / "deepspeed")


def _run_as_slurm_step(words: list[str]) -> list[tuple[int, str]]:
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"}
    step |= {"SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, str(TRAIN), *words],
            env=environment(**step, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs: list[tuple[int, str]] = [(-1, "")] * 2

    def wait(rank: int) -> None:
        text, _ = processes[rank].communicate(timeout=600)
        outputs[rank] = (processes[rank].returncode, text[-3000:])

    threads = [threading.Thread(target=wait, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outputs


def test_plain_python_trains_and_scores_samples(flags: list[str], tmp_path: Path) -> None:
    done = run(
        [
            sys.executable,
            str(TRAIN),
            *flags,
            "--output_dir",
            str(tmp_path / "out"),
            "--report_to",
            "tensorboard",
            "--loss_type",
            "plackett_luce",
        ]
    )
    assert done.code == 0, done.output[-4000:]
    assert "scores of 2 groups by the saved model" in done.output
    assert read_json(tmp_path / "out" / "run" / "evaluation.json")["num_pairs"] == 11
    assert list((tmp_path / "out").rglob("events.out.tfevents.*")), "TensorBoard got nothing"
    last = (tmp_path / "out" / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    assert "eval_accuracy" in last, "the final evaluation reaches the loggers"


@pytest.mark.long
def test_overwriting_leaves_nothing_of_the_earlier_run(flags: list[str], tmp_path: Path) -> None:
    words = [sys.executable, str(TRAIN), *flags, "--output_dir", str(tmp_path / "out"), "--sample_scores", "0"]
    assert run([*words, "--save_strategy", "steps", "--save_steps", "1"]).code == 0
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
    again = run([*words, "--force", "overwrite"])
    assert again.code == 0, again.output[-3000:]
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert len(losses(tmp_path / "out")) == 2


def test_dry_run_prints_settings_and_plan_and_writes_nothing(flags: list[str], tmp_path: Path) -> None:
    done = run([sys.executable, str(TRAIN), *flags, "--output_dir", str(tmp_path / "out"), "--dry_run"])
    assert done.code == 0, done.output
    for part in ("full training of ", "learning_rate: 0.001", "max_length: 1024"):
        assert part in done.output
    assert not (tmp_path / "out").exists()


def test_help_needs_no_torch() -> None:
    done = run([sys.executable, "-X", "importtime", str(TRAIN), "--help"])
    assert done.code == 0 and "--lora_r " in done.output
    assert "| torch\n" not in done.output.replace("|   ", "| ")


RESUMED = [
    ("full", "zero3"),
    ("lora", "zero3"),
    ("qlora", "zero2"),
    ("full", "zero1"),
    ("full", "zero3_offload"),
    ("lora", "none"),
]
SHORT = ("lora", "zero3")


@pytest.fixture(scope="module")
def whole_and_resumed(
    tiny_model: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Launches, Launches]:
    """Runs that were not interrupted, and those that go on from a checkpoint of them in new processes."""
    words = ["--model_name_or_path", str(tiny_model), "--dataset_path", str(pairs_file), "--eval_split_size", "20"]
    words += ["--per_device_train_batch_size", "10", "--num_train_epochs", "2", "--logging_steps", "1"]
    words += ["--learning_rate", "2e-3", "--save_strategy", "steps", "--save_steps", "4"]
    words += ["--sample_scores", "0", "--disable_tqdm"]
    first, second = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("resumed")
    whole: dict[str, dict[str, list[str]]] = {"short": {}, "long": {}}
    resumed: dict[str, dict[str, list[str]]] = {"short": {}, "long": {}}
    for method, stage in RESUMED:
        name, group = f"{method}-{stage}", "short" if (method, stage) == SHORT else "long"
        flags = [*words, *([] if stage == "none" else ["--deepspeed", stage])]
        flags += [] if method == "full" else ["--use_peft", *(["--load_in_4bit"] if method == "qlora" else [])]
        whole[group][name] = flags
        resumed[group][name] = [*flags, "--resume_from_checkpoint", str(first / name / "checkpoint-4")]
    return Launches(first, whole), Launches(second, resumed)


@pytest.mark.parametrize(("method", "stage"), mostly_long(RESUMED, short=[SHORT]))
def test_resumed_run_is_the_uninterrupted_run(
    method: str, stage: str, whole_and_resumed: tuple[Launches, Launches]
) -> None:
    """Bit for bit on CPU, across an epoch's end, under ZeRO-3 in bf16 (head master included)."""
    whole, resumed = (launches[f"{method}-{stage}"] for launches in whole_and_resumed)
    assert losses(resumed) == losses(whole)[4:]
    assert scores(resumed) == scores(whole)


def test_ranked_lists_ties_and_subsets_train_and_evaluate(tiny_model: Path, tmp_path: Path) -> None:
    from rm_scale.demo.synthetic_preferences import generate_rows

    path = tmp_path / "ranked.jsonl"
    rows = generate_rows(40, 0, "train", None, "ranked")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model_name_or_path", str(tiny_model), "--dataset_path", str(path), "--eval_split_size", "8"]
    words += ["--max_steps", "3", "--output_dir", str(tmp_path / "out"), "--sample_scores", "1", "--disable_tqdm"]
    done = run([sys.executable, str(TRAIN), *words])
    assert done.code == 0, done.output[-4000:]
    evaluation = read_json(tmp_path / "out" / "run" / "evaluation.json")
    assert evaluation["num_pairs"] == 8 * 5  # six comparisons of four responses, one of them a tie
    assert sum(part["num_pairs"] for part in evaluation["subsets"].values()) == 8 * 5


@pytest.mark.long
def test_launch_plans_tries_rows_and_trains(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    """`rm-scale launch --auto_batch`: real trials, then the run itself, with its figures beside the plan's."""
    output = tmp_path / "run"
    words = ["launch", "--gpus", "2", "--auto_batch", "--model_name_or_path", str(tiny_model)]
    words += ["--dataset_path", str(pairs_file), "--output_dir", str(output), "--max_length", "256", "--max_steps", "3"]
    words += ["--global_batch_size", "8", "--max_tokens_per_device", "1024", "--disable_tqdm", "true"]
    done = run([sys.executable, "-m", "rm_scale.cli", *words, "--sample_scores", "0", "--eval_strategy", "no"])
    assert done.code == 0, done.output[-4000:]
    assert "auto_batch: rows of 1,024 tokens train" in done.output
    assert "auto_batch: rows of 2,048 tokens train" in done.output  # a rank's whole share: the search ends there
    assert "--max_tokens_per_device 2048" in done.output
    record = read_json(output / "run" / "plan_check.json")
    assert record["measured"]["peak_memory_bytes"] > 0 < record["predicted"]["peak_memory_bytes"]
    assert "plan and run: peak memory" in done.output
    assert not output.with_name("run.auto_batch").exists()

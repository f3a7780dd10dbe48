"""What was trained on CUDA is saved, loaded again, scored and served there, and scores as it does on a processor."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from rm_scale.demo.assets import make_tiny_model
from rm_scale.demo.random_weights import make_random_model
from rm_scale.inference.scoring.scorer import RewardScorer
from rm_scale.modeling.golden_scores import allowed_drift
from rm_scale.modeling.scoring_contract import ScoringContract
from rm_scale.modeling.token_scores import as_in_training, score_sequences
from tests.support import launching
from tests.support.gpu import (
    CLI,
    METHODS,
    RANKS,
    environment,
    needs_gpu,
    rm_scale,
    run_watched,
    small_run,
    visible_devices,
)
from tests.support.launching import read_json, read_lines
from tests.support.tiny_runs import evaluated_texts

pytestmark = [*needs_gpu, pytest.mark.timeout(1800)]

MODEL_VARIABLE = "RM_SCALE_GPU_MODEL"
SMOLLM2_SHAPE = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.0417,
}
ALONE = ["--max_tokens_per_batch", "1"]
"""Each text in a forward pass of its own: whoever scores it, kernels meet the same shapes, so scores are equal."""


@pytest.fixture(scope="module")
def real_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained model: the folder that RM_SCALE_GPU_MODEL names, else SmolLM2-135M, else its shape at random."""
    if MODEL_VARIABLE in os.environ:
        return Path(os.environ[MODEL_VARIABLE])
    try:
        found: Path = request.getfixturevalue("smollm2")
        return found
    except pytest.skip.Exception as reason:
        print(f"random weights of SmolLM2's shape stand in for it ({reason})")
        return make_random_model(tmp_path_factory.mktemp("random") / "135m", SMOLLM2_SHAPE, "135m")


# --- Real models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "stage"), [("full", "zero3"), ("full", "none"), ("lora", "zero2"), ("qlora", "none"), ("qlora", "zero3")]
)
def test_a_real_model_is_saved_and_scores_as_in_training(
    method: str, stage: str, real_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """In bf16, whose kernels can move a real model's rewards by tenths: a checkpoint, the last save, and the reload."""
    words = [*small_run(real_model, pairs_file), "--max_steps", "3", "--max_length", "256", "--learning_rate", "1e-5"]
    words += ["--save_strategy", "steps", "--save_steps", "2", *METHODS[method]]
    words += [] if stage == "none" else ["--deepspeed", stage]
    done = run_watched(tmp_path, {"run": {"flags": words}}, ranks=1 if stage == "none" else RANKS)
    folder = tmp_path / "run"
    assert done.code == 0 and f"saved and verified {folder}" in done.output, done.output[-6000:]
    assert (folder / "checkpoint-2" / "scoring_contract.json").is_file(), "kept under its own name: it was verified"
    contract = ScoringContract.load(folder)
    before = [golden.score for golden in contract.golden_scores]
    on_gpu, on_cpu = (golden_scores(folder, contract, device) for device in ("cuda", "cpu"))
    worst_gpu, worst_cpu = (max(abs(a - b) for a, b in zip(before, found, strict=True)) for found in (on_gpu, on_cpu))
    drift = allowed_drift(contract, contract.compute_dtype)
    print(f"{method} under {stage}: a reload moves golden scores by {worst_gpu:.2e} on the GPU, by {worst_cpu:.2e} on "
          f"the CPU (allowed {drift:.2e}); scores {[round(score, 3) for score in before]}")  # fmt: skip
    # The same kernels on the same weights; ranks that share a step may still have met other shapes.
    assert worst_gpu <= 1e-2 * max(1.0, *map(abs, before))
    assert worst_cpu <= drift


def golden_scores(folder: Path, contract: ScoringContract, device: str) -> list[float]:
    """Scores of the golden texts by the model as it lies on disk, as training computed them: padded, one by one."""
    scorer = RewardScorer.from_pretrained(folder, device=device, packed=False)
    sequences = [golden.input_ids for golden in contract.golden_scores]
    with as_in_training(contract, device):
        return score_sequences(scorer.model, sequences, contract.pad_token_id, 1, device)


# --- QLoRA ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["none", "zero3"])
def qlora_run(request: pytest.FixtureRequest, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-bit model trained on CUDA.

    Its rows are whole blocks of 64 values, as those of real models: others are unpacked wrongly by bitsandbytes' kernel
    for processors, with which it is compared.
    """
    folder = tmp_path_factory.mktemp(f"qlora-{request.param}")
    model = make_tiny_model(folder / "base", vocab_size=400, hidden_size=64)
    words = [*small_run(model, pairs_file), *METHODS["qlora"], "--learning_rate", "5e-3"]
    words += [] if request.param == "none" else ["--deepspeed", request.param]
    done = run_watched(folder, {"run": {"flags": words}}, ranks=1 if request.param == "none" else RANKS)
    assert done.code == 0, done.output[-5000:]
    return folder / "run"


def rows_to_score(run: Path, pairs: Path, folder: Path) -> tuple[Path, list[dict[str, str]]]:
    """A file with the texts of a run's evaluation set."""
    rows = [{"prompt": p, "completion": c} for p, c in zip(*evaluated_texts(run, pairs), strict=True)]
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, rows


def scored(model: Path, texts: Path, output: Path, *words: str) -> list[float]:
    """What `rm-scale score` gives."""
    done = rm_scale("score", "--model", str(model), "--input", str(texts), "--output", str(output), *words)
    assert done.code == 0, done.output[-4000:]
    return [row["score"] for row in read_lines(output)]


def test_all_of_a_4_bit_model_is_on_the_device(qlora_run: Path) -> None:
    """Nothing moves such a model, so head, residual and adapter must be made where it is."""
    scorer = RewardScorer.from_pretrained(qlora_run, device="cuda")
    tensors = [*scorer.model.named_parameters(), *scorer.model.named_buffers()]
    assert {name: str(tensor.device) for name, tensor in tensors if tensor.device.type != "cuda"} == {}
    assert any(type(parameter).__name__ == "Params4bit" for _, parameter in tensors), "it is in 4 bits"


def test_a_4_bit_model_is_scored_and_served_alike(qlora_run: Path, pairs_file: Path, tmp_path: Path) -> None:
    """`rm-scale score`, the server and the library give one text one score."""
    import httpx

    from tests.support.serving import serving_process

    texts, rows = rows_to_score(qlora_run, pairs_file, tmp_path)
    by_command = scored(qlora_run, texts, tmp_path / "scores.jsonl", "--device", "cuda", *ALONE)
    assert len(by_command) == 42
    scorer = RewardScorer.from_pretrained(qlora_run, device="cuda")
    by_library = [scorer.score_one(row["prompt"], row["completion"]) for row in rows]
    seen = {"CUDA_VISIBLE_DEVICES": ",".join(visible_devices()), "DS_ACCELERATOR": "cuda"}
    with serving_process(qlora_run, "--device", "cuda", *ALONE, **seen) as (url, _):
        answers = [httpx.post(f"{url}/score", json={"items": [row]}, timeout=60).json() for row in rows]
    by_server = [answer["scores"][0] for answer in answers]
    assert by_command == pytest.approx(by_library, abs=1e-5)
    assert by_server == pytest.approx(by_library, abs=1e-5)
    assert len(set(by_library)) > 20, "texts that differ score differently"


def test_a_4_bit_model_scores_as_in_training(qlora_run: Path, pairs_file: Path, tmp_path: Path) -> None:
    """The trainer's own evaluation on CUDA, `rm-scale score`, and a processor; in bf16, batches of other shapes."""
    texts, _ = rows_to_score(qlora_run, pairs_file, tmp_path)
    contract = ScoringContract.load(qlora_run)
    in_training = launching.scores(qlora_run)
    allowed = allowed_drift(contract, "bfloat16", in_training)
    for device in ("cuda", "cpu"):
        found = scored(qlora_run, texts, tmp_path / f"{device}.jsonl", "--device", device)
        print(device, max(abs(a - b) for a, b in zip(found, in_training, strict=True)), "allowed", allowed)
        assert found == pytest.approx(in_training, abs=allowed)


def test_a_4_bit_model_is_evaluated(qlora_run: Path, pairs_file: Path, tmp_path: Path) -> None:
    words = ["--model", str(qlora_run), "--dataset_path", str(pairs_file), "--device", "cuda"]
    done = rm_scale("eval", *words, "--output", str(tmp_path / "report"), "--num_resamples", "100")
    assert done.code == 0, done.output[-4000:]
    assert read_json(tmp_path / "report" / "evaluation.json")["num_pairs"] == 120


# --- One text, one score, on any device -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora"])
def test_fp32_scores_are_those_of_the_processor(
    method: str, request: pytest.FixtureRequest, pairs_file: Path, tmp_path: Path
) -> None:
    """Models trained and evaluated on a processor, in fp32."""
    run: Path = request.getfixturevalue(f"{method}_run")
    texts, _ = rows_to_score(run, pairs_file, tmp_path)
    found = scored(run, texts, tmp_path / "scores.jsonl", "--device", "cuda", "--dtype", "float32")
    assert found == pytest.approx(launching.scores(run), abs=1e-4)


def test_fp32_scores_of_a_real_model_are_those_of_the_processor(
    real_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """At its true depth: relative to the spread of the scores, since a new head's rewards may be small or large."""
    words = [*small_run(real_model, pairs_file), "--max_steps", "1", "--max_length", "256", "--eval_split_size", "6"]
    done = run_watched(tmp_path, {"run": {"flags": words}}, ranks=1)
    assert done.code == 0, done.output[-5000:]
    texts, _ = rows_to_score(tmp_path / "run", pairs_file, tmp_path)
    on_gpu, on_cpu = (
        torch.tensor(
            scored(tmp_path / "run", texts, tmp_path / f"{device}.jsonl", "--device", device, "--dtype", "float32")
        )
        for device in ("cuda", "cpu")
    )
    worst = float((on_gpu - on_cpu).abs().max() / on_cpu.std())
    print(f"GPU and CPU differ by {worst:.2e} of the scores' standard deviation {float(on_cpu.std()):.3f}")
    assert worst <= 1e-3


def test_tasks_that_see_one_device_each_share_a_file(full_run: Path, pairs_file: Path, tmp_path: Path) -> None:
    """As under `srun --gpus-per-task=1`: the second task has local rank 1 and sees a single device, its own."""
    texts, _ = rows_to_score(full_run, pairs_file, tmp_path)
    texts.write_text(texts.read_text() * 8)  # a part has at least 64 rows, and each task is to get some
    alone = scored(full_run, texts, tmp_path / "alone.jsonl", "--device", "cuda")
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"}
    step |= {"SLURM_STEP_NODELIST": "localhost"}
    output = tmp_path / "together.jsonl"
    words = ["score", "--model", str(full_run), "--input", str(texts), "--output", str(output), "--chunk_rows", "64"]

    def start(task: int) -> subprocess.Popen[str]:
        device = visible_devices()[task % len(visible_devices())]
        place: dict[str, Any] = {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task), "CUDA_VISIBLE_DEVICES": device}
        return subprocess.Popen(
            [*CLI, *words],
            env=environment(**step, **place),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    tasks = [start(0), start(1)]
    try:
        said = [task.communicate(timeout=300)[0] for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [0, 0], said
    assert [row["score"] for row in read_lines(output)] == pytest.approx(alone, abs=1e-5)

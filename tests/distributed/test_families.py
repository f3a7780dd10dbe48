"""Every family of models on two real ranks: trained, saved with its head, loaded by transformers, resumed, exported.

A cell is a family, an engine and a method; a launch per engine and method trains all families in turn. By default a
family has three cells, which meet every engine and every method once; `RM_SCALE_ALL_CELLS=1` runs all nine of each.
`RM_SCALE_FAMILY_RESULTS=FILE` keeps what came of each cell as JSON, for the table in docs/models.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from filelock import FileLock
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from rm_scale.inference.export.export_model import export
from rm_scale.modeling.language_model import language_model_in
from rm_scale.modeling.loading import load_reward_model
from rm_scale.modeling.token_scores import score_sequences
from tests.support.families import write_causal_model, write_model_that_sees
from tests.support.launching import REPOSITORY, environment, losses, read_json, read_lines, run_cases, weights

pytestmark = pytest.mark.distributed

RUNNER = REPOSITORY / "tests" / "support" / "family_runner.py"
FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_5_text",
    "gemma2",
    "gemma3_text",
    "mistral",
    "mixtral",
    "phi3",
    "olmo2",
    "olmo3",
    "gpt_oss",
    "deepseek_v3",
    "smollm3",
    "zamba2",
    "jamba",
)
SEEING = ("gemma3", "qwen3_5")
"""Their language model alone is trained."""
MIXTURES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "jamba")
BALANCED_BY_A_LOSS = ("qwen3_moe", "mixtral", "gpt_oss", "jamba")
WITH_EXPERTS_ADAPTED = tuple(f"{family}-experts" for family in MIXTURES)
_WITHOUT = "-without-coefficient"
WITHOUT_A_COEFFICIENT = tuple(f"{family}{_WITHOUT}" for family in BALANCED_BY_A_LOSS)
SHORT = ("qwen3_moe", "qwen3_5_text", f"qwen3_moe{_WITHOUT}")
STAGES: dict[str, list[str]] = {"none": [], "zero2": ["--deepspeed", "zero2"], "zero3": ["--deepspeed", "zero3"]}
METHODS: dict[str, list[str]] = {
    "full": ["--gradient_checkpointing", "true"],
    "lora": ["--use_peft"],
    "qlora": ["--use_peft", "--load_in_4bit"],
}
ENGINES = [(stage, method) for stage in STAGES for method in METHODS]
FIRST = [("none", "qlora"), ("zero2", "full"), ("zero3", "lora")]
RESUMED = [("zero2", "full"), ("zero3", "lora")]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
NUM_STEPS, SAVED_AT = 4, 2
NUM_EVAL = 7  # odd, so that ranks don't divide it
COEFFICIENT = 0.01

Cell = tuple[str, str, str]
CHOSEN = ENGINES if os.environ.get("RM_SCALE_ALL_CELLS") else FIRST


def _parameters(engines: list[tuple[str, str]], families: tuple[str, ...] = FAMILIES) -> list[Any]:
    return [
        pytest.param(
            (family, stage, method),
            id=f"{family}-{stage}-{method}",
            marks=() if family in SHORT and (stage, method) in FIRST else pytest.mark.long,
        )
        for stage, method in engines
        for family in families
    ]


def _with_coefficient(cell: Cell) -> Cell:
    return cell[0].removesuffix(_WITHOUT), cell[1], cell[2]


MORE = [*_parameters([("zero3", "lora")], WITH_EXPERTS_ADAPTED), *_parameters(RESUMED, SEEING)]
"""Cells of some families alone."""


class Cells:
    """Trains the cells of an engine and a method when the first of them is asked for.

    Args:
        folder: where all is written.
        pairs: a file of preference pairs.
        asked: the cells that will be asked for.
    """

    def __init__(self, folder: Path, pairs: Path, asked: list[Cell]) -> None:
        from rm_scale.demo.assets import default_tokenizer

        self._folder, self._pairs, self._asked = folder, pairs, asked
        self._tokenizer = default_tokenizer(400)
        self._done: dict[tuple[str, str], dict[str, Any]] = {}

    def model(self, family: str) -> Path:
        """Return the folder of a family's causal model."""
        folder = self._folder / "models" / family
        if folder.exists():
            return folder
        write = write_model_that_sees if family in SEEING else write_causal_model
        return write(folder, family, self._tokenizer)

    def __getitem__(self, cell: Cell) -> Path:
        """Return the output directory of a cell that was trained to its end."""
        folder = self._launched(cell)
        outcome = self._done[cell[1:]][cell[0]]
        assert outcome["codes"] == [0, 0], self.log_of(cell)[-6000:]
        return folder

    def seconds(self, cell: Cell) -> float:
        """Return how long a cell took."""
        self._launched(cell)
        return float(self._done[cell[1:]][cell[0]]["seconds"])

    def log_of(self, cell: Cell) -> str:
        """Return what a cell printed."""
        log = (self._launched(cell).parent / "log.txt").read_text()
        return log.partition(f"=== case {cell[0]}\n")[2].partition("=== case")[0]

    def _launched(self, cell: Cell) -> Path:
        family, stage, method = cell
        folder = self._folder / f"{stage}-{method}"
        if (stage, method) not in self._done:
            cases = {}
            for name in dict.fromkeys(asked[0] for asked in self._asked if asked[1:] == (stage, method)):
                cases[name] = [*self._flags(name), *STAGES[stage], *METHODS[method]]
                if (stage, method) in RESUMED:
                    checkpoint = str(folder / name / f"checkpoint-{SAVED_AT}")
                    cases[f"{name}-resumed"] = [*cases[name], "--resume_from_checkpoint", checkpoint]
                    cases[name] += ["--save_strategy", "steps", "--save_steps", str(SAVED_AT)]
            finished = run_cases(folder, cases, runner=RUNNER, env=environment(OMP_NUM_THREADS="1"), timeout=3000)
            assert finished.code == 0, finished.output[-6000:]
            self._done[stage, method] = read_json(folder / "outcomes.json")
        return folder / family

    def _flags(self, family: str) -> list[str]:
        name = family.removesuffix("-experts").removesuffix(_WITHOUT)
        flags = ["--model_name_or_path", str(self.model(name)), "--dataset_path", str(self._pairs), "--disable_tqdm"]
        flags += ["--eval_split_size", str(NUM_EVAL), "--per_device_train_batch_size", "2", "--max_length", "128"]
        flags += ["--max_steps", str(NUM_STEPS), "--learning_rate", "5e-3", "--logging_steps", "1"]
        flags += ["--sample_scores", "0"]
        if name in BALANCED_BY_A_LOSS and not family.endswith(_WITHOUT):
            flags += ["--router_aux_loss_coef", str(COEFFICIENT)]
        return [*flags, "--lora_target_parameters", *EXPERTS] if family.endswith("-experts") else flags


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory, pairs_file: Path, request: pytest.FixtureRequest) -> Cells:
    """The cells of the tests that were selected, in one launch for each engine and method."""
    items = [item for item in request.session.items if item.path == request.path and isinstance(item, pytest.Function)]
    asked: list[Cell] = [item.callspec.params["cell"] for item in items]
    asked += [_with_coefficient(cell) for cell in asked if cell[0].endswith(_WITHOUT)]
    return Cells(tmp_path_factory.mktemp("families"), pairs_file, asked)


@contextmanager
def kept(cell: Cell, what: str, seconds: float | None = None) -> Iterator[None]:
    """Keep whether the block passed, where `RM_SCALE_FAMILY_RESULTS` asks for it."""
    outcome = False
    try:
        yield
        outcome = True
    finally:
        file = os.environ.get("RM_SCALE_FAMILY_RESULTS")
        if file:
            with FileLock(f"{file}.lock"):
                path = Path(file)
                results = json.loads(path.read_text()) if path.is_file() else {"cells": {}}
                results["transformers"] = transformers.__version__
                entry = results["cells"].setdefault("/".join(cell), {})
                entry[what] = outcome
                if seconds is not None:
                    entry["seconds"] = seconds
                path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


@pytest.mark.parametrize("cell", [*_parameters(CHOSEN), *MORE])
def test_trains_and_keeps_its_head(cell: Cell, cells: Cells) -> None:
    with kept(cell, "trains", cells.seconds(cell)):
        folder = cells[cell]
        assert f"saved and verified {folder}" in cells.log_of(cell)
        assert len(losses(folder)) == NUM_STEPS
        assert len(read_lines(folder / "run" / "evaluation_scores.jsonl")) == NUM_EVAL
        saved = weights(folder)
        (head,) = [name for name in saved if name.endswith("score.weight")]
        assert saved[head].shape == (1, 32) and saved[head].dtype == torch.float32
        # Trained: an engine's bf16 copy would hold no more than bf16 can.
        assert not torch.equal(saved[head], saved[head].bfloat16().float())
        if cell[2] != "full":
            tensors = {name: tensor for name, tensor in saved.items() if ".lora_" in name}
            assert tensors and all(tensor.any() for tensor in tensors.values())


@pytest.mark.parametrize("cell", _parameters(CHOSEN, MIXTURES))
def test_load_of_experts_is_logged(cell: Cell, cells: Cells) -> None:
    """And the auxiliary loss, where the family has one. The load is that of the real tokens of both ranks."""
    lines = [line for line in read_lines(cells[cell] / "run" / "metrics.jsonl") if "loss" in line]
    assert len(lines) == NUM_STEPS
    for line in lines:
        load = line["expert_load"]
        assert len(load["share"]) == 4 and sum(load["share"]) == pytest.approx(1.0, abs=1e-4)
        choices = 2 * line["num_tokens"]["real"]  # of two experts for each token
        counts = [share * choices for share in [*load["layer_max"], *load["layer_min"]]]
        assert counts == pytest.approx([round(count) for count in counts], abs=choices * 1e-6)
        assert line["router_aux_loss_coef"] == (COEFFICIENT if cell[0] in BALANCED_BY_A_LOSS else 0.0)
        # Two of four experts are chosen: 2 is an equal share.
        assert ("router_aux_loss" in line) == (cell[0] in BALANCED_BY_A_LOSS)
        assert line.get("router_aux_loss", 2.0) > 1.5


@pytest.mark.parametrize("cell", _parameters([("zero3", "lora")], WITHOUT_A_COEFFICIENT))
def test_the_auxiliary_loss_changes_what_is_trained(cell: Cell, cells: Cells) -> None:
    """Compared with the same run without it, which would end bit for bit the same."""
    without, balanced = cells[cell], cells[_with_coefficient(cell)]
    lines = [line for line in read_lines(without / "run" / "metrics.jsonl") if "loss" in line]
    assert [(line["router_aux_loss_coef"], "router_aux_loss" in line) for line in lines] == [(0.0, False)] * NUM_STEPS
    expected, found = weights(without), weights(balanced)
    assert found.keys() == expected.keys()
    adapters = [name for name in expected if ".lora_" in name]
    assert adapters and not any(torch.equal(found[name], expected[name]) for name in adapters)


@pytest.mark.parametrize("cell", [*_parameters(CHOSEN), *MORE])
def test_plain_transformers_gives_the_same_scores(cell: Cell, cells: Cells) -> None:
    """In fp32, as they lie on the disk: that these are the scores of training has been verified by the save."""
    with kept(cell, "reloads"):
        folder = cells[cell]
        contract = read_json(folder / "scoring_contract.json")
        texts = [golden["input_ids"] for golden in contract["golden_scores"]]
        pad = contract["pad_token_id"]
        ours = load_reward_model(folder, dtype=torch.float32, quantized=False)
        expected = score_sequences(ours, texts, pad, len(texts), "cpu")
        if cell[2] == "full":
            plain = AutoModelForSequenceClassification.from_pretrained(folder)
            assert plain.dtype == torch.float32
        else:
            name = contract["base_model"]["name"]
            inside = language_model_in(name)
            settings = {"num_labels": 1} if inside is None else inside.load_settings
            base = AutoModelForSequenceClassification.from_pretrained(name, dtype=torch.float32, **settings)
            base.config.pad_token_id = pad
            plain = PeftModel.from_pretrained(base, str(folder))
        found = score_sequences(plain, texts, pad, len(texts), "cpu")
        assert found == pytest.approx(expected, abs=1e-5)
        assert len(set(found)) > 1


@pytest.mark.parametrize("cell", [*_parameters(RESUMED), *MORE])
def test_its_export_is_one_plain_model_with_the_same_scores(cell: Cell, cells: Cells, tmp_path: Path) -> None:
    """Adapters are merged. In fp32: in fewer bits a merged model scores a little differently, as it should."""
    with kept(cell, "exports"):
        folder = cells[cell]
        exported = export(folder, tmp_path / "export", dtype="float32").folder
        contract = read_json(folder / "scoring_contract.json")
        texts = [golden["input_ids"] for golden in contract["golden_scores"]]
        pad = contract["pad_token_id"]
        ours = load_reward_model(folder, dtype=torch.float32, quantized=False)
        expected = score_sequences(ours, texts, pad, len(texts), "cpu")
        plain, loading = AutoModelForSequenceClassification.from_pretrained(exported, output_loading_info=True)
        assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
        found = score_sequences(plain, texts, pad, len(texts), "cpu")
        assert found == pytest.approx(expected, abs=1e-5)
        assert len(set(found)) > 1
        names = weights(exported).keys()
        assert "score.weight" in names and not [name for name in names if "lora" in name or "base_layer" in name]


@pytest.mark.parametrize("cell", [*_parameters(RESUMED), *MORE])
def test_a_resumed_run_ends_bit_for_bit_the_same(cell: Cell, cells: Cells) -> None:
    with kept(cell, "resumes"):
        whole = cells[cell]
        resumed = cells[f"{cell[0]}-resumed", cell[1], cell[2]]
        assert losses(resumed) == losses(whole)[SAVED_AT:]
        expected, found = weights(whole), weights(resumed)
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []

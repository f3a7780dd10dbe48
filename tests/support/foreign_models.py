"""Reward models as other projects write them, and what their own code makes of token ids: formulas written out here.

Sources: docs/foreign_models.md. Nothing of this package computes the scores.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

META = {"format": "pt"}
SEQUENCES = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [11, 12, 13, 14], [250, 31, 7, 99, 120, 5, 66, 40, 3]]
BIAS = 0.75

Home = Callable[[list[int]], float]
"""What a project's own code gives for token ids, in fp32."""


@dataclass(frozen=True)
class ForeignModel:
    """A folder, the scores of its own code, and the constant that is part of these."""

    folder: Path
    home: Home
    constant: float = 0.0


def edit_config(folder: Path, **values: object) -> None:
    """Write values into config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def add_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write further tensors into model.safetensors."""
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, META)


def width_of(folder: Path) -> int:
    """Return the width of the hidden states."""
    return int(json.loads((folder / "config.json").read_text())["hidden_size"])


def random_head(folder: Path, rows: int = 1) -> torch.Tensor:
    """Return a head that bf16 can't hold."""
    return torch.randn(rows, width_of(folder), generator=torch.Generator().manual_seed(5))


def last_token(backbone: torch.nn.Module, head: torch.Tensor, bias: float = 0.0) -> Home:
    """Return the score at the last token: `hidden[-1] . head + bias`, over the states behind the last norm."""

    def score(ids: list[int]) -> float:
        with torch.no_grad():
            hidden = backbone(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        return float(hidden.double() @ head[0].double() + bias)

    return score


def backbone_of(folder: Path) -> torch.nn.Module:
    """Return the backbone of a language model, by transformers alone."""
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def _openrlhf(folder: Path, prefix: str) -> ForeignModel:
    head, home = random_head(folder), backbone_of(folder)
    add_tensors(folder, {f"{prefix}.weight": head})
    own = {"value_head_prefix": prefix, "normalize_reward": False, "mean": 0.5, "std": 2.0}
    edit_config(folder, architectures=["RewardModel"], **own)
    return ForeignModel(folder, last_token(home, head))


def openrlhf(folder: Path) -> ForeignModel:
    """As `openrlhf.cli.train_rm` writes it by default."""
    return _openrlhf(folder, "score")


def openrlhf_value_head(folder: Path) -> ForeignModel:
    """With its earlier prefix."""
    return _openrlhf(folder, "value_head")


def openrlhf_own_prefix(folder: Path) -> ForeignModel:
    """With --ds.value_head_prefix of a user's own."""
    return _openrlhf(folder, "preference_head")


def _value_head(head: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"v_head.summary.weight": head, "v_head.summary.bias": torch.tensor([BIAS])}


def llama_factory(folder: Path) -> ForeignModel:
    """A language model with value_head.safetensors beside it."""
    head = random_head(folder)
    save_file(_value_head(head), folder / "value_head.safetensors", META)
    return ForeignModel(folder, last_token(backbone_of(folder), head, BIAS), BIAS)


def llama_factory_pickled(folder: Path) -> ForeignModel:
    """The same with value_head.bin."""
    head = random_head(folder)
    torch.save(_value_head(head), folder / "value_head.bin")
    return ForeignModel(folder, last_token(backbone_of(folder), head, BIAS), BIAS)


def llama_factory_adapter(folder: Path) -> ForeignModel:
    """A LoRA adapter of a language model, with the head beside it; the base is another folder."""
    adapter = folder.with_name(f"{folder.name}-adapter")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lora = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules=["q_proj", "v_proj", "up_proj"])
    adapted = get_peft_model(model, lora)
    _randomise(adapted)
    adapted.save_pretrained(adapter)
    AutoTokenizer.from_pretrained(folder).save_pretrained(adapter)
    head = random_head(folder)
    save_file(_value_head(head), adapter / "value_head.safetensors", META)
    merged = adapted.merge_and_unload().eval()
    return ForeignModel(adapter, last_token(merged.model, head, BIAS), BIAS)


def trl_adapter(folder: Path) -> ForeignModel:
    """A LoRA adapter of a sequence classifier, as TRL and ms-swift leave it."""
    adapter = folder.with_name(f"{folder.name}-adapter")
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules=["q_proj", "v_proj"])
    adapted = get_peft_model(model, lora)
    _randomise(adapted)
    adapted.save_pretrained(adapter)
    AutoTokenizer.from_pretrained(folder).save_pretrained(adapter)
    merged = adapted.merge_and_unload().eval()
    return ForeignModel(adapter, last_token(merged.model, merged.score.weight.detach()))


def _randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(8)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = 0.3 if "lora_" in name else 1.0
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale


def trl_value_model(folder: Path) -> ForeignModel:
    """AutoModelForCausalLMWithValueHead: head and language head in one file."""
    head, home = random_head(folder), backbone_of(folder)
    add_tensors(folder, _value_head(head))
    return ForeignModel(folder, last_token(home, head, BIAS), BIAS)


def _classifier(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> None:
    weights = {
        key: tensor for key, tensor in load_file(folder / "model.safetensors").items() if key != "lm_head.weight"
    }
    save_file({**weights, **tensors}, folder / "model.safetensors", META)
    edit_config(folder, architectures=["LlamaForSequenceClassification"], **config)


def sequence_classifier(folder: Path) -> ForeignModel:
    """LlamaForSequenceClassification with one label: TRL, ms-swift, Skywork-Reward."""
    head, home = random_head(folder), backbone_of(folder)
    _classifier(folder, {"score.weight": head}, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})
    return ForeignModel(folder, last_token(home, head))


def classifier_with_bias(folder: Path) -> ForeignModel:
    """The same with a bias, which a class of the project's own adds; weight and bias in different shards."""
    head, home = random_head(folder), backbone_of(folder)
    _classifier(folder, {"score.weight": head}, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    first = load_file(folder / "model-00001-of-00002.safetensors")
    save_file({"score.bias": torch.tensor([BIAS])}, folder / "model-00002-of-00002.safetensors", META)
    places = {
        **dict.fromkeys(first, "model-00001-of-00002.safetensors"),
        "score.bias": "model-00002-of-00002.safetensors",
    }
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return ForeignModel(folder, last_token(home, head, BIAS), BIAS)


def one_of_two_labels(folder: Path) -> ForeignModel:
    """Two outputs, of which config.json calls one the reward."""
    heads, home = random_head(folder, rows=2), backbone_of(folder)
    labels = {"id2label": {"0": "unused", "1": "reward"}, "label2id": {"unused": 0, "reward": 1}}
    _classifier(folder, {"score.weight": heads}, **labels)
    return ForeignModel(folder, last_token(home, heads[1:]))


def two_labels_one_row(folder: Path) -> ForeignModel:
    """One output, in a config that says two."""
    head, home = random_head(folder), backbone_of(folder)
    labels = {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    _classifier(folder, {"score.weight": head}, **labels)
    return ForeignModel(folder, last_token(home, head))


def token_logit(folder: Path) -> ForeignModel:
    """A language model whose reward is the logit of one token; the others have none."""
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    language_head = torch.zeros(rows, width_of(folder))
    language_head[0] = random_head(folder)[0]
    return _language_model(folder, language_head)


def nemotron(folder: Path) -> ForeignModel:
    """NVIDIA's Nemotron: the first row of the language head is the reward's, the others are as they were."""
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    edit_config(folder, reward_token_id=0)
    return _language_model(folder, random_head(folder, rows))


def _language_model(folder: Path, language_head: torch.Tensor) -> ForeignModel:
    edit_config(folder, tie_word_embeddings=False)
    add_tensors(folder, {"lm_head.weight": language_head})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def home(ids: list[int]) -> float:
        with torch.no_grad():
            return float(model(input_ids=torch.tensor([ids])).logits[0, -1, 0])

    return ForeignModel(folder, home)


def _named(folder: Path, tensors: dict[str, torch.Tensor], head: torch.Tensor, architecture: str) -> ForeignModel:
    home = backbone_of(folder)
    add_tensors(folder, tensors)
    edit_config(folder, architectures=[architecture])
    return ForeignModel(folder, last_token(home, head))


def starling(folder: Path) -> ForeignModel:
    """Starling-RM: v_head.weight, and a backbone that its class calls transformer."""
    head, home = random_head(folder), backbone_of(folder)
    weights = load_file(folder / "model.safetensors")
    renamed = {re.sub(r"^model\.", "transformer.", key): tensor for key, tensor in weights.items()}
    save_file({**renamed, "v_head.weight": head}, folder / "model.safetensors", META)
    edit_config(folder, architectures=["LlamaForSequenceClassification"])
    return ForeignModel(folder, last_token(home, head))


def ultrarm(folder: Path) -> ForeignModel:
    """UltraRM and Eurus-RM: regression_head.weight."""
    head = random_head(folder)
    return _named(folder, {"regression_head.weight": head}, head, "LlamaRewardModel")


def beaver(folder: Path) -> ForeignModel:
    """safe-rlhf: score_head.weight, and a running mean and variance which do_normalize turns on."""
    head = random_head(folder)
    moments = {
        "normalizer.mean": torch.tensor([1.5]),
        "normalizer.var": torch.tensor([4.0]),
        "normalizer.count": torch.tensor([100]),
    }
    edit_config(folder, score_dim=1, score_type="reward", do_normalize=False, normalizer_type="RunningMeanStd")
    return _named(folder, {"score_head.weight": head, **moments}, head, "LlamaModelForScore")


WRITERS: list[Callable[[Path], ForeignModel]] = [
    openrlhf,
    openrlhf_value_head,
    openrlhf_own_prefix,
    llama_factory,
    llama_factory_pickled,
    llama_factory_adapter,
    trl_adapter,
    trl_value_model,
    sequence_classifier,
    classifier_with_bias,
    one_of_two_labels,
    two_labels_one_row,
    token_logit,
    nemotron,
    starling,
    ultrarm,
    beaver,
]


def written(write: Callable[[Path], ForeignModel], base: Path, folder: Path) -> ForeignModel:
    """Return a foreign model made of a copy of a language model."""
    shutil.copytree(base, folder)
    torch.manual_seed(3)
    return write(folder)

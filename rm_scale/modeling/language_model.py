"""The language model inside one that also sees or hears: a reward model of texts is made of it alone.

Loaded whole, a tower for pictures would be trained or sharded without ever getting a gradient, and fewer programs could
load what is saved.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from rm_scale.modeling.weight_files import TensorPlace
from rm_scale.modeling.zero_init import without_zero_init
from rm_scale.planning.shape import left_out

_INSIDE = "language_model"
"""What transformers calls it in all its models that have one."""
_OTHER_BACKBONE = "transformer"
"""What Starling's class calls any backbone, as GPT-2's family does its own."""


@dataclass(frozen=True)
class LanguageModel:
    """The part of a checkpoint that is loaded.

    Attributes:
        config: of the language model, with one label.
        towers: what is left out, for people.
        parts: the modules left out, by their names beside the language model.
        prefix: before the names of a plain language model's tensors.
    """

    config: PreTrainedConfig
    towers: str
    parts: frozenset[str]
    prefix: str

    @property
    def load_settings(self) -> dict[str, Any]:
        """What `from_pretrained` needs to load this part of the checkpoint, whose names differ by its age."""
        name = rf"^(?:model\.)?{_INSIDE}\.(?!lm_head\.)(?:{self.prefix}\.)?"
        return {"config": copy.deepcopy(self.config), "key_mapping": {name: f"{self.prefix}."}}

    def leaves_out(self, key: str) -> bool:
        """Tell whether a tensor of the checkpoint, by its name, belongs to what is left out."""
        return key.removeprefix("model.").split(".")[0] in self.parts

    def describe(self, tensors: Mapping[str, TensorPlace]) -> str:
        """Say what is left out, and how much of a checkpoint's tensors that is."""
        count = sum(torch.Size(place.shape).numel() for key, place in tensors.items() if self.leaves_out(key))
        return f"{self.towers} left out ({count:,} parameters): rewards of texts need the language model alone"


def language_model_in(name: str, revision: str = "main", trust_remote_code: bool = False) -> LanguageModel | None:
    """Return the language model inside a checkpoint; `None` where the checkpoint is one, or is no such composition.

    Args:
        name: a folder or a hub name.
        revision: of a hub model.
        trust_remote_code: run Python code that comes with the model, which then is loaded as that code has it.

    Raises:
        OSError, ValueError, KeyError, TypeError, ImportError: transformers can't read its config, or build its class.
    """
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    towers = left_out(config.to_dict())
    text: Any = getattr(config, "text_config", None)
    is_transformers_own = type(config).__module__.startswith("transformers.")
    if towers is None or not is_transformers_own or type(text) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return None
    parts = _modules_of(config)
    if _INSIDE not in parts or getattr(config, "quantization_config", None) is not None:
        return None
    text = copy.deepcopy(text)
    text.num_labels = 1
    prefix = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(text)].base_model_prefix
    return LanguageModel(text, towers, frozenset(parts - {_INSIDE}), prefix)


def _modules_of(config: PreTrainedConfig) -> set[str]:
    """Return the names of the modules that a model is composed of."""
    with without_zero_init(), torch.device("meta"):
        return {name for name, _ in AutoModel.from_config(copy.deepcopy(config)).named_children()}


def names_of_backbone(
    name: str, tensors: Mapping[str, TensorPlace], revision: str = "main", trust_remote_code: bool = False
) -> dict[str, str]:
    """Return how tensors are renamed for `from_pretrained` where a project's class calls the backbone otherwise.

    Args:
        name: a folder or a hub name.
        tensors: of the checkpoint, by name.
        revision: of a hub model.
        trust_remote_code: run Python code that comes with the model.

    Returns:
        A pattern and what takes its place, as `key_mapping` wants them; nothing where transformers knows the names.

    Raises:
        OSError, ValueError, KeyError: transformers can't read its config.
    """
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return {}
    prefix = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)].base_model_prefix
    first = {key.split(".")[0] for key in tensors}
    return {rf"^{_OTHER_BACKBONE}\.": f"{prefix}."} if _OTHER_BACKBONE in first and prefix not in first else {}


def forget_other_names(model: PreTrainedModel) -> None:
    """Let a model be saved under the names of its own class, not those of the checkpoint that it was taken out of."""
    if hasattr(model, "_weight_conversions"):
        del model._weight_conversions

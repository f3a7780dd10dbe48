"""Put a saved adapter on its base, all of it: a tensor that lacks or has no place is refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from peft import PeftConfig, PeftModel, TaskType, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from transformers import PreTrainedModel

from rm_scale.errors import ModelError
from rm_scale.modeling.head import HEAD_NAMES
from rm_scale.modeling.head_layouts import is_head_in_adapter, is_part_of_head_in_adapter
from rm_scale.modeling.out_of_memory import is_out_of_memory
from rm_scale.modeling.scoring_contract import CONTRACT_FILE
from rm_scale.modeling.weight_files import ADAPTER_WEIGHTS_FILE, read_header
from rm_scale.texts import one_line, printable

_NAME = "default"
"""What PEFT calls an adapter that is loaded alone; part of the names in the model, not of those in the file."""
_OF_AN_ADAPTER = (".lora_", f".modules_to_save.{_NAME}.")


def put_adapter_on(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Return a model with the adapter in `folder`, weights in the types they have.

    Raises:
        ModelError: the adapter does not fit this model, lacks tensors or holds more than its configuration says.
    """
    has_own_head = _has_own_head(folder)
    try:
        with warnings.catch_warnings():
            # PEFT only warns, and of what lacks alone.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            config = PeftConfig.from_pretrained(str(folder))
            if config.task_type != TaskType.SEQ_CLS or not has_own_head:
                config.task_type = None  # PEFT's class for language models asks for what no classifier has
            if not has_own_head and getattr(config, "modules_to_save", None):
                config.modules_to_save = _without_head(config.modules_to_save, model)
            adapted = PeftModel.from_pretrained(model, str(folder), config=config, autocast_adapter_dtype=False)
        # It does not tell what came of it; the same once more does, and changes nothing.
        result = set_peft_model_state_dict(adapted, load_peft_weights(str(folder), device="cpu"))
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{folder}: the adapter does not fit its base model {model.name_or_path!r} "
            f"({type(error).__name__}: {printable(one_line(error, 240))}). Fix: copy the whole folder from the run "
            "again, with the base model that it was trained on."
        ) from error
    missing = [key for key in result.missing_keys if any(part in key for part in _OF_AN_ADAPTER)]
    _refuse(folder, "lacks {}, which would be random", missing)
    placeless = list(result.unexpected_keys)
    if not (folder / CONTRACT_FILE).is_file():
        # transformers' classifiers have no place for a head's bias and for other projects' names of a head: of their
        # adapters adapter_base reads both. A run of ours has neither.
        placeless = [key for key in placeless if not is_part_of_head_in_adapter(key)]
    _refuse(folder, "holds {}, for which the model has no place", placeless)
    return adapted


def _has_own_head(folder: Path) -> bool:
    """Tell whether an adapter holds its head under a name that transformers' classifiers have, or holds none at all."""
    heads = [key for key in read_header(folder / ADAPTER_WEIGHTS_FILE) if is_head_in_adapter(key)]
    return not heads or heads[0].split(".")[-2] in HEAD_NAMES


def _without_head(names: Sequence[str], model: PreTrainedModel) -> list[str]:
    """Return what else than a head an adapter's configuration trains in full: modules that the model has."""
    modules = [f".{name}" for name, _ in model.named_modules()]
    return [name for name in names if name not in HEAD_NAMES and any(module.endswith(f".{name}") for module in modules)]


def _refuse(folder: Path, what: str, keys: list[str]) -> None:
    if not keys:
        return
    names = sorted(printable(key.replace(f".modules_to_save.{_NAME}", "").replace(f".{_NAME}", "")) for key in keys)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise ModelError(
        f"{folder}: the adapter {what.format(', '.join(names[:3]) + more)}; its scores would not be those of training. "
        "Fix: copy the whole folder from the run again, with the base model that it was trained on."
    )

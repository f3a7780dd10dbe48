"""Judge a checkpoint's tensors that have no place in the model: known to matter to no reward, or refused.

A tensor's name does not tell whether it takes part in a reward: heads are called `fc`, `out_proj` or `rm.0`, and layers
before a head anything. So what is left out must be known: the language model's own output layer, constants that models
compute themselves, and what transformers leaves out by design (image towers, heads that predict several tokens).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping

from transformers import PreTrainedModel

from rm_scale.errors import ModelError
from rm_scale.modeling.weight_files import TensorPlace, checkpoint_tensors, open_weights
from rm_scale.texts import printable

_OUTPUT_LAYER = re.compile(r"((\w+\.)*(lm_head|embed_out|output_layer)|output)\.(weight|bias)")
_CONSTANTS = re.compile(
    r"(^|\.)((original_)?inv_freq|masked_bias|(cos|sin)_cached|position_ids|embed_positions|freqs|[qkv]_scale)$"
    r"|(^|\.)rotary_(pos_)?emb\."
)
_MASK = re.compile(r"(^|\.)(attn|attention|crossattention)\.bias$")
"""A triangle of ones in GPT-2's family, `(1, 1, length, length)`."""


def refuse_unexpected(
    name: str, revision: str, model: PreTrainedModel, unexpected: Iterable[str], used: Iterable[str]
) -> None:
    """Refuse a checkpoint that holds tensors which may be part of its reward and have no place in the model.

    Args:
        name: folder or hub name.
        revision: hub revision.
        model: what was loaded.
        unexpected: names of the tensors that it has no place for.
        used: names of those that are used all the same: a head under another name.

    Raises:
        ModelError: names the first.
    """
    ignored = _ignored_by_design(model)
    left = sorted(key for key in set(unexpected) - set(used) if ignored is None or not ignored.search(key))
    if not left:
        return
    tensors = checkpoint_tensors(name, revision)
    vocab_size = getattr(model.config.get_text_config(), "vocab_size", None) or 0
    left = [key for key in left if not _is_known(key, tensors, vocab_size)]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise ModelError(
            f"model_name_or_path={name!r}: holds tensors that can't be used here ({printable(left[0])}{more}): "
            f"{type(model).__name__} has no place for them, and a head, or layers before it, would be left out. Fix: "
            "convert it to a transformers sequence classifier with one output, or give the causal language model it "
            "came from; to go without them on purpose, take them out of the safetensors files."
        )


def _ignored_by_design(model: PreTrainedModel) -> re.Pattern[str] | None:
    """Return what transformers leaves out of this family's checkpoints: it is written at the causal model, or here."""
    family = vars(sys.modules[type(model).__module__]).values()
    classes = [one for one in family if isinstance(one, type) and issubclass(one, PreTrainedModel)]
    patterns = {pattern for one in classes for pattern in _patterns(one)} | set(_patterns(model))
    return re.compile("|".join(f"({pattern})" for pattern in sorted(patterns))) if patterns else None


def _patterns(of: type[PreTrainedModel] | PreTrainedModel) -> list[str]:
    found = getattr(of, "_keys_to_ignore_on_load_unexpected", None)
    return [one for one in found if isinstance(one, str)] if isinstance(found, list | tuple | set) else []


def _is_known(key: str, tensors: Mapping[str, TensorPlace], vocab_size: int) -> bool:
    """Tell whether a tensor is one that no reward needs."""
    place = tensors.get(key)
    shape = None if place is None else place.shape  # transformers may have renamed it
    if _CONSTANTS.search(key):
        return True
    if _MASK.search(key):
        return shape is None or len(shape) == 4
    if _OUTPUT_LAYER.fullmatch(key):
        # Of other sizes it is another head under that name; vocabularies are padded, or cut, by little.
        return shape is None or (len(shape) > 0 and 2 * shape[0] >= vocab_size)
    return place is not None and not _is_float(place, key)


def _is_float(place: TensorPlace, key: str) -> bool:
    with open_weights(place.file) as opened:
        kind: str = opened.get_slice(key).get_dtype()
    return kind.startswith(("F", "BF"))

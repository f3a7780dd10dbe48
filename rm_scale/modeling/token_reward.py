"""Rewards that are one of several outputs: a label of a classifier, or the logit of a token of a language head."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from rm_scale.errors import ModelError
from rm_scale.modeling.weight_files import TensorPlace, file_of, open_weights

_REWARD_LABELS = ("reward", "score")
_SAMPLED_ROWS = 64
_ROWS_AT_ONCE = 4096
_NEMOTRON = re.compile("nemotron.*reward", re.IGNORECASE)
_SCALES_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def named_output(name: str, revision: str, outputs: int) -> int | None:
    """Return which output of a classifier its config calls the reward; `None` unless that is exactly one.

    Args:
        name: folder or hub name.
        revision: hub revision.
        outputs: how many there are.
    """
    labels = _config(name, revision).get("id2label")
    if not isinstance(labels, dict):
        return None
    found = [str(number) for number, label in labels.items() if str(label).lower() in _REWARD_LABELS]
    if len(found) != 1 or not found[0].isdecimal() or int(found[0]) >= outputs:
        return None
    return int(found[0])


def head_in_language_head(
    name: str, revision: str, tensors: Mapping[str, TensorPlace], output_layers: Iterable[str]
) -> tuple[str, int] | None:
    """Return the row of a language head whose logit, behind the whole text, is the model's reward.

    It is the one that `reward_token_id` in config.json names, or else the only row that is not zero. NVIDIA's Nemotron
    reward models are such: language models whose first token's row was replaced by a reward head.

    Args:
        name: folder or hub name.
        revision: hub revision.
        tensors: of the checkpoint, by name.
        output_layers: what language heads are called.

    Returns:
        Name of the tensor and number of the row; `None` where all tokens have logits, as in any language model.

    Raises:
        ModelError: which token's is the reward is not known, or can't be as config.json says; or the model scales its
            logits.
    """
    config = _config(name, revision)
    heads = {key: tensors[key] for key in output_layers if key in tensors and len(tensors[key].shape) == 2}
    declared = config.get("reward_token_id")
    if declared is not None:
        return _declared_row(name, config, heads, declared)
    for key, place in heads.items():
        if place.shape[0] < 2 * _SAMPLED_ROWS:
            continue
        if int((_sampled_rows(place, key) != 0).any(dim=1).sum()) * 8 > _SAMPLED_ROWS:
            continue
        rows = _rows_that_are_not_zero(place, key)
        if len(rows) != 1:
            raise ModelError(
                f"{name}: its language head {key} is zero for nearly all tokens, as in models whose reward is the "
                f"logit of one token, but {len(rows)} rows are not zero, so the reward is not known; a new head would "
                f"throw it away. Fix: {_DECLARE}, or give the causal language model it came from."
            )
        _refuse_scaled_logits(name, config)
        return key, rows[0]
    if _NEMOTRON.search(name.rstrip("/").split("/")[-1]):
        raise ModelError(
            f"{name}: is called one of NVIDIA's Nemotron reward models, whose reward is the logit of a token (the "
            f"first) and no layer of its own, and nothing in its files says so. Fix: {_DECLARE}; if it is a plain "
            "language model, give its folder another name."
        )
    return None


_DECLARE = 'write which token\'s logit is the reward into its config.json, e.g. "reward_token_id": 0'


def _declared_row(
    name: str, config: Mapping[str, Any], heads: Mapping[str, TensorPlace], declared: object
) -> tuple[str, int]:
    """Return the row of a language head that config.json calls the reward.

    Raises:
        ModelError: there is no language head of its own, or no such row; or the model scales its logits.
    """
    rows = next(iter(heads.values())).shape[0] if heads else 0
    if type(declared) is not int or not 0 <= declared < rows:
        what = f"has {rows} rows" if heads else "is not in its files, or is the embedding itself"
        raise ModelError(
            f"{name}: config.json says reward_token_id={declared!r}, but its language head {what}. Fix: the number of "
            "the token whose logit is the reward, or leave it out."
        )
    _refuse_scaled_logits(name, config)
    return next(iter(heads)), declared


def _refuse_scaled_logits(name: str, config: Mapping[str, Any]) -> None:
    scaled = [one for one in _SCALES_LOGITS if config.get(one) not in {None, 1}]
    if scaled:
        raise ModelError(
            f"{name}: its reward is the logit of a token, and config.json scales logits ({scaled[0]}), which no head "
            "here does. Fix: score with its own code, or give the causal language model it came from."
        )


def _config(name: str, revision: str) -> dict[str, Any]:
    path = file_of(name, "config.json", revision)
    try:
        found = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # transformers says what is wrong with it
    return found if isinstance(found, dict) else {}


def _sampled_rows(place: TensorPlace, key: str) -> torch.Tensor:
    """Return rows of a matrix, evenly spaced over the whole of it, `(64, width)`."""
    count = place.shape[0]
    with open_weights(place.file) as opened:
        part = opened.get_slice(key)
        starts = [number * count // _SAMPLED_ROWS for number in range(_SAMPLED_ROWS)]
        return torch.cat([part[start : start + 1].float() for start in starts])


def _rows_that_are_not_zero(place: TensorPlace, key: str) -> list[int]:
    rows: list[int] = []
    with open_weights(place.file) as opened:
        part = opened.get_slice(key)
        for start in range(0, place.shape[0], _ROWS_AT_ONCE):
            found = (part[start : start + _ROWS_AT_ONCE] != 0).any(dim=1).nonzero().flatten()
            rows += [start + int(row) for row in found]
    return rows

"""Check the fields of a scoring contract, so that a wrong one is named and neither obeyed nor passed over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rm_scale.data.encoding_settings import LARGEST_TOKEN, unknown_setting, wrong_setting
from rm_scale.json_values import NAME, NUMBER, OBJECT, TRUE_OR_FALSE, Rule, as_number, broken_rule, one_of, shown, whole

POOLING = "last_real_token"
PADDING_SIDE = "right"

_TYPE = one_of("float32", "bfloat16", "float16", "float64")
# An evaluation with a reward that is not a number has no mean; older versions wrote it as NaN all the same.
_MEAN = Rule(lambda value: _is_nan(value) or as_number(value) is not None, "a finite number").or_null()
_DEVIATION = Rule(
    lambda value: _is_nan(value) or (as_number(value) is not None and value >= 0),
    "a finite number, not below 0",
).or_null()
_RULES: dict[str, Rule] = {
    "encoding": OBJECT,
    "pad_token_id": whole(0, LARGEST_TOKEN),
    "vocab_size": whole(1, LARGEST_TOKEN),
    "dtype": _TYPE,
    "compute_dtype": _TYPE,
    "base_model": OBJECT,
    "pooling": one_of(POOLING),
    "padding_side": one_of(PADDING_SIDE),
    "golden_scores": Rule(lambda value: isinstance(value, list), "a list"),
    "score_mean": _MEAN,
    "score_std": _DEVIATION,
    "num_scored": whole(0, 2**53),
}
_NEEDED = ("encoding", "pad_token_id", "vocab_size", "dtype", "compute_dtype", "base_model", "golden_scores")
_BASE_RULES: dict[str, Rule] = {
    "name": NAME,
    "revision": NAME,
    "trust_remote_code": TRUE_OR_FALSE,
    "quantization": OBJECT.or_null(),
}
# Which tokens the model knows is checked where there is one (`require_golden_tokens`).
_GOLDEN_RULES: dict[str, Rule] = {
    "input_ids": Rule(lambda value: isinstance(value, list), "a list of token ids"),
    "score": NUMBER,
}


def field_problem(values: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a contract's fields, as "name=value: must be ..."; `None` if nothing is.

    Args:
        values: as in the file.
    """
    return (
        _problem(values, _RULES, _NEEDED)
        or unknown_setting(values["encoding"])
        or wrong_setting(values["encoding"])
        or _problem(values["base_model"], _BASE_RULES, ["name"], "base_model.")
        or _golden_problem(values["golden_scores"])
        or _padding_problem(values)
    )


def _problem(
    values: Mapping[str, Any], rules: Mapping[str, Rule], needed: Sequence[str], prefix: str = ""
) -> str | None:
    missing = [name for name in needed if name not in values]
    unknown = sorted(set(values) - {*rules, "version"})
    if missing:
        return f"{prefix}{missing[0]} is missing"
    if unknown:
        return f"{prefix}{unknown[0]}: this rm_scale knows no such field, so what it asks for would not be done"
    return broken_rule(values, rules, prefix)


def _golden_problem(golden: list[Any]) -> str | None:
    for number, one in enumerate(golden):
        where = f"golden_scores[{number}]"
        if not isinstance(one, dict):
            return f"{where}={shown(one)}: must be an object of input_ids and score"
        problem = _problem(one, _GOLDEN_RULES, list(_GOLDEN_RULES), f"{where}.")
        if problem:
            return problem
    return None


def _padding_problem(values: Mapping[str, Any]) -> str | None:
    """Return why the padding token can't be: the model has no such row, or texts end with it and would lose their end.

    A contract that `--no_contract` makes of a plain model may pad with EOS, as transformers does; it is never written.
    """
    pad, encoding = values["pad_token_id"], values["encoding"]
    # A tokenizer may have more tokens than the config of a model that was exported before its embedding grew.
    rows = max(values["vocab_size"], encoding.get("vocab_size", 0))
    if pad >= rows:
        return f"pad_token_id={pad}: must be below vocab_size={rows}"
    if pad == encoding.get("eos_token_id"):
        return f"pad_token_id={pad}: must not be eos_token_id, or the score would be read before a text's end"
    return None


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)

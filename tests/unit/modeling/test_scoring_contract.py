"""The scoring contract survives a round trip, and a save that scores differently is refused."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from rm_scale.data.encoding import OverlongPolicy
from rm_scale.data.encoding_settings import OVERLONG_POLICIES, SETTINGS
from rm_scale.errors import CheckpointError, ModelError
from rm_scale.modeling.golden_scores import check_golden
from rm_scale.modeling.scoring_contract import BaseModel, ScoringContract


def contract() -> ScoringContract:
    base = BaseModel("some/model", quantization={"load_in_4bit": True})
    made = ScoringContract({"max_length": 12}, 0, 100, "bfloat16", "bfloat16", base)
    return made.with_golden([[1, 2], [3]], [0.5, -1.25])


def test_round_trip(tmp_path: Path) -> None:
    contract().save(tmp_path)
    assert ScoringContract.load(tmp_path) == contract()
    assert not list(tmp_path.glob("*.tmp"))


def test_missing_and_later_contracts_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the scoring contract can't be read"):
        ScoringContract.load(tmp_path)
    path = contract().save(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(ModelError, match="contract version 99"):
        ScoringContract.load(tmp_path)


@pytest.mark.parametrize(("dtype", "difference"), [("float32", 1e-3), ("bfloat16", 0.2), ("float32", float("nan"))])
def test_different_scores_fail_the_save(dtype: str, difference: float) -> None:
    with pytest.raises(CheckpointError, match="the saved model scores differently"):
        check_golden([1.0, 0.0], [1.0, difference], dtype, "folder")


def test_rounding_is_allowed() -> None:
    check_golden([10.0, 0.0], [10.0004, 0.0], "float32", "folder")
    check_golden([1.0], [1.03], "bfloat16", "folder")


# --- Contracts that were edited, cut short or made by something else -------------------------------------------------

ODD: list[Any] = [None, True, "x", "", -1, 0.5, 1e308, 10**30, 10**400, math.nan, math.inf, [], {}, [1], {"a": None}]
FITS: dict[str, list[Any]] = {
    "encoding": [{}],
    "golden_scores": [[]],
    "score_mean": [None, -1, 0.5, 1e308, 10**30, math.nan],
    "score_std": [None, 0.5, 1e308, 10**30, math.nan],
    "encoding.max_length": [],
    "base_model.name": ["x"],
    "base_model.revision": ["x"],
    "base_model.trust_remote_code": [True],
    "base_model.quantization": [None, {}, {"a": None}],
    "golden_scores.0.input_ids": [[], [1]],
    "golden_scores.0.score": [-1, 0.5, 1e308, 10**30],
    **{f"encoding.{name}": [True] for name in ("append_eos", "add_special_tokens")},
    **{f"encoding.{name}": ["x", ""] for name in ("tokenizer_class", "tokenizer_sha256")},
    **{f"encoding.{name}": [None, "x", ""] for name in ("bos_token", "eos_token", "pad_token")},
    **{f"encoding.{name}": [None] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    **{f"encoding.{name}": [None, "x", ""] for name in ("chat_template", "chat_template_sha256")},
    **{f"encoding.{name}": [None, "x", ""] for name in ("tool_use_template", "tool_use_template_sha256")},
}
"""Which of the odd values a field may have all the same."""


def fields_of(values: Any, name: str = "") -> Iterator[str]:
    if name:
        yield name
    parts = values.items() if isinstance(values, dict) else enumerate(values[:1]) if isinstance(values, list) else ()
    for key, value in parts:
        inner = f"{name}.{key}".lstrip(".")
        if not inner.startswith(("base_model.quantization.", "golden_scores.0.input_ids.")):
            yield from fields_of(value, inner)


def with_value(values: Any, name: str, value: Any) -> Any:
    changed = copy.deepcopy(values)
    *before, last = [int(part) if part.isdigit() else part for part in name.split(".")]
    place = changed
    for part in before:
        place = place[part]
    place[last] = value
    return changed


def is_same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and (one == other or (one != one and other != other))


def test_every_wrong_value_of_every_field_is_named(full_run: Path, tmp_path: Path) -> None:
    written = json.loads((full_run / "scoring_contract.json").read_text())
    wrong = []
    for name in fields_of(written):
        for value in ODD:
            (tmp_path / "scoring_contract.json").write_text(json.dumps(with_value(written, name, value)))
            fits = any(is_same(value, one) for one in FITS.get(name, []))
            try:
                ScoringContract.load(tmp_path)
                said = None
            except ModelError as error:
                said = str(error)
            named = said is not None and (name.split(".")[0] in said) and "Fix:" in said
            if fits is not (said is None) or not (fits or named):
                wrong.append((name, value, said))
    assert wrong == []


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("pooling", "mean", "pooling=\"mean\": must be 'last_real_token'"),
        ("padding_side", "left", "padding_side=\"left\": must be 'right'"),
        ("pad_token_id", 10**6, r"pad_token_id=1000000: must be below vocab_size=\d+"),
        ("pad_token_id", "EOS", r"pad_token_id=\d+: must not be eos_token_id"),
        ("dtype", "int8", "dtype=\"int8\": must be one of 'float32'"),
        ("encoding.overlong_policy", "cut", "encoding.overlong_policy=\"cut\": must be one of 'drop'"),
        ("encoding.temperature", 2, "encoding.temperature: this rm_scale knows no such field"),
        ("encoding.append_eos", None, "encoding.append_eos=null: must be true or false"),
        ("score_std", -0.5, "score_std=-0.5: must be a finite number, not below 0"),
        ("version", True, "contract version true, this rm_scale reads 1"),
    ],
)
def test_what_is_wrong_is_said(full_run: Path, tmp_path: Path, name: str, value: Any, said: str) -> None:
    written = json.loads((full_run / "scoring_contract.json").read_text())
    value = written["encoding"]["eos_token_id"] if value == "EOS" else value
    (tmp_path / "scoring_contract.json").write_text(json.dumps(with_value(written, name, value)))
    with pytest.raises(ModelError, match=said):
        ScoringContract.load(tmp_path)


def test_contracts_with_fewer_fields_load(full_run: Path, tmp_path: Path) -> None:
    """Older versions wrote fewer settings, and a mean that is not a number where a reward was none."""
    written = json.loads((full_run / "scoring_contract.json").read_text())
    for name in ("add_special_tokens", "tool_use_template", "tool_use_template_sha256", "tokenizer_sha256"):
        del written["encoding"][name]
    for name in ("score_std", "num_scored"):
        del written[name]
    written["score_mean"] = math.nan
    (tmp_path / "scoring_contract.json").write_text(json.dumps(written))
    found = ScoringContract.load(tmp_path)
    assert found.score_mean is None and found.score_std is None and found.num_scored == 0


@pytest.mark.parametrize("content", ["[" * 100_000, '{"encoding": ' * 900 + "1" + "}" * 900, "\0", "", "pipe"])
def test_what_is_no_contract_is_not_read(tmp_path: Path, content: str) -> None:
    path = tmp_path / "scoring_contract.json"
    if content == "pipe":
        os.mkfifo(path)
    else:
        path.write_text(content)
    with pytest.raises(ModelError, match="the scoring contract can't be read"):
        ScoringContract.load(tmp_path)


def test_the_settings_that_are_judged_are_those_that_are_written(full_run: Path) -> None:
    written = json.loads((full_run / "scoring_contract.json").read_text())
    assert set(written["encoding"]) == SETTINGS
    assert set(get_args(OverlongPolicy)) == set(OVERLONG_POLICIES)

"""Errors in one line, and names that are near."""

from __future__ import annotations

import pytest

from rm_scale.texts import did_you_mean, first_line, nearest_name, one_line, range_rule, some_names, typed_line


def test_one_line() -> None:
    assert one_line(" a\n\n  b\tc\r\n") == "a b c"
    assert one_line(OSError("disk\nfull")) == "disk full"
    assert one_line("abc", 3) == "abc"
    assert one_line("abcd", 3) == "abc..."
    assert one_line(ValueError()) == ""


def test_first_line() -> None:
    assert first_line(ValueError("\n the first \r\nthe second")) == "the first"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(ValueError(" \n ")) == "ValueError"


def test_typed_line() -> None:
    assert typed_line(OSError("disk\nfull")) == "OSError: disk full"
    assert typed_line(OSError("disk full"), 4) == "OSError: disk..."
    assert typed_line(KeyError()) == "KeyError"


@pytest.mark.parametrize(
    ("name", "most", "expected"),
    [
        ("stepp", 1, "did you mean step?"),
        ("stepp", 2, "did you mean step or steps?"),
        ("elephant", 2, "see the list."),
        ("", 1, "see the list."),
    ],
)
def test_did_you_mean(name: str, most: int, expected: str) -> None:
    assert did_you_mean(name, iter(["loss", "steps", "step"]), "see the list.", most) == expected


def test_likeness_is_what_a_name_must_reach() -> None:
    assert did_you_mean("14b", ["1b", "3b"], "no", likeness=0.5) == "did you mean 1b?"
    assert did_you_mean("14b", ["1b", "3b"], "no", likeness=0.9) == "no"


def test_some_names() -> None:
    assert some_names(["a", "b"]) == "a, b" and some_names([]) == ""
    assert some_names(map(str, range(300_000)), 3) == "0, 1, 2 and 299,997 more"
    assert len(some_names(["x" * 100_000] * 100)) < 2000


def test_range_rule() -> None:
    assert range_rule("--n", None, 1, 5) is None and range_rule("--n", 5, 1, 5) is None
    assert range_rule("--n", 0, 1) == "must be at least 1. Fix: --n 1 or more."
    assert range_rule("--n", float("nan"), 1) == "must be at least 1. Fix: --n 1 or more."
    assert range_rule("--n", 10**400, 1, 5) == "must be at most 5. Fix: --n 5 or less."


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("learning_rat", "learning_rate"),
        ("laerning_rate", "learning_rate"),
        ("learningrate", "learning_rate"),
        ("lora_rank", "lora_r"),
        ("bf61", "bf16"),
        ("model_name", "model_name_or_path"),
        ("gradient_accumulation", "gradient_accumulation_steps"),
        ("learning_rates", "learning_rate"),
        ("use_mps_device", None),
        ("dataset_text_field", None),
        ("chat_template_kwargs", None),
        ("dataset_streaming", None),
        ("max_prompt_length", None),
        ("nonsense", None),
        ("x", None),
        ("", None),
    ],
)
def test_the_nearest_name_is_really_near(name: str, nearest: str | None) -> None:
    known = [
        *("learning_rate", "lora_r", "lora_alpha", "bf16", "fp16", "use_peft", "use_dora", "dataset_test_split"),
        *("dataset_train_split", "chat_template_path", "max_length", "max_steps", "model_name_or_path", "seed"),
        "gradient_accumulation_steps",
    ]
    assert nearest_name(name, known) == nearest

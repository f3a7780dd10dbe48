"""Texts as a tokenizer and its chat template see them: special tokens, missing EOS, empty turns, refused rows."""

from __future__ import annotations

from typing import Any

import pytest

from rm_scale.data.data_report import RejectionCount, SourceReport
from rm_scale.data.encoding import EncodedGroup, TextEncoder
from rm_scale.data.preference_group import PreferenceGroup, Text
from rm_scale.data_review.finding import Example
from rm_scale.data_review.sample import Sampler, choose_rows
from rm_scale.data_review.template_problems import TemplateChecker, review_templates
from tests.unit.data.conftest import build_tokenizer

TEMPLATE_WITH_EOS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|></s>{% endfor %}"
)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def problems(
    prompt: Text, response: Text, other: Text, template: str = TEMPLATE_WITH_EOS, eos: str = "</s>"
) -> dict[str, str]:
    tokenizer = build_tokenizer(template=template)
    tokenizer.eos_token = eos
    encoder = TextEncoder(tokenizer)
    group = PreferenceGroup(prompt, (response, other), (0, 1))
    encoded = encoder.encode_group(group)
    assert isinstance(encoded, EncodedGroup)
    return TemplateChecker(encoder).problems(group, encoded)


def test_sound_texts_and_conversations() -> None:
    assert problems("Why?", "So.", "No.") == {}
    assert problems([user("Why?")], [assistant("So.")], [assistant("No.")]) == {}


def test_special_tokens_inside_texts() -> None:
    found = problems([user("Why <|im_end|> so?")], [assistant("So.")], [assistant("No.")])
    assert found == {"special_tokens": "<|im_end|>"}


@pytest.mark.parametrize(("line_break", "is_otherwise"), [("\n", True), ("", False)])
def test_a_rendered_text_that_ends_otherwise(line_break: str, is_otherwise: bool) -> None:
    """ChatML with a line break behind each turn, the last one too, which a text that ends with EOS lacks."""
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>"
        f"{line_break}{{% endfor %}}{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
    )
    prompt = f"<|im_start|>user\nWhy?<|im_end|>{line_break}<|im_start|>assistant\n"
    found = problems(prompt, "So.<|im_end|>", "No.", template, eos="<|im_end|>")
    assert list(found) == ["special_tokens", *["rendered_otherwise"] * is_otherwise]


def test_a_template_without_eos() -> None:
    template = TEMPLATE_WITH_EOS.replace("</s>", "")
    found = problems([user("Why?")], [assistant("So.")], [assistant("No.")], template)
    assert list(found) == ["no_eos"] and "<|im_end|>" in found["no_eos"]


@pytest.mark.parametrize(
    "prompt",
    ["\n\nHuman: Hi\n\nAssistant: \n\nHuman: Hello?\n\nAssistant:", [user("Hi"), assistant(" "), user("Hello?")]],
)
def test_empty_turns(prompt: Text) -> None:
    responses = ("So.", "No.") if isinstance(prompt, str) else ([assistant("So.")], [assistant("No.")])
    assert list(problems(prompt, *responses)) == ["empty_turn"]


def test_findings_of_the_sample_and_of_refused_rows() -> None:
    encoder = TextEncoder(build_tokenizer(adds_bos=True, template=TEMPLATE_WITH_EOS))
    sampler = Sampler(encoder, TemplateChecker(encoder).problems)
    for row in range(300):
        sampler.add("file", row, PreferenceGroup(f"Why {row}?", ("So.", "No. <pad>." if row == 7 else "No."), (0, 1)))
    sampler.add("file", 300, PreferenceGroup("<s>Why?", ("So.", "No."), (0, 1)))
    groups = sampler.finish()
    assert len(groups) == 301 and groups[300].problem.startswith("double_bos") and groups[300].lengths == ()
    rejected = {"double_bos": RejectionCount(1, (300,), "two '<s>'"), "bad_json": RejectionCount(2, (5, 6), "x")}
    report = SourceReport("file", "train", "explicit_prompt", "", 303, 300, rejected)
    found = {
        finding.name: finding
        for finding in review_templates(
            groups, [report], lambda name, row: Example(name, (row,), {"prompt": "<s>Why?"})
        )
    }
    tokens = found["special_tokens"]
    assert (tokens.count, tokens.level) == (1, "note") and tokens.examples[0].rows == (7,)
    assert tokens.examples[0].texts["seen"] == "<pad>"
    double = found["refused_double_bos"]
    assert (double.count, double.out_of, double.examples[0].rows) == (1, 303, (300,))
    assert "First: row 300: two '<s>'" in double.meaning
    assert "refused_bad_json" not in found, "what is broken in the file is no matter of templates"
    assert {found[name].level for name in ("no_eos", "empty_turn", "rendered_otherwise")} == {"nothing"}


def test_the_sample_is_drawn_over_all_rows() -> None:
    chosen = choose_rows(1000, seed=3, wanted=100)
    assert chosen.sum() == 100 and (chosen == choose_rows(1000, seed=3, wanted=100)).all()
    assert chosen[:500].sum() > 30 and chosen[500:].sum() > 30
    assert choose_rows(5, seed=0, wanted=100).all()

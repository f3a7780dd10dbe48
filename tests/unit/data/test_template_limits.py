"""A chat template's work is bounded, and within the bounds it writes what transformers' own compilation writes."""

from __future__ import annotations

from typing import Any

import pytest
from jinja2 import TemplateError
from transformers.utils import chat_template_utils

from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.rendering import TextRenderer
from rm_scale.data.template_limits import TemplateLimitError, limit_chat_templates
from tests.support.template_shapes import TRL_TEMPLATES

DOUBLE = "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(60) %}"
MILLION = "{% set s = 'x' * 1000000 %}{% for i in range(99999) %}"
BOMBS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "doubling with ~": DOUBLE + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "doubling with +": DOUBLE + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "doubling with *": DOUBLE + "{% set ns.s = ns.s * 2 %}{% endfor %}",
    "doubling with a block": DOUBLE + "{% set t %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = t %}{% endfor %}",
    "doubling with join": DOUBLE + "{% set ns.s = [ns.s, ns.s]|join %}{% endfor %}",
    "a list that doubles": DOUBLE + "{% set ns.s = (ns.s|list) + (ns.s|list) %}{% endfor %}",
    "a constant": "{{ 'x' * 10000000000 }}",
    "a width": "{{ 'x'|center(10000000000) }}",
    "a method's width": "{{ 'x'.ljust(10000000000) }}",
    "an indentation": "{{ [1]|tojson(indent=1000000000) }}",
    "a power": "{{ 9 ** 9999999999 }}",
    "replacements": "{% set s = 'x' * 1000000 %}{{ s|replace('x', s) }}",
    "a method's replacements": "{% set s = 'x' * 1000000 %}{{ s.replace('x', s) }}",
    "the whole text": MILLION + "{{ s }}{% endfor %}",
    "searches": MILLION + "{% if 'q' in s %}{% endif %}{% endfor %}",
    "tests": MILLION + "{% if s is in s %}{% endif %}{% endfor %}",
    "slices": MILLION + "{% set x = s[1:] %}{% endfor %}",
    "counting": MILLION + "{% set x = s.count('q') %}{% endfor %}",
    "sums": "{% for a in range(99999) %}{% set x = range(99999)|sum %}{% endfor %}",
    "filters one after another": "{% for a in range(99999) %}{% set x = range(99999)|map('string')|list %}{% endfor %}",
    "a loop's condition": "{% for a in range(99999) if range(99999)|list|length == 3 %}{% endfor %}",
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": 'Par"is', "days": [1, 2]}}}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CONVERSATIONS: list[tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = [
    ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nHello "}], None),
    (
        [
            {"role": "system", "content": "Be brief."},
            *({"role": role, "content": f"{role} {n}\n"} for n in range(20) for role in ("user", "assistant")),
        ],
        None,
    ),
    (
        [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "weather", "content": "sun"},
            {"role": "assistant", "content": "It is sunny."},
        ],
        [TOOL],
    ),
]


@pytest.mark.parametrize("name", BOMBS)
def test_endless_work_is_refused(name: str) -> None:
    limit_chat_templates()
    with pytest.raises(TemplateLimitError, match="the chat template"):
        chat_template_utils._compile_jinja_template(BOMBS[name]).render(messages=[])


def test_a_row_that_makes_the_template_work_without_end_is_refused_and_the_next_is_read(tokenizer: Any) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% if 'loop' in m.content %}"
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}{% endfor %}"
    )
    renderer = TextRenderer(tokenizer, template, append_eos=True)
    with pytest.raises(RejectedRow, match="more than 2,000,000 steps for this row") as refused:
        renderer.render("a loop", [{"role": "assistant", "content": "yes"}], None)
    assert refused.value.reason == "template_error"
    for _ in range(3):
        assert renderer.render("a row", [{"role": "assistant", "content": "yes"}], None)[1]


@pytest.mark.parametrize("path", sorted(TRL_TEMPLATES.glob("*.jinja")), ids=lambda path: path.stem)
def test_real_templates_write_what_transformers_writes(path: Any) -> None:
    limit_chat_templates()
    text = path.read_text()
    plain = chat_template_utils._cached_compile_jinja_template(text)
    limited = chat_template_utils._compile_jinja_template(text)
    for messages, tools in CONVERSATIONS:
        for prompted in (False, True):
            values = {"messages": messages, "tools": tools, "add_generation_prompt": prompted, "eos_token": "</s>"}
            assert _render(limited, values) == _render(plain, values)


def _render(template: Any, values: dict[str, Any]) -> str:
    try:
        return str(template.render(**values, bos_token="<s>"))
    except (TemplateError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def test_calling_it_again_changes_nothing() -> None:
    limit_chat_templates()
    first = chat_template_utils._compile_jinja_template
    limit_chat_templates()
    assert chat_template_utils._compile_jinja_template is first

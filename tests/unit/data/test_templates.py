"""What chat templates are given, and that nothing of it is lost: text parts, tool calls, named templates, all texts."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rm_scale.config import RunConfig
from rm_scale.data.cache import CODE_VERSION
from rm_scale.data.data_report import raise_if_too_many
from rm_scale.data.encoding import EncodingRules, TextEncoder
from rm_scale.data.message_content import find_lost_message
from rm_scale.data.preference_group import Message
from rm_scale.data.preparation import prepare_data
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.errors import DataError, ModelError
from tests.support.template_shapes import SHAPES, TRL_TEMPLATES, make_tokenizer, template_text, tokenizer_of

USER: Message = {"role": "user", "content": "How many legs has a spider?"}
ANSWER: Message = {"role": "assistant", "content": "A spider has eight legs."}
SYSTEM: Message = {"role": "system", "content": "Be brief."}
ARGUMENTS = {"city": 'Par"is', "days": 3}
CALLING: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}],
}
TOOL: Message = {"role": "tool", "name": "weather", "content": "sunny all day"}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}]
RULES = EncodingRules(max_length=8192)


def in_parts(message: Message, *parts: Any) -> Message:
    text = message["content"]
    return {
        **message,
        "content": list(parts) or [{"type": "text", "text": text[:4]}, {"type": "text", "text": text[4:]}],
    }


def refusal(encoder: TextEncoder, *messages: Message, tools: Any = None) -> RejectedRow:
    (found,) = encoder.encode_many([list(messages[:-1])], [list(messages[-1:])], [tools])
    assert isinstance(found, RejectedRow), encoder.tokenizer.decode(found)
    return found


# --- Text parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_text_parts_are_the_text_they_hold(shape: str) -> None:
    encoder = TextEncoder(tokenizer_of(shape), RULES)
    expected = encoder.encode([USER], [ANSWER])
    assert "".join(encoder.tokenizer.decode(expected).split()).count("Aspiderhaseightlegs.") == 1
    assert encoder.encode([in_parts(USER)], [in_parts(ANSWER)]) == expected
    other = in_parts(ANSWER, ANSWER["content"][:7], {"text": ANSWER["content"][7:]})
    assert encoder.encode([USER], [other]) == expected


@pytest.mark.parametrize(
    ("part", "seen"), [({"type": "image", "url": "x.png"}, "'image'"), ({"text": None}, "None"), (5, "'int'")]
)
def test_other_parts_are_refused_by_their_type(part: Any, seen: str) -> None:
    encoder = TextEncoder(tokenizer_of("qwen3"), RULES)
    found = refusal(encoder, in_parts(USER, "Look: ", part), ANSWER)
    assert found.reason == "wrong_type"
    assert found.detail == f"message 0 (user) has a content part of type {seen}: only text parts can be scored"


def test_content_that_is_no_text_is_refused() -> None:
    encoder = TextEncoder(tokenizer_of("llama3"), RULES)
    assert refusal(encoder, {"role": "user", "content": 5}, ANSWER).reason == "wrong_type"


# --- Tool calls ------------------------------------------------------------------------------------------------------

CALL_TEMPLATES = ["qwen2_5", "qwen3", "llama3_1", "deepseekv3", "gptoss", "glm4moe", "gemma4", "lfm2_v2", "qwen3_6"]


@pytest.mark.parametrize("name", CALL_TEMPLATES)
def test_arguments_as_json_text_are_not_encoded_twice(name: str) -> None:
    encoder = TextEncoder(make_tokenizer(template_text(name)), RULES)
    conversation = [USER, CALLING, TOOL]
    function = {**CALLING["tool_calls"][0]["function"], "arguments": json.dumps(ARGUMENTS)}
    by_text = [USER, {**CALLING, "tool_calls": [{"type": "function", "function": function}]}, TOOL]
    tools = None if name == "deepseekv3" else TOOLS  # its template writes none
    ids = encoder.encode(conversation, [ANSWER], tools)
    assert encoder.encode(by_text, [ANSWER], tools) == ids
    written = encoder.tokenizer.decode(ids)
    assert "city" in written and '\\"city' not in written and str(ARGUMENTS) not in written


def test_where_a_template_writes_both_forms_alike_they_stay_as_given() -> None:
    """Qwen3 writes text as it is: so does TRL, and white space in it is the policy's own."""
    tokenizer = make_tokenizer(template_text("qwen3"))
    function = {"name": "weather", "arguments": '{"city":"Paris"}'}
    messages = [USER, {**CALLING, "tool_calls": [{"type": "function", "function": function}]}, TOOL, ANSWER]
    expected = tokenizer.apply_chat_template(messages, tokenize=False)
    assert isinstance(expected, str) and '{"city":"Paris"}' in expected
    assert TextEncoder(tokenizer, RULES).render(messages[:-1], messages[-1:]) == expected


# --- Named templates -------------------------------------------------------------------------------------------------


def test_named_templates_are_chosen_by_rule_and_both_kept(tmp_path: Path) -> None:
    default, tool_use = template_text("qwen3"), "[with tools]" + template_text("qwen3")
    tokenizer = make_tokenizer(template_text("qwen3"))
    tokenizer.chat_template = {"default": default, "tool_use": tool_use}
    tokenizer.save_pretrained(tmp_path)
    # As training makes it, with the tokenizer's templates as the rule.
    encoder = TextEncoder(tokenizer, EncodingRules(chat_template=tokenizer.chat_template, max_length=8192))
    assert "[with tools]" not in encoder.render([USER], [ANSWER])
    assert encoder.render([USER], [ANSWER], TOOLS).startswith("[with tools]")
    settings = json.loads(json.dumps(encoder.describe()))
    assert (settings["chat_template"], settings["tool_use_template"]) == (default, tool_use)
    assert settings["tool_use_template_sha256"] not in (None, settings["chat_template_sha256"])
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for again in (TextEncoder.from_settings(loaded, settings), TextEncoder(loaded, RULES)):
        for tools in (None, TOOLS):
            assert again.encode([USER], [ANSWER], tools) == encoder.encode([USER], [ANSWER], tools)
    forced = TextEncoder.from_settings(loaded, {**settings, "chat_template": tool_use, "tool_use_template": None})
    assert forced.render([USER], [ANSWER]).startswith("[with tools]")


def test_named_templates_without_a_default_are_named() -> None:
    tokenizer = make_tokenizer(template_text("qwen3"))
    tokenizer.chat_template = {"tool_use": template_text("qwen3"), "rag": template_text("qwen3")}
    with pytest.raises(ModelError, match=r"templates named rag, tool_use, none of them default, .* Fix: --chat_temp"):
        TextEncoder(tokenizer, RULES).encode([USER], [ANSWER])
    tokenizer.chat_template = {"chat": template_text("qwen3")}
    assert TextEncoder(tokenizer, RULES).encode([USER], [ANSWER])


# --- Texts that vanish -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(TRL_TEMPLATES.glob("*.jinja")), ids=lambda path: path.stem)
def test_every_template_of_trl_writes_all_texts(path: Path) -> None:
    """Or the template refuses the conversation itself; none is refused for a text that it writes in its own way."""
    encoder = TextEncoder(make_tokenizer(path.read_text(encoding="utf-8")), RULES)
    thinking = {**ANSWER, "content": "<think>\nSpiders are\n arachnids.\n</think>\n\nEight.\n\n  Always."}
    more: list[Message] = [{"role": "user", "content": " And\nan ant? "}, {"role": "assistant", "content": "Six.\n"}]
    for conversation in ([USER, ANSWER], [USER, thinking], [USER, ANSWER, *more], [USER, thinking, *more]):
        encoder.encode(conversation[:-1], conversation[-1:])
    (found,) = encoder.encode_many([[SYSTEM, USER]], [[ANSWER]])
    assert not isinstance(found, RejectedRow) or found.detail == "TemplateError: System role not supported"


def test_a_role_that_the_template_leaves_out_is_refused_however_short_its_text() -> None:
    encoder = TextEncoder(tokenizer_of("vicuna"), RULES)
    found = refusal(encoder, {"role": "system", "content": "A"}, USER, ANSWER)
    assert (found.reason, found.detail) == ("lost_text", "the chat template leaves out message 0 (system), 'A'")


@pytest.mark.parametrize(
    ("shape", "role"), [("phi3", "developer"), ("zephyr", "developer"), ("qwen3", "developer"), ("zephyr", "tool")]
)
def test_other_roles_that_the_template_leaves_out_are_refused_though_their_text_occurs(shape: str, role: str) -> None:
    encoder = TextEncoder(tokenizer_of(shape), RULES)
    said: Message = {"role": role, "content": "spider", "name": "weather"}
    messages = [said, USER] if role == "developer" else [USER, ANSWER, said]
    assert f"({role}), 'spider'" in refusal(encoder, *messages, ANSWER).detail


WRITE_NO_TOOLS = ["llama2", "llama3", "gemma", "gemma3", "mistral", "phi3", "chatml", "zephyr", "vicuna", "cohere"]
WRITE_NO_TOOLS += ["cohere2", "deepseekv3", "smolvlm", "llava_next"]
WRITE_TOOLS = ["qwen2_5-instruct", "qwen3", "llama3_1", "gptoss", "glm4moe", "gemma4", "lfm2", "nemotron_3_nano"]


@pytest.mark.parametrize("shape", WRITE_NO_TOOLS)
def test_tools_that_the_template_writes_nowhere_are_refused(shape: str) -> None:
    encoder = TextEncoder(tokenizer_of(shape), RULES)
    asked: Message = {"role": "user", "content": "What is the weather?"}
    found = refusal(encoder, asked, ANSWER, tools=TOOLS)
    assert found.reason == "lost_text"
    assert found.detail == (
        "the chat template leaves out the tool 'weather'; "
        "to do without tools, leave them out of the rows (--ignore_columns tools)"
    )
    assert "a tool" in refusal(encoder, asked, ANSWER, tools=[{"type": "retrieval"}]).detail
    assert encoder.encode([asked], [ANSWER], []) == encoder.encode([asked], [ANSWER])


@pytest.mark.parametrize("shape", WRITE_TOOLS)
def test_tools_that_the_template_writes_are_kept(shape: str) -> None:
    encoder = TextEncoder(tokenizer_of(shape), RULES)
    for messages in ([USER, ANSWER], [SYSTEM, USER, ANSWER]):
        assert len(encoder.encode(messages[:-1], messages[-1:], TOOLS)) > len(
            encoder.encode(messages[:-1], messages[-1:])
        )


def test_one_tool_that_the_template_leaves_out_is_refused() -> None:
    template = (
        "{% for t in tools or [] %}{% if t.function %}{{ t.function.name }}{% endif %}{% endfor %}"
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    )
    encoder = TextEncoder(make_tokenizer(template), RULES)
    assert encoder.encode([USER], [ANSWER], TOOLS)
    assert "the tool 'clock'" in refusal(encoder, USER, ANSWER, tools=[*TOOLS, {"name": "clock"}]).detail


def test_a_data_set_can_be_read_without_its_tools(
    tmp_path: Path, make_config: Callable[..., RunConfig], jsonl: Callable[..., str]
) -> None:
    rows = [
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": f"{n}"}], "tools": TOOLS}
        for n in range(4)
    ]
    path, encoder = jsonl(tmp_path / "some.jsonl", rows), TextEncoder(tokenizer_of("llama3"), RULES)
    with pytest.raises(DataError, match=r"leaves out the tool 'weather'; .*\(--ignore_columns tools\)"):
        prepare_data(make_config(path), encoder)
    data = prepare_data(make_config(path, ignore_columns=["tools"]), encoder)
    assert len(data.train) == 4


def test_a_tool_call_and_its_result_that_the_template_leaves_out_are_refused() -> None:
    encoder = TextEncoder(tokenizer_of("phi3"), RULES)
    assert "its call of the tool 'weather'" in refusal(encoder, USER, CALLING, ANSWER).detail
    said = {"role": "tool", "content": "x" * 100}
    assert refusal(encoder, USER, ANSWER, said, ANSWER).detail.endswith(f"message 2 (tool), {'x' * 60 + '...'!r}")


@pytest.mark.parametrize("content", ["", "Let me look."])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
def test_a_tool_call_that_is_left_out_is_refused_though_the_list_of_tools_names_it(
    tools: list[Any] | None, content: str
) -> None:
    encoder = TextEncoder(tokenizer_of("lfm2"), RULES)
    found = refusal(encoder, USER, {**CALLING, "content": content}, tools=tools)
    assert found.detail == "the chat template leaves out message 1 (assistant), its call of the tool 'weather'"
    asked: Message = {"role": "user", "content": 'What is the weather in Par"is in 3 days?'}
    assert "its call of the tool 'weather'" in refusal(encoder, asked, CALLING, TOOL, ANSWER, tools=tools).detail


def test_a_second_call_of_one_tool_that_is_left_out_is_refused() -> None:
    """GPT-OSS writes the first call of a message alone."""
    encoder = TextEncoder(tokenizer_of("gptoss"), RULES)
    assert encoder.encode([USER], [CALLING], TOOLS)
    twice = {**CALLING, "tool_calls": CALLING["tool_calls"] * 2}
    assert "its call of the tool 'weather'" in refusal(encoder, USER, twice, tools=TOOLS).detail


def test_arguments_of_a_call_that_are_left_out_are_refused() -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}"
        "[{{ c.function.name }}]{% endfor %}{% endfor %}"
    )
    encoder = TextEncoder(make_tokenizer(template), RULES)
    found = refusal(encoder, {"role": "user", "content": json.dumps(ARGUMENTS)}, CALLING)
    assert found.detail.endswith("message 1 (assistant), the arguments of its call of the tool 'weather'")
    function = CALLING["tool_calls"][0]["function"]
    empty: list[Any] = [{}, None, "{}", ""]
    for arguments in empty:
        calling = {**CALLING, "tool_calls": [{"type": "function", "function": {**function, "arguments": arguments}}]}
        assert encoder.encode([USER], [calling])


@pytest.mark.parametrize("shape", ["qwen2_5-instruct", "llama3_1", "gptoss", "chatml"])
def test_a_call_in_the_form_of_old_interfaces_is_refused_unless_the_template_writes_it(shape: str) -> None:
    tokenizer = tokenizer_of(shape)
    calling = {"role": "assistant", "content": "Wait.", "function_call": CALLING["tool_calls"][0]["function"]}
    assert "its call of the tool 'weather'" in refusal(TextEncoder(tokenizer, RULES), USER, calling).detail
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.function_call %}"
        "{{ m.function_call | tojson }}{% endif %}{% endfor %}"
    )
    written = TextEncoder(make_tokenizer(template), RULES).render([USER], [calling])
    assert '"name": "weather"' in written


def test_text_beside_a_tool_call_that_the_template_leaves_out_is_refused() -> None:
    """Llama 3.1 writes the call alone."""
    encoder = TextEncoder(tokenizer_of("llama3_1"), RULES)
    calling = {**CALLING, "content": "Let me look."}
    assert "message 1 (assistant), 'Let me look.'" in refusal(encoder, USER, calling, TOOL, ANSWER, tools=TOOLS).detail


def test_a_template_that_writes_no_answers_is_refused_at_the_start() -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(ModelError, match=r"leaves out the text of assistant messages \(a probe came out as"):
        TextEncoder(make_tokenizer(template), RULES).encode([USER], [ANSWER])


def test_what_counts_as_written() -> None:
    def lost(content: str, text: str, role: str = "assistant") -> str | None:
        return find_lost_message([{"role": role, "content": content}], text)

    assert lost("<think>why</think> Yes.", "Yes.") is None
    assert lost("<think>why</think>", "") is None
    assert lost('say "hi"\nnow', '{"result": "say \\"hi\\"\\nnow"}', "tool") is None
    assert lost("a\n\n  b", "a b") is None
    assert lost("Be brief. /no_think", "Be brief.", "system") is None
    assert lost("No.", "Yes.") == "message 0 (assistant), 'No.'"
    assert lost("<think>why</think> No.", "why") is not None


# --- The template's own error ----------------------------------------------------------------------------------------


def test_the_templates_own_error_is_shown_when_rows_are_refused(
    tmp_path: Path,
    make_config: Callable[..., RunConfig],
    jsonl: Callable[..., str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    good = [{"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": f"{n}"}]} for n in range(4)]
    bad = [{**row, "prompt": [SYSTEM, USER]} for row in good[:2]]
    encoder = TextEncoder(tokenizer_of("gemma"), RULES)
    with caplog.at_level(logging.WARNING):
        data = prepare_data(make_config(jsonl(tmp_path / "some.jsonl", good + bad), dataset_format="auto"), encoder)
    shown = "row 4: TemplateError: System role not supported"
    assert f"; {shown}" in caplog.text
    assert data.report.to_dict()["sources"][0]["rejected"]["template_error"]["detail"] == shown[7:]
    with pytest.raises(DataError) as stopped:
        raise_if_too_many(data.report, 0.05, data.rejected.files())
    (file,) = data.rejected.files()
    assert f"\n    {shown}\n  every row: {file}\nFix: " in str(stopped.value)
    assert len(file.read_text().splitlines()) == 2
    with pytest.raises(DataError, match=r"no usable row is left.*\n.*\n    row 0: TemplateError: System role not supp"):
        prepare_data(make_config(jsonl(tmp_path / "none.jsonl", bad)), encoder)
    assert CODE_VERSION > 1, "what an older version cached has no details"

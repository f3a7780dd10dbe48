"""A whole text that a policy wrote has the tokens of its messages: for real templates, with their own tokens."""

from __future__ import annotations

import pytest

from rm_scale.data.encoding import EncodingRules, TextEncoder, unscorable_text
from rm_scale.data.preference_group import Message
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.rendering import TextRenderer
from tests.support.template_shapes import SHAPES, make_tokenizer, template_text, tokenizer_of

USER: Message = {"role": "user", "content": "How many legs has a spider?"}
ANSWER: Message = {"role": "assistant", "content": "A spider has eight legs."}
LATER: list[Message] = [
    {"role": "user", "content": "And an ant?"},
    {"role": "assistant", "content": "Six.\n\nAll of them 🐜."},
]
CONVERSATIONS = {"one turn": [USER, ANSWER], "two turns": [USER, ANSWER, *LATER]}
RULES = EncodingRules(max_length=8192)
# A generation prompt that opens the policy's reasoning: what follows it without reasoning is another answer.
OPENS_REASONING = {"qwen3_5_think", "deepseekv3", "deepseek_r1_distill", "nemotron_3_nano"}
OPENS_A_CHANNEL = {"gptoss"}


def encoder_of(shape: str) -> TextEncoder:
    return TextEncoder(tokenizer_of(shape), RULES)


def of_messages(encoder: TextEncoder, messages: list[Message]) -> list[int]:
    return encoder.encode(messages[:-1], messages[-1:])


def asked(encoder: TextEncoder) -> str:
    """A question with the generation prompt, as a trainer gives it to the policy."""
    return TextRenderer(encoder.tokenizer, None, True).render_messages([USER], None, add_generation_prompt=True)


def refused(encoder: TextEncoder, text: str) -> str:
    found = encoder.encode_rendered(text)
    assert isinstance(found, RejectedRow), encoder.tokenizer.decode(found)
    assert found.reason == "unfinished_text" and " Fix: give the text up to the end" in unscorable_text(found)
    return found.detail


@pytest.mark.parametrize("turns", CONVERSATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_text_stopped_at_the_end_of_turn_has_the_tokens_of_its_messages(shape: str, turns: str) -> None:
    encoder, messages, stop = encoder_of(shape), CONVERSATIONS[turns], SHAPES[shape][3]
    ids = of_messages(encoder, messages)
    whole = encoder.tokenizer.decode(ids)
    said = whole[: whole.rindex(messages[-1]["content"]) + len(messages[-1]["content"])]
    bos, pad, eos = encoder.tokenizer.bos_token, encoder.tokenizer.pad_token, encoder.tokenizer.eos_token
    texts = {
        "as rendered": whole,
        "stopped": said + stop,
        "stopped, and EOS": said + stop + eos,
        "stopped, and padding": said + stop + pad + pad,
        "ended by EOS alone": said + eos,
        "cut": said,
        "without BOS": (said + stop).removeprefix(bos),
    }
    found = {name: encoder.encode_rendered(text) for name, text in texts.items()}
    assert found == dict.fromkeys(texts, ids)


@pytest.mark.parametrize(
    "content", ["A spider has eight legs.", " Eight. \n", "", "<think>\nSpiders.\n</think>\n\nEight."]
)
@pytest.mark.parametrize("shape", sorted(set(SHAPES) - OPENS_REASONING - OPENS_A_CHANNEL))
def test_a_policys_answer_behind_its_prompt_has_the_tokens_of_its_messages(shape: str, content: str) -> None:
    """As OpenRLHF has it: the prompt with its generation prompt, then the policy's tokens up to the end of turn."""
    encoder = encoder_of(shape)
    prompt = asked(encoder)
    if content.startswith(" ") and shape in {"vicuna", "smolvlm", "llava_next"}:
        pytest.skip("the space is the template's own")
    expected = of_messages(encoder, [USER, {**ANSWER, "content": content}])
    assert encoder.encode_rendered(prompt + content + SHAPES[shape][3]) == expected


@pytest.mark.parametrize("shape", sorted(OPENS_REASONING))
def test_a_policys_reasoning_is_read_as_in_messages(shape: str) -> None:
    encoder = encoder_of(shape)
    prompt = asked(encoder)
    expected = of_messages(encoder, [USER, {**ANSWER, "content": "<think>\nSpiders.\n</think>\n\nEight."}])
    assert encoder.encode_rendered(prompt + "Spiders.\n</think>\n\nEight." + SHAPES[shape][3]) == expected


@pytest.mark.parametrize("shape", ["qwen2_5-instruct", "llama3", "gemma", "phi3", "chatml", "cohere", "gemma3"])
def test_a_conversation_that_does_not_end_with_an_answer_is_refused(shape: str) -> None:
    encoder, stop = encoder_of(shape), SHAPES[shape][3]
    tokenizer = encoder.tokenizer
    whole = tokenizer.apply_chat_template([USER, ANSWER, LATER[0]], tokenize=False)
    assert isinstance(whole, str)
    assert "ends before the assistant says anything" in refused(encoder, asked(encoder))
    assert f"goes on after {stop!r}" in refused(encoder, whole)
    assert "no assistant's turn" in refused(encoder, asked(encoder).partition(USER["content"])[0] + "How?")


def test_a_text_that_ends_in_another_token_is_refused() -> None:
    encoder = encoder_of("qwen2_5-base")
    text = encoder.render([USER], [ANSWER]).partition("<|im_end|>\n<|im_start|>assistant")[0]
    text += "<|im_end|>\n<|im_start|>assistant\nEight<|im_start|>"
    assert "ends with '<|im_start|>', which does not end an answer" in refused(encoder, text)


def test_plain_text_still_ends_with_eos() -> None:
    for shape in ("qwen2_5-base", "llama3", "mistral", "chatml"):
        encoder = encoder_of(shape)
        expected = encoder.encode("Why? ", "Because.")
        assert expected[-1] == encoder.tokenizer.eos_token_id
        assert encoder.encode_rendered("Why? Because.") == expected
        assert encoder.encode_rendered("Why? Because." + encoder.tokenizer.eos_token) == expected


def test_a_tokenizer_without_special_tokens_for_its_turns() -> None:
    tokenizer = make_tokenizer(template_text("qwen2_5"), not_tokens={"<|im_start|>", "<|im_end|>"})
    encoder = TextEncoder(tokenizer, RULES)
    text = encoder.render([USER], [ANSWER])
    for stopped in (text, text.removesuffix("\n"), text.removesuffix("<|im_end|>\n")):
        assert encoder.encode_rendered(stopped) == encoder.encode([USER], [ANSWER])


def test_a_template_without_marks_makes_no_text_a_conversation() -> None:
    encoder = TextEncoder(make_tokenizer("{% for m in messages %}{{ m.content }};{% endfor %}"), RULES)
    assert encoder.encode_rendered("a; b; c") == encoder.encode("a; ", "b; c")


def test_a_tokenizer_that_adds_bos_where_the_template_has_none() -> None:
    """No plain text gives the tokens of its messages, but this door reads a conversation as the contract does."""
    encoder = TextEncoder(make_tokenizer(template_text("qwen2_5"), adds_bos=True), RULES)
    ids = encoder.encode([USER], [ANSWER])
    text = encoder.tokenizer.decode(ids)
    assert encoder.encode_rendered(text) == encoder.encode_rendered(text.removesuffix("\n")) == ids


def test_tool_calls_rendered_by_the_contract_stay_as_they_are() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    calling: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
    for shape in ("qwen2_5-instruct", "qwen3", "llama3_1", "deepseekv3"):
        encoder = encoder_of(shape)
        ids = of_messages(encoder, [USER, calling])
        assert encoder.encode_rendered(encoder.tokenizer.decode(ids)) == ids, shape


@pytest.mark.parametrize("shape", ["qwen2_5-instruct", "qwen2_5-base", "gemma", "phi3"])
def test_conversations_that_were_plain_text_in_training_stay_plain_text(shape: str) -> None:
    """Some data holds rendered conversations as text. The sequences of a contract's golden scores show it."""
    encoder, stop = encoder_of(shape), SHAPES[shape][3]
    prompt = asked(encoder).removeprefix(str(encoder.tokenizer.bos_token))
    in_training = encoder.encode(prompt, "Eight." + stop)
    encoder.follow_training([in_training])
    assert encoder.encode_rendered(prompt + "Eight." + stop) == in_training
    text, ids = prompt + ANSWER["content"] + stop, of_messages(encoder, [USER, ANSWER])
    assert encoder.encode_rendered(text) != ids
    for sequences in ([ids], [in_training, ids], [encoder.encode("Why? ", "Because.")], []):
        encoder.follow_training(sequences)
        assert encoder.encode_rendered(text) == ids


@pytest.mark.parametrize("shape", ["qwen2_5-instruct", "llama2", "zephyr", "mistral", "chatml"])
def test_a_whole_text_whose_answer_holds_an_end_of_turn_is_read_as_in_messages(shape: str) -> None:
    encoder, stop = encoder_of(shape), SHAPES[shape][3]
    odd = {"role": "assistant", "content": f"It ends.{stop} Or not?"}

    def written(*messages: dict[str, str]) -> str:
        return str(encoder.tokenizer.apply_chat_template(list(messages), tokenize=False))

    assert encoder.encode_rendered(written(USER, odd)) == of_messages(encoder, [USER, odd])
    assert "unfinished_text" in str(encoder.encode_rendered(written(USER, odd, LATER[0])))


# --- The opening of a turn as text -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["stopped", "cut", "whole"])
@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ("vicuna", "ASSISTANT: x"),
        ("vicuna", "no USER: why? ASSISTANT: so"),
        ("smolvlm", "User: hi\nAssistant: ho"),
        ("smolvlm", "Assistant: ho"),
        ("llama2", "[INST] x [/INST] y"),
        ("llava_next", "[INST] x [/INST] y"),
        ("mistral", "x [/INST] y"),
        ("mistral", "[INST] x [/INST] y"),
    ],
)
@pytest.mark.parametrize("turns", [[USER], [USER, ANSWER, LATER[0]]], ids=["one turn", "two turns"])
def test_an_answer_that_holds_the_opening_of_a_turn(shape: str, said: str, turns: list[Message], form: str) -> None:
    encoder = encoder_of(shape)
    expected = of_messages(encoder, [*turns, {"role": "assistant", "content": said}])
    prompt = TextRenderer(encoder.tokenizer, None, True).render_messages(turns, None, add_generation_prompt=True)
    texts = {"stopped": prompt + said + SHAPES[shape][3], "cut": prompt + said}
    assert encoder.encode_rendered(texts.get(form, encoder.tokenizer.decode(expected))) == expected


@pytest.mark.parametrize("shape", ["llama2", "llava_next"])
def test_a_text_whose_answer_begins_at_one_of_two_places_is_refused_where_that_matters(shape: str) -> None:
    encoder = encoder_of(shape)
    detail = refused(encoder, asked(encoder) + "x [/INST] y" + SHAPES[shape][3])
    assert "[/INST]' twice, and it can't be told where the answer begins" in detail
    # Read from either place it is the same text.
    expected = of_messages(encoder, [USER, {"role": "assistant", "content": "x [/INST] y"}])
    assert encoder.encode_rendered(asked(encoder) + " x [/INST] y" + SHAPES[shape][3]) == expected


@pytest.mark.parametrize("shape", ["vicuna", "smolvlm", "llama2", "mistral", "llava_next"])
def test_a_question_that_holds_the_opening_of_a_turn(shape: str) -> None:
    encoder = encoder_of(shape)
    mark = {"vicuna": "ASSISTANT:", "smolvlm": "Assistant:"}.get(shape, " [/INST]")
    question: Message = {"role": "user", "content": f"What is {mark} for?"}
    prompt = TextRenderer(encoder.tokenizer, None, True).render_messages([question], None, add_generation_prompt=True)
    expected = of_messages(encoder, [question, ANSWER])
    assert encoder.encode_rendered(encoder.tokenizer.decode(expected)) == expected
    found = encoder.encode_rendered(prompt + ANSWER["content"] + SHAPES[shape][3])
    assert found == expected or isinstance(found, RejectedRow)
    assert "unfinished_text" in str(encoder.encode_rendered(prompt))


# --- Two templates ---------------------------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "weather"}}]
_TURNS = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
_ASKING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_TOLD = "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>{% endif %}"
ONE_LINE = _TOLD + "{% for m in messages %}" + _TURNS + "{% endfor %}" + _ASKING
LINES = "{% for m in messages %}" + _TURNS + "\n{% endfor %}" + _ASKING


def with_two(default: str, tool_use: str) -> TextEncoder:
    tokenizer = make_tokenizer(template_text("qwen2_5"), eos="<|endoftext|>")
    tokenizer.chat_template = {"default": default, "tool_use": tool_use}
    return TextEncoder(tokenizer, RULES)


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
def test_of_two_templates_the_one_that_wrote_a_text_ends_it(tools: list[dict[str, str]] | None) -> None:
    for encoder in (with_two(LINES, ONE_LINE), with_two(ONE_LINE, _TOLD + LINES)):
        expected = encoder.encode([USER], [ANSWER], tools)
        whole = encoder.tokenizer.decode(expected)
        said = whole.partition(ANSWER["content"])[0] + ANSWER["content"]
        for text in (whole, said, said + "<|im_end|>"):
            assert encoder.encode_rendered(text) == expected


def test_of_two_templates_that_differ_in_the_end_alone_a_whole_text_keeps_its_own() -> None:
    last = "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    tool_use = _TOLD + "{% for m in messages %}" + _TURNS + last
    tool_use += "{% if add_generation_prompt %}{{ '\n' }}<|im_start|>assistant\n{% endif %}"
    encoder = with_two(LINES, tool_use)
    for tools in (None, TOOLS):
        expected = encoder.encode([USER], [ANSWER], tools)
        assert encoder.encode_rendered(encoder.tokenizer.decode(expected)) == expected
    cut = encoder.render([USER], [ANSWER]).removesuffix("<|im_end|>\n")
    assert "can't be told which of them it is from" in refused(encoder, cut)


def test_of_two_templates_one_may_know_a_text_alone() -> None:
    encoder = with_two(template_text("qwen2_5"), template_text("llama3_1"))
    for tools in (None, TOOLS):
        expected = encoder.encode([USER], [ANSWER], tools)
        assert encoder.encode_rendered(encoder.tokenizer.decode(expected)) == expected

"""Learn from a few short conversations how a chat template writes messages, and how it ends an answer."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from rm_scale.data.message_content import ArgumentForm, with_arguments, with_text_parts
from rm_scale.data.preference_group import Message

_SAID = "probe of another role's text."
_QUESTION = "probe of a question?"
_ANSWER = "probe of an answer."
_SECOND = "probe of another question?"
_OPENING_ROLES = ("system", "developer")
_USER: Message = {"role": "user", "content": _QUESTION}
_ARGUMENTS = {"probed_city": 'Par"is'}
_CALL = {"id": "probe0001", "type": "function", "function": {"name": "probe", "arguments": _ARGUMENTS}}
_CALLING: Message = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_TOOL_NAME = "probed_tool"
_PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "where"}},
    "required": ["city"],
}
_TOOL = {"type": "function", "function": {"name": _TOOL_NAME, "description": "tell", "parameters": _PARAMETERS}}
_FEWEST_CHARACTERS = 3
"""Of what opens an answer: with fewer, such as a semicolon, any text would look like a conversation."""


class Render(Protocol):
    """What a template makes of messages, with or without a generation prompt; `None` if it refuses them."""

    def __call__(self, messages: list[Message], opened: bool, tools: list[Any] | None = None, /) -> str | None:
        """Return the rendering."""


@dataclass(frozen=True)
class AnswerFrame:
    """What a template writes around the last answer of a conversation.

    Attributes:
        before: what stands between a question and `opening`: the end of the user's turn.
        opening: what opens an assistant's turn, as a generation prompt ends; without an opening of reasoning.
        whole_opening: all that the template writes before an answer without reasoning; begins with `opening`.
        ending: all that follows the answer.
        end_of_turn: the token, or the text, at which a policy stops; "" if nothing ends a turn.
        marks: special tokens around turns, but BOS, EOS and padding.
        asking: what opens a user's turn after an answer; "" if that can't be told.
        writes_bos: the template begins with BOS.
    """

    before: str
    opening: str
    whole_opening: str
    ending: str
    end_of_turn: str
    marks: tuple[str, ...]
    asking: str
    writes_bos: bool


@dataclass(frozen=True)
class TemplateFacts:
    """How a chat template is to be used.

    Attributes:
        wants_parts: it leaves out content that is text, and writes a list of text parts (templates of image models).
        arguments: the form in which it writes the arguments of tool calls once and whole.
        lost_roles: roles whose messages it leaves out.
        loses_tools: it writes no tools.
        problem: why it can't be used, or "".
        frame: what it writes around an answer; `None` if that can't be told.
    """

    wants_parts: bool
    arguments: ArgumentForm
    lost_roles: frozenset[str]
    loses_tools: bool
    problem: str
    frame: AnswerFrame | None


def probe_template(render: Render, special: Collection[str], bos: str | None, ends: Collection[str]) -> TemplateFacts:
    """Try a template.

    Args:
        render: the template.
        special: the tokenizer's added tokens.
        bos: its BOS.
        ends: EOS and padding, which may stand behind any text.
    """
    answered = render([_USER, answer(_ANSWER)], False)
    wants_parts, problem = False, ""
    if answered is None or not _has_both(answered):
        by_parts = render(with_text_parts([_USER, answer(_ANSWER)]), False)
        wants_parts = by_parts is not None and _has_both(by_parts)
        if wants_parts:
            render = partial(_by_parts, render)
            answered = by_parts
        elif answered is not None:
            problem = _problem(answered)
    usable = answered is not None and not problem
    arguments = _argument_form(render)
    return TemplateFacts(
        wants_parts=wants_parts,
        arguments=arguments,
        lost_roles=_lost_roles(render, arguments) if usable else frozenset(),
        loses_tools=usable and _loses_tools(render),
        problem=problem,
        frame=_frame(render, answered, special, bos, ends) if answered is not None and usable else None,
    )


def _by_parts(render: Render, messages: list[Message], opened: bool, tools: list[Any] | None = None, /) -> str | None:
    return render(with_text_parts(messages), opened, tools)


def answer(content: str) -> Message:
    """Return an assistant's message."""
    return {"role": "assistant", "content": content}


def question() -> Message:
    """Return the user's message that probes begin with."""
    return dict(_USER)


def after_question(text: str) -> str:
    """Return what follows the probe's question in a rendering."""
    return text.partition(_QUESTION)[2]


def _has_both(text: str) -> bool:
    return _QUESTION in text and _ANSWER in after_question(text)


def _problem(text: str) -> str:
    role = "user" if _QUESTION not in text else "assistant"
    return f"it leaves out the text of {role} messages (a probe came out as {text[:200]!r})"


def _lost_roles(render: Render, form: ArgumentForm) -> frozenset[str]:
    """Return the roles whose text is in no rendering; a role that the template refuses is not lost."""
    result = {"role": "tool", "name": "probe", "tool_call_id": _CALL["id"], "content": _SAID}
    called = with_arguments([_USER, _CALLING, result, answer(_ANSWER)], form)
    conversations = {role: [{"role": role, "content": _SAID}, _USER, answer(_ANSWER)] for role in _OPENING_ROLES}
    return frozenset(
        role
        for role, messages in [*conversations.items(), ("tool", called)]
        if _is_nowhere(_SAID, [render(messages, False), render(messages, False, [_TOOL])])
    )


def _loses_tools(render: Render) -> bool:
    system: Message = {"role": "system", "content": _SAID}
    conversations: list[list[Message]] = [[_USER, answer(_ANSWER)], [system, _USER, answer(_ANSWER)]]
    return _is_nowhere(_TOOL_NAME, [render(messages, False, [_TOOL]) for messages in conversations])


def _is_nowhere(said: str, texts: Sequence[str | None]) -> bool:
    rendered = [text for text in texts if text is not None]
    return bool(rendered) and not any(said in text for text in rendered)


# --- Arguments of tool calls -----------------------------------------------------------------------------------------


def _argument_form(render: Render) -> ArgumentForm:
    """Return the form of arguments that the template writes whole and once; objects where it writes only them so.

    Where it writes both alike, they stay as given, so that the tokens are those of TRL.
    """
    by_object, by_text = (_render_call(render, form) for form in ("object", "text"))
    if by_object == by_text:
        return "as_given"
    if by_object is not None and str(_ARGUMENTS) not in by_object:
        return "object"
    if by_text is not None and json.dumps(json.dumps(_ARGUMENTS))[1:-1] not in by_text:
        return "text"
    return "as_given"


def _render_call(render: Render, form: ArgumentForm) -> str | None:
    text = render(with_arguments([_USER, _CALLING], form), False)
    return text if text is not None and next(iter(_ARGUMENTS)) in text else None


# --- What stands around an answer ------------------------------------------------------------------------------------


def _frame(
    render: Render, answered: str, special: Collection[str], bos: str | None, ends: Collection[str]
) -> AnswerFrame | None:
    between, _, ending = after_question(answered).rpartition(_ANSWER)
    opening = _opening(render, between)
    if len("".join(opening.split())) < _FEWEST_CHARACTERS:
        return None
    marks = tuple(
        token
        for token in special
        if token in answered and token != bos and token not in ends and "think" not in token.lower()
    )
    end_of_turn = _first_token(ending, special) or _end_in_between(render, special)
    place = between.index(opening)
    return AnswerFrame(
        before=between[:place],
        opening=opening,
        whole_opening=between[place:],
        ending=ending,
        end_of_turn=end_of_turn,
        marks=marks,
        asking=_asking(render, end_of_turn),
        writes_bos=bool(bos) and answered.startswith(bos or ""),
    )


def _asking(render: Render, end_of_turn: str) -> str:
    """Return what opens a user's turn after an answer, without the end of the answer's turn."""
    again: Message = {"role": "user", "content": _ANSWER}
    text = render([_USER, {"role": "assistant", "content": _QUESTION}, again], False) or ""
    between = after_question(after_question(text)).partition(_ANSWER)[0]
    return (between.partition(end_of_turn)[2] if end_of_turn else between).strip()


def _opening(render: Render, between: str) -> str:
    """Return what opens an answer: the start that a generation prompt and a written answer have in common."""
    asked, opened = render([_USER], False), render([_USER], True)
    common = between
    if opened is not None:
        common = _common_start(between, after_question(opened))
        closed = after_question(asked or "")
        if asked is not None and len(closed) < len(common):
            common = common.removeprefix(closed)
    # A policy's own reasoning begins there too, and is part of what it says.
    for start in ("<think>", "<thinking>", "[THINK]", "<|START_THINKING|>"):
        common = common.partition(start)[0]
    return common


def _common_start(first: str, second: str) -> str:
    length = next((place for place, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), None)
    return first[: min(len(first), len(second)) if length is None else length]


def _first_token(text: str, special: Collection[str]) -> str:
    """Return the special token that a text begins with, white space apart, or else what stands before the next one."""
    word = next(iter(text.split()), "")
    starts = sorted((word.find(token), -len(token), token) for token in special if token and token in word)
    if not starts:
        return word
    place, _, token = starts[0]
    return token if place == 0 else word[:place]


def _end_in_between(render: Render, special: Collection[str]) -> str:
    """Return the special token that follows an answer only when a question does, as in GLM-4's template."""
    text = render([_USER, answer(_ANSWER), {"role": "user", "content": _SECOND}], False)
    token = _first_token((text or "").partition(_ANSWER)[2].partition(_SECOND)[0], special)
    return token if token in special else ""

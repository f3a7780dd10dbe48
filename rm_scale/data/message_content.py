"""Give a chat template messages in the form it can write, and find out which message's text it left out."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

from rm_scale.data.preference_group import Message
from rm_scale.data.rejected_rows import RejectedRow

ArgumentForm = Literal["as_given", "object", "text"]

# What ends the reasoning that a message may hold. Many templates leave the reasoning of earlier turns out on purpose.
_REASONING_ENDS = ("</think>", "</thinking>", "[/THINK]", "<channel|>", "<|END_THINKING|>", "</seed:think>")
# Orders to the template, which takes them out of the text (SmolLM3, Nemotron).
_SWITCHES = re.compile(r"/no_think|/think|/system_override")
_SHOWN_CHARACTERS = 60


# --- Content ---------------------------------------------------------------------------------------------------------


def content_text(content: Any, where: str) -> str | None:
    """Return a message's content as text: itself, or the text of its parts, joined without anything between.

    Args:
        content: text, `None`, or a list of parts: texts, or objects with `text` and, if any, `type` "text".
        where: what is named when it is none of these.

    Raises:
        RejectedRow: `wrong_type`, e.g. for an image.
    """
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RejectedRow("wrong_type", f"{where} has content that is neither text nor a list of text parts")
    return "".join(_part_text(part, where) for part in content)


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if isinstance(part, Mapping) and kind in (None, "text") and isinstance(part.get("text"), str):
        return str(part["text"])
    raise RejectedRow("wrong_type", f"{where} has a content part of type {kind!r}: only text parts can be scored")


def with_plain_content(messages: Sequence[Message]) -> list[Message]:
    """Return messages whose content is text.

    Raises:
        RejectedRow: `wrong_type`.
    """
    plain = []
    for number, message in enumerate(messages):
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            message = {**message, "content": content_text(content, f"message {number} ({message.get('role')})")}
        plain.append(message)
    return plain


def with_text_parts(messages: Sequence[Message]) -> list[Message]:
    """Return messages whose text is a list of one text part, for templates that read only such lists."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


# --- Arguments of tool calls -----------------------------------------------------------------------------------------


def with_arguments(messages: Sequence[Message], form: ArgumentForm) -> list[Message]:
    """Return messages whose tool calls have their arguments as objects, or as JSON text; or as they were given."""
    if form == "as_given":
        return list(messages)
    return [
        {**message, "tool_calls": [_with_form(call, form) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), list)
        else message
        for message in messages
    ]


def _with_form(call: Any, form: ArgumentForm) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_form(call["function"], form)}
    if "arguments" not in call:
        return call
    arguments = call["arguments"]
    return {**call, "arguments": _as_object(arguments) if form == "object" else _as_text(arguments)}


def _as_object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _as_text(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, Mapping) else arguments


# --- What a rendering left out ---------------------------------------------------------------------------------------


def find_lost_message(
    messages: Sequence[Message], text: str, lost_roles: Collection[str] = (), marked: str | None = None
) -> str | None:
    """Return which message's text or tool call is not in its rendering, or `None` if all are.

    Left out on purpose, and so not counted: reasoning before `</think>` and the like, white space, case, orders such as
    `/no_think`. Text that the template writes as JSON counts as written.

    Args:
        messages: with text as content.
        text: what the template made of them.
        lost_roles: roles whose messages it never writes, so that a short text which occurs by chance deceives nobody.
        marked: what it made of `with_marked_calls(messages)`, since a called name stands among the tools too; `None`
            if it refuses those.
    """
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        content = content.strip() if isinstance(content, str) else ""
        if content and (role in lost_roles or not is_written(content, text)):
            shown = content if len(content) <= _SHOWN_CHARACTERS else content[:_SHOWN_CHARACTERS] + "..."
            return f"message {number} ({role}), {shown!r}"
        for place, function in enumerate(_called(message)):
            lost = _lost_of_call(function, _mark(number, place), text, marked)
            if lost:
                return f"message {number} ({role}), {lost}"
    return None


def find_lost_tool(tools: Sequence[Any], text: str, loses_tools: bool) -> str | None:
    """Return which tool is not in a rendering, or `None` if all are.

    Args:
        tools: tool descriptions.
        text: what the template made of a conversation with them.
        loses_tools: the template never writes any.
    """
    for tool in tools:
        function = _function_of(tool)
        if loses_tools or (function is not None and not is_written(function["name"], text)):
            return "a tool" if function is None else f"the tool {function['name']!r}"
    return None


def _lost_of_call(function: Mapping[str, Any], mark: str, text: str, marked: str | None) -> str | None:
    call = f"its call of the tool {function['name']!r}"
    if marked is None:
        return None if function["name"] in text else call
    if mark not in marked:
        return call
    has_arguments = function.get("arguments") != _marked(function, mark).get("arguments")
    return f"the arguments of {call}" if has_arguments and _argument_mark(mark) not in marked else None


def is_written(content: str, text: str) -> bool:
    """Tell whether a message's content is in a rendering, but for what templates leave out on purpose."""
    content = content.strip()
    if content in text:
        return True
    ends = [content.rfind(end) + len(end) for end in _REASONING_ENDS if end in content]
    answer = content[max(ends, default=0) :].strip()
    if answer in text or any(json.dumps(answer, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True)):
        return True
    return _words(answer) in _words(text)


def has_reasoning(content: str) -> bool:
    """Tell whether a message holds reasoning that has ended, which a template may leave out."""
    return any(end in content for end in _REASONING_ENDS)


def _words(text: str) -> str:
    return " ".join(_SWITCHES.sub(" ", text).casefold().split())


def has_calls(messages: Sequence[Message]) -> bool:
    """Tell whether a message calls a tool."""
    return any(_called(message) for message in messages)


def with_marked_calls(messages: Sequence[Message]) -> list[Message]:
    """Return messages whose calls have names and arguments that occur nowhere else in a conversation."""
    return [_with_marks(message, number) for number, message in enumerate(messages)]


def _with_marks(message: Message, number: int) -> Message:
    marks = (_mark(number, place) for place in itertools.count())
    changed = dict(message)
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        changed["tool_calls"] = [_with_mark(call, marks) for call in calls]
    if _is_function(message.get("function_call")):
        changed["function_call"] = _marked(message["function_call"], next(marks))
    return changed


def _with_mark(call: Any, marks: Iterator[str]) -> Any:
    function = _function_of(call)
    if function is None:
        return call
    marked = _marked(function, next(marks))
    return {**call, "function": marked} if "function" in call else marked


def _marked(function: Mapping[str, Any], mark: str) -> dict[str, Any]:
    """Return a call of a name, and with arguments if it has some, that are marks; in the form that they had."""
    arguments: Any = {"marked": _argument_mark(mark)}
    given = function.get("arguments")
    if isinstance(given, str) and given.strip() not in {"", "{}", "null"}:
        return {**function, "name": mark, "arguments": json.dumps(arguments)}
    return {**function, "name": mark, **({"arguments": arguments} if given and isinstance(given, Mapping) else {})}


def _mark(number: int, place: int) -> str:
    return f"mark_of_call_{place}_in_message_{number}_"


def _argument_mark(mark: str) -> str:
    return "argument" + mark.removeprefix("mark")


def _called(message: Message) -> list[Mapping[str, Any]]:
    """Return name and arguments of a message's calls, those of older interfaces' `function_call` last."""
    calls = message.get("tool_calls")
    functions = [_function_of(call) for call in calls] if isinstance(calls, list) else []
    older = message.get("function_call")
    return [function for function in [*functions, older] if function is not None and _is_function(function)]


def _function_of(call: Any) -> Mapping[str, Any] | None:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    return function if _is_function(function) else None


def _is_function(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("name"), str)

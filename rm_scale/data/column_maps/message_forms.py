"""Bring messages of other names and shapes to `role` and `content`: other keys, texts, Anthropic's content blocks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rm_scale.data.conversations import as_messages, as_text, json_messages
from rm_scale.data.preference_group import Message, Text
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.row_values import kind_name, refuse_empty_prompt, without_none

# What a message may hold beside role and content; the rest (ids, languages, ratings) is no part of it.
_OTHER_KEYS = frozenset(
    ["tool_calls", "tool_call_id", "name", "function_call", "reasoning_content", "reasoning", "thinking"]
)


def named_messages(value: Any, naming: Mapping[str, Any], said_by: str) -> Any:
    """Return messages under the names `role` and `content`; a text stays one.

    Args:
        value: a text, a message, a list of messages, or, of Anthropic's form, a list of content blocks.
        naming: `messages` of a map.
        said_by: the role of content blocks without a message around them.

    Raises:
        RejectedRow: a message has a role that the map does not name, or blocks of no known kind.
    """
    if isinstance(value, str):
        messages = json_messages(value, "messages")
        if messages is None:
            return value
        value = messages
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        return value
    if naming.get("blocks") == "anthropic":
        return _from_blocks(value, said_by)
    return [_renamed(message, naming) for message in value]


def _renamed(message: Any, naming: Mapping[str, Any]) -> Any:
    role_key, content_key = naming.get("role", "role"), naming.get("content", "content")
    if not isinstance(message, Mapping) or role_key not in message:
        return message
    roles = naming.get("roles", {})
    role = message[role_key]
    renamed = {key: part for key, part in message.items() if key in _OTHER_KEYS}
    renamed["role"] = roles.get(role, role) if isinstance(role, str) else role
    if content_key in message:
        renamed["content"] = message[content_key]
    return renamed


def in_conversation(prompt: Any, responses: list[Any], system: Any) -> tuple[Any, list[Any]]:
    """Return a prompt and its responses as messages, texts being turns of the user and of the assistant.

    Args:
        prompt: text or messages; `None` where the responses are whole conversations.
        responses: texts or messages.
        system: text of a system message before it all; "" or `None` for none.
    """
    asked = None if prompt is None else _asked_messages(as_text(prompt, "prompt"))
    answers = [None if part is None else as_messages(_with_json(part), "response") for part in responses]
    if isinstance(system, list):
        system = "".join(str(part.get("text", "")) for part in system if isinstance(part, Mapping))
    if system is None or system == "":
        return asked, answers
    if not isinstance(system, str):
        raise RejectedRow("wrong_type", f"system is {kind_name(system)}, not text")
    before: list[Message] = [{"role": "system", "content": system}]
    if asked is not None:
        return before + asked, answers
    return None, [None if part is None else before + part for part in answers]


def _asked_messages(prompt: Text) -> list[Message]:
    if not isinstance(prompt, str):
        return prompt
    refuse_empty_prompt(prompt)
    return [{"role": "user", "content": prompt}]


def _with_json(value: Any) -> Any:
    return (json_messages(value, "response") or value) if isinstance(value, str) else value


# --- Anthropic -------------------------------------------------------------------------------------------------------


def tools_from_anthropic(value: Any) -> Any:
    """Return tool descriptions with `input_schema` in the form that chat templates take."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return value
    if not isinstance(value, list):
        return value
    return [_tool(part) for part in value]


def _tool(tool: Any) -> Any:
    if not isinstance(tool, Mapping) or "input_schema" not in tool:
        return tool
    function = {"name": tool.get("name"), "description": tool.get("description"), "parameters": tool["input_schema"]}
    return {"type": "function", "function": without_none(function)}


def _from_blocks(value: list[Any], said_by: str) -> list[Message]:
    if value and all(isinstance(part, Mapping) and "role" not in part and "type" in part for part in value):
        value = [{"role": said_by, "content": value}]
    found: list[Message] = []
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
            found.append(message)
        elif message.get("role") == "assistant":
            found.append(_answer(message))
        else:
            found += _asked(message)
    return found


def _answer(message: Mapping[str, Any]) -> Message:
    """Return an assistant's message: its texts, its thinking, and the tools that it calls."""
    texts, thoughts, calls = [], [], []
    for block in message["content"]:
        match _kind(block):
            case "text":
                texts.append(_text_of(block))
            case "thinking":
                thoughts.append(str(block.get("thinking", "")))
            case "tool_use":
                function = {"name": block.get("name"), "arguments": without_none(block.get("input")) or {}}
                calls.append({"id": block.get("id"), "type": "function", "function": function})
            case kind:
                raise RejectedRow("wrong_type", f"an assistant's message has a content block of type {kind!r}")
    answer: Message = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        answer["reasoning_content"] = "\n".join(thoughts)
    return {**answer, "tool_calls": calls} if calls else answer


def _asked(message: Mapping[str, Any]) -> list[Message]:
    """Return a user's message: what tools gave back, each a message of its own, and then the user's words."""
    results: list[Message] = []
    texts = []
    for block in message["content"]:
        match _kind(block):
            case "text":
                texts.append(_text_of(block))
            case "tool_result":
                results.append(
                    {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": _result_text(block)}
                )
            case kind:
                raise RejectedRow("wrong_type", f"a user's message has a content block of type {kind!r}")
    said = [{"role": message.get("role"), "content": "".join(texts)}] if texts or not results else []
    return results + said


def _result_text(block: Mapping[str, Any]) -> str:
    content = block.get("content")
    if isinstance(content, list):
        if any(_kind(part) != "text" for part in content):
            raise RejectedRow("wrong_type", "a tool's result holds more than text")
        return "".join(_text_of(part) for part in content)
    return "" if content is None else str(content)


def _text_of(block: Mapping[str, Any]) -> str:
    if not isinstance(block.get("text"), str):
        raise RejectedRow("wrong_type", f"a text block holds {kind_name(block.get('text'))}, not text")
    return str(block["text"])


def _kind(block: Any) -> Any:
    return block.get("type") if isinstance(block, Mapping) else type(block).__name__

"""Read and check conversations: messages and tools, and where the prompt ends. Training and scoring both read here.

What comes from a table is brought to one form, whatever the kind of file: nulls that Arrow adds to objects are dropped,
JSON text becomes messages and tools, and ShareGPT's `from` and `value` become `role` and `content`. Every function that
reads or checks raises `RejectedRow`, with the reason, for values that can't be used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rm_scale.data.message_content import content_text
from rm_scale.data.preference_group import Message, Text
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.row_values import (
    Row,
    check_unicode,
    check_unicode_inside,
    kind_name,
    refuse_empty_prompt,
    without_none,
)

# The names that ShareGPT files give to roles.
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_JSON_OBJECTS = re.compile(r"\s*(?:\[\s*\{|\{\s*\"(?:role|from|content|value)\")")
_LIKE_MESSAGES = re.compile(r"""\s*(?:\[\s*)?\{\s*["'](?:role|from|content|value)["']\s*:""")


# --- Tools -----------------------------------------------------------------------------------------------------------


def read_tools(row: Row) -> list[Any] | None:
    """Return the row's tool descriptions as `as_tools` does."""
    return as_tools(row.get("tools"))


def as_tools(value: Any) -> list[Any] | None:
    """Return tool descriptions, given as a list, as its JSON text, or as a list of JSON texts; `None` for none."""
    if isinstance(value, str):
        value = _json_value(value, "tools") if value.strip() else None
    if value is not None and not isinstance(value, list):
        raise RejectedRow("wrong_type", f"tools is {kind_name(value)}, not a list")
    tools = [_tool(part, f"tools[{number}]") for number, part in enumerate(value or []) if part is not None]
    check_unicode_inside(tools, "tools")
    # None for an empty list, which would make some templates (Llama) write their introduction to tools.
    return without_none(tools) or None


def _tool(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    tool = _json_value(value, where)
    if not isinstance(tool, Mapping):
        raise RejectedRow("wrong_type", f"{where} is {kind_name(tool)}, not an object")
    return tool


def _json_value(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RejectedRow("wrong_type", f"{where} is text that isn't JSON: {error}") from None


# --- Messages --------------------------------------------------------------------------------------------------------


def json_messages(text: str, where: str) -> list[Any] | None:
    """Return the messages that a text holds as JSON, a list of them or a single one; `None` for any other text.

    Raises:
        RejectedRow: it begins like messages and can't be read as such, e.g. since it is Python's form of them.
    """
    first = text[:1]
    if first not in "[{" and not first.isspace():
        return None  # as most texts are, at a fraction of the time
    if not _JSON_OBJECTS.match(text) and not _LIKE_MESSAGES.match(text):
        return None
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not _LIKE_MESSAGES.match(text):
            return None
        raise RejectedRow(
            "wrong_type", f"{where} begins like a list of messages, but isn't JSON ({error}); write it with json.dumps"
        ) from None
    parts = parsed if isinstance(parsed, list) else [parsed]
    found = [_is_message(part) for part in parts]
    if not any(found):
        return None
    if not all(found):
        raise RejectedRow("bad_conversation", f"{where} is JSON text, and its element {found.index(False)} no message")
    return parts


def _is_message(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    own = isinstance(value.get("role"), str) and ("content" in value or "tool_calls" in value)
    return own or (isinstance(value.get("from"), str) and "value" in value)


def as_text(value: Any, column: str, json_text: bool = True) -> Text:
    """Return a text, or messages.

    Args:
        value: a text, a message or a list of them.
        column: what it is, for messages.
        json_text: a text that is the JSON of messages is a conversation, as in the cells of a table.
    """
    if isinstance(value, str):
        messages = json_messages(value, column) if json_text else None
        if messages is None:
            check_unicode(value, column)
            return value
        value = messages
    if not isinstance(value, list | Mapping):
        raise RejectedRow("wrong_type", f"{column} is {kind_name(value)}, neither text nor a list of messages")
    return as_messages(value, column)


def read_messages(row: Row, column: str) -> list[Message]:
    """Return the messages of a column."""
    value = row.get(column)
    if value is None:
        raise RejectedRow("missing_key", column)
    return as_messages(value, column)


def as_messages(value: Any, column: str) -> list[Message]:
    """Return a value as messages: a list of them, a single one, or a text, which is the assistant's turn."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise RejectedRow("wrong_type", f"{column} is {kind_name(value)}, not a list of messages")
    if not value:
        raise RejectedRow("empty", f"{column} has no messages")
    return [_message(part, f"{column}[{number}]") for number, part in enumerate(value)]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise RejectedRow("wrong_type", f"{where} is {kind_name(value)}, not a message")
    message: Message = _with_role(without_none(value))
    if not isinstance(message.get("role"), str):
        raise RejectedRow("bad_conversation", f"{where} has no role")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise RejectedRow("bad_conversation", f"{where} has neither content nor tool calls")
    content_text(content, where)
    check_unicode_inside(message, where)
    return message


def _with_role(message: Message) -> Message:
    """Return a message with `role` and `content`, which ShareGPT files call `from` and `value`."""
    role = _SHAREGPT_ROLES.get(message["from"]) if isinstance(message.get("from"), str) else None
    if "role" in message or "value" not in message or role is None:
        return message
    others = {key: part for key, part in message.items() if key not in {"from", "value"}}
    return {"role": role, "content": message["value"], **others}


def message_text(message: Message) -> str:
    """Return the text of a message, whether its content is text or a list of text parts."""
    return content_text(message.get("content"), str(message.get("role"))) or ""


def split_shared_messages(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], tuple[list[Message], list[Message]]]:
    """Split two whole conversations into prompt and responses: the prompt is the messages that both begin with.

    Each response keeps at least one message.
    """
    if chosen == rejected:
        raise RejectedRow("identical_responses")
    count = 0
    while count < min(len(chosen), len(rejected)) - 1 and chosen[count] == rejected[count]:
        count += 1
    if not any(message["role"] == "user" for message in chosen[:count]):
        raise RejectedRow("prompt_mismatch", f"the conversations share {count} messages and no user turn")
    return chosen[:count], (chosen[count:], rejected[count:])


def without_prompt(prompt: list[Message], messages: list[Message]) -> list[Message]:
    """Drop the prompt from a response that repeats it, as in some files.

    A response that merely continues the prompt can't begin with the same messages, since roles alternate.
    """
    repeated = len(messages) > len(prompt) and messages[: len(prompt)] == prompt
    return messages[len(prompt) :] if repeated else messages


def join_text_prompt(prompt: str, responses: list[list[Message]]) -> tuple[list[Message], list[list[Message]]]:
    """Turn a text prompt beside responses that are messages into messages.

    If all responses begin with the assistant, the text is the user's turn before them. Otherwise (as in UltraFeedback)
    it repeats a user's turn that the responses hold, and the prompt is the messages that all of them begin with.

    Returns:
        The prompt, and the responses without it.
    """
    refuse_empty_prompt(prompt)
    check_unicode(prompt, "prompt")
    if all(messages[0]["role"] == "assistant" for messages in responses):
        return [{"role": "user", "content": prompt}], responses
    first, *others = responses
    count = 0
    while len(first) - 1 > count and all(
        len(messages) - 1 > count and messages[count] == first[count] for messages in others
    ):
        count += 1
    shared = first[:count]
    if not any(message["role"] == "user" and message_text(message) == prompt for message in shared):
        raise RejectedRow("prompt_mismatch", "the shared messages don't hold the text of the prompt column")
    return shared, [messages[count:] for messages in responses]


# --- One completion ---------------------------------------------------------------------------------------------------


def read_completion(
    prompt: Any, completion: Any, tools: Any = None, json_text: bool = False
) -> tuple[Text, Text, list[Any] | None]:
    """Return prompt, completion and tools to score, in the form that training has them in.

    Args:
        prompt: text or messages; "", [] or `None` for none.
        completion: what follows it. Messages may repeat the prompt's.
        tools: tool descriptions, or their JSON text.
        json_text: a completion that is the JSON of messages is a conversation, as in the cells of a table. Elsewhere
            it is only beside a prompt of that kind: a policy that writes such JSON must not be read as having said
            something else.

    Raises:
        RejectedRow: they can't be used; also `bad_conversation` for one that doesn't end with the assistant's turn.
    """
    if prompt is None or prompt == []:
        prompt = ""
    asked = as_text(prompt, "prompt")
    said = as_text(completion, "completion", json_text or (isinstance(prompt, str) and not isinstance(asked, str)))
    descriptions = as_tools(tools)
    if descriptions and isinstance(asked, str) and isinstance(said, str):
        raise tools_beside_text()
    return (*join_completion(asked, said), descriptions)


def tools_beside_text() -> RejectedRow:
    """Return the refusal of tools where no chat template is called that could write them, as in training."""
    return RejectedRow(
        "unread_context",
        "tools need messages, which a chat template renders. Fix: give prompt or completion as such, or leave tools "
        "out (in files --ignore_columns tools)",
    )


def join_completion(prompt: Text, completion: Text) -> tuple[Text, Text]:
    """Return prompt and completion as two texts, or as a conversation that is checked as in training.

    Raises:
        RejectedRow: `bad_conversation`, `prompt_mismatch` or `empty`.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, completion
    if isinstance(completion, str):
        check_answered([*prompt, {"role": "assistant", "content": completion}])
        return prompt, completion
    if isinstance(prompt, str):
        if not prompt:
            # An answer may be scored by itself; what comes before it is then not there to be checked.
            alone = bool(completion) and completion[0]["role"] == "assistant"
            check_answered([{"role": "user"}, *completion] if alone else completion)
            return [], completion
        prompt, (completion,) = join_text_prompt(prompt, [completion])
    completion = without_prompt(prompt, completion)
    check_answered([*prompt, *completion])
    return prompt, completion


def check_answered(messages: Sequence[Message]) -> None:
    """Check that roles alternate, and that the assistant has the last turn: only then is there an answer to score.

    Raises:
        RejectedRow: `bad_conversation`, saying which message breaks the rule.
    """
    check_conversation(messages)
    last = messages[-1]["role"]
    if last != "assistant":
        raise RejectedRow("bad_conversation", f"the conversation ends with {last}, not assistant")


# --- Order of roles ---------------------------------------------------------------------------------------------------


def check_conversation(messages: Sequence[Message]) -> None:
    """Check that roles alternate: [system] user assistant [tool ... assistant] user assistant ...

    Raises:
        RejectedRow: `bad_conversation`, saying which message breaks the rule.
    """
    allowed = {"system", "developer", "user"}
    before = "the start"
    for number, message in enumerate(messages):
        role = message["role"]
        if role not in allowed:
            wanted = " or ".join(sorted(allowed))
            raise RejectedRow("bad_conversation", f"message {number} is {role} after {before}: expected {wanted}")
        before = role
        allowed = _roles_after(message)


def _roles_after(message: Message) -> set[str]:
    """Return the roles that the next message may have."""
    match message["role"]:
        case "system" | "developer":
            return {"user"}
        case "user":
            return {"assistant"}
        case "tool":
            return {"tool", "assistant"}
        case _:
            return {"tool"} if message.get("tool_calls") else {"user"}

"""Render prompt and response as the one text that the tokenizer reads: plain text with EOS, or the chat template's.

Everything that trains or scores comes through here, so messages are brought into the template's form in this one place:
content in text parts is joined, arguments of tool calls are not encoded twice, and no message may be left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from rm_scale.data.message_content import (
    find_lost_message,
    find_lost_tool,
    has_calls,
    is_written,
    with_arguments,
    with_marked_calls,
    with_plain_content,
    with_text_parts,
)
from rm_scale.data.preference_group import Message, Text
from rm_scale.data.raw_texts import choose_reading, complete_conversation, ends_question
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.template_limits import limit_chat_templates
from rm_scale.data.template_probe import AnswerFrame, TemplateFacts, after_question, answer, probe_template, question
from rm_scale.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NamedTemplates = str | Mapping[str, str] | None
"""As tokenizers have them: one template, several by name, or none."""


@dataclass(frozen=True)
class TextRenderer:
    """Turns prompt and response into one text.

    Attributes:
        tokenizer: has the special tokens and, usually, a chat template.
        chat_template_override: Jinja text used instead of the tokenizer's chat template, if not `None`.
        append_eos: end plain text with EOS unless it already does (in conversations that is the template's job).
        tool_use_override: Jinja text for conversations with tools, beside `chat_template_override`.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template_override: NamedTemplates
    append_eos: bool
    tool_use_override: str | None = None
    _eos: Any = field(default=None, init=False, repr=False, compare=False)
    _known: dict[str, TemplateFacts] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Asked for in every text, where the tokenizer takes its time to look it up.
        object.__setattr__(self, "_eos", self.tokenizer.eos_token)

    @property
    def chat_template(self) -> str | None:
        """The template in force, or `None` when there is none; of several by name the one named default."""
        named = self.chat_template_override or self.tokenizer.chat_template
        if isinstance(named, Mapping):
            return next(iter(named.values())) if len(named) == 1 else named.get("default")
        return named

    @property
    def tool_use_template(self) -> str | None:
        """The template for conversations with tools, where the tokenizer has one named tool_use."""
        named = self.chat_template_override or self.tokenizer.chat_template
        if isinstance(named, Mapping):
            return named.get("tool_use") if len(named) > 1 else None
        return self.tool_use_override if self.chat_template_override is not None else None

    def render(self, prompt: Text, response: Text, tools: list[Any] | None) -> tuple[str, bool]:
        """Return the whole text, and whether the chat template wrote it.

        Args:
            prompt: text, or messages. A text before messages is the user's turn.
            response: text, or messages. A text after messages is the assistant's turn.
            tools: tool descriptions for the chat template.

        Raises:
            RejectedRow: `template_error`, `wrong_type` for content that is not text, or `lost_text` where the template
                left out a message's text, a tool call or a tool.
            ModelError: a conversation, but there is no chat template, or one that writes no text.
        """
        if isinstance(prompt, str) and isinstance(response, str):
            return self._with_eos(prompt + response), False
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}] if prompt else []
        if isinstance(response, str):
            response = [{"role": "assistant", "content": response}]
        messages = with_plain_content(prompt + response)
        text = self.render_messages(messages, tools)
        self._refuse_losses(messages, tools, text)
        return text, True

    def _refuse_losses(self, messages: list[Message], tools: list[Any] | None, text: str) -> None:
        facts = self._facts(self._template_for(tools))
        marked = self._render_marked(messages, tools) if has_calls(messages) else None
        lost = find_lost_message(messages, text, facts.lost_roles, marked)
        if lost is None and tools:
            lost = find_lost_tool(tools, text, facts.loses_tools)
            lost = lost and f"{lost}; to do without tools, leave them out of the rows (--ignore_columns tools)"
        if lost is not None:
            raise RejectedRow("lost_text", f"the chat template leaves out {lost}")

    def _render_marked(self, messages: list[Message], tools: list[Any] | None) -> str | None:
        try:
            return self.render_messages(with_marked_calls(messages), tools)
        except RejectedRow:
            return None

    def are_plain(self, texts: Sequence[str]) -> bool:
        """Tell whether texts hold the chat template's marks though none of them ends as the template ends them."""
        template = self.chat_template
        frame = None if template is None else self._facts(template).frame
        if frame is None or not frame.ending.strip():
            return False
        return any(frame.opening in text for text in texts) and not any(text.endswith(frame.ending) for text in texts)

    def are_conversations(self, texts: Sequence[str]) -> bool:
        """Tell whether the chat template wrote any of these texts; else they are plain, whatever marks they hold."""
        template = self.chat_template
        if template is None or self.are_plain(texts):
            return False
        frame = self._facts(template).frame
        if frame is None:  # its marks can't be told; what is left is that plain text ends with EOS
            return any(text != self._with_eos(text) for text in texts)
        # Without a generation prompt the opening may be EOS, which ends plain text too.
        return any(frame.opening in text.removesuffix(frame.ending) for text in texts)

    def complete(self, text: str, reads_conversations: bool = True) -> tuple[str, bool]:
        """Return a whole text that someone else rendered as `render` would give it, and whether it is a conversation.

        Args:
            text: prompt and response.
            reads_conversations: one in the chat template's form is a conversation; else every text is plain text.

        Raises:
            RejectedRow: `unfinished_text`: a conversation in the chat template's form that doesn't end with an answer.
        """
        frames = self._frames() if reads_conversations else {}
        fitting = {template: frame for template, frame in frames.items() if frame.opening in text}
        if fitting:
            return self._complete_by(fitting, text), True
        marks = sorted({mark for frame in frames.values() for mark in frame.marks})
        seen = next((mark for mark in marks if mark in text), None)
        if seen is not None:
            raise RejectedRow(
                "unfinished_text", f"the text holds {seen!r} of the chat template, but no assistant's turn"
            )
        return self._with_eos(text), False

    def _frames(self) -> dict[str, AnswerFrame]:
        """Return what each template in force writes around an answer, where that can be told."""
        templates = [template for template in (self.chat_template, self.tool_use_template) if template is not None]
        frames = {template: self._facts(template).frame for template in templates}
        return {template: frame for template, frame in frames.items() if frame is not None}

    def _complete_by(self, frames: Mapping[str, AnswerFrame], text: str) -> str:
        """Complete a conversation by the one of these templates that wrote it.

        Raises:
            RejectedRow: `unfinished_text`.
        """
        closer = {template: frame for template, frame in frames.items() if ends_question(text, frame)}
        bos = self.tokenizer.bos_token if isinstance(self.tokenizer.bos_token, str) else None
        readings: list[tuple[AnswerFrame, str | RejectedRow]] = []
        for template, frame in (closer or frames).items():
            write = partial(self._write_answer, template, frame.opening)
            try:
                found = complete_conversation(text, frame, write, bos, self._special_tokens(), self._ends())
                readings.append((frame, found))
            except RejectedRow as rejected:
                readings.append((frame, rejected))
        return choose_reading(text, readings)

    def _with_eos(self, text: str) -> str:
        eos = self._eos
        if self.append_eos and isinstance(eos, str) and not text.endswith(eos):
            return text + eos
        return text

    def render_messages(
        self, messages: list[Message], tools: list[Any] | None, add_generation_prompt: bool = False
    ) -> str:
        """Return what the chat template writes for a conversation.

        Args:
            messages: the conversation.
            tools: tool descriptions.
            add_generation_prompt: end with the opening of an assistant's turn.

        Raises:
            RejectedRow: `template_error`, or `wrong_type` for content that is not text.
            ModelError: there is no chat template, or it writes no text.
        """
        template = self._template_for(tools)
        facts = self._facts(template)
        if facts.problem:
            raise ModelError(f"the chat template can't be used: {facts.problem}. Fix: --chat_template_path FILE.jinja.")
        messages = with_arguments(with_plain_content(messages), facts.arguments)
        messages = with_text_parts(messages) if facts.wants_parts else messages
        return self._apply(template, messages, tools, add_generation_prompt)

    # --- Templates ---------------------------------------------------------------------------------------------------

    def _template_for(self, tools: list[Any] | None) -> str:
        """Return the template for a conversation: tool_use with tools where there is one, else the default.

        Raises:
            ModelError: there is none.
        """
        template = (self.tool_use_template if tools else None) or self.chat_template
        if template is None:
            name, named = type(self.tokenizer).__name__, self.tokenizer.chat_template
            what = "no chat template"
            if isinstance(named, Mapping) and named:
                what = f"chat templates named {', '.join(sorted(named))}, none of them default"
            raise ModelError(
                f"{name} has {what}, but the data holds conversations. "
                "Fix: --chat_template_path FILE.jinja, or use a chat model's tokenizer."
            )
        return template

    def _facts(self, template: str) -> TemplateFacts:
        """Return what probes of a template have shown; it is tried once."""
        if template not in self._known:
            limit_chat_templates()
            render = partial(self._try, template)
            bos = self.tokenizer.bos_token
            self._known[template] = probe_template(
                render, self._special_tokens(), bos if isinstance(bos, str) else None, self._ends()
            )
        return self._known[template]

    def _special_tokens(self) -> list[str]:
        added = (token.content for token in self.tokenizer.added_tokens_decoder.values())
        return sorted({*map(str, self.tokenizer.all_special_tokens), *added})

    def _ends(self) -> tuple[str, ...]:
        tokens = (self.tokenizer.eos_token, self.tokenizer.pad_token)
        return tuple(token for token in tokens if isinstance(token, str) and token)

    def _write_answer(self, template: str, opening: str, content: str) -> str | None:
        """Return what the template writes for an answer, from its opening on; `None` where it can't write it."""
        messages = [question(), answer(content)]
        if self._facts(template).wants_parts:
            messages = with_text_parts(messages)
        turn = after_question(self._try(template, messages, False) or "")
        _, found, rest = turn.partition(opening)
        return found + rest if found and is_written(content, rest) else None

    def _try(
        self,
        template: str,
        messages: list[Message],
        add_generation_prompt: bool,
        tools: list[Any] | None = None,
        /,
    ) -> str | None:
        try:
            return self._apply(template, messages, tools, add_generation_prompt)
        except RejectedRow:
            return None

    def _apply(
        self, template: str, messages: list[Message], tools: list[Any] | None, add_generation_prompt: bool
    ) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        # Templates evaluate expressions over the row's values, so a row they were not written for may raise anything.
        except Exception as error:
            raise RejectedRow("template_error", f"{type(error).__name__}: {error}") from error
        assert isinstance(text, str)
        return text

"""Encode text as token ids, the same way in training, scoring, serving and plain pipelines.

The token ids equal those of TRL's `RewardTrainer` (1.16): plain text is prompt + response + EOS tokenised in one go;
a conversation is rendered by the chat template and tokenised without further special tokens. How the text comes about
is in `rm_scale.data.rendering`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from rm_scale.data.batch_tokenizer import BatchTokenizer
from rm_scale.data.common_prefix import common_prefix_length
from rm_scale.data.encoding_settings import wrong_setting
from rm_scale.data.length_bound import longest_token, num_solid_characters
from rm_scale.data.preference_group import PreferenceGroup, Text
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.rendering import TextRenderer
from rm_scale.data.tokenizer_checks import PROBE_TEXT, check_tokenizer, require_same_tokenizer, tokenizer_facts
from rm_scale.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OverlongPolicy = Literal["drop", "truncate_prompt_left", "error"]


@dataclass(frozen=True)
class EncodingRules:
    """How text becomes tokens.

    Attributes:
        append_eos: end plain text with EOS unless it already does (in conversations that is the template's job).
        max_length: longest sequence, in tokens of prompt + response.
        overlong_policy: what happens to a group with a longer sequence.
        chat_template: Jinja text, or `None` for the tokenizer's own template, of which there may be two: default and
            tool_use, the latter for conversations with tools.
        tool_use_template: Jinja text for conversations with tools beside `chat_template`, or `None` for the same.
        add_special_tokens: let the tokenizer add its BOS and the like to plain text, as `tokenizer(text)` does.
    """

    append_eos: bool = True
    max_length: int = 1024
    overlong_policy: OverlongPolicy = "drop"
    chat_template: str | None = None
    add_special_tokens: bool = True
    tool_use_template: str | None = None


@dataclass(frozen=True, slots=True)
class EncodedGroup:
    """A group as token ids.

    Attributes:
        input_ids: K sequences, in the group's order; each at most `max_length` long.
        prompt_length: number of leading tokens that all K sequences share; each has at least one more.
        ranks: K ranks, 0 is best; equal ranks are ties.
        margin, soft_label, subset, id, source: as in `PreferenceGroup`.
    """

    input_ids: tuple[list[int], ...]
    prompt_length: int
    ranks: tuple[int, ...]
    margin: float | None = None
    soft_label: float | None = None
    subset: str = ""
    id: str = ""
    source: str = ""

    @property
    def num_tokens(self) -> int:
        """Tokens of all K sequences, the shared prompt counted K times."""
        return sum(len(sequence) for sequence in self.input_ids)


class TextEncoder:
    """Turns prompts and responses into token ids under fixed rules.

    Args:
        tokenizer: a transformers tokenizer with EOS, and a pad token (if any) that differs from EOS.
        rules: how text becomes tokens.

    Raises:
        ModelError: no EOS although it is to be appended, pad equals EOS, or everything becomes the same token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rules: EncodingRules | None = None) -> None:
        self.tokenizer = tokenizer
        self.rules = rules or EncodingRules()
        self._description: dict[str, Any] | None = None
        check_tokenizer(tokenizer, self.rules.append_eos)
        self._renderer = TextRenderer(
            tokenizer, self.rules.chat_template, self.rules.append_eos, self.rules.tool_use_template
        )
        # Asked for in every row, where the tokenizer takes its time to look them up.
        self._bos_id, self._pad_id = tokenizer.bos_token_id, tokenizer.pad_token_id
        bos = self._bos_id
        self._tokens = BatchTokenizer(tokenizer, self.rules.add_special_tokens)
        self.adds_bos = bos is not None and self._tokens.ids([PROBE_TEXT], add_special_tokens=True)[0][:1] == [bos]
        self._reads_conversations = True
        self._longest_token = longest_token(tokenizer)

    # --- One text --------------------------------------------------------------------------------------------------

    def encode(self, prompt: Text, response: Text, tools: list[Any] | None = None) -> list[int]:
        """Return the token ids of prompt + response, full length.

        Args:
            prompt: text, or messages; "" or [] for none.
            response: what follows it, of the same kind; text after messages is what the assistant says.
            tools: tool descriptions for the chat template.

        Raises:
            DataError: the text begins with a second BOS, or the template can't render the conversation.
            ModelError: a conversation, but there is no chat template.
        """
        text, is_chat = self._render_or_data_error(prompt, response, tools)
        ids = self._tokens.ids_of_kind([text], is_chat)[0]
        if self._has_double_bos(ids):
            raise DataError(_double_bos_text(self.tokenizer.bos_token))
        return ids

    def render(self, prompt: Text, response: Text, tools: list[Any] | None = None) -> str:
        """Return the text that plain `tokenizer(text)` turns into the same ids as `encode`.

        This is what to hand to `transformers.pipeline("text-classification")`. Where both the template and the
        tokenizer write a BOS, the text leaves the template's out.

        Raises:
            ModelError: no text gives the same ids, e.g. the tokenizer adds a BOS that the template doesn't write.
        """
        text, is_chat = self._render_or_data_error(prompt, response, tools)
        bos = self.tokenizer.bos_token
        plain = text.removeprefix(bos) if is_chat and self.adds_bos and isinstance(bos, str) else text
        expected = self._tokens.ids_of_kind([text], is_chat)[0]
        if self._tokens.ids([plain], add_special_tokens=True)[0] == expected:
            return plain
        raise ModelError(
            f"{type(self.tokenizer).__name__}: tokenizer(text) can't give the token ids used in training "
            f"(it adds BOS: {self.adds_bos}; add_special_tokens={self.rules.add_special_tokens}; conversation: "
            f"{is_chat}), so a plain pipeline would score another sequence. "
            "Fix: use a chat template that begins with {{ bos_token }} (--chat_template_path FILE), or score with "
            "rm-scale score."
        )

    # --- Groups ----------------------------------------------------------------------------------------------------

    def encode_group(self, group: PreferenceGroup) -> EncodedGroup:
        """Encode all K sequences of a group, within `max_length`.

        Raises:
            RejectedRow: `over_long`, `identical_tokens`, `ends_with_pad`, `double_bos` or `template_error`.
            DataError: a sequence is too long and `overlong_policy` is "error".
            ModelError: a conversation, but there is no chat template.
        """
        result = self.encode_groups([group])[0]
        if isinstance(result, RejectedRow):
            raise result
        return result

    def encode_one(self, prompt: Text, response: Text, tools: list[Any] | None = None) -> list[int]:
        """Encode one text for scoring: as `encode`, but a text over `max_length` is cut or refused as in training.

        Raises:
            DataError: too long, and the policy is not to cut or the prompt is too short to be cut; or as `encode`.
        """
        (found,) = self.encode_many([prompt], [response], [tools])
        if isinstance(found, RejectedRow):
            raise DataError(unscorable_text(found)) from None
        return found

    def encode_many(
        self, prompts: Sequence[Text], responses: Sequence[Text], tools: Sequence[list[Any] | None] | None = None
    ) -> list[list[int] | RejectedRow]:
        """Encode many texts as `encode_one` does; for a text that can't be scored the reason is returned.

        Args:
            prompts: texts or lists of messages.
            responses: as many, of the same kind.
            tools: tool descriptions for the chat template, one entry per prompt.
        """
        tools = tools if tools is not None else [None] * len(prompts)
        groups = [
            PreferenceGroup(prompt, (response,), (0,), tools=tool)
            for prompt, response, tool in zip(prompts, responses, tools, strict=True)
        ]
        results: list[list[int] | RejectedRow] = []
        for group, sequences in zip(groups, self._tokenize_groups(groups), strict=True):
            try:
                results.append(sequences if isinstance(sequences, RejectedRow) else self._fit_one(group, sequences[0]))
            except RejectedRow as rejected:
                results.append(rejected)
        return results

    def encode_rendered(self, text: str) -> list[int] | RejectedRow:
        """Encode a whole text: to the tokens that its prompt and response have in `encode`.

        A text as `render` returns it is read as a pipeline reads it. One that stops short, such as a policy's decoded
        tokens, which end with `<|im_end|>` where the template writes a line break too, gets the end that the contract
        gives it: a conversation its chat template's, everything else EOS.

        Returns:
            The token ids. Or why there are none: `over_long` (without a separate prompt there is nothing to cut), or
            `unfinished_text` (a conversation that does not end with an answer).
        """
        try:
            self._refuse_far_too_long([text])
            text, is_chat = self._renderer.complete(text, self._reads_conversations)
        except RejectedRow as rejected:
            return rejected
        ids = self._tokens.ids_of_kind([text], is_chat)[0]
        if len(ids) > self.rules.max_length:
            return RejectedRow("over_long", f"{len(ids)} tokens, max_length is {self.rules.max_length}")
        return self._problem_of(ids) or ids

    def follow_training(self, sequences: Sequence[Sequence[int]]) -> None:
        """Take whole texts for plain ones in `encode_rendered` where sequences of training show that they were.

        Some data holds rendered conversations as plain text. Its texts hold the chat template's marks, but do not end
        as the template ends them.
        """
        self._reads_conversations = not self._renderer.are_plain(self._decode(sequences))

    def are_conversations(self, sequences: Sequence[Sequence[int]]) -> bool:
        """Tell whether any of these sequences of training is a conversation that the chat template wrote."""
        return self._renderer.are_conversations(self._decode(sequences))

    def _decode(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        return [str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for ids in sequences]

    def _problem_of(self, ids: list[int]) -> RejectedRow | None:
        """Return why a score could not be read from this sequence as in training, or `None` if it can."""
        if self._has_double_bos(ids):
            return RejectedRow("double_bos", _double_bos_text(self.tokenizer.bos_token))
        if not ids or ids[-1] == self._pad_id:
            return RejectedRow("ends_with_pad", "no last token that is not padding")
        return None

    def _fit_one(self, group: PreferenceGroup, ids: list[int]) -> list[int]:
        """Apply the checks on tokens and the policy for long sequences to one text.

        The cut is as long as this text needs. In training all responses of a group lose the same number of prompt
        tokens, as many as the longest of them needs.

        Raises:
            RejectedRow: `double_bos`, `ends_with_pad` or `over_long`.
        """
        problem = self._problem_of(ids)
        if problem is not None:
            raise problem
        if len(ids) <= self.rules.max_length:
            return ids
        try:
            cut = self._prompt_cut(group, [ids], len(ids) - 1, len(ids))
        except DataError:  # overlong_policy "error" stops a training run; in scoring only this text is refused
            seen = f"{len(ids)} tokens, max_length is {self.rules.max_length}"
            raise RejectedRow("over_long", seen) from None
        keep = self._num_leading_bos(ids)
        return ids[:keep] + ids[keep + cut :]

    def encode_groups(self, groups: Sequence[PreferenceGroup]) -> list[EncodedGroup | RejectedRow]:
        """Encode many groups as `encode_group` does; for a group that can't be used the reason is returned."""
        results: list[EncodedGroup | RejectedRow] = []
        for group, sequences in zip(groups, self._tokenize_groups(groups), strict=True):
            try:
                results.append(sequences if isinstance(sequences, RejectedRow) else self._fit(group, sequences))
            except RejectedRow as rejected:
                results.append(rejected)
        return results

    def _tokenize_groups(self, groups: Sequence[PreferenceGroup]) -> list[list[list[int]] | RejectedRow]:
        """Return the K full-length sequences of each group, or why its text can't be rendered."""
        results: list[list[list[int]] | RejectedRow] = []
        rendered: dict[int, list[tuple[str, bool]]] = {}
        for number, group in enumerate(groups):
            try:
                texts = [self._renderer.render(group.prompt, part, group.tools) for part in group.responses]
                self._refuse_far_too_long(text for text, _ in texts)
            except RejectedRow as rejected:
                results.append(rejected)
            else:
                rendered[number] = texts
                results.append([])
        for number, sequences in zip(rendered, self._tokens.ids_of_groups(list(rendered.values())), strict=True):
            results[number] = sequences
        return results

    def _refuse_far_too_long(self, texts: Iterable[str]) -> None:
        """Reject a text whose characters alone show that it is too long, where it would be dropped in the end."""
        if self.rules.overlong_policy != "drop" or self._longest_token is None:
            return
        most = self.rules.max_length * self._longest_token
        for text in texts:
            if len(text) > most and num_solid_characters(text) > most:
                raise RejectedRow("over_long", f"{len(text):,} characters, max_length is {self.rules.max_length}")

    def _fit(self, group: PreferenceGroup, sequences: list[list[int]]) -> EncodedGroup:
        """Apply the checks on tokens and the policy for long sequences to a group.

        Raises:
            RejectedRow: `double_bos`, `identical_tokens`, `ends_with_pad` or `over_long`.
            DataError: a sequence is too long and `overlong_policy` is "error".
        """
        if any(self._has_double_bos(ids) for ids in sequences):
            raise RejectedRow("double_bos", _double_bos_text(self.tokenizer.bos_token))
        if all(ids == sequences[0] for ids in sequences[1:]):
            raise RejectedRow("identical_tokens", f"{len(sequences)} responses, {len(sequences[0])} tokens each")
        pad = self._pad_id
        for number, ids in enumerate(sequences):
            if not ids or ids[-1] == pad:
                raise RejectedRow("ends_with_pad", f"response {number} ends with pad token {pad}")
        # At least one token is left to each response.
        shared = common_prefix_length(sequences, leave=1)
        longest = max(len(ids) for ids in sequences)
        if longest > self.rules.max_length:
            cut = self._prompt_cut(group, sequences, shared, longest)
            keep = self._num_leading_bos(sequences[0])
            sequences = [ids[:keep] + ids[keep + cut :] for ids in sequences]
            shared -= cut
        return EncodedGroup(
            tuple(sequences),
            shared,
            group.ranks,
            group.margin,
            group.soft_label,
            group.subset,
            group.id,
            group.source,
        )

    def _prompt_cut(self, group: PreferenceGroup, sequences: list[list[int]], shared: int, longest: int) -> int:
        """Return how many prompt tokens to cut on the left, the same number for all K sequences.

        Args:
            group: what the sequences encode.
            sequences: K lists of token ids.
            shared: leading tokens that all of them share.
            longest: length of the longest.
        """
        limit, policy = self.rules.max_length, self.rules.overlong_policy
        seen = f"{longest} tokens, max_length is {limit}"
        if policy == "error":
            raise DataError(
                f"{group.source or 'the data'}, row {group.id}: {seen}, and overlong_policy is error. "
                f"Fix: --max_length {longest} or more, or --overlong_policy drop or truncate_prompt_left."
            )
        if policy == "drop":
            raise RejectedRow("over_long", seen)
        cut = longest - limit
        available = min(shared, self._prompt_tokens(group, sequences[0])) - self._num_leading_bos(sequences[0])
        if cut > available:
            raise RejectedRow("over_long", f"{seen}, and the prompt has only {max(available, 0)} tokens to cut")
        return cut

    def _prompt_tokens(self, group: PreferenceGroup, sequence: list[int]) -> int:
        """Return how many leading tokens of a sequence are the prompt's; a start common to all responses is not."""
        if not group.prompt:
            return 0
        try:
            if isinstance(group.prompt, str):
                prompt_ids = self._tokens.ids_of_kind([group.prompt], is_chat=False)[0]
            else:
                text = self._renderer.render_messages(group.prompt, group.tools, add_generation_prompt=True)
                prompt_ids = self._tokens.ids_of_kind([text], is_chat=True)[0]
        except RejectedRow:
            # Some templates refuse to render a prompt alone. The caller then cuts no more than the shared tokens.
            return len(sequence)
        return common_prefix_length([prompt_ids, sequence])

    # --- Tokens ----------------------------------------------------------------------------------------------------

    def _render_or_data_error(self, prompt: Text, response: Text, tools: list[Any] | None) -> tuple[str, bool]:
        try:
            return self._renderer.render(prompt, response, tools)
        except RejectedRow as rejected:
            raise DataError(f"{rejected}. Fix: correct this conversation or the chat template.") from rejected

    def _num_leading_bos(self, ids: Sequence[int]) -> int:
        bos = self._bos_id
        return int(bos is not None and bool(ids) and ids[0] == bos)

    def _has_double_bos(self, ids: Sequence[int]) -> bool:
        bos = self._bos_id
        return bos is not None and len(ids) > 1 and ids[0] == bos and ids[1] == bos

    # --- Describing itself -----------------------------------------------------------------------------------------

    @property
    def chat_template(self) -> str | None:
        """The template in force: the rules' own, or the tokenizer's."""
        return self._renderer.chat_template

    def describe(self) -> dict[str, Any]:
        """Return all that decides which ids a text becomes, as JSON values: for the scoring contract and cache keys."""
        if self._description is None:
            self._description = {
                **asdict(self.rules),
                **_template_facts("chat_template", self.chat_template),
                **_template_facts("tool_use_template", self._renderer.tool_use_template),
                **tokenizer_facts(self.tokenizer),
            }
        return dict(self._description)

    @classmethod
    def from_settings(cls, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]) -> TextEncoder:
        """Build an encoder from what `describe` returned; unknown keys are ignored.

        Raises:
            ModelError: a setting is of a wrong type or size; or the tokenizer's special tokens or vocabulary size are
                not those in `settings`.
        """
        problem = wrong_setting(settings)
        if problem is not None:
            raise ModelError(f"{problem}. Fix: give the settings that TextEncoder.describe returned.")
        rules = {name: settings[name] for name in EncodingRules.__dataclass_fields__ if name in settings}
        encoder = cls(tokenizer, EncodingRules(**rules))
        require_same_tokenizer(tokenizer, settings)
        return encoder


def _template_facts(name: str, template: str | None) -> dict[str, Any]:
    digest = None if template is None else hashlib.sha256(template.encode()).hexdigest()
    return {name: template, f"{name}_sha256": digest}


def unscorable_text(rejected: RejectedRow) -> str:
    """Return why one text can't be scored, and what to do about it."""
    if rejected.reason == "over_long":
        return (
            f"a text is too long to be scored: {rejected.detail}. Fix: shorten the prompt, or train with a longer "
            "max_length or overlong_policy: truncate_prompt_left."
        )
    if rejected.reason == "double_bos":
        return rejected.detail
    if rejected.reason == "unfinished_text":
        return f"{rejected}. Fix: give the text up to the end of the answer, or prompt and completion as messages."
    return f"{rejected}. Fix: correct this text or the chat template."


def _double_bos_text(bos: Any) -> str:
    return (
        f"the sequence begins with two {bos!r}: the text holds one and another is added to it. "
        f"Fix: remove {bos!r} from the start of the text (or from the chat template)"
    )

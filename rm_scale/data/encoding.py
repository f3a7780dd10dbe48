"""From a group's text to token sequences, the same way in training, scoring, serving and plain pipelines.

The token ids equal those of TRL's `RewardTrainer` (1.16): plain text is prompt + response + EOS tokenised in one go;
a conversation is rendered by the chat template and tokenised without further special tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from rm_scale.data.groups import Message, PreferenceGroup, RejectedRow, Text
from rm_scale.errors import DataError, ModelError
from rm_scale.logs import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)

OverlongPolicy = Literal["drop", "truncate_prompt_left", "error"]
_PROBE = "The quick brown fox jumps over 13 lazy dogs."


@dataclass(frozen=True)
class EncodingRules:
    """How text becomes tokens.

    Attributes:
        append_eos: end plain text with EOS unless it already does (in conversations that is the template's job).
        max_length: longest sequence, in tokens of prompt + response.
        overlong_policy: what happens to a group with a longer sequence.
        chat_template: Jinja text, or `None` for the tokenizer's own template.
        add_special_tokens: let the tokenizer add its BOS and the like to plain text, as `tokenizer(text)` does.
    """

    append_eos: bool = True
    max_length: int = 1024
    overlong_policy: OverlongPolicy = "drop"
    chat_template: str | None = None
    add_special_tokens: bool = True


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
        _check_special_tokens(tokenizer, self.rules)
        _check_vocabulary(tokenizer)
        self.adds_bos = self._tokenizer_adds_bos()

    # --- One text --------------------------------------------------------------------------------------------------

    def encode(self, prompt: Text, response: Text, tools: list[Any] | None = None) -> list[int]:
        """Token ids of prompt + response, full length.

        Args:
            prompt: text, or messages; "" or [] for none.
            response: what follows it, of the same kind; text after messages is what the assistant says.
            tools: tool descriptions for the chat template.

        Raises:
            DataError: the text begins with a second BOS, or the template can't render the conversation.
            ModelError: a conversation, but there is no chat template.
        """
        text, is_chat = self._compose_or_data_error(prompt, response, tools)
        ids = self._tokenize([text], is_chat)[0]
        if self._has_double_bos(ids):
            raise DataError(_double_bos_text(self.tokenizer.bos_token))
        return ids

    def render(self, prompt: Text, response: Text, tools: list[Any] | None = None) -> str:
        """The text that plain `tokenizer(text)` turns into the same ids as `encode`.

        This is what to hand to `transformers.pipeline("text-classification")`. Where the template writes a BOS and
        the tokenizer adds one too, it is left out here.

        Raises:
            ModelError: no text gives the same ids, e.g. the tokenizer adds a BOS that the template doesn't write.
        """
        text, is_chat = self._compose_or_data_error(prompt, response, tools)
        bos = self.tokenizer.bos_token
        plain = text.removeprefix(bos) if is_chat and self.adds_bos and isinstance(bos, str) else text
        expected = self._tokenize([text], is_chat)[0]
        if self._call([plain], add_special_tokens=True)[0] == expected:
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
        """All K sequences of a group, within `max_length`.

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
        """One text as it is scored: `encode`, and past `max_length` the policy that held in training.

        Raises:
            DataError: too long, and the policy is not to cut, or the prompt is too short for that; or as `encode`.
        """
        (found,) = self.encode_many([prompt], [response], [tools])
        if isinstance(found, RejectedRow):
            raise DataError(unscorable_text(found)) from None
        return found

    def encode_many(
        self, prompts: Sequence[Text], responses: Sequence[Text], tools: Sequence[list[Any] | None] | None = None
    ) -> list[list[int] | RejectedRow]:
        """Texts as `encode_one` gives them, with one call of the tokenizer; what can't be scored comes back as why.

        Args:
            prompts: texts or lists of messages.
            responses: as many, of the same kind.
            tools: tool descriptions for the chat template, one entry per prompt.
        """
        tools = tools if tools is not None else [None] * len(prompts)
        results: list[list[int] | RejectedRow] = []
        texts: dict[bool, list[str]] = {False: [], True: []}
        places: list[tuple[int, bool, int]] = []
        for number, (prompt, response, tool) in enumerate(zip(prompts, responses, tools, strict=True)):
            try:
                text, is_chat = self._compose(prompt, response, tool)
            except RejectedRow as rejected:
                results.append(rejected)
                continue
            places.append((number, is_chat, len(texts[is_chat])))
            texts[is_chat].append(text)
            results.append([])
        ids = {is_chat: self._tokenize(batch, is_chat) for is_chat, batch in texts.items()}
        for number, is_chat, place in places:
            group = PreferenceGroup(prompts[number], (responses[number],), (0,), tools=tools[number])
            try:
                results[number] = self._fit_one(group, ids[is_chat][place])
            except RejectedRow as rejected:
                results[number] = rejected
        return results

    def encode_rendered(self, text: str) -> list[int] | RejectedRow:
        """A whole text as `render` gives it, the way plain `tokenizer(text)` and so a pipeline reads it.

        What is too long comes back as the reason: a text alone doesn't say what of it is a prompt that could be cut.
        """
        ids = self._call([text], add_special_tokens=True)[0]
        if len(ids) > self.rules.max_length:
            return RejectedRow("over_long", f"{len(ids)} tokens, max_length is {self.rules.max_length}")
        return self._problem_of(ids) or ids

    def _problem_of(self, ids: list[int]) -> RejectedRow | None:
        """Why a sequence has no place to read a score at, or another one than in training."""
        if self._has_double_bos(ids):
            return RejectedRow("double_bos", _double_bos_text(self.tokenizer.bos_token))
        if not ids or ids[-1] == self.tokenizer.pad_token_id:
            return RejectedRow("ends_with_pad", "no last token that is not padding")
        return None

    def _fit_one(self, group: PreferenceGroup, ids: list[int]) -> list[int]:
        """A text alone is cut by what it is too long itself; in training all responses of a group lost the same."""
        problem = self._problem_of(ids)
        if problem is not None:
            raise problem
        if len(ids) <= self.rules.max_length:
            return ids
        try:
            cut = self._prompt_cut(group, [ids], len(ids) - 1, len(ids))
        except DataError:  # overlong_policy "error" ends a training run; a text to be scored is refused alone
            seen = f"{len(ids)} tokens, max_length is {self.rules.max_length}"
            raise RejectedRow("over_long", seen) from None
        keep = self._num_leading_bos(ids)
        return ids[:keep] + ids[keep + cut :]

    def encode_groups(self, groups: Sequence[PreferenceGroup]) -> list[EncodedGroup | RejectedRow]:
        """Like `encode_group`, with one call of the tokenizer for all; a refused group comes back as the reason."""
        results: list[EncodedGroup | RejectedRow | None] = [None] * len(groups)
        texts: dict[bool, list[str]] = {False: [], True: []}
        spans: list[tuple[int, bool, int, int]] = []
        for number, group in enumerate(groups):
            try:
                rendered = [self._compose(group.prompt, response, group.tools)[0] for response in group.responses]
            except RejectedRow as rejected:
                results[number] = rejected
                continue
            batch = texts[group.is_conversational]
            spans.append((number, group.is_conversational, len(batch), len(batch) + len(rendered)))
            batch += rendered
        ids = {is_chat: self._tokenize(batch, is_chat) for is_chat, batch in texts.items()}
        for number, is_chat, start, stop in spans:
            try:
                results[number] = self._fit(groups[number], ids[is_chat][start:stop])
            except RejectedRow as rejected:
                results[number] = rejected
        return [result for result in results if result is not None]

    def _fit(self, group: PreferenceGroup, sequences: list[list[int]]) -> EncodedGroup:
        """Apply the checks on tokens and the policy for long sequences."""
        if any(self._has_double_bos(ids) for ids in sequences):
            raise RejectedRow("double_bos", _double_bos_text(self.tokenizer.bos_token))
        if all(ids == sequences[0] for ids in sequences[1:]):
            raise RejectedRow("identical_tokens", f"{len(sequences)} responses, {len(sequences[0])} tokens each")
        pad = self.tokenizer.pad_token_id
        for number, ids in enumerate(sequences):
            if not ids or ids[-1] == pad:
                raise RejectedRow("ends_with_pad", f"response {number} ends with pad token {pad}")
        shared = common_prefix_length(sequences)
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
        """How many prompt tokens to cut on the left, the same for all K responses."""
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
        """Leading tokens of a sequence that belong to the prompt itself, not to a start the responses share."""
        if not group.prompt:
            return 0
        try:
            if isinstance(group.prompt, str):
                prompt_ids = self._call([group.prompt], self.rules.add_special_tokens)[0]
            else:
                text = self._apply_template(group.prompt, group.tools, add_generation_prompt=True)
                prompt_ids = self._call([text], add_special_tokens=False)[0]
        except RejectedRow:
            # Some templates refuse to render a prompt alone; the shared tokens are then the best known bound.
            return len(sequence)
        return common_prefix_length([prompt_ids, sequence], leave=0)

    # --- Text and tokens -------------------------------------------------------------------------------------------

    def _compose_or_data_error(self, prompt: Text, response: Text, tools: list[Any] | None) -> tuple[str, bool]:
        try:
            return self._compose(prompt, response, tools)
        except RejectedRow as rejected:
            raise DataError(f"{rejected}. Fix: correct this conversation or the chat template.") from rejected

    def _compose(self, prompt: Text, response: Text, tools: list[Any] | None) -> tuple[str, bool]:
        """The whole text, and whether it came from a chat template."""
        if isinstance(prompt, str) and isinstance(response, str):
            return self._plain_text(prompt + response), False
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}] if prompt else []
        if isinstance(response, str):
            response = [{"role": "assistant", "content": response}]
        return self._apply_template(prompt + response, tools), True

    def _plain_text(self, text: str) -> str:
        eos = self.tokenizer.eos_token
        if self.rules.append_eos and isinstance(eos, str) and not text.endswith(eos):
            return text + eos
        return text

    def _apply_template(
        self, messages: list[Message], tools: list[Any] | None, add_generation_prompt: bool = False
    ) -> str:
        template = self.rules.chat_template
        if template is None and not self.tokenizer.chat_template:
            raise ModelError(
                f"{type(self.tokenizer).__name__} has no chat template, but the data holds conversations. "
                "Fix: --chat_template_path FILE.jinja, or use a chat model's tokenizer."
            )
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        # Templates run arbitrary expressions: anything may come out of a row they were not written for.
        except Exception as error:
            raise RejectedRow("template_error", f"{type(error).__name__}: {error}") from error
        assert isinstance(text, str)
        return text

    def _tokenize(self, texts: list[str], is_chat: bool) -> list[list[int]]:
        # The template has written the special tokens of a conversation already.
        return self._call(texts, add_special_tokens=not is_chat and self.rules.add_special_tokens)

    def _call(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: lengths are handled by max_length here, not by the tokenizer's own warning.
        return self.tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def _tokenizer_adds_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and self._call([_PROBE], add_special_tokens=True)[0][:1] == [bos]

    def _num_leading_bos(self, ids: Sequence[int]) -> int:
        bos = self.tokenizer.bos_token_id
        return int(bos is not None and bool(ids) and ids[0] == bos)

    def _has_double_bos(self, ids: Sequence[int]) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and len(ids) > 1 and ids[0] == bos and ids[1] == bos

    # --- Describing itself -----------------------------------------------------------------------------------------

    @property
    def chat_template(self) -> str | None:
        """The template in force: the rules' own, or the tokenizer's."""
        template = self.rules.chat_template or self.tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        return template

    def describe(self) -> dict[str, Any]:
        """Everything that decides which ids a text becomes, as JSON values: for the scoring contract and cache keys."""
        if self._description is None:
            self._description = {**asdict(self.rules), **_template_facts(self.chat_template), **self._tokenizer_facts()}
        return dict(self._description)

    def _tokenizer_facts(self) -> dict[str, Any]:
        tokenizer = self.tokenizer
        facts: dict[str, Any] = {}
        for name in ("bos", "eos", "pad"):
            facts[f"{name}_token"] = getattr(tokenizer, f"{name}_token")
            facts[f"{name}_token_id"] = getattr(tokenizer, f"{name}_token_id")
        facts["tokenizer_class"] = type(tokenizer).__name__
        facts["vocab_size"] = len(tokenizer)
        facts["tokenizer_sha256"] = tokenizer_sha256(tokenizer)
        return facts

    @classmethod
    def from_settings(cls, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]) -> TextEncoder:
        """Rebuild an encoder from `describe()`'s dict; keys it does not know are ignored.

        Raises:
            ModelError: the tokenizer's special tokens or vocabulary size are not those in `settings`.
        """
        rules = {name: settings[name] for name in EncodingRules.__dataclass_fields__ if name in settings}
        encoder = cls(tokenizer, EncodingRules(**rules))
        facts = encoder._tokenizer_facts()
        checked = ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size")
        wrong = [name for name in checked if name in settings and settings[name] != facts[name]]
        if wrong:
            seen = ", ".join(f"{name}={facts[name]} (settings: {settings[name]})" for name in wrong)
            raise ModelError(
                f"the tokenizer is not the one these settings were written for: {seen}. "
                "Fix: load the tokenizer from the folder that holds the settings."
            )
        if settings.get("tokenizer_sha256", facts["tokenizer_sha256"]) != facts["tokenizer_sha256"]:
            logger.warning("The tokenizer's files differ from those the model was trained with; scores may differ.")
        return encoder


def common_prefix_length(sequences: Sequence[Sequence[int]], leave: int = 1) -> int:
    """Number of leading tokens that all sequences share.

    Args:
        leave: tokens of each sequence that are not counted, so that a response is never empty.
    """
    first = sequences[0]
    count = max(min(len(ids) for ids in sequences) - leave, 0)
    for other in sequences[1:]:
        if first[:count] == other[:count]:
            continue
        count = next(place for place in range(count) if first[place] != other[place])
    return count


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what decides a tokenizer's output; padding and truncation, which calls switch on, are left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state.update(padding=None, truncation=None)
    else:
        state = {"vocab": tokenizer.get_vocab(), "options": repr(sorted(tokenizer.init_kwargs.items(), key=str))}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _template_facts(template: str | None) -> dict[str, Any]:
    digest = None if template is None else hashlib.sha256(template.encode()).hexdigest()
    return {"chat_template": template, "chat_template_sha256": digest}


def unscorable_text(rejected: RejectedRow) -> str:
    """Why one text can't be scored, and what to do."""
    if rejected.reason == "over_long":
        return (
            f"a text is too long to be scored: {rejected.detail}. Fix: shorten the prompt, or train with a longer "
            "max_length or overlong_policy: truncate_prompt_left."
        )
    if rejected.reason == "double_bos":
        return rejected.detail
    return f"{rejected}. Fix: correct this text or the chat template."


def _double_bos_text(bos: Any) -> str:
    return (
        f"the sequence begins with two {bos!r}: the text holds one and another is added to it. "
        f"Fix: remove {bos!r} from the start of the text (or from the chat template)"
    )


def _check_special_tokens(tokenizer: PreTrainedTokenizerBase, rules: EncodingRules) -> None:
    name = type(tokenizer).__name__
    if rules.append_eos and tokenizer.eos_token_id is None:
        raise ModelError(
            f"{name} has no EOS token, but plain text must end with one to be scored at its end. "
            "Fix: --eos_token TOKEN, one that is in the vocabulary."
        )
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ModelError(
            f"{name}: pad_token {tokenizer.pad_token!r} is the EOS token too, so the score would be read one token "
            "before the end. Fix: --pad_token TOKEN, another one than EOS."
        )


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    """A tokenizer loaded from the wrong or missing files turns any text into nothing, or into one unknown token."""
    special = set(tokenizer.all_special_ids)
    if _num_known_tokens(tokenizer, _PROBE, special) > 1:
        return
    # A toy vocabulary may not know the probe's words; its own words it must know.
    words = [word for word, number in sorted(tokenizer.get_vocab().items()) if number not in special]
    known = _num_known_tokens(tokenizer, " ".join(words[:64]), special)
    if known < min(2, max(len(words), 1)):
        raise ModelError(
            f"{type(tokenizer).__name__} turns any text into {known} known tokens (vocabulary of {len(tokenizer)}): "
            "its vocabulary was not loaded. Fix: check that the folder holds tokenizer.json or the vocabulary files."
        )


def _num_known_tokens(tokenizer: PreTrainedTokenizerBase, text: str, special: set[int]) -> int:
    return len(set(tokenizer(text, add_special_tokens=False)["input_ids"]) - special)

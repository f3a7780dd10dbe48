"""Tokenise many texts at once, by the calls that take the least time and give the ids that `tokenizer(text)` gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rm_scale.data.shared_prefix import can_be_cut, place_to_cut
from rm_scale.data.tokenizer_checks import PROBE_TEXT, only_calls_its_backend

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Few enough that what the backend makes of them stays in the processor's cache, enough for all of its threads.
_AT_ONCE = 32

RenderedText = tuple[str, bool]
"""A text, and whether the chat template wrote it."""


class BatchTokenizer:
    """Turns texts, and groups of texts that begin alike, into token ids.

    Args:
        tokenizer: a transformers tokenizer.
        add_special_tokens: let it add its BOS and the like to plain text. In a conversation the chat template has
            already written them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._add_special_tokens = add_special_tokens
        self._is_direct = only_calls_its_backend(tokenizer)
        self.cuts = can_be_cut(tokenizer) and self._adds_nothing_behind()

    def ids(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Return the token ids of each text, full length."""
        if not texts:
            return []
        # Of many the first alone: with it the tokenizer sets its backend up, which takes the others without more ado.
        first = list(texts[:1] if self._is_direct else texts)
        # verbose=False: no warning about long texts, which max_length takes care of.
        called = self._tokenizer(
            first,
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids: list[list[int]] = called["input_ids"]
        for start in range(len(first), len(texts), _AT_ONCE):
            some = self._tokenizer.backend_tokenizer.encode_batch_fast(
                texts[start : start + _AT_ONCE], add_special_tokens=add_special_tokens
            )
            ids.extend(one.ids for one in some)
        return ids

    def ids_of_kind(self, texts: Sequence[str], is_chat: bool) -> list[list[int]]:
        """Return the token ids of texts that the chat template wrote, or of plain ones."""
        return self.ids(texts, self._add_special_tokens and not is_chat)

    def ids_of_groups(self, groups: Sequence[Sequence[RenderedText]]) -> list[list[list[int]]]:
        """Return the token ids of each group's texts.

        The texts of all groups are tokenised together. Where it is safe, what the texts of a group begin with is
        tokenised once.
        """
        cuts = [self._place_to_cut(texts) for texts in groups]
        found = self._ids_with_cuts(groups, cuts)
        if self._is_as_whole(groups, cuts, found):
            return found
        return self._ids_with_cuts(groups, [None] * len(groups))

    def _place_to_cut(self, texts: Sequence[RenderedText]) -> int | None:
        if not self.cuts or len(texts) < 2 or any(is_chat != texts[0][1] for _, is_chat in texts):
            return None
        return place_to_cut([text for text, _ in texts])

    def _ids_with_cuts(
        self, groups: Sequence[Sequence[RenderedText]], cuts: Sequence[int | None]
    ) -> list[list[list[int]]]:
        kinds: dict[str, list[str]] = {"chat": [], "plain": [], "tail": []}
        for texts, cut in zip(groups, cuts, strict=True):
            if cut is None:
                for text, is_chat in texts:
                    kinds["chat" if is_chat else "plain"].append(text)
            else:
                text, is_chat = texts[0]
                kinds["chat" if is_chat else "plain"].append(text[:cut])
                kinds["tail"] += [text[cut:] for text, _ in texts]
        found = {kind: iter(self.ids_of_kind(texts, kind != "plain")) for kind, texts in kinds.items()}
        results = []
        for texts, cut in zip(groups, cuts, strict=True):
            if cut is None:
                results.append([next(found["chat" if is_chat else "plain"]) for _, is_chat in texts])
            else:
                start = next(found["chat" if texts[0][1] else "plain"])
                results.append([start + next(found["tail"]) for _ in texts])
        return results

    def _is_as_whole(
        self,
        groups: Sequence[Sequence[RenderedText]],
        cuts: Sequence[int | None],
        found: Sequence[Sequence[list[int]]],
    ) -> bool:
        """Tell whether the first text that was cut has the ids that it has as a whole."""
        number = next((number for number, cut in enumerate(cuts) if cut is not None), None)
        return number is None or self.ids_of_kind([groups[number][0][0]], groups[number][0][1])[0] == found[number][0]

    def _adds_nothing_behind(self) -> bool:
        plain = self.ids([PROBE_TEXT], add_special_tokens=False)[0]
        return self.ids([PROBE_TEXT], add_special_tokens=True)[0][-len(plain) :] == plain

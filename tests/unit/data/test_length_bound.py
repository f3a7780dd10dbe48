"""A text is refused by its characters alone only where its tokens would have been too many, whatever it holds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rm_scale.data.encoding import EncodingRules, TextEncoder
from rm_scale.data.length_bound import longest_token, num_solid_characters
from rm_scale.data.rejected_rows import RejectedRow
from tests.unit.data.conftest import build_tokenizer


def with_nfc_and_greedy_tokens() -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken("<end>", lstrip=True, rstrip=True), AddedToken("xyz", normalized=True)])
    return tokenizer


TOKENIZERS = {"plain": build_tokenizer(), "nfc": with_nfc_and_greedy_tokens()}
PIECES = st.sampled_from(
    ["a", "the", "<end>", "xyz", " ", "\n\t", "\u03b1\u0313\u0300\u0345", "e\u0301", "\U0001f600", "\x1c"]
)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=200, deadline=None)
@given(text=st.lists(PIECES | st.text(max_size=5), max_size=40).map("".join))
def test_tokens_are_never_fewer_than_the_bound_says(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    longest = longest_token(tokenizer)
    assert longest is not None
    text = text.encode(errors="ignore").decode()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) * longest >= num_solid_characters(text)


def test_tokenizers_that_may_drop_characters_are_not_judged() -> None:
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")), unk_token="[UNK]"
    )
    assert longest_token(words) is None, "a word of a thousand letters is one unknown token"
    for change in ("normalizer", "pre_tokenizer"):
        tokenizer = build_tokenizer()
        backend = tokenizer.backend_tokenizer
        if change == "normalizer":
            backend.normalizer = normalizers.StripAccents()
        else:
            removing = pre_tokenizers.Split("a", "removed")
            backend.pre_tokenizer = pre_tokenizers.Sequence([removing, pre_tokenizers.ByteLevel()])
        assert longest_token(tokenizer) is None


def test_what_is_far_too_long_is_refused_without_tokenising(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = TextEncoder(build_tokenizer(), EncodingRules(max_length=8))
    long, short = "a b " * 1000, "a b"
    called: list[str] = []
    ids = encoder._tokens.ids
    monkeypatch.setattr(encoder._tokens, "ids", lambda texts, *how: called.extend(texts) or ids(texts, *how))
    kept, refused = encoder.encode_many(["", ""], [short, long])
    assert isinstance(kept, list) and isinstance(refused, RejectedRow) and refused.reason == "over_long"
    assert "max_length is 8" in refused.detail
    found = encoder.encode_rendered(long)
    assert isinstance(found, RejectedRow) and found.reason == "over_long"
    assert called == [short + "</s>"]
    cutting = TextEncoder(build_tokenizer(), EncodingRules(max_length=8, overlong_policy="truncate_prompt_left"))
    (cut,) = cutting.encode_many([long], [short])
    assert isinstance(cut, list) and len(cut) == 8

"""What the texts of a group share is tokenised once only where that gives the same tokens: held against whole texts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rm_scale.data.encoding import EncodedGroup, EncodingRules, TextEncoder
from rm_scale.data.preference_group import PreferenceGroup
from rm_scale.data.shared_prefix import _PATTERNS, can_be_cut, place_to_cut
from tests.unit.data.conftest import BOS_TEMPLATE, SENTENCES

SPECIAL = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]


def build(pre: Any, normalizer: Any = None, processor: Any = None, model: Any = None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model or models.BPE())
    backend.pre_tokenizer, backend.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet)
    if model is None:
        backend.train_from_iterator(SENTENCES * 3, trainer)
    if processor is not None:
        backend.post_processor = processor
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens=SPECIAL[3:]
    )
    made.chat_template = BOS_TEMPLATE
    return made


def split(pattern: str) -> Any:
    by_pattern = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([by_pattern, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
ADDS_BOS = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
ADDS_BOTH = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
CUT = {
    "gpt2": build(BYTES),
    "bos": build(BYTES, processor=ADDS_BOS),
    "digits": build(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])),
    **{f"pattern {n}": build(split(one), normalizers.NFC(), ADDS_BOS) for n, one in enumerate(sorted(_PATTERNS))},
}
WHOLE = {
    "eos behind": build(BYTES, processor=ADDS_BOTH),
    "prefix space": build(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "lower case": build(BYTES, normalizers.Lowercase()),
    "other pattern": build(split(r"[\s\S]{4}")),
    "words": build(BYTES, model=models.WordLevel({word: n for n, word in enumerate([*SPECIAL, "a"])}, unk_token="a")),
}
pieces = st.one_of(
    st.sampled_from(
        [" ", "  ", "\n", "'s", " the", " fox", "é", "e\u0301", "漢", "12", "<|im_end|>", ".", "?!", "\u00a0"]
    ),
    st.text(max_size=6),
)
texts = st.lists(pieces, max_size=12).map("".join)


@pytest.mark.parametrize("name", CUT)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(prompt=texts, responses=st.lists(texts, min_size=2, max_size=3), is_chat=st.booleans())
def test_tokens_are_those_of_the_whole_texts(name: str, prompt: str, responses: list[str], is_chat: bool) -> None:
    tokenizer = CUT[name]
    encoder = TextEncoder(tokenizer, EncodingRules(max_length=10_000))
    assert encoder._tokens.cuts
    whole = TextEncoder(tokenizer, EncodingRules(max_length=10_000))
    whole._tokens.cuts = False
    prompt = f"How do I bake the best bread?{prompt} and now{prompt}"
    asked: Any = [{"role": "user", "content": prompt}] if is_chat else prompt
    said: Any = [[{"role": "assistant", "content": text}] if is_chat else text for text in responses]
    group = PreferenceGroup(asked, tuple(said), tuple(range(len(said))))
    (cut,), (uncut,) = encoder.encode_groups([group]), whole.encode_groups([group])
    if isinstance(uncut, EncodedGroup):
        assert cut == uncut
    else:
        assert isinstance(cut, type(uncut)) and str(cut) == str(uncut)


@pytest.mark.parametrize("name", [*CUT, *WHOLE])
def test_only_tokenizers_of_which_all_is_known_are_cut_for(name: str) -> None:
    encoder = TextEncoder({**CUT, **WHOLE}[name], EncodingRules(append_eos=False))
    assert encoder._tokens.cuts == (name in CUT)


@pytest.mark.parametrize(
    ("token", "cut"),
    [
        (AddedToken("<tool>"), True),
        (AddedToken("<tool>", lstrip=True, rstrip=True), True),
        (AddedToken("tool", lstrip=True), False),
        (AddedToken("</tool", rstrip=True), False),
        (AddedToken("the fox"), False),
        (AddedToken("fox"), True),
    ],
)
def test_added_tokens_that_reach_over_a_space_forbid_it(token: AddedToken, cut: bool) -> None:
    tokenizer = build(BYTES)
    tokenizer.add_tokens([token])
    assert can_be_cut(tokenizer) == cut


def test_a_tokenizer_with_a_way_of_its_own_is_not_cut_for() -> None:
    class Own(PreTrainedTokenizerFast):
        def __call__(self, *given: Any, **more: Any) -> Any:
            return super().__call__(*given, **more)

    own = Own(tokenizer_object=CUT["gpt2"].backend_tokenizer, eos_token="</s>")
    assert not can_be_cut(own)
    dropping = build(BYTES)
    dropping.backend_tokenizer.model.dropout = 0.1
    assert not can_be_cut(dropping)


@pytest.mark.parametrize(
    ("given_texts", "begins"),
    [
        (["How do I ever bake the best bread? Yes.", "How do I ever bake the best bread? No."], " bread"),
        (["How do I ever bake the best bread now", "How do I ever bake the best bread no"], " no"),
        (["How do I ever bake the best bread 12", "How do I ever bake the best bread 13"], " bread"),
        (["How do I bake the", "How do I bake the bread"], None),
        (["x" * 99, "x" * 98], None),
        (["", "a"], None),
        (["How do I ever bake the best bread?"] * 2, " bread"),
        (["How do I ever bake the best, é é  bread", "How do I ever bake the best, é é  bread!"], None),
    ],
)
def test_the_place_is_the_last_between_a_letter_and_a_space(given_texts: list[str], begins: str | None) -> None:
    place = place_to_cut(given_texts)
    assert place is None if begins is None else given_texts[0][place:].startswith(begins)


def test_a_word_that_does_not_begin_there_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should a tokenizer be another than it seems, the whole texts are tokenised."""
    tokenizer = CUT["gpt2"]
    monkeypatch.setattr("rm_scale.data.batch_tokenizer.place_to_cut", lambda texts: 26)
    encoder = TextEncoder(tokenizer)
    group = PreferenceGroup("How do I bake the best bread?", (" Yes.", " No."), (0, 1))
    found = encoder.encode_group(group)
    assert list(found.input_ids) == [encoder.encode(group.prompt, response) for response in group.responses]

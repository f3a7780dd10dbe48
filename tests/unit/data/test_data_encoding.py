"""Token ids equal TRL's, `render` equals a plain pipeline's input, and long groups follow the policy."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl.trainer import reward_trainer

from rm_scale.data.common_prefix import common_prefix_length
from rm_scale.data.encoding import EncodedGroup, EncodingRules, TextEncoder
from rm_scale.data.preference_group import Message, PreferenceGroup, Text
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.tokenizer_checks import tokenizer_sha256
from rm_scale.errors import DataError, ModelError

USER = {"role": "user", "content": "How do I bake bread?"}
GOOD = {"role": "assistant", "content": "Mix flour and water."}
BAD = {"role": "assistant", "content": "Buy some."}
TOOLS = [{"type": "function", "function": {"name": "time"}}]


def trl_ids(tokenizer: Any, prompt: Text, response: Text, tools: Any = None) -> list[int]:
    """What RewardTrainer 1.16 does in `_prepare_dataset`, with its own `_tokenize`."""
    if isinstance(prompt, str):
        assert isinstance(response, str)
        text = response if response.endswith(tokenizer.eos_token) else response + tokenizer.eos_token
        return reward_trainer._tokenize(tokenizer, prompt + text)["input_ids"]
    return reward_trainer._tokenize(tokenizer, prompt + list(response), tools=tools)["input_ids"]  # type: ignore[arg-type]


def group(prompt: Text, *responses: Text, **more: Any) -> PreferenceGroup:
    return PreferenceGroup(prompt, responses, tuple(range(len(responses))), **more)


TEXTS = [
    ("How do I bake", " bread?"),
    ("", "Paris."),
    ("Why? ", "ünï 漢字 🙂"),
    ("Why? ", "Because.</s>"),
    ("Why", "</s>"),
]


@pytest.mark.parametrize(("prompt", "response"), TEXTS)
@pytest.mark.parametrize("kind", ["tokenizer", "bos_tokenizer"])
def test_plain_text_ids_equal_trl_and_the_rendered_text(
    request: pytest.FixtureRequest, kind: str, prompt: str, response: str
) -> None:
    tokenizer = request.getfixturevalue(kind)
    encoder = TextEncoder(tokenizer)
    ids = encoder.encode(prompt, response)
    assert ids == trl_ids(tokenizer, prompt, response)
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer(encoder.render(prompt, response))["input_ids"] == ids


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("kind", ["tokenizer", "bos_tokenizer"])
def test_conversation_ids_equal_trl_and_the_rendered_text(
    request: pytest.FixtureRequest, kind: str, tools: Any
) -> None:
    tokenizer = request.getfixturevalue(kind)
    encoder = TextEncoder(tokenizer)
    ids = encoder.encode([USER], [GOOD], tools)
    assert ids == trl_ids(tokenizer, [USER], [GOOD], tools)
    assert tokenizer(encoder.render([USER], [GOOD], tools))["input_ids"] == ids
    assert ids.count(tokenizer.bos_token_id) == (kind == "bos_tokenizer")
    assert tokenizer.eos_token_id not in ids


def test_groups_equal_single_texts(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = TextEncoder(bos_tokenizer)
    groups = [group("Why? ", "Because.", "No."), group([USER], [GOOD], [BAD]), group("How", " now", " so", " much")]
    for given, encoded in zip(groups, encoder.encode_groups(groups), strict=True):
        assert isinstance(encoded, EncodedGroup)
        assert list(encoded.input_ids) == [encoder.encode(given.prompt, response) for response in given.responses]
        assert encoded == encoder.encode_group(given)
        assert encoded.num_tokens == sum(map(len, encoded.input_ids))


def test_text_beside_messages(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = TextEncoder(tokenizer)
    assert encoder.encode([USER], "Buy some.") == encoder.encode([USER], [BAD])
    assert encoder.encode(USER["content"], [BAD]) == encoder.encode([USER], [BAD])
    assert encoder.encode("", [USER, BAD]) == encoder.encode([USER], [BAD])


def test_rules_without_eos_or_special_tokens(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = TextEncoder(bos_tokenizer, EncodingRules(append_eos=False, add_special_tokens=False))
    assert encoder.encode("How ", "now") == bos_tokenizer("How now", add_special_tokens=False)["input_ids"]
    with pytest.raises(ModelError, match=r"can't give the token ids used in training .*adds BOS: True.*Fix: "):
        encoder.render("How ", "now")


def test_a_template_without_bos_can_not_be_rendered_for_a_tokenizer_that_adds_one(
    bos_tokenizer: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast
) -> None:
    bos_tokenizer.chat_template = tokenizer.chat_template
    encoder = TextEncoder(bos_tokenizer)
    assert encoder.encode([USER], [GOOD]) == trl_ids(bos_tokenizer, [USER], [GOOD])
    with pytest.raises(ModelError, match=r"begins with \{\{ bos_token \}\}"):
        encoder.render([USER], [GOOD])


def test_rules_template_wins_over_the_tokenizers(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = TextEncoder(tokenizer, EncodingRules(chat_template="{% for m in messages %}{{ m.content }};{% endfor %}"))
    assert encoder.render([USER], [GOOD]) == "How do I bake bread?;Mix flour and water.;"


def test_long_texts_are_encoded_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.model_max_length = 4
    assert len(TextEncoder(tokenizer, EncodingRules(max_length=8)).encode("How " * 50, "now")) > 50


# --- The shared prompt ---------------------------------------------------------------------------------------------


def test_common_prefix_of_sequences_and_texts() -> None:
    assert common_prefix_length([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 9]], leave=1) == 2
    assert common_prefix_length([[1, 2, 3], [1, 2, 3, 4]], leave=1) == 2
    assert common_prefix_length([[1], [2]], leave=1) == 0
    assert common_prefix_length([[1, 2], [1, 2]]) == 2
    assert common_prefix_length(["abcdef", "abcxef"]) == 3 and common_prefix_length(["", "a"]) == 0
    for same in range(9):
        assert common_prefix_length(["a" * same + "b" * 9, "a" * same + "c" * (9 - same)]) == same


def test_prompt_length_is_that_of_the_shared_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = TextEncoder(tokenizer).encode_group(group("What is the capital? ", "Paris.", "London.", "Berlin."))
    first, *others = encoded.input_ids
    for other in others:
        assert first[: encoded.prompt_length] == other[: encoded.prompt_length]
    assert len({ids[encoded.prompt_length] for ids in encoded.input_ids}) > 1


def test_labels_travel_along(tokenizer: PreTrainedTokenizerFast) -> None:
    given = PreferenceGroup("Why? ", ("a", "b"), (1, 0), 0.5, 0.25, None, "file", "maths", "7")
    encoded = TextEncoder(tokenizer).encode_group(given)
    assert (encoded.ranks, encoded.margin, encoded.soft_label) == ((1, 0), 0.5, 0.25)
    assert (encoded.source, encoded.subset, encoded.id) == ("file", "maths", "7")


# --- Long groups ---------------------------------------------------------------------------------------------------

LONG = group("How do I bake bread? " * 10, "Mix flour and water.", "Buy some.", source="file", id="7")


def test_drop_refuses_long_groups(tokenizer: PreTrainedTokenizerFast) -> None:
    length = max(len(ids) for ids in TextEncoder(tokenizer).encode_group(LONG).input_ids)
    assert TextEncoder(tokenizer, EncodingRules(max_length=length)).encode_group(LONG).num_tokens > length
    with pytest.raises(RejectedRow, match=f"over_long: {length} tokens, max_length is {length - 1}"):
        TextEncoder(tokenizer, EncodingRules(max_length=length - 1)).encode_group(LONG)


def test_error_policy_names_the_row(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = TextEncoder(tokenizer, EncodingRules(max_length=20, overlong_policy="error"))
    with pytest.raises(
        DataError, match=r"file, row 7: .*max_length is 20, and overlong_policy is error. Fix: --max_length"
    ):
        encoder.encode_group(LONG)


@pytest.mark.parametrize("kind", ["tokenizer", "bos_tokenizer"])
@pytest.mark.parametrize("chat", [False, True])
def test_truncation_cuts_the_same_prompt_tokens_from_every_response(
    request: pytest.FixtureRequest, kind: str, chat: bool
) -> None:
    tokenizer = request.getfixturevalue(kind)
    messages: list[Message] = [{"role": "user", "content": LONG.prompt}]
    given = group(messages, [GOOD], [BAD]) if chat else LONG
    whole = TextEncoder(tokenizer).encode_group(given)
    limit = max(map(len, whole.input_ids)) - 30
    encoded = TextEncoder(
        tokenizer, EncodingRules(max_length=limit, overlong_policy="truncate_prompt_left")
    ).encode_group(given)
    keep = int(kind == "bos_tokenizer")
    assert max(map(len, encoded.input_ids)) == limit
    assert encoded.prompt_length == whole.prompt_length - 30
    for before, after in zip(whole.input_ids, encoded.input_ids, strict=True):
        assert after == before[:keep] + before[keep + 30 :]
        assert (after[0] == tokenizer.bos_token_id) == bool(keep)


def test_truncation_never_cuts_into_responses(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    shared_start = "I think the lazy dog is here and " * 5
    given = group("Why? ", shared_start + "a", shared_start + "b")
    whole = TextEncoder(bos_tokenizer).encode_group(given)
    prompt_tokens = len(bos_tokenizer("Why? ", add_special_tokens=False)["input_ids"])
    longest = max(map(len, whole.input_ids))
    rules = EncodingRules(max_length=longest - prompt_tokens - 1, overlong_policy="truncate_prompt_left")
    with pytest.raises(RejectedRow, match=r"over_long: .* the prompt has only \d tokens to cut"):
        TextEncoder(bos_tokenizer, rules).encode_group(given)
    with pytest.raises(RejectedRow, match=r"the prompt has only 0 tokens to cut"):
        TextEncoder(bos_tokenizer, rules).encode_group(group("", shared_start + "a", shared_start + "b"))


def test_a_template_that_refuses_a_lone_prompt_still_truncates(tokenizer: PreTrainedTokenizerFast) -> None:
    template = "{% if messages | length < 2 %}{{ raise_exception('no answer') }}{% endif %}" + tokenizer.chat_template
    given = group([{"role": "user", "content": LONG.prompt}], [GOOD], [BAD])
    rules = EncodingRules(max_length=60, overlong_policy="truncate_prompt_left", chat_template=template)
    assert max(map(len, TextEncoder(tokenizer, rules).encode_group(given).input_ids)) == 60


# --- Refusals ------------------------------------------------------------------------------------------------------


def test_identical_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | lower }}{% endfor %}"
    loud = [{"role": "assistant", "content": "PARIS"}]
    quiet = [{"role": "assistant", "content": "paris"}]
    with pytest.raises(RejectedRow, match=r"identical_tokens: 2 responses"):
        TextEncoder(tokenizer).encode_group(group([USER], loud, quiet))


def test_ends_with_pad(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = TextEncoder(tokenizer, EncodingRules(append_eos=False))
    with pytest.raises(RejectedRow, match=r"ends_with_pad: response 1 ends with pad token 2"):
        encoder.encode_group(group("Why? ", "a", "b<pad>"))


def test_double_bos_in_data_and_in_templates(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = TextEncoder(bos_tokenizer)
    with pytest.raises(RejectedRow, match=r"double_bos: .*begins with two '<s>'.*Fix: remove"):
        encoder.encode_group(group("<s>Why? ", "a", "b"))
    with pytest.raises(DataError, match=r"begins with two '<s>'"):
        encoder.encode("<s>Why? ", "a")
    bos_tokenizer.chat_template = "<s>" + bos_tokenizer.chat_template
    with pytest.raises(RejectedRow, match=r"double_bos"):
        encoder.encode_group(group([USER], [GOOD], [BAD]))


def test_template_errors(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = TextEncoder(tokenizer, EncodingRules(chat_template="{{ raise_exception('no system role') }}"))
    with pytest.raises(RejectedRow, match=r"template_error: TemplateError: no system role"):
        encoder.encode_group(group([USER], [GOOD], [BAD]))
    with pytest.raises(DataError, match=r"no system role. Fix: correct this conversation"):
        encoder.encode([USER], [GOOD])


def test_no_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    with pytest.raises(
        ModelError, match=r"has no chat template, but the data holds conversations. Fix: --chat_template_path"
    ):
        TextEncoder(tokenizer).encode_group(group([USER], [GOOD], [BAD]))


def test_special_tokens_are_checked(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.pad_token = "</s>"
    with pytest.raises(ModelError, match=r"pad_token '</s>' is the EOS token too.*Fix: --pad_token"):
        TextEncoder(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match=r"has no EOS token.*Fix: --eos_token"):
        TextEncoder(tokenizer)
    TextEncoder(tokenizer, EncodingRules(append_eos=False))


def test_a_tokenizer_without_vocabulary_is_refused() -> None:
    empty = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")),
        unk_token="[UNK]",
        eos_token="</s>",
    )
    with pytest.raises(
        ModelError, match=r"0 known tokens .vocabulary of 2.*was not loaded. Fix: check that the folder"
    ):
        TextEncoder(empty)


def test_a_toy_vocabulary_is_accepted() -> None:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "yes": 2, "no": 3}, unk_token="[UNK]"))
    from tokenizers.pre_tokenizers import Whitespace

    backend.pre_tokenizer = Whitespace()
    TextEncoder(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="</s>"))


# --- Settings ------------------------------------------------------------------------------------------------------


def test_settings_rebuild_the_same_encoder(tokenizer: PreTrainedTokenizerFast, tmp_path: Any, caplog: Any) -> None:
    rules = EncodingRules(True, 77, "truncate_prompt_left", None, False)
    encoder = TextEncoder(tokenizer, rules)
    settings = json.loads(json.dumps({**encoder.describe(), "score_mean": 0.5}))
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    loaded.chat_template = "another"
    rebuilt = TextEncoder.from_settings(loaded, settings)
    assert rebuilt.describe() == encoder.describe()
    assert rebuilt.encode([USER], [GOOD]) == encoder.encode([USER], [GOOD])
    assert settings["max_length"] == 77 and len(settings["chat_template_sha256"]) == 64
    assert (settings["bos_token"], settings["eos_token_id"], settings["pad_token_id"]) == ("<s>", 1, 2)
    assert settings["vocab_size"] == len(tokenizer) and "differ" not in caplog.text


def test_settings_of_another_tokenizer_are_refused(
    tokenizer: PreTrainedTokenizerFast, bos_tokenizer: PreTrainedTokenizerFast, caplog: Any
) -> None:
    settings = TextEncoder(tokenizer).describe()
    with pytest.raises(ModelError, match=r"eos_token_id=1 \(settings: 9\).*Fix: load the tokenizer from the folder"):
        TextEncoder.from_settings(tokenizer, {**settings, "eos_token_id": 9})
    TextEncoder.from_settings(bos_tokenizer, settings)
    assert "tokenizer's files differ" in caplog.text


def test_tokenizer_hash_ignores_padding_and_notices_content(
    tokenizer: PreTrainedTokenizerFast, bos_tokenizer: PreTrainedTokenizerFast
) -> None:
    before = tokenizer_sha256(tokenizer)
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=4)
    assert tokenizer_sha256(tokenizer) == before != tokenizer_sha256(bos_tokenizer)

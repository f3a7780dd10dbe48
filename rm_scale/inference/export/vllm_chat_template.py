"""The chat template by which vLLM's /score and /rerank read a prompt and an answer as the scoring contract does.

Without one, vLLM joins the two without EOS, or with a separator. Started with --chat-template it renders messages of
the roles query and document by it and lets the tokenizer add its special tokens (entrypoints/pooling/scoring/
io_processor.py, 0.32.0); /classify renders the `messages` of a request by the same file, and adds none.
"""

from __future__ import annotations

from collections.abc import Iterator

from rm_scale.data.message_content import with_text_parts
from rm_scale.data.preference_group import Message, Text
from rm_scale.errors import DataError, ModelError
from rm_scale.files import write_whole
from rm_scale.inference.export.engine_facts import PAIRS, EngineFacts
from rm_scale.texts import one_line

TEMPLATE_FILE = "vllm_chat_template.jinja"

# transformers renders with trim_blocks, which takes the line break after a block's tag, and lstrip_blocks, which takes
# blanks before one unless it begins with a plus: so that the model's own template stays what it is between two tags.
_HEAD = """{# Written by rm_scale for vLLM: pass it as --chat-template. #}
{% set add_generation_prompt = false %}
{% set rm_scale_is_pair = messages | map(attribute='role') | list == ['query', 'document'] %}
"""
_PLAIN_PAIR = """{% if rm_scale_is_pair %}
{% set rm_scale_text = messages[0]['content'] ~ messages[1]['content'] %}
{{ rm_scale_text }}{% if not rm_scale_text.endswith(eos_token) %}{{ eos_token }}{% endif %}
"""
_PLAIN_PAIR_WITHOUT_EOS = """{% if rm_scale_is_pair %}
{{ messages[0]['content'] ~ messages[1]['content'] }}
"""
_AS_CONVERSATION = """{% if rm_scale_is_pair %}
{% set rm_scale_query, rm_scale_document = messages[0]['content'], messages[1]['content'] %}
{% set messages = [{'role': 'assistant', 'content': DOCUMENT}] %}
{% if rm_scale_query %}
{% set messages = [{'role': 'user', 'content': QUERY}] + messages %}
{% endif %}
{% endif %}
"""
_NO_TEMPLATE = "{{ raise_exception('this model was trained on plain text: send text_1 and text_2, or input') }}"


def write_chat_template(facts: EngineFacts) -> int:
    """Write `vllm_chat_template.jinja` into an export; return how many texts had the contract's token ids by it.

    Raises:
        ModelError: no template gives vLLM the contract's token ids.
    """
    reasons: list[str] = []
    for template in _candidates(facts):
        try:
            num_texts = _check(facts, template)
        except ModelError as error:
            reasons.append(str(error))
            continue
        write_whole(facts.folder / TEMPLATE_FILE, template)
        return num_texts
    raise ModelError(
        f"--engine vllm: no chat template gives its /score the token ids of training: {reasons[0]}. Fix: train with "
        "a chat template that begins with {{ bos_token }} (--chat_template_path FILE), or leave out --engine vllm "
        "and send token ids as input to its /classify."
    )


def _candidates(facts: EngineFacts) -> Iterator[str]:
    """Yield templates to try: content as text, and, for templates of image models, as a list of parts."""
    own = facts.encoder.chat_template
    if not facts.reads_conversations:
        pair = _PLAIN_PAIR if facts.encoder.rules.append_eos else _PLAIN_PAIR_WITHOUT_EOS
        yield f"{_HEAD}{pair.rstrip()}{{% else %}}\n{_kept(own) if own else _NO_TEMPLATE}{{%+ endif %}}"
        return
    assert own is not None, "conversations were rendered by a template"
    for form in ("NAME", "[{'type': 'text', 'text': NAME}]"):
        renamed = _AS_CONVERSATION
        for role, name in (("QUERY", "rm_scale_query"), ("DOCUMENT", "rm_scale_document")):
            renamed = renamed.replace(role, form.replace("NAME", name))
        yield f"{_HEAD}{renamed}{_without_second_bos(facts, own)}"


def _without_second_bos(facts: EngineFacts, own: str) -> str:
    """Return the model's template; where the tokenizer adds BOS to a pair's text, one that leaves its own BOS out."""
    if not facts.encoder.adds_bos:
        return own
    body = f"{{% set rm_scale_text %}}\n{_kept(own)}{{%+ endset %}}"
    begins = "rm_scale_is_pair and rm_scale_text.startswith(bos_token)"
    return f"{body}{{{{ rm_scale_text[bos_token | length:] if {begins} else rm_scale_text }}}}"


def _kept(own: str) -> str:
    """Return a template without the one line break at its end, which Jinja drops only there."""
    return own.removesuffix("\n")


def _check(facts: EngineFacts, template: str) -> int:
    """Compare token ids as vLLM makes them with the contract's; return how many texts were compared.

    Raises:
        ModelError: they differ.
    """
    compared = 0
    for prompt, answer in PAIRS:
        expected = _expected(facts, *facts.as_trained(prompt, answer))
        if expected is None:
            continue
        pair = [{"role": "query", "content": prompt}, {"role": "document", "content": answer}]
        _require_same(facts, template, pair, True, expected)
        compared += 1
        if facts.encoder.chat_template is not None:
            _check_conversation(facts, template, prompt, answer)
    if not compared:
        raise ModelError("the contract refuses every text that was tried")
    return compared


def _check_conversation(facts: EngineFacts, template: str, prompt: str, answer: str) -> None:
    """Compare the token ids of messages, as a request to /classify holds them, with the contract's.

    vLLM hands content to a template that goes through parts as a list of them, and as text to all others.

    Raises:
        ModelError: they differ in both forms.
    """
    messages: list[Message] = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    expected = _expected(facts, messages[:1], messages[1:])
    if expected is None:
        return
    try:
        _require_same(facts, template, messages, False, expected)
    except ModelError:
        _require_same(facts, template, with_text_parts(messages), False, expected)


def _expected(facts: EngineFacts, prompt: Text, answer: Text) -> list[int] | None:
    """Return the contract's token ids, or `None` for a text that it refuses."""
    try:
        return facts.encoder.encode(prompt, answer)
    except DataError:
        return None


def _require_same(
    facts: EngineFacts, template: str, messages: list[Message], adds_special_tokens: bool, expected: list[int]
) -> None:
    try:
        text = facts.tokenizer.apply_chat_template(
            messages, tools=None, chat_template=template, tokenize=False, add_generation_prompt=False
        )
    except Exception as error:  # a template may raise anything over messages that it was not written for
        raise ModelError(f"it can't be rendered ({one_line(error, 200)})") from error
    found = facts.tokenizer(text, add_special_tokens=adds_special_tokens, verbose=False)["input_ids"]
    if found != expected:
        raise ModelError(
            f"{one_line(text, 120)!r} becomes {len(found)} tokens from {found[:3]} to {found[-3:]}, in training it was "
            f"{len(expected)} from {expected[:3]} to {expected[-3:]}"
        )

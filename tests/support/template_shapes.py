"""Real chat templates with their own special tokens on a tiny tokenizer: TRL's files, and some that it lacks."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path

import trl
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from rm_scale.demo.assets import default_tokenizer

TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"

# As the models' tokenizer_config.json have them.
_LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
_ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
_CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

# Name: template (a file of TRL's, or its text), EOS, whether the tokenizer adds BOS, and where a policy stops.
SHAPES: dict[str, tuple[str, str, bool, str]] = {
    "qwen2_5-instruct": ("qwen2_5", "<|im_end|>", False, "<|im_end|>"),
    "qwen2_5-base": ("qwen2_5", "<|endoftext|>", False, "<|im_end|>"),
    "qwen3": ("qwen3", "<|im_end|>", False, "<|im_end|>"),
    "qwen3_instruct_2507": ("qwen3_instruct_2507", "<|im_end|>", False, "<|im_end|>"),
    "qwen3_5_think": ("qwen3_5_think", "<|im_end|>", False, "<|im_end|>"),
    "llama2": (_LLAMA2, "</s>", True, "</s>"),
    "llama3": ("llama3", "<|eot_id|>", True, "<|eot_id|>"),
    "llama3-base": ("llama3", "<|end_of_text|>", True, "<|eot_id|>"),
    "llama3_1": ("llama3_1", "<|eot_id|>", True, "<|eot_id|>"),
    "gemma": ("gemma", "<eos>", True, "<end_of_turn>"),
    "gemma3": ("gemma3", "<eos>", True, "<end_of_turn>"),
    "gemma4": ("gemma4", "<eos>", True, "<turn|>"),
    "mistral": (_MISTRAL, "</s>", True, "</s>"),
    "phi3": ("phi3", "<|endoftext|>", False, "<|end|>"),
    "phi3_5": ("phi3_5", "<|endoftext|>", False, "<|end|>"),
    "chatml": (_CHATML, "<|im_end|>", False, "<|im_end|>"),
    "chatml-eos-text": (_CHATML, "<|endoftext|>", False, "<|im_end|>"),
    "zephyr": (_ZEPHYR, "</s>", True, "</s>"),
    "vicuna": (_VICUNA, "</s>", True, "</s>"),
    "cohere": ("cohere", "<|END_OF_TURN_TOKEN|>", True, "<|END_OF_TURN_TOKEN|>"),
    "cohere2": ("cohere2", "<|END_OF_TURN_TOKEN|>", True, "<|END_OF_TURN_TOKEN|>"),
    "deepseekv3": ("deepseekv3", "<｜end▁of▁sentence｜>", True, "<｜end▁of▁sentence｜>"),
    "deepseek_r1_distill": ("deepseek_r1_distill", "<｜end▁of▁sentence｜>", True, "<｜end▁of▁sentence｜>"),
    "glm4moe": ("glm4moe", "<|endoftext|>", False, "<|user|>"),
    "gptoss": ("gptoss", "<|return|>", False, "<|return|>"),
    "lfm2": ("lfm2", "<|im_end|>", True, "<|im_end|>"),
    "nemotron_3_nano": ("nemotron_3_nano", "<|im_end|>", False, "<|im_end|>"),
    "smolvlm": ("smolvlm", "<end_of_utterance>", False, "<end_of_utterance>"),
    "llava_next": ("llava_next", "</s>", True, "</s>"),
}
_SPECIAL = re.compile(r"<\|[A-Za-z_]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_turn>|<\|turn>|<turn\|>|<end_of_utterance>")
_TEXT_MARKS = {"<|user|>", "<|assistant|>", "<|system|>"}
"""Zephyr's are text, not tokens."""


def template_text(name: str) -> str:
    """Return a template of TRL's by its file's name, or the text itself."""
    path = TRL_TEMPLATES / f"{name}.jinja"
    return path.read_text(encoding="utf-8") if len(name) < 60 and path.exists() else name


@functools.cache
def _plain_tokenizer() -> PreTrainedTokenizerBase:
    return default_tokenizer(400)


def tokenizer_of(shape: str) -> PreTrainedTokenizerBase:
    """Return a tiny tokenizer with a shape's template and special tokens."""
    source, eos, adds_bos, _ = SHAPES[shape]
    return make_tokenizer(template_text(source), eos, adds_bos, _TEXT_MARKS if shape == "zephyr" else set())


def make_tokenizer(
    template: str, eos: str = "<eos>", adds_bos: bool = False, not_tokens: set[str] | None = None
) -> PreTrainedTokenizerBase:
    """Return a tiny tokenizer in which what looks like a special token in a template is one."""
    tokenizer = copy.deepcopy(_plain_tokenizer())
    marks = sorted(set(_SPECIAL.findall(template)) - (not_tokens or set()))
    tokenizer.add_special_tokens({"eos_token": eos, "additional_special_tokens": marks})
    tokenizer.chat_template = template
    if adds_bos:
        bos = str(tokenizer.bos_token)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    return tokenizer

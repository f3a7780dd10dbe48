"""Which causal models no reward head can be put on, since transformers has no sequence classifier for their family."""

from __future__ import annotations

from importlib.metadata import version

_NAMES = """
afmoe apertus aria_text bailing_hybrid bamba beam bert-generation bitnet blenderbot blenderbot-small blt codegen
cohere cohere2 cohere2_moe cpmant cwm dbrx deepseek_v32 deepseek_v4 dots1 dots3_note dots3_note_text emu3 ernie4_5
ernie4_5_moe exaone_moe falcon_h1 falcon_mamba flex_olmo flint fuyu gemma3n gemma3n_text gemma4 gemma4_assistant
gemma4_text gemma4_unified gemma4_unified_assistant gemma4_unified_text git glm4_moe glm4_moe_lite glm_moe_dsa
got_ocr2 gpt_neox_japanese granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared hrm_text
hy_v3 hy_v4 hyperclovax inkling2_text inkling_text internlm3 iquestcoder jais2 kimi_linear kolibri1 laguna lfm2
lfm2_moe lfm3 llama4 llama4_text longcat_flash mamba mamba2 marian mellum mimo_v2_flash minimax_m2
minimax_m3_vl_text mllama moshi moss_transcribe_diarize musicgen musicgen_melody nanochat nemotron_h olmo_hybrid
olmoe pegasus phi4_multimodal prophetnet qwen3_5_moe qwen3_5_moe_text qwen4_exp qwen4_exp_text recurrent_gemma rwkv
solar_open trocr vaultgemma whisper xglm xlstm youtu zaya
"""

WITHOUT_CLASSIFIER = frozenset(_NAMES.split())
"""Model types that transformers has as causal models alone; a test compares them with its lists."""


def no_classifier(what: str, kind: str) -> str:
    """Say that transformers has no sequence classifier for a kind of model, and what to do.

    Args:
        what: the model, as the user named it.
        kind: its model type.
    """
    return (
        f"{what}: transformers {version('transformers')} has no sequence classifier for {kind} models: it can't put a "
        "reward head on one, nor load one to score with. Fix: use a model of a family that has one (Llama, Qwen, "
        "Gemma, Mistral, Mixtral, Phi, OLMo, SmolLM3, GPT-OSS, DeepSeek, ...), or a transformers that adds it."
    )

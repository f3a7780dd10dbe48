"""How vLLM and SGLang run each classifier that an export can be, as their sources say.

Written by tools/engine_architectures.py from vLLM 0.32.0 (model_executor/models/registry.py, config/model.py), SGLang
0.5.23 (srt/models) and the classes of transformers 5.23.0.
"""

from __future__ import annotations

VLLM_VERSION = "0.32.0"
SGLANG_VERSION = "0.5.23"

VLLM_CLASSES: dict[str, str] = {
    "AXK1ForSequenceClassification": "AXK1ForCausalLM",
    "BloomForSequenceClassification": "BloomForCausalLM",
    "DeepseekV2ForSequenceClassification": "DeepseekV2ForCausalLM",
    "DeepseekV3ForSequenceClassification": "DeepseekV3ForCausalLM",
    "Exaone4ForSequenceClassification": "Exaone4ForCausalLM",
    "FalconForSequenceClassification": "FalconForCausalLM",
    "GemmaForSequenceClassification": "GemmaForCausalLM",
    "Gemma2ForSequenceClassification": "Gemma2ForCausalLM",
    "Gemma3ForSequenceClassification": "Gemma3ForCausalLM",
    "Glm4ForSequenceClassification": "Glm4ForCausalLM",
    "GPT2ForSequenceClassification": "GPT2ForSequenceClassification",
    "GptOssForSequenceClassification": "GptOssForCausalLM",
    "GPTJForSequenceClassification": "GPTJForCausalLM",
    "JambaForSequenceClassification": "JambaForSequenceClassification",
    "LlamaForSequenceClassification": "LlamaForCausalLM",
    "MiniCPM3ForSequenceClassification": "MiniCPM3ForCausalLM",
    "Ministral3ForSequenceClassification": "Ministral3ForCausalLM",
    "MistralForSequenceClassification": "MistralForCausalLM",
    "MixtralForSequenceClassification": "MixtralForCausalLM",
    "NemotronForSequenceClassification": "NemotronForCausalLM",
    "OPTForSequenceClassification": "OPTForCausalLM",
    "Phi3ForSequenceClassification": "Phi3ForCausalLM",
    "Qwen2ForSequenceClassification": "Qwen2ForCausalLM",
    "Qwen2MoeForSequenceClassification": "Qwen2MoeForCausalLM",
    "Qwen3ForSequenceClassification": "Qwen3ForCausalLM",
    "Qwen3_5ForSequenceClassification": "Qwen3_5ForCausalLM",
    "Qwen3MoeForSequenceClassification": "Qwen3MoeForCausalLM",
    "Qwen3NextForSequenceClassification": "Qwen3NextForCausalLM",
    "StableLmForSequenceClassification": "StableLmForCausalLM",
    "Zamba2ForSequenceClassification": "Zamba2ForCausalLM",
}
"""Classifiers that vLLM runs with a class of its own, and that class."""

VLLM_OVERRIDES: dict[str, str] = {
    "Gemma3TextForSequenceClassification": "Gemma3ForCausalLM",
    "Qwen3_5TextForSequenceClassification": "Qwen3_5ForCausalLM",
}
"""Classifiers for which vLLM has a class that it does not find by their name: it must be told (--hf-overrides)."""

VLLM_THROUGH_TRANSFORMERS: dict[str, str] = {
    "ArceeForSequenceClassification": "ArceeForCausalLM",
    "AXK2ForSequenceClassification": "AXK2ForSequenceClassification",
    "BioGptForSequenceClassification": "BioGptForSequenceClassification",
    "CohereCompassTextForSequenceClassification": "CohereCompassTextForSequenceClassification",
    "DiffLlamaForSequenceClassification": "DiffLlamaForSequenceClassification",
    "DogeForSequenceClassification": "DogeForSequenceClassification",
    "GlmForSequenceClassification": "GlmForCausalLM",
    "GPTBigCodeForSequenceClassification": "GPTBigCodeForCausalLM",
    "GPTNeoXForSequenceClassification": "GPTNeoXForCausalLM",
    "HeliumForSequenceClassification": "HeliumForSequenceClassification",
    "HunYuanDenseV1ForSequenceClassification": "HunYuanDenseV1ForCausalLM",
    "HunYuanMoEV1ForSequenceClassification": "HunYuanMoEV1ForCausalLM",
    "JetMoeForSequenceClassification": "JetMoeForSequenceClassification",
    "MiniMaxForSequenceClassification": "MiniMaxForSequenceClassification",
    "MinistralForSequenceClassification": "MinistralForSequenceClassification",
    "Mistral4ForSequenceClassification": "Mistral4ForSequenceClassification",
    "OlmoForSequenceClassification": "OlmoForCausalLM",
    "Olmo2ForSequenceClassification": "Olmo2ForCausalLM",
    "Olmo3ForSequenceClassification": "Olmo3ForCausalLM",
    "PersimmonForSequenceClassification": "PersimmonForSequenceClassification",
    "PhiForSequenceClassification": "PhiForCausalLM",
    "PhimoeForSequenceClassification": "PhimoeForSequenceClassification",
    "SeedOssForSequenceClassification": "SeedOssForCausalLM",
    "SmolLM3ForSequenceClassification": "SmolLM3ForCausalLM",
    "Starcoder2ForSequenceClassification": "Starcoder2ForCausalLM",
    "ZambaForSequenceClassification": "ZambaForSequenceClassification",
}
"""Classifiers that vLLM runs with transformers' code, slower, and the architecture that it looks up."""

VLLM_NOT: tuple[str, ...] = (
    "GPTNeoForSequenceClassification",
    "MptForSequenceClassification",
    "OpenAIGPTForSequenceClassification",
)
"""Classifiers that vLLM can't run."""

SGLANG_CLASSES: dict[str, bool] = {
    "Gemma2ForSequenceClassification": False,
    "LlamaForSequenceClassification": False,
    "Qwen2ForSequenceClassification": True,
    "Qwen3ForSequenceClassification": True,
}
"""Classifiers for which SGLang has a class, and whether its head has a bias that no checkpoint of transformers fills.

Of all others SGLang returns a normalised hidden vector, not a score.
"""

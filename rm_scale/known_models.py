"""Shapes of models that people train reward models from, so that a plan needs no network.

Each is what of the model's `config.json` on the hub decides memory and time. Training reads the real file.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]


def _sizes(hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, mlp: int, vocabulary: int) -> Config:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
    }


def _qwen3(hidden: int, layers: int, heads: int, mlp: int) -> Config:
    sizes = _sizes(hidden, layers, heads, 8, 128, mlp, 151936)
    return {"model_type": "qwen3", **sizes, "max_position_embeddings": 40960}


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, mlp: int) -> Config:
    sizes = _sizes(hidden, layers, heads, kv_heads, hidden // heads, mlp, 128256)
    return {"model_type": "llama", **sizes, "max_position_embeddings": 131072}


def _gemma3(
    hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, vocabulary: int, window: int, head_dim: int = 256
) -> Config:
    kinds = ["full_attention" if (layer + 1) % 6 == 0 else "sliding_attention" for layer in range(layers)]
    sizes = _sizes(hidden, layers, heads, kv_heads, head_dim, mlp, vocabulary)
    positions = 32768 if hidden < 2000 else 131072
    more = {"sliding_window": window, "layer_types": kinds, "max_position_embeddings": positions}
    return {"model_type": "gemma3_text", **sizes, **more}


def _with_vision_tower(text: Config) -> Config:
    return {"model_type": "gemma3", "text_config": text, "vision_config": {"model_type": "siglip_vision_model"}}


def _qwen2(hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, vocabulary: int) -> Config:
    sizes = _sizes(hidden, layers, heads, kv_heads, hidden // heads, mlp, vocabulary)
    return {"model_type": "qwen2", **sizes, "max_position_embeddings": 32768}


def _qwen3_moe(hidden: int, layers: int, heads: int, mlp: int, expert: int, positions: int) -> Config:
    return {
        "model_type": "qwen3_moe",
        **_sizes(hidden, layers, heads, 4, 128, mlp, 151936),
        "moe_intermediate_size": expert,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "max_position_embeddings": positions,
    }


def _gpt_oss(layers: int, experts: int) -> Config:
    return {
        "model_type": "gpt_oss",
        **_sizes(2880, layers, 64, 8, 64, 2880, 201088),
        "attention_bias": True,
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "layer_types": ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)],
        "max_position_embeddings": 131072,
        "quantization_config": {"quant_method": "mxfp4"},
    }


KNOWN_MODELS: dict[str, Config] = {
    "Qwen/Qwen2.5-0.5B-Instruct": _qwen2(896, 24, 14, 2, 4864, 151936),
    "Qwen/Qwen2.5-7B-Instruct": _qwen2(3584, 28, 28, 4, 18944, 152064),
    "Qwen/Qwen2.5-14B-Instruct": _qwen2(5120, 48, 40, 8, 13824, 152064),
    "meta-llama/Llama-2-13b-chat-hf": {
        "model_type": "llama",
        **_sizes(5120, 40, 40, 40, 128, 13824, 32000),
        "max_position_embeddings": 4096,
    },
    "Qwen/Qwen3-0.6B": _qwen3(1024, 28, 16, 3072),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 28, 16, 6144),
    "Qwen/Qwen3-4B": _qwen3(2560, 36, 32, 9728),
    "Qwen/Qwen3-8B": _qwen3(4096, 36, 32, 12288),
    "Qwen/Qwen3-14B": _qwen3(5120, 40, 40, 17408),
    "Qwen/Qwen3-30B-A3B": _qwen3_moe(2048, 48, 32, 6144, 768, 40960),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": _qwen3_moe(2048, 48, 32, 6144, 768, 262144),
    "Qwen/Qwen3-235B-A22B": _qwen3_moe(4096, 94, 64, 12288, 1536, 40960),
    "openai/gpt-oss-20b": _gpt_oss(24, 32),
    "openai/gpt-oss-120b": _gpt_oss(36, 128),
    "mistralai/Mixtral-8x7B-v0.1": {
        "model_type": "mixtral",
        **_sizes(4096, 32, 32, 8, 128, 14336, 32000),
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "max_position_embeddings": 32768,
    },
    "deepseek-ai/DeepSeek-V3": {
        "model_type": "deepseek_v3",
        **_sizes(7168, 61, 128, 128, 64, 18432, 129280),
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "max_position_embeddings": 163840,
        "quantization_config": {"quant_method": "fp8"},
    },
    "meta-llama/Llama-3.2-1B-Instruct": _llama(2048, 16, 32, 8, 8192),
    "meta-llama/Llama-3.2-3B-Instruct": _llama(3072, 28, 24, 8, 8192),
    "meta-llama/Llama-3.1-8B-Instruct": _llama(4096, 32, 32, 8, 14336),
    "google/gemma-3-1b-it": _gemma3(1152, 26, 4, 1, 6912, 262144, 512),
    "google/gemma-3-4b-it": _with_vision_tower(_gemma3(2560, 34, 8, 4, 10240, 262208, 1024)),
    "google/gemma-3-12b-it": _with_vision_tower(_gemma3(3840, 48, 16, 8, 15360, 262208, 1024)),
    "google/gemma-3-27b-it": _with_vision_tower(_gemma3(5376, 62, 32, 16, 21504, 262208, 1024, head_dim=128)),
    "allenai/Olmo-3-7B-Instruct": {
        "model_type": "olmo3",
        **_sizes(4096, 32, 32, 32, 128, 11008, 100278),
        "sliding_window": 4096,
        "layer_types": ["full_attention" if (n + 1) % 4 == 0 else "sliding_attention" for n in range(32)],
        "max_position_embeddings": 65536,
    },
    "mistralai/Ministral-8B-Instruct-2410": {
        "model_type": "mistral",
        **_sizes(4096, 36, 32, 8, 128, 12288, 131072),
        "sliding_window": 32768,
        "max_position_embeddings": 32768,
    },
    "microsoft/phi-4": {
        "model_type": "phi3",
        **_sizes(5120, 40, 40, 10, 128, 17920, 100352),
        "max_position_embeddings": 16384,
    },
}
"""By hub name; without what neither memory nor time depends on. Quantisation stands where no other weights exist."""

"""The models, rows and settings whose predicted activation memory `activations.py` compares with what torch counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rm_scale.planning.activations.settings import Options, Row
from rm_scale.planning.shape import ModelShape, shape_from_config

# What the models' config.json say.
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {
        "model_type": "llama",
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "vocab_size": 128256,
    },
    "Llama-2-7B": {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
    },
    "Llama-3.1-8B": {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
    },
    "Llama-2-13B": {
        "model_type": "llama",
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "intermediate_size": 13824,
        "vocab_size": 32000,
    },
    "Qwen2.5-7B": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
    },
    "Qwen3-4B": {
        "model_type": "qwen3",
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 9728,
        "vocab_size": 151936,
    },
    "Gemma-2-2B": {
        "model_type": "gemma2",
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "intermediate_size": 9216,
        "vocab_size": 256000,
        "attn_logit_softcapping": None,
    },
    "StarCoder2-3B": {
        "model_type": "starcoder2",
        "hidden_size": 3072,
        "num_hidden_layers": 30,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "intermediate_size": 12288,
        "vocab_size": 49152,
        "embedding_dropout": 0.0,
        "residual_dropout": 0.0,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "vocab_size": 151936,
    },
    "Qwen3.5-9B": {
        "model_type": "qwen3_5_text",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "intermediate_size": 12288,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "vocab_size": 248320,
    },
    "DeepSeek-V3": {
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "vocab_size": 129280,
    },
    "GPT-OSS-20B": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 2880,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "attention_bias": True,
        "vocab_size": 201088,
    },
    "Qwen1.5-MoE-A2.7B": {
        "model_type": "qwen2_moe",
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 5632,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "vocab_size": 151936,
    },
    "Qwen3-Next-80B-A3B": {
        "model_type": "qwen3_next",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "intermediate_size": 5120,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "vocab_size": 151936,
    },
    "OLMo-2-7B": {
        "model_type": "olmo2",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 100352,
    },
    "Phi-3-mini": {
        "model_type": "phi3",
        "hidden_size": 3072,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 8192,
        "vocab_size": 32064,
    },
}
LONG_CLASSES = ("Llama-3.2-1B", "Llama-2-7B", "Llama-3.1-8B", "Llama-2-13B", "Qwen2.5-7B")
RANK = 16


@dataclass(frozen=True)
class Case:
    """One micro-step: a pair of two responses of equal length in one row.

    Attributes:
        model: a name out of `MODELS`.
        options: how it is run.
        prompt, response: tokens of the prompt and of each response.
        shares: the prompt stands once.
        num_layers: fewer layers than the model has.
        vocab_size: of a smaller vocabulary than the model has.
    """

    model: str
    options: Options
    prompt: int = 768
    response: int = 256
    shares: bool = False
    num_layers: int | None = None
    vocab_size: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        """What config.json would say."""
        config = dict(MODELS[self.model])
        config["num_hidden_layers"] = self.num_layers or config["num_hidden_layers"]
        config["vocab_size"] = self.vocab_size or config["vocab_size"]
        return config

    @property
    def shape(self) -> ModelShape:
        """The same as the planner sees it."""
        return shape_from_config(self.config)

    @property
    def row(self) -> Row:
        """The row as the planner sees it."""
        return Row.of([(self.prompt, [self.response, self.response])], self.shares)

    @property
    def name(self) -> str:
        """A line for the table."""
        options = self.options
        name = self.model if self.num_layers is None else f"{self.model} with {self.num_layers} layers"
        parts = [name, f"{self.row.tokens} tokens", options.method, options.precision]
        parts += ["shared prompt"] if self.shares else []
        parts += ["checkpointing"] if options.checkpointing == "full" else []
        parts += ["reentrant"] if options.use_reentrant else []
        parts += ["dropout"] if options.lora_dropout else []
        parts += [options.attention] if options.attention != "varlen" else []
        parts += [options.head] if options.head != "score" else []
        return ", ".join(parts)


def all_cases() -> list[Case]:
    """Return five models with and without checkpointing, full and LoRA, in two lengths; then what else a run can be."""
    cases = []
    for model in LONG_CLASSES:
        for method in ("full", "lora"):
            for checkpointing in ("none", "full"):
                for factor in (1, 4):
                    options = Options(method=method, checkpointing=checkpointing, lora_rank=RANK)
                    cases.append(Case(model, options, 768 * factor, 256 * factor))
    return cases + [
        Case(model, Options(checkpointing=checkpointing, **settings), **row)
        for model, settings, row in _further()
        for checkpointing in ("none", "full")
    ]


def _further() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Return model, options and row of the further cases."""
    shared = {"prompt": 1536, "response": 256, "shares": True}
    return [
        ("Llama-3.2-1B", {"precision": "amp"}, {}),
        ("Llama-3.1-8B", {"precision": "amp"}, {}),
        ("Llama-3.1-8B", {"precision": "amp", "method": "lora"}, {}),
        ("Llama-3.2-1B", {"precision": "fp32"}, {}),
        ("Llama-3.1-8B", {"method": "lora", "lora_dropout": 0.05}, {}),
        ("Llama-3.1-8B", {"method": "lora", "lora_dropout": 0.05, "precision": "amp"}, {}),
        ("Llama-2-7B", {"method": "qlora"}, {}),
        ("Llama-3.1-8B", {"method": "qlora", "lora_dropout": 0.05}, {}),
        ("Llama-2-7B", {"method": "lora", "use_reentrant": True}, {}),
        ("Llama-3.1-8B", {}, shared),
        ("Llama-3.1-8B", {"method": "lora"}, shared),
        ("Llama-2-7B", {}, shared),
        ("Llama-3.2-1B", {"attention": "sdpa"}, {}),
        ("Llama-3.2-1B", {"attention": "matmul"}, {}),
        ("Llama-2-7B", {"head": "score_all"}, {}),
        ("Llama-2-7B", {"head": "lm"}, {}),
        ("Llama-2-7B", {"head": "lm", "method": "lora"}, {}),
        *((model, {}, {}) for model in ("Qwen3-4B", "Gemma-2-2B", "StarCoder2-3B", "OLMo-2-7B", "Phi-3-mini")),
        *(
            (model, {"method": method, **settings}, row)
            for model, settings, row in _PARTS
            for method in ("full", "lora")
        ),
    ]


# Experts, latent attention, delta nets and attention sinks.
_PARTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("Qwen3-30B-A3B", {}, {}),
    ("Qwen1.5-MoE-A2.7B", {}, {"num_layers": 4}),
    ("DeepSeek-V3", {}, {"num_layers": 8}),
    ("GPT-OSS-20B", {"attention": "matmul"}, {}),
    ("Qwen3.5-9B", {"head": "score_all"}, {}),
    ("Qwen3-Next-80B-A3B", {"head": "score_all"}, {"num_layers": 8}),
]


def allocator_cases() -> list[Case]:
    """Return small steps that a CPU does in seconds: the 1B model's widths, two layers, few tokens, in fp32."""
    settings: list[dict[str, Any]] = [
        {"checkpointing": "none"},
        {},
        {"use_reentrant": True},
        {"checkpointing": "none", "method": "lora"},
        {"method": "lora"},
    ]
    return [
        Case(
            "Llama-3.2-1B",
            Options(precision="fp32", attention="matmul", **changes),
            96,
            96,
            num_layers=2,
            vocab_size=1000,
        )
        for changes in settings
    ]

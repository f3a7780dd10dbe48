"""How each family of models fills its layers, read from `config.json`: the formulas that a test checks against classes.

A family that is not listed is not estimated: a guess that it is like Llama was wrong tenfold for mixtures of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rm_scale.planning.class_defaults import CLASS_DEFAULTS
from rm_scale.planning.layer_parts import DeltaNet, Experts, LatentAttention, LayerKind, LayerStyle, Mamba

_LAYER_NORM_STYLE = LayerStyle(gated_mlp=False, qkv_bias=True, output_bias=True, mlp_bias=True, norm_bias=True)
_QUERY_NORM_STYLE = LayerStyle(qk_norm="head")

LAYER_STYLES = {
    "llama": LayerStyle(),
    "mistral": LayerStyle(),
    "ministral": LayerStyle(),
    "ministral3": LayerStyle(),
    "gemma": LayerStyle(),
    "smollm3": LayerStyle(),
    "helium": LayerStyle(),
    "seed_oss": LayerStyle(),
    "minicpm3": LayerStyle(),
    "mistral4": LayerStyle(),
    "mixtral": LayerStyle(),
    "deepseek_v2": LayerStyle(),
    "deepseek_v3": LayerStyle(),
    "jamba": LayerStyle(),
    "arcee": LayerStyle(gated_mlp=False),
    "olmo": LayerStyle(norm_weights=False),
    "qwen2": LayerStyle(qkv_bias=True),
    "qwen2_moe": LayerStyle(qkv_bias=True),
    "qwen3": _QUERY_NORM_STYLE,
    "qwen3_moe": _QUERY_NORM_STYLE,
    "hunyuan_v1_dense": _QUERY_NORM_STYLE,
    "qwen3_next": LayerStyle(qk_norm="head", output_gate=True),
    "qwen3_5_text": LayerStyle(qk_norm="head", output_gate=True),
    "gemma2": LayerStyle(num_norms=4),
    "gemma3_text": LayerStyle(num_norms=4, qk_norm="head"),
    "exaone4": LayerStyle(qk_norm="head", norms_follow=True),
    "olmo2": LayerStyle(qk_norm="full", norms_follow=True),
    "olmo3": LayerStyle(qk_norm="full", norms_follow=True),
    "glm": LayerStyle(fused_mlp=True),
    "glm4": LayerStyle(fused_mlp=True, num_norms=4),
    "gpt_oss": LayerStyle(sinks=True),
    "phi3": LayerStyle(fused_qkv=True, fused_mlp=True),
    "phimoe": LayerStyle(norm_bias=True),
    "stablelm": LayerStyle(norm_bias=True),
    "nemotron": LayerStyle(gated_mlp=False, norm_bias=True),
    "phi": replace(_LAYER_NORM_STYLE, num_norms=1),
    "starcoder2": _LAYER_NORM_STYLE,
    "gpt_neox": replace(_LAYER_NORM_STYLE, fused_qkv=True),
    "gpt2": replace(_LAYER_NORM_STYLE, fused_qkv=True, learned_positions=True),
    "gpt_bigcode": replace(_LAYER_NORM_STYLE, fused_qkv=True, learned_positions=True),
    "gpt_neo": replace(_LAYER_NORM_STYLE, qkv_bias=False, learned_positions=True),
    "opt": replace(_LAYER_NORM_STYLE, learned_positions=True),
    "mpt": LayerStyle(gated_mlp=False, fused_qkv=True),
    "gptj": replace(_LAYER_NORM_STYLE, qkv_bias=False, output_bias=False, num_norms=1),
    "bloom": replace(_LAYER_NORM_STYLE, fused_qkv=True),
    "falcon": replace(_LAYER_NORM_STYLE, qkv_bias=False, output_bias=False, mlp_bias=False, fused_qkv=True),
}
"""transformers' model types; a test compares the parameters counted here with those of their classes."""

TEXT_TYPES = {"gemma3": "gemma3_text", "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
"""Types with a vision tower, and the type of their text model, which is all that a reward model of texts needs."""

_READ_AS_EXPERTS = frozenset(["gate_proj", "up_proj", "down_proj"])
NOT_ADAPTED = {
    "qwen3_moe": _READ_AS_EXPERTS,
    "qwen3_next": _READ_AS_EXPERTS,
    "deepseek_v2": _READ_AS_EXPERTS,
    "deepseek_v3": _READ_AS_EXPERTS,
    "jamba": frozenset(["dt_proj"]),
}
"""Linear layers without an adapter unless asked for, as `modeling/adapters.py` explains and a test compares: PEFT would
read these names as the experts, and Jamba reads one weight past its layer."""

_OF_QWEN = _READ_AS_EXPERTS | {"gate"}
_OF_MIXTRAL = frozenset(["gate", "w1", "w2", "w3"])
READ_AS_EXPERTS = {
    "qwen3_moe": _OF_QWEN,
    "qwen3_next": _OF_QWEN,
    "deepseek_v2": _OF_QWEN,
    "deepseek_v3": _OF_QWEN,
    "hunyuan_v1_moe": _OF_QWEN,
    "mixtral": _OF_MIXTRAL,
    "minimax": _OF_MIXTRAL,
}
"""Names in `lora_target_modules` by which PEFT adapts all experts of such models, or the router; a test asks PEFT."""

EXPERTS_ARE_IN = {"jamba": "feed_forward"}
"""The part of a layer that holds its experts, where it is not "mlp"; a test compares the names with the classes'."""

WITHOUT_BALANCING_LOSS = frozenset(["deepseek_v2", "deepseek_v3", "mistral4"])
"""Mixtures for whose routers transformers has no load-balancing loss; a test asks their classes."""

NOT_QUANTISED = frozenset(["falcon"])
"""Types whose linear layers are a subclass of torch's, which bitsandbytes leaves in 16 bits."""

Text = dict[str, Any]


_ALIASES = (
    ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "expansion_ratio"),
    ("max_position_embeddings", "n_positions"),
    ("num_key_value_heads", "num_kv_heads"),
    ("num_experts", "num_local_experts", "n_routed_experts"),
    ("num_experts_per_tok", "experts_per_token"),
    ("sliding_window", "attention_window"),
)
"""Names for one and the same size, of which a `config.json` has one."""


def with_class_defaults(text: Text, model_type: str) -> Text:
    """Return the values with those that the model's class fills in where nothing is said; null is something said."""
    given = set(text)
    for names in _ALIASES:
        if given & set(names):
            given |= set(names)
    filled = {name: value for name, value in CLASS_DEFAULTS[model_type].items() if name not in given}
    return {**filled, **text}


class Numbers:
    """Whole numbers of a `config.json`, by any of several names."""

    def __init__(self, text: Text, refuse: Callable[[str], Exception]) -> None:
        self.text, self._refuse = text, refuse

    def get(self, *names: str, default: int = 0) -> int:
        """Return the first that is there and not 0, else the default.

        Raises:
            Exception: made by `refuse`: it is no number.
        """
        for name in names:
            value = self.text.get(name)
            if value and not isinstance(value, int | float):
                raise self._refuse(f"{name}={str(value)[:80]}: must be a number")
            if value:
                return int(value)
        return default

    def need(self, *names: str) -> int:
        """Return the first that is there.

        Raises:
            Exception: made by `refuse`: none is.
        """
        for name in names:
            value = self.text.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        raise self._refuse(f"has none of {', '.join(names)}, so its shape can't be read")


def style_of(text: Text, model_type: str) -> LayerStyle:
    """Return the style of a known family, with the biases and norms that its `config.json` turns on or off."""
    style = LAYER_STYLES[model_type]
    if "attention_bias" in text and model_type != "gpt_neox":
        on = bool(text["attention_bias"])
        # MLA puts the bias on its narrow projections; see `_latent_attention` in parameters.
        style = replace(style, qkv_bias=on, output_bias=on and model_type not in {"glm", "glm4", "seed_oss"})
    if model_type == "glm4":
        style = replace(style, output_bias=False)
    if "attention_out_bias" in text and model_type == "seed_oss":
        style = replace(style, output_bias=bool(text["attention_out_bias"]))
    if "mlp_bias" in text:
        style = replace(style, mlp_bias=bool(text["mlp_bias"]))
    if model_type == "starcoder2" and "use_bias" in text:
        on = bool(text["use_bias"])
        style = replace(style, qkv_bias=on, output_bias=on, mlp_bias=on)
    if model_type == "qwen2_moe" and "qkv_bias" in text:
        style = replace(style, qkv_bias=bool(text["qkv_bias"]))
    if model_type == "stablelm":
        style = replace(
            style,
            qkv_bias=bool(text.get("use_qkv_bias")),
            num_norms=1 if text.get("use_parallel_residual") else 2,
        )
    if model_type == "falcon":
        on = bool(text.get("bias"))
        style = replace(style, qkv_bias=on, output_bias=on, mlp_bias=on, num_norms=_falcon_norms(text))
    return style


def _falcon_norms(text: Text) -> int:
    if text.get("new_decoder_architecture"):
        count = text.get("num_ln_in_parallel_attn")
        return 2 if count is None else int(count)
    return 1 if text.get("parallel_attn", True) else 2


def key_heads(text: Text, model_type: str, num_heads: int, numbers: Numbers) -> int:
    """Return the heads of keys and values."""
    if model_type == "falcon":
        if text.get("new_decoder_architecture"):
            return numbers.get("num_kv_heads", default=num_heads)
        return 1 if text.get("multi_query", True) else num_heads
    if model_type == "gpt_bigcode":
        return 1 if text.get("multi_query", True) else num_heads
    return numbers.get("num_key_value_heads", default=num_heads)


# --- Which layer is of which kind -------------------------------------------------------------------------------------


def layer_kinds(text: Text, model_type: str, num_layers: int, numbers: Numbers) -> tuple[LayerKind, ...]:
    """Return the kind of each layer, in order."""
    has_experts = _HAS_EXPERTS.get(model_type, _never)
    return tuple(
        LayerKind(
            mixer=_mixer(text, model_type, layer, numbers),
            feed_forward="experts" if has_experts(text, numbers, layer) else "mlp",
            window=_window(text, model_type, layer, numbers),
        )
        for layer in range(num_layers)
    )


def _mixer(text: Text, model_type: str, layer: int, numbers: Numbers) -> Any:
    if model_type in {"deepseek_v2", "deepseek_v3", "minicpm3", "mistral4"}:
        return "latent"
    if model_type in {"qwen3_next", "qwen3_5_text"}:
        return "attention" if _layer_type(text, layer, numbers) == "full_attention" else "delta"
    if model_type == "jamba":
        period, offset = numbers.get("attn_layer_period", default=8), numbers.get("attn_layer_offset", default=0)
        return "attention" if layer % period == offset else "mamba"
    return "attention"


def _layer_type(text: Text, layer: int, numbers: Numbers) -> str:
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and layer < len(kinds):
        return str(kinds[layer])
    interval = numbers.get("full_attention_interval", default=4)
    return "linear_attention" if (layer + 1) % interval else "full_attention"


def _window(text: Text, model_type: str, layer: int, numbers: Numbers) -> int | None:
    window = numbers.get("sliding_window", "attention_window") or None
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and layer < len(kinds):
        return window if kinds[layer] == "sliding_attention" else None
    if model_type in _EVERY_SO_MANY_IS_FULL:
        every = numbers.get(
            "sliding_window_pattern", "_sliding_window_pattern", default=_EVERY_SO_MANY_IS_FULL[model_type]
        )
        return window if (layer + 1) % every else None
    if model_type in {"qwen2", "qwen2_moe", "qwen3", "qwen3_moe"}:
        first = numbers.get("max_window_layers")
        return window if text.get("use_sliding_window") and layer >= first else None
    return window if model_type in {"ministral", "mistral", "mixtral", "phi3", "phimoe", "starcoder2"} else None


_EVERY_SO_MANY_IS_FULL = {"exaone4": 4, "gemma2": 2, "gemma3_text": 6, "gpt_oss": 2, "olmo3": 4}
"""Of every so many layers the last sees all tokens, the others a window, where `layer_types` is not given."""


def _every_so_many(text: Text, numbers: Numbers, layer: int) -> bool:
    only_mlp = text.get("mlp_only_layers") or []
    step = numbers.get("decoder_sparse_step", default=1)
    return layer not in only_mlp and numbers.get("num_experts", "num_local_experts") > 0 and (layer + 1) % step == 0


def _after_the_first(text: Text, numbers: Numbers, layer: int) -> bool:
    return layer >= numbers.get("first_k_dense_replace")


def _jamba_has_experts(text: Text, numbers: Numbers, layer: int) -> bool:
    period, offset = numbers.get("expert_layer_period", default=2), numbers.get("expert_layer_offset", default=0)
    return numbers.get("num_experts", "num_local_experts", default=16) > 1 and layer % period == offset


def _never(text: Text, numbers: Numbers, layer: int) -> bool:
    return False


def _always(text: Text, numbers: Numbers, layer: int) -> bool:
    return True


_HAS_EXPERTS: dict[str, Callable[[Text, Numbers, int], bool]] = {
    "mixtral": _always,
    "phimoe": _always,
    "gpt_oss": _always,
    "qwen2_moe": _every_so_many,
    "qwen3_moe": _every_so_many,
    "qwen3_next": _every_so_many,
    "deepseek_v2": _after_the_first,
    "deepseek_v3": _after_the_first,
    "mistral4": _after_the_first,
    "jamba": _jamba_has_experts,
}

# --- The parts' sizes -------------------------------------------------------------------------------------------------


def experts(model_type: str, numbers: Numbers) -> Experts | None:
    """Return the experts of the layers that have some."""
    if model_type not in _HAS_EXPERTS:
        return None
    if model_type in {"mixtral", "phimoe", "gpt_oss"}:
        chosen = numbers.get("num_experts_per_tok", "experts_per_token", default=2)
        width = numbers.need("intermediate_size")
        return Experts(numbers.need("num_local_experts", "num_experts"), chosen, width, biases=model_type == "gpt_oss")
    if model_type == "jamba":
        chosen, width = numbers.get("num_experts_per_tok", default=2), numbers.need("intermediate_size")
        return Experts(numbers.get("num_experts", "num_local_experts", default=16), chosen, width)
    width = numbers.need("moe_intermediate_size")
    if model_type.startswith(("deepseek", "mistral4")):
        num, chosen = numbers.need("n_routed_experts", "num_local_experts"), numbers.need("num_experts_per_tok")
        return Experts(num, chosen, width, shared_width=width * numbers.get("n_shared_experts"))
    num, chosen = numbers.need("num_experts", "num_local_experts"), numbers.need("num_experts_per_tok")
    shared = numbers.get("shared_expert_intermediate_size")
    return Experts(num, chosen, width, shared_width=shared, shared_gate=shared > 0)


def latent_attention(model_type: str, numbers: Numbers) -> LatentAttention | None:
    """Return the sizes of multi-head latent attention."""
    if model_type not in {"deepseek_v2", "deepseek_v3", "minicpm3", "mistral4"}:
        return None
    return LatentAttention(
        query_rank=numbers.get("q_lora_rank") or None,
        kv_rank=numbers.need("kv_lora_rank"),
        rope_dim=numbers.need("qk_rope_head_dim"),
        nope_dim=numbers.need("qk_nope_head_dim"),
        value_dim=numbers.get("v_head_dim") or numbers.need("hidden_size") // numbers.need("num_attention_heads"),
    )


def delta_net(model_type: str, numbers: Numbers) -> DeltaNet | None:
    """Return the sizes of gated delta nets."""
    if model_type not in {"qwen3_next", "qwen3_5_text"}:
        return None
    return DeltaNet(
        num_key_heads=numbers.need("linear_num_key_heads"),
        num_value_heads=numbers.need("linear_num_value_heads"),
        key_dim=numbers.need("linear_key_head_dim"),
        value_dim=numbers.need("linear_value_head_dim"),
        kernel=numbers.get("linear_conv_kernel_dim", default=4),
        fused=model_type == "qwen3_next",
    )


def mamba(model_type: str, numbers: Numbers, hidden_size: int) -> Mamba | None:
    """Return the sizes of Mamba layers."""
    if model_type != "jamba":
        return None
    return Mamba(
        inner=numbers.get("mamba_expand", default=2) * hidden_size,
        state=numbers.get("mamba_d_state", default=16),
        kernel=numbers.get("mamba_d_conv", default=4),
        rank=numbers.get("mamba_dt_rank", default=-(-hidden_size // 16)),
        conv_bias=bool(numbers.text.get("mamba_conv_bias", True)),
        projection_bias=bool(numbers.text.get("mamba_proj_bias", False)),
    )

"""Write rm_scale/planning/class_defaults.py from the installed transformers:  python tools/class_defaults.py

A `config.json` may leave out what its class fills in. The planner, which imports no transformers, fills in the same.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY)]

from transformers import AutoConfig  # noqa: E402

from rm_scale.planning.families import LAYER_STYLES  # noqa: E402

FILE = REPOSITORY / "rm_scale" / "planning" / "class_defaults.py"
READ = (
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "vocab_size", "num_key_value_heads", "num_kv_heads"),
    *("head_dim", "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "expansion_ratio"),
    *("max_position_embeddings", "n_positions", "attention_bias", "attention_out_bias", "mlp_bias", "use_bias"),
    *("qkv_bias", "use_qkv_bias", "bias", "multi_query", "parallel_attn", "new_decoder_architecture"),
    *("use_parallel_residual", "sliding_window", "attention_window", "use_sliding_window", "max_window_layers"),
    *("decoder_sparse_step", "num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"),
    *("experts_per_token", "moe_intermediate_size", "shared_expert_intermediate_size", "n_shared_experts"),
    *("first_k_dense_replace", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    *("linear_conv_kernel_dim", "attn_layer_period", "attn_layer_offset", "expert_layer_period"),
    *("expert_layer_offset", "mamba_d_state", "mamba_d_conv", "mamba_expand", "mamba_conv_bias", "mamba_proj_bias"),
)
"""What the planner's formulas read of a `config.json`, but for hidden size and layers, which each model must state."""
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")


def defaults_of(model_type: str) -> dict[str, Any]:
    """Return what a class fills in, as far as the formulas read it; not what it works out from other values."""
    values = AutoConfig.for_model(model_type).to_dict()
    others = {name: 2 * values[name] for name in ("hidden_size", "n_embd", "d_model", *_HEADS) if values.get(name)}
    half = {name: 2 * values[name] for name in _HEADS if values.get(name)}
    changed = [AutoConfig.for_model(model_type, **given).to_dict() for given in (others, half)]
    return {
        name: values[name]
        for name in READ
        if values.get(name) is not None
        and (name in _HEADS or all(other.get(name) == values[name] for other in changed))
    }


def text() -> str:
    """Return the module."""
    rows = {model_type: defaults_of(model_type) for model_type in sorted(LAYER_STYLES)}
    return f'''"""What transformers' classes fill in where a `config.json` says nothing, as far as the formulas read it.

Written by tools/class_defaults.py; a test compares it with the installed transformers.
"""

from __future__ import annotations

CLASS_DEFAULTS: dict[str, dict[str, int | float | bool]] = {rows!r}
'''


def main() -> None:
    """Write the module and format it."""
    logging.disable(logging.WARNING)
    FILE.write_text(text(), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "ruff", "format", "-q", str(FILE)], check=True)


if __name__ == "__main__":
    main()

"""Choose the attention backend of packed rows, and say why one can't be used on a device, type or model."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from rm_scale.errors import ConfigError


def choose_backend(
    asked: str, device: str, dtype: str, has_softcap: bool, head_dim: int | None = None, has_sinks: bool = False
) -> str:
    """Return the backend for packed rows: the one asked for if it can do the job; for "auto" by device and type.

    Args:
        asked: a name out of `rm_scale.batching.packed.attention.BACKENDS`, or "auto".
        device: "cuda" or "cpu".
        dtype: compute type, such as "bfloat16".
        has_softcap: the model caps its attention scores.
        head_dim: size of its attention heads; `None` where it is not known.
        has_sinks: its attention has sinks (`has_sinks`).

    Raises:
        ConfigError: the backend asked for can't run there, or can't do what the model needs.
    """
    if asked == "auto":
        if device == "cpu":
            return "matmul"
        best = ("flex",) if has_softcap else ("flex", "sdpa") if has_sinks else ("varlen", "sdpa")
        fits = [name for name in best if _reason_against(name, device, dtype, has_softcap, has_sinks, head_dim) is None]
        return fits[0] if fits else "matmul"
    reason = _reason_against(asked, device, dtype, has_softcap, has_sinks, head_dim)
    if reason is not None:
        raise ConfigError([f"packed_attention={asked}: {reason}. Fix: leave it out, or use matmul."])
    return asked


def _reason_against(
    name: str, device: str, dtype: str, has_softcap: bool, has_sinks: bool, head_dim: int | None
) -> str | None:
    """Say why a backend can't be used; `None` when it can."""
    if name in {"sdpa", "varlen"} and has_softcap:
        return "can't cap attention scores, as this model does"
    if name == "varlen" and has_sinks:
        return "has no attention sinks, which this model needs"
    if name == "varlen":
        return _reason_against_varlen(device, dtype, head_dim)
    return _reason_against_flex(device, dtype, head_dim) if name == "flex" else None


def _reason_against_varlen(device: str, dtype: str, head_dim: int | None) -> str | None:
    """Apply the rules of flash attention in torch 2.13 (aten's flash_api.cpp and sdp_utils.cpp)."""
    capability = torch.cuda.get_device_capability() if device == "cuda" else (0, 0)
    if capability < (8, 0) or dtype not in {"bfloat16", "float16"}:
        return f"needs a CUDA device of compute capability 8 or more and bfloat16 or float16, here {device}, {dtype}"
    # A CPU build has no device to ask about; there only tests come this far.
    if torch.version.cuda is not None and not torch.backends.cuda.is_flash_attention_available():
        return "needs flash attention, which this build of torch was made without"
    if head_dim is None:
        return None
    if head_dim > 256 or head_dim % 8:
        return f"needs heads of at most 256, a multiple of 8, here {head_dim}"
    if has_little_shared_memory(capability) and 192 < head_dim <= 224:
        return f"has no backward pass for heads of 193 to 224 on this GPU, here {head_dim}"
    return None


def _reason_against_flex(device: str, dtype: str, head_dim: int | None) -> str | None:
    """Apply the rules of FlexAttention's Triton kernels in torch 2.13 (`torch._inductor.kernel.flex`)."""
    if device == "cpu":
        return "has no backward pass on a CPU"
    capability = torch.cuda.get_device_capability()
    if capability < (7, 0) or (dtype == "bfloat16" and capability < (8, 0)):
        return f"needs compute capability 7 or more, and 8 for bfloat16, here {_dotted(capability)}, {dtype}"
    if head_dim is not None and not 16 <= head_dim <= 256:
        return f"needs heads of 16 to 256, here {head_dim}"
    if head_dim is not None and head_dim > 128 and dtype == "float32" and capability < (8, 0):
        return f"needs more shared memory for heads over 128 in float32 than this GPU has, here {head_dim}"
    return None


def has_little_shared_memory(capability: tuple[int, int]) -> bool:
    """Tell whether a GPU has 64 to 100 KiB of shared memory per block, as consumer and inference cards do.

    A100 has 163 and H100 227 (CUDA C++ Programming Guide, table of compute capabilities).
    """
    return capability[0] in {7, 12} or capability in {(8, 6), (8, 9)}


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(str(part) for part in capability)


def head_size(config: PreTrainedConfig) -> int:
    """Return the numbers per attention head of a model, for `choose_backend`."""
    text = config.get_text_config()
    if getattr(text, "qk_nope_head_dim", None) is not None:
        # Latent attention: parts without and with rotary positions.
        return int(text.qk_nope_head_dim + text.qk_rope_head_dim)
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def has_sinks(model: torch.nn.Module) -> bool:
    """Tell whether a model's attention has sinks, for `choose_backend`."""
    return any(name.rpartition(".")[2] == "sinks" for name, _ in model.named_parameters())

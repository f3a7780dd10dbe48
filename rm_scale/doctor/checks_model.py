"""Checks of the software in use: import every library, and score a pair with a tiny model loaded as for training."""

from __future__ import annotations

import importlib
import math
import tempfile
from pathlib import Path
from typing import Any

from rm_scale.doctor.findings import Check
from rm_scale.texts import typed_line

_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "bitsandbytes")
_TEXTS = ["What is 2 + 2? 4", "What is 2 + 2? 5", "Say hello. Hello there", "Count: 0 1 2 3 4 5 6 7 8 9"]
# Both layouts round differently in bfloat16, which holds 3 digits; rewards here are of size 1.
_TOLERANCE = 0.1


def imports() -> list[Check]:
    """Import each library. An extension built for another torch or driver fails here, not after an hour."""
    broken = [(name, error) for name in _LIBRARIES if (error := _import_error(name)) is not None]
    if not broken:
        return [Check("imports", "pass", f"{len(_LIBRARIES)} libraries")]
    return [_broken_import(name, error) for name, error in broken]


def _import_error(name: str) -> str | None:
    try:
        importlib.import_module(name)
    except BaseException as error:  # an extension can raise anything
        return typed_line(error, 300)
    return None


def _broken_import(name: str, error: str) -> Check:
    fix = f"pip install --force-reinstall --no-deps {name}, in the version that the line {name} asks for."
    if name == "bitsandbytes":
        return Check("imports", "warn", f"{name}: {error}", f"{fix} Only QLoRA and 8-bit optimizers need it.")
    return Check("imports", "fail", f"{name}: {error}", fix)


def forward(device: str) -> Check:
    """Score one pair with a tiny Llama, in a packed row and in padded rows; both must be finite and agree.

    Args:
        device: "cpu" or "cuda:N".
    """
    import torch

    with tempfile.TemporaryDirectory(prefix="rm_scale_doctor_") as scratch:
        model, pad_token_id, backend, pair = _load_tiny(Path(scratch), device)
    head = _head_of(model)
    if not bool(torch.isfinite(head).all()) or not bool(head.any()):
        fix = "Check the versions of torch and transformers above; report this with the table."
        return Check("model forward", "fail", "the new head is not finite, or zero", fix)
    return judge_forward(_rewards(model, pair, pad_token_id, device), backend, device)


def judge_forward(rewards: dict[str, list[float]], backend: str, device: str) -> Check:
    """Compare the rewards of one pair in both layouts.

    Args:
        rewards: of chosen and rejected, by "packed" and "padded".
        backend: attention of packed rows.
        device: where it ran.
    """
    name = "model forward"
    packed, padded = rewards["packed"], rewards["padded"]
    seen = f"rewards {padded[0]:.3f} and {padded[1]:.3f} on {device}, packed attention {backend}"
    if not all(math.isfinite(value) for value in [*packed, *padded]):
        fix = "The device computes wrong: try another one, then other versions of driver and torch."
        return Check(name, "fail", f"rewards are not finite: {rewards} on {device}", fix)
    if max(abs(a - b) for a, b in zip(packed, padded, strict=True)) > _TOLERANCE:
        fix = "Train with --packing none, and report this with the table."
        return Check(name, "fail", f"packed and padded rows disagree: {rewards} on {device}, {backend}", fix)
    if device != "cpu" and backend == "sdpa":
        fix = "A GPU of compute capability 8 or more runs packed rows by flash attention."
        return Check(name, "warn", f"{seen}, the slower one", fix)
    return Check(name, "pass", seen)


def _load_tiny(folder: Path, device: str) -> tuple[Any, int, str, list[list[int]]]:
    """Return the model on its device, the padding token's id, the attention backend, and the pair's token ids."""
    import torch
    from transformers.utils import logging

    from rm_scale.batching.packed.backend_choice import choose_backend, head_size
    from rm_scale.config_parsing import parse_config
    from rm_scale.demo.assets import make_tiny_model
    from rm_scale.modeling.loading import load_for_training
    from rm_scale.modeling.tokenizers import load_tokenizer
    from rm_scale.planning.plan import make_plan

    # A new head is what is wanted here; transformers would report it as a loss.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tiny = make_tiny_model(folder / "model", texts=_TEXTS, vocab_size=300, hidden_size=32)
    (folder / "pairs.jsonl").touch()
    flags: dict[str, str | Path] = {
        "model_name_or_path": tiny,
        "dataset_path": folder / "pairs.jsonl",
        "output_dir": folder / "out",
    }
    # With DeepSpeed, as most runs have it, the backbone is held in bfloat16.
    flags |= {"deepspeed": "zero2", "packing": "prefix_shared"}
    parsed = parse_config([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    kind = torch.device(device).type
    plan = make_plan(parsed, 1, kind, check_output=False)
    tokenizer = load_tokenizer(str(tiny))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = load_for_training(parsed.config, plan, tokenizer).model.to(device)
    backend = choose_backend("auto", kind, plan.compute_dtype, has_softcap=False, head_dim=head_size(model.config))
    pair = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in _TEXTS[:2]]
    return model, tokenizer.pad_token_id, backend, pair


def _head_of(model: Any) -> Any:
    from rm_scale.modeling.head import active_head

    return active_head(model).effective_weight()


def _rewards(model: Any, pair: list[list[int]], pad_token_id: int, device: str) -> dict[str, list[float]]:
    from rm_scale.modeling.token_scores import score_packed, score_sequences

    return {
        "packed": score_packed(model, [pair], pad_token_id, max_tokens=256, device=device)[0],
        "padded": score_sequences(model, pair, pad_token_id, batch_size=2, device=device),
    }


def four_bits(device: str) -> Check:
    """Quantise a matrix to NF4 and back with bitsandbytes, on the device that QLoRA would use."""
    import torch
    from bitsandbytes import functional

    matrix = torch.linspace(-1, 1, 64 * 64, device=device).reshape(64, 64).to(torch.bfloat16)
    packed, state = functional.quantize_4bit(matrix, quant_type="nf4")
    error = float((functional.dequantize_4bit(packed, state) - matrix).abs().max())
    if error < 0.2:  # NF4's widest gap between neighbours is 0.3
        return Check("4-bit weights", "pass", f"NF4 there and back on {device}, largest error {error:.2f}")
    fix = "Install the tested bitsandbytes, or use --use_peft without --load_in_4bit."
    return Check("4-bit weights", "fail", f"NF4 there and back on {device} is off by {error:.2f}", fix)

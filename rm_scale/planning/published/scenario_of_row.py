"""One row of published measurements as a scenario: what each column says, one function per family of columns.

What a row leaves open is taken from the code it was measured with, and said here beside the rule.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from rm_scale.planning.families import LAYER_STYLES
from rm_scale.planning.hardware import GBIT, Device, known_devices
from rm_scale.planning.parameters import adapter_tensors, layer_tensors
from rm_scale.planning.scenario import Buckets, Head, Method, Precision, RowLoad, Scenario, default_buckets
from rm_scale.planning.shape import ModelShape

Row = dict[str, str]

ALPACA_TOKENS = 130
"""Mean tokens of an Alpaca example with its template (52,002 examples)."""

ALPACA_LONGEST = 1304
"""Tokens of its longest example with Llama 2's vocabulary."""

PADDING = 0.3
"""n sequences padded to their longest take n^0.3 times their tokens: log-normal lengths with a deviation of 0.45."""

CUMULATIVE = (
    "packed",
    "compile",
    "chunked ce",
    "act ckpt",
    "opt in bwd",
    "act offload",
    "8bit adamw",
    "lora",
    "qlora",
)
"""torchtune's table adds one technique per row, in this order; a row names the last one."""

_DEVICE_BY_NAME_PART = (
    ("h100 96gb", "h100-96g"),
    ("h200", "h200"),
    ("h100", "h100-80g"),
    ("h800", "h100-80g"),
    ("b200", "b200"),
    ("mi300", "mi300x"),
    ("a100-sxm4-40", "a100-40g"),
    ("a100_40", "a100-40g"),
    ("a100-40", "a100-40g"),
    ("a100 40", "a100-40g"),
    ("a100", "a100-80g"),
    ("a800", "a100-80g"),
    ("a6000", "a6000"),
    ("a40", "a40"),
    ("l40s", "l40s"),
    ("4090", "4090"),
    ("3090", "3090"),
)
"""Devices of the planner's table by a part of what a row's source calls them; the first that matches counts."""

_LIKE = (
    ("mpt", "mpt"),
    ("qwen3", "qwen3"),
    ("qwen", "qwen2"),
    ("stablelm-alpha", "gpt_neox"),
    ("pythia", "gpt_neox"),
    ("phi", "phi"),
    ("falcon", "falcon"),
    ("gemma", "gemma"),
    ("mistral", "mistral"),
    ("opt", "opt"),
)
"""Architectures by how a model's name begins; others are Llama-like or, without a gated MLP, GPT-NeoX-like."""

_TARGETS = {
    "q,v": ("q_proj", "v_proj"),
    "c_attn,c_proj,w1,w2": None,
    "*_proj": None,
    "all-linear": None,
    "all": None,
    "": ("q_proj", "v_proj"),
}
"""Adapted layers; `None`: all linear ones. Empty: PEFT's and torchtune's default for Llama."""


class NotModelled(Exception):
    """A row's setup is outside of what the planner knows; the text says why."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of a sequence.

    Attributes:
        mean: as it is.
        padded: filled up to the longest of its micro-batch.
        longest: of all.
    """

    mean: float
    padded: float
    longest: float


def scenario_of_row(row: Row) -> Scenario:
    """Read a row as a scenario.

    Raises:
        NotModelled: the planner has no model of this setup.
    """
    _refuse(row)
    device, shape = device_of(row), _shape(row)
    ranks, sequences = number(row, "n_gpus") or 1, _sequences(row)
    method, lengths = _method(row), lengths_of(row)
    scenario = Scenario(
        shape=shape,
        device=_with_interconnect(device, row),
        num_devices=ranks,
        num_nodes=math.ceil(ranks / device.devices_per_node),
        load=_load(row, sequences, lengths),
        max_row_tokens=sequences * lengths.longest if lengths and lengths.longest > lengths.padded else None,
        num_micro_steps=_micro_steps(row, sequences, ranks),
        method=method,
        lora_rank=_rank(row),
        lora_targets=_targets(row, shape),
        lora_dropout=_dropout(row),
        nested_quant="dq" in row["method"] or row["source"] == "pytorch/torchtune",
        zero_stage=_stage(row),
        offload_param="cpu" if "offload" in row["sharding"].lower() else "none",
        offload_optimizer="cpu" if "offload" in row["sharding"].lower() else "none",
        precision=_precision(row),
        master_bytes=0 if is_pure(row) else 4,
        checkpointing=row["act_ckpt"].startswith("full"),
        attention="flash1" if row["attn"].startswith("flash(") else "varlen",
        packed=True,
        head=_head(row),
        optimizer_bytes=_optimizer_bytes(row),
        buckets=_buckets(row, shape),
        fused=is_fused(row),
        selective_checkpointing=row["act_ckpt"].startswith("selective"),
        tied_head="tied" in row["head"].replace("untied", ""),
        whole_layers="FSDP" in row["sharding"],
        # PEFT's comparison runs torch's AdamW as it comes, in loops over lists of tensors.
        fused_update=row["source"] != "huggingface/peft",
        head_chunks=8 if "torchtune" in row["source"] and _head(row) == "lm_chunked" else None,
    )
    if method != "full" and not scenario.adapters:
        raise NotModelled(f"lora_targets {row['lora_targets']!r} name no layer of the model")
    return scenario


def number(row: Row, column: str) -> int | None:
    """Return the whole number that a cell begins with; `None` without one."""
    found = re.match(r"\s*(\d+)", row[column])
    return int(found.group(1)) if found else None


def techniques(row: Row) -> frozenset[str]:
    """Return all techniques of a row in a cumulative table, by the names of `CUMULATIVE`."""
    found = re.search(r"cumulative: \+?(.*)", row["notes"].lower())
    last = found.group(1) if found else ""
    if last not in CUMULATIVE:
        return frozenset()
    used = set(CUMULATIVE[: CUMULATIVE.index(last) + 1])
    if "lora" in used:
        # Adapters take the place of what keeps gradients and optimizer state of all weights small.
        used -= {"opt in bwd", "8bit adamw"}
    return frozenset(used)


def is_pure(row: Row) -> bool:
    """Tell whether weights, gradients and optimizer state are all in bfloat16."""
    pure = row["precision"] in {"bf16 pure", "bf16-true"} or "PURE" in row["sharding"]
    return pure or row["source"] == "huggingface/peft"


def is_fused(row: Row) -> bool:
    """Tell whether element-wise operations are fused: compiled, or kernels of Liger or Transformer Engine."""
    notes = f"{row['head']} {row['notes']}".lower()
    return "liger" in notes or is_compiled(row) or row["attn"].startswith("TE")


def is_compiled(row: Row) -> bool:
    """Tell whether torch.compile was used, which also keeps less for the backward pass."""
    return "compile" in techniques(row) or "+compile" in row["notes"].replace("cumulative: ", "")


def is_own_qwen_code(row: Row) -> bool:
    """Tell whether it is one of Qwen's first models.

    They run code of their own, which leaves logits in the model's type; autocast makes them fp32.
    """
    return row["model"].startswith("Qwen-")


def is_older_transformers(row: Row) -> bool:
    """Tell whether a language model of transformers before 4.45 was run, which returned its logits in fp32."""
    return row["source"] == "AnswerDotAI/fsdp_qlora" or (
        row["source"] == "huggingface/peft" and "ZeRO" in row["sharding"]
    )


# --- Model and machine ------------------------------------------------------------------------------------------------


def assumptions(row: Row) -> list[str]:
    """Say what the row leaves open and the prediction assumes."""
    taken = []
    if not row["micro_batch"]:
        taken.append("micro_batch 1 assumed")
    if "Alpaca" in row["seq_len"]:
        taken.append(f"Alpaca: {ALPACA_TOKENS} tokens on average assumed")
    return taken


def _refuse(row: Row) -> None:
    if "int8" in f"{row['method']} {row['precision']}".lower():
        raise NotModelled("8-bit weights")
    if "emb" in row["method"]:
        raise NotModelled("adapters with trained embeddings")
    if re.search(r"\b(TP|PP)([2-9]|\d\d)", row["sharding"]):
        raise NotModelled("tensor or pipeline parallelism")
    if not row["method"].startswith(("full", "lora", "qlora")):
        raise NotModelled(f"method {row['method']!r}")


def device_of(row: Row) -> Device:
    """Return the accelerator; an A100 where the row names none, since then only memory in use is asked for."""
    name = row["gpu"].lower()
    if name in {"", "not stated"}:
        return known_devices()["a100-80g"]
    found = next((device for part, device in _DEVICE_BY_NAME_PART if part in name), None)
    if found is None:
        raise NotModelled(f"gpu {row['gpu']!r} is not a device the planner knows")
    return known_devices()[found]


def names_its_device(row: Row) -> bool:
    """Tell whether the row names the card that was measured, not only one that the run would fit."""
    return row["gpu"] not in {"", "not stated"} and "runnable on" not in row["gpu"]


def _with_interconnect(device: Device, row: Row) -> Device:
    """Return the device with the node's network as the row states it."""
    found = re.match(r"(\d+)\s*Gb/s( per GPU|/node)?", row["interconnect"])
    if not found:
        return device
    gbit = float(found.group(1)) * (device.devices_per_node if found.group(2) == " per GPU" else 1)
    return replace(device, node_bandwidth=gbit * GBIT)


def _shape(row: Row) -> ModelShape:
    sizes = {name: number(row, name) or 0 for name in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab")}
    missing = [name for name, value in sizes.items() if not value]
    if missing:
        raise NotModelled(f"the row lacks {', '.join(missing)}")
    gated = row["glu"] == "1"
    named = next((kind for start, kind in _LIKE if row["model"].lower().startswith(start)), "")
    kind = named if named and LAYER_STYLES[named].gated_mlp == gated else "llama" if gated else "gpt_neox"
    return ModelShape(
        model_type=kind,
        hidden_size=sizes["hidden"],
        num_layers=sizes["layers"],
        num_heads=sizes["heads"],
        num_kv_heads=sizes["kv_heads"],
        head_dim=sizes["hidden"] // sizes["heads"],
        intermediate_size=sizes["ffn"],
        vocab_size=sizes["vocab"],
        style=replace(LAYER_STYLES[kind], fused_qkv=LAYER_STYLES[kind].fused_qkv or is_own_qwen_code(row)),
        # MPT learns its positions: a table as long as the longest sequence.
        max_positions=number(row, "seq_len") if kind == "mpt" else None,
        quantization="gptq" if "GPTQ" in row["precision"] else None,
    )


# --- Tokens -----------------------------------------------------------------------------------------------------------


def _sequences(row: Row) -> int:
    """Count the sequences of a micro-batch; a pair is two."""
    return (2 if "pair" in row["micro_batch"] else 1) * (number(row, "micro_batch") or 1)


def lengths_of(row: Row) -> Lengths | None:
    """Return the lengths of the row's sequences; `None` where only the longest is known."""
    text, sequences = row["seq_len"], _sequences(row)
    if text.isdigit() and "unpacked" not in row["notes"]:
        return Lengths(int(text), int(text), int(text))
    mean = re.search(r"mean ~?(\d+)", text)
    longest = re.search(r"<=\s*(\d+)", text)
    if "Alpaca" in text:
        most = int(longest.group(1)) if longest else ALPACA_LONGEST
        return Lengths(ALPACA_TOKENS, ALPACA_TOKENS * sequences**PADDING, most)
    if mean and longest:
        average = int(mean.group(1))
        return Lengths(average, average * sequences**PADDING, int(longest.group(1)))
    if not re.search(r"\d", text):
        raise NotModelled(f"seq_len {text!r} has no number")
    return None


def _load(row: Row, sequences: int, lengths: Lengths | None) -> RowLoad:
    """Return the tokens of a micro-step."""
    shared = re.search(r"prefix-shared.*prefix=(\d+) response=(\d+)", row["notes"])
    if shared:
        prompt, response = int(shared.group(1)), int(shared.group(2))
        squared = prompt**2 + 2 * response * (2 * prompt + response)
        both = prompt + response
        return RowLoad(prompt + 2 * response, squared, 2 * both, 2 * both**2, 1, 2)
    known = re.search(r"\d+", row["seq_len"])
    padded = lengths.padded if lengths else float(known.group()) if known else 0.0
    real = lengths.mean if lengths else padded
    return RowLoad(
        tokens=sequences * padded,
        squared=sequences * padded**2,
        effective_tokens=sequences * real,
        effective_squared=sequences * real**2,
        groups=sequences / 2,
        responses=sequences,
    )


def _micro_steps(row: Row, sequences: int, ranks: int) -> float:
    """Return micro-steps per optimizer step, from their number or from a global batch: "128/mb", "GBS 8"."""
    text = row["grad_accum"]
    batch = re.match(r"(?:GBS )?(\d+)", text)
    if batch is None:
        return 1
    if text.endswith("/mb"):
        return max(1, int(batch.group(1)) / sequences)
    if text.startswith("GBS"):
        return max(1, int(batch.group(1)) / sequences / ranks)
    return int(batch.group(1))


# --- Method, precision, sharding --------------------------------------------------------------------------------------


def _method(row: Row) -> Method:
    if row["method"].startswith("full"):
        return "full"
    return "qlora" if row["method"].startswith("qlora") else "lora"


def _targets(row: Row, shape: ModelShape) -> tuple[str, ...] | None:
    if row["lora_targets"] not in _TARGETS:
        return tuple(f"{name.strip()}_proj" for name in row["lora_targets"].split(","))
    targets = _TARGETS[row["lora_targets"]]
    return ("qkv_proj",) if targets is not None and shape.style.fused_qkv else targets


def _rank(row: Row) -> int:
    return number(row, "lora_rank") or _noted(row, r"rank\s*(\d+)") or 8


def _dropout(row: Row) -> float:
    """Return the adapters' dropout: torchtune, PEFT's comparison and Automodel use none, other scripts some."""
    return 0.0 if row["source"] in {"pytorch/torchtune", "huggingface/peft", "NVIDIA-NeMo/Automodel"} else 0.05


def _noted(row: Row, pattern: str) -> int | None:
    found = re.search(pattern, row["notes"])
    return int(found.group(1)) if found else None


def _stage(row: Row) -> int | None:
    """Return the ZeRO stage that shards as the row's method does; `None` where nothing is sharded."""
    sharding = row["sharding"]
    if "per finetune scripts" in row["act_ckpt"]:
        # Qwen's scripts run full fine-tuning and GPTQ under DeepSpeed on one card too: finetune_ds.sh and
        # finetune_qlora_single_gpu.sh.
        return 3 if row["method"] == "full" else 2 if "GPTQ" in row["precision"] else None
    if re.search("FULL_SHARD|ZeRO-?3|FSDP2|FSDP\\d", sharding):
        return 3
    return 2 if re.search("SHARD_GRAD_OP|ZeRO-?2", sharding) else None


def _precision(row: Row) -> Precision:
    """Return the precision; adapters beside a bfloat16 model, without an engine, are fp32 under autocast."""
    by_autocast = row["method"].startswith(("lora", "qlora")) and _stage(row) is None and "FSDP" not in row["sharding"]
    return "amp" if by_autocast and not is_pure(row) else "bf16"


def _optimizer_bytes(row: Row) -> float:
    if "no optimizer" in row["method"]:
        return 0.0
    eight_bit = ("8bit" in row["optimizer"] and row["method"] == "full") or "8bit adamw" in techniques(row)
    return 2.0 if eight_bit else 4.0 if is_pure(row) else 8.0


def _head(row: Row) -> Head:
    if row["head"].startswith("score"):
        return "score"
    chunked = "no logits" in row["head"] or "chunked" in row["head"] or "chunked ce" in techniques(row)
    return "lm_chunked" if chunked else "lm"


def _buckets(row: Row, shape: ModelShape) -> Buckets:
    """Return the communication buffers: FSDP gathers a layer and the next one, and reduces the trained part."""
    if "FSDP" not in row["sharding"]:
        return default_buckets(shape.hidden_size)
    tensors = layer_tensors(shape, shape.layers[0])
    layer = trained = sum(tensor.numel for tensor in tensors)
    if _method(row) != "full":
        trained = sum(tensor.numel for tensor in adapter_tensors(tensors, _rank(row), _targets(row, shape)))
    return Buckets(reduce=trained, prefetch=layer, persistent=0, live=layer, reuse=0, overlaps=True)

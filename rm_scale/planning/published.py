"""Predict published measurements: each row of a CSV file becomes a scenario, answered in the row's own units.

Columns are those of benchmarks/data/published_measurements.csv. Measured figures in a row are never read.
"""

from __future__ import annotations

import csv
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from rm_scale.errors import ConfigError
from rm_scale.planning.estimate import activations, peak_memory
from rm_scale.planning.hardware import GBIT, GIB, Device, known_devices
from rm_scale.planning.parameters import layer_tensors
from rm_scale.planning.scenario import Buckets, Head, Precision, RowLoad, Scenario, default_buckets
from rm_scale.planning.shape import LAYER_STYLES, LayerStyle, ModelShape
from rm_scale.planning.timing import step_time

COLUMNS = (
    "id",
    "model",
    "layers",
    "hidden",
    "heads",
    "kv_heads",
    "ffn",
    "vocab",
    "glu",
    "head",
    "gpu",
    "n_gpus",
    "interconnect",
    "seq_len",
    "micro_batch",
    "grad_accum",
    "act_ckpt",
    "attn",
    "precision",
    "sharding",
    "method",
    "lora_rank",
    "lora_targets",
    "optimizer",
    "mem_unit",
    "mem_kind",
    "notes",
)
"""What a row must have; a cell may be empty where the setup doesn't need it."""

OUTPUT_COLUMNS = ("id", "peak_memory_gb", "tokens_per_second_per_device", "note")

Row = dict[str, str]

RESERVED = 1.05
"""Reserved over allocated memory: the allocator hands out rounded blocks and keeps pieces it can't use again."""

OVERLAP = 0.5
"""Share of a step's communication that is hidden behind computing, for a single figure within the band."""

_DEVICES = (
    ("a100-sxm4-40", "a100-40g"),
    ("a100_40gb", "a100-40g"),
    ("a100-40", "a100-40g"),
    ("a100", "a100-80g"),
    ("a800", "a100-80g"),
    ("h100", "h100-80g"),
    ("rtx3090", "3090"),
    ("rtx4090", "4090"),
    ("l40s", "l40s"),
    ("a40-48gb", "a40"),
)
_TARGETS = {"q,v": ("q_proj", "v_proj", "qkv_proj")}


class NotModelled(Exception):
    """A row's setup is outside of what the planner knows; the text says why."""


@dataclass(frozen=True)
class Prediction:
    """The answer to one row.

    Attributes:
        id: the row's.
        peak_memory: in the row's unit, of its kind; `None`: not modelled.
        tokens_per_second: processed tokens per device; `None`: not modelled.
        note: why a figure is missing, or what was assumed.
    """

    id: str
    peak_memory: float | None
    tokens_per_second: float | None
    note: str = ""


def predict_cases(cases: str, output: str | None) -> int:
    """Predict every row of a file; gives 0.

    Args:
        cases: CSV file with `COLUMNS`.
        output: CSV file to write; `None`: standard output.

    Raises:
        ConfigError: the file can't be read or lacks columns, or the output can't be written.
    """
    predictions = [predict_row(row) for row in read_cases(cases)]
    if output is None:
        write_predictions(predictions, sys.stdout)
        return 0
    try:
        with Path(output).open("w", encoding="utf-8", newline="") as file:
            write_predictions(predictions, file)
    except OSError as error:
        raise ConfigError(
            [f"output={output}: can't be written ({error.strerror}). Fix: name a file in a folder that exists."]
        ) from error
    print(f"{len(predictions)} rows predicted: {output}", file=sys.stderr)
    return 0


def read_cases(cases: str) -> list[Row]:
    """The file's rows.

    Raises:
        ConfigError: it can't be read, holds no row, or lacks columns.
    """
    try:
        with Path(cases).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = [{name: (value or "").strip() for name, value in row.items() if name} for row in reader]
            names = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        cause = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError([f"cases={cases}: can't be read ({cause}). Fix: give a CSV file in UTF-8."]) from error
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise ConfigError(
            [
                f"cases={cases}: lacks the columns {', '.join(missing)}. Fix: use the columns of "
                "benchmarks/data/published_measurements.csv; cells may be empty."
            ]
        )
    if not rows:
        raise ConfigError([f"cases={cases}: holds no rows. Fix: one setup per line under the header."])
    return rows


def write_predictions(predictions: Iterable[Prediction], file: TextIO) -> None:
    """As CSV with `OUTPUT_COLUMNS`; a figure that is not modelled stays empty."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(OUTPUT_COLUMNS)
    for answer in predictions:
        memory = "" if answer.peak_memory is None else f"{answer.peak_memory:.2f}"
        tokens = "" if answer.tokens_per_second is None else f"{answer.tokens_per_second:.1f}"
        writer.writerow([answer.id, memory, tokens, answer.note])


# --- One row ---------------------------------------------------------------------------------------------------------


def predict_row(row: Row) -> Prediction:
    """The answer to one row."""
    try:
        scenario = _scenario(row)
    except NotModelled as reason:
        return Prediction(row["id"], None, None, str(reason))
    notes = []
    speed = memory = None
    try:
        speed = _tokens_per_second(row, scenario)
    except NotModelled as reason:
        notes.append(f"no speed: {reason}")
    try:
        memory = _peak_memory(row, scenario)
    except NotModelled as reason:
        notes.append(f"no memory: {reason}")
    return Prediction(row["id"], memory, speed, "; ".join(notes))


def _scenario(row: Row) -> Scenario:
    """The row's setup; sharding by FSDP is read as the ZeRO stage that sends and keeps the same."""
    if any(word in row["sharding"] for word in ("PP4", "TP4")):
        raise NotModelled("tensor or pipeline parallelism")
    device, shape = _device(row), _shape(row)
    ranks = _whole(row, "n_gpus") or 1
    nodes = max(1, math.ceil(ranks / device.devices_per_node))
    load = _load(row)
    method = "qlora" if "qlora" in row["method"] else "lora" if "lora" in row["method"] else "full"
    return Scenario(
        shape=shape,
        device=_with_interconnect(device, row),
        num_devices=ranks,
        num_nodes=nodes,
        load=load,
        num_micro_steps=_whole(row, "grad_accum") or 1,
        method=method,  # type: ignore[arg-type]
        lora_rank=_whole(row, "lora_rank") or (64 if "Qwen" in row["source"] else 8),
        lora_targets=_TARGETS.get(row["lora_targets"]),
        lora_dropout=0.05 if "Qwen" in row["source"] else 0.0,
        nested_quant="dq" in row["method"],
        zero_stage=_stage(row),
        precision=_precision(row),
        master_bytes=_master_bytes(row),
        checkpointing=row["act_ckpt"].startswith("full"),
        attention="flash1" if row["attn"].startswith("flash(") else "varlen",
        head=_head(row),
        optimizer_bytes=_optimizer_bytes(row),
        buckets=_buckets(row, shape),
    )


def _whole(row: Row, column: str) -> int | None:
    found = re.match(r"\s*(\d+)", row[column].split("/")[-1] if column == "grad_accum" else row[column])
    return int(found.group(1)) if found else None


def _device(row: Row) -> Device:
    name = row["gpu"].lower()
    if "runnable on" in name:
        return known_devices()["a6000"]
    if name == "not stated":
        return known_devices()["a100-80g"]
    found = next((device for part, device in _DEVICES if part in name), None)
    if found is None:
        raise NotModelled(f"gpu {row['gpu']!r} is not a device the planner knows")
    return known_devices()[found]


def _with_interconnect(device: Device, row: Row) -> Device:
    """The node's network as the row states it."""
    found = re.match(r"(\d+)\s*Gb/s( per GPU|/node)?", row["interconnect"])
    if not found:
        return device
    gbit = float(found.group(1)) * (device.devices_per_node if found.group(2) == " per GPU" else 1)
    return replace(device, node_bandwidth=gbit * GBIT)


def _shape(row: Row) -> ModelShape:
    values = {name: _whole(row, name) for name in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab")}
    missing = [name for name, value in values.items() if not value]
    if missing:
        raise NotModelled(f"the row lacks {', '.join(missing)}")
    sizes = {name: value or 0 for name, value in values.items()}
    model_type = "llama" if row["glu"] == "1" else "mpt" if row["model"].startswith("MPT") else "gpt_neox"
    # MPT learns its positions: a table as long as the longest sequence.
    positions = _whole(row, "seq_len") if model_type == "mpt" else None
    style: LayerStyle = LAYER_STYLES[model_type]
    return ModelShape(
        model_type=model_type,
        hidden_size=sizes["hidden"],
        num_layers=sizes["layers"],
        num_heads=sizes["heads"],
        num_kv_heads=sizes["kv_heads"],
        head_dim=sizes["hidden"] // sizes["heads"],
        intermediate_size=sizes["ffn"],
        vocab_size=sizes["vocab"],
        style=style,
        max_positions=positions,
    )


def _load(row: Row) -> RowLoad:
    """Tokens of a micro-step, from sequence length and micro-batch or from a prefix and responses."""
    found = re.search(r"prefix=(\d+) response=(\d+)", row["notes"])
    shared = "prefix-shared" in row["notes"]
    if found and shared:
        prompt, response = int(found.group(1)), int(found.group(2))
        squared = prompt**2 + 2 * response * (2 * prompt + response)
        both = prompt + response
        return RowLoad(prompt + 2 * response, squared, 2 * both, 2 * both**2, 1, 2)
    length = re.search(r"\d+", row["seq_len"])
    if not length:
        raise NotModelled(f"seq_len {row['seq_len']!r} has no number")
    per_pair = 2 if "pair" in row["micro_batch"] else 1
    sequences = per_pair * (_whole(row, "micro_batch") or 1)
    tokens = int(length.group())
    total = sequences * tokens
    return RowLoad(total, total * tokens, total, total * tokens, sequences / 2, sequences)


def _stage(row: Row) -> int | None:
    sharding = row["sharding"]
    if "Qwen" in row["source"] and row["method"] == "full":
        return 3  # its script for full fine-tuning uses ZeRO-3 on one card too
    if "FULL_SHARD" in sharding or "ZeRO-3" in sharding or "FSDP2" in sharding:
        return 3
    return 2 if "SHARD_GRAD_OP" in sharding else None


def _is_pure(row: Row) -> bool:
    """Weights, gradients and optimizer state all in bfloat16."""
    return row["precision"] in {"bf16 pure", "bf16-true"} or "PURE" in row["sharding"] or "peft" in row["source"]


def _precision(row: Row) -> Precision:
    if _is_pure(row) or _stage(row) is not None or "fsdp_qlora" in row["source"]:
        return "bf16"
    return "amp" if "lora" in row["method"] else "bf16"


def _master_bytes(row: Row) -> int:
    return 0 if _is_pure(row) else 4


def _optimizer_bytes(row: Row) -> float:
    if "no optimizer" in row["method"]:
        return 0.0
    if "8bit" in row["optimizer"] or "8bit" in row["notes"]:
        return 2.0
    return 4.0 if _is_pure(row) else 8.0


def _head(row: Row) -> Head:
    text = row["head"] + row["notes"]
    if row["head"].startswith("score"):
        return "score"
    chunked = "no logits" in text or "chunked" in text or _torchtune_step(row) >= 2
    return "lm_chunked" if chunked else "lm"


_TORCHTUNE_STEPS = ("packed", "compile", "chunked CE", "act ckpt", "opt in bwd", "act offload", "8bit", "LoRA", "QLoRA")


def _torchtune_step(row: Row) -> int:
    """How far a row of torchtune's cumulative table has got: the index of its last optimisation."""
    if "cumulative" not in row["notes"]:
        return -1
    return max((n for n, word in enumerate(_TORCHTUNE_STEPS) if word.lower() in row["notes"].lower()), default=-1)


def _buckets(row: Row, shape: ModelShape) -> Buckets:
    """FSDP gathers a layer at a time and the next one ahead; DeepSpeed as it does by default."""
    if "FSDP" not in row["sharding"]:
        return default_buckets(shape.hidden_size)
    layer = sum(tensor.numel for tensor in layer_tensors(shape))
    return Buckets(reduce=layer, prefetch=layer, persistent=0, live=layer, overlaps=True)


# --- Speed -----------------------------------------------------------------------------------------------------------


def _tokens_per_second(row: Row, scenario: Scenario) -> float:
    if "FP8" in row["precision"]:
        raise NotModelled("FP8 products")
    if "runnable on" in row["gpu"] or row["gpu"] == "not stated":
        raise NotModelled("the card that was measured is not named")
    if not row["seq_len"].isdigit():
        raise NotModelled(f"mean length of sequences up to {row['seq_len']} is not given")
    if "unpacked" in row["notes"]:
        raise NotModelled("real lengths of the padded sequences are not given")
    if "GPTQ" in row["precision"]:
        raise NotModelled("GPTQ kernels")
    time = step_time(scenario)
    hidden = time.low + (1 - OVERLAP) * (time.high - time.low)
    return scenario.load.tokens * scenario.num_micro_steps / hidden


# --- Memory ----------------------------------------------------------------------------------------------------------


def _peak_memory(row: Row, scenario: Scenario) -> float:
    """In the row's unit and of its kind."""
    if row["act_ckpt"].startswith(("selective", "varies")):
        raise NotModelled(f"activation checkpointing {row['act_ckpt']!r}")
    if _torchtune_step(row) >= 1 and not scenario.checkpointing:
        raise NotModelled("torch.compile, which keeps less for the backward pass")
    if "GPTQ" in row["precision"]:
        raise NotModelled("GPTQ weights, which are not bitsandbytes' NF4")
    if "unpacked" in row["notes"]:
        raise NotModelled("real lengths of the padded sequences are not given")
    parts = peak_memory(scenario)
    allocated: float = sum(size for name, size in parts.items() if name != "framework")
    allocated -= _not_there(row, scenario, parts)
    kind = row["mem_kind"]
    by_driver = "smi" in kind or kind == "not stated" or "screenshot" in row["mem_unit"]
    held = allocated * (RESERVED if "reserved" in kind or by_driver else 1.0)
    if by_driver:
        held += parts["framework"]
    if "SUM" in row["mem_unit"]:
        held *= scenario.num_devices
    gib = "GiB" in row["mem_unit"] or row["mem_unit"].startswith("G as printed")
    return held / (GIB if gib else 1e9)


def _not_there(row: Row, scenario: Scenario, parts: dict[str, int]) -> float:
    """What a row's own tricks save: gradients used up in the backward pass, checkpoints kept on the host."""
    saved = 0.0
    if scenario.method == "full" and _torchtune_step(row) >= 4:
        saved += parts["gradients"]
    if "offload" in row["act_ckpt"]:
        saved += activations(scenario).stored_bytes
    return saved

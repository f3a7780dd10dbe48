"""Write the table of docs/models.md:  python tools/models_table.py

Its columns come from the code (planner, packed rows), from tests/data/families.json, which the family tests write, and
from vLLM's and transformers' lists of models. How the file is made anew:

    rm -f results.json
    RM_SCALE_ALL_CELLS=1 RM_SCALE_FAMILY_RESULTS=$PWD/results.json pytest tests/distributed/test_families.py
    mv results.json tests/data/families.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY)]

from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES  # noqa: E402

from rm_scale.inference.export.engine_architectures import (  # noqa: E402
    VLLM_CLASSES,
    VLLM_OVERRIDES,
    VLLM_THROUGH_TRANSFORMERS,
)
from rm_scale.planning.families import LAYER_STYLES, TEXT_TYPES  # noqa: E402
from rm_scale.planning.layout_choice import (  # noqa: E402
    REFUSED_MODEL_TYPES,
    TESTED_MODEL_TYPES,
    TESTED_RECURRENT_TYPES,
)

PAGE = REPOSITORY / "docs" / "models.md"
RESULTS = REPOSITORY / "tests" / "data" / "families.json"
BEGIN, END = "<!-- models:begin -->", "<!-- models:end -->"
STAGES = {"none": "plain", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
METHODS = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}

EXAMPLES = {
    "llama": "Llama 2, 3.x",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3 0.6B to 32B",
    "qwen3_moe": "Qwen3-30B-A3B, 235B-A22B",
    "qwen3_5_text": "Qwen3.5 (text)",
    "qwen3_next": "Qwen3-Next-80B-A3B",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2-57B-A14B",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 1B",
    "gemma3": "Gemma 3 4B to 27B, without the vision tower",
    "qwen3_5": "Qwen3.5, without the vision tower",
    "mistral": "Mistral 7B, Ministral-8B-2410",
    "ministral": "Ministral 3 with windows",
    "ministral3": "Ministral 3",
    "mixtral": "Mixtral 8x7B, 8x22B",
    "phi": "Phi-1.5, Phi-2",
    "phi3": "Phi-3, Phi-4",
    "phimoe": "Phi-3.5-MoE",
    "olmo": "OLMo",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "gpt_oss": "gpt-oss-20b, 120b",
    "deepseek_v2": "DeepSeek-V2, V2-Lite",
    "deepseek_v3": "DeepSeek-V3, R1; Moonlight",
    "smollm3": "SmolLM3-3B",
    "starcoder2": "StarCoder2",
    "zamba2": "Zamba2",
    "jamba": "Jamba",
    "glm4": "GLM-4-0414",
    "exaone4": "EXAONE 4",
    "seed_oss": "Seed-OSS-36B",
    "nemotron": "Nemotron-3, Minitron",
    "stablelm": "StableLM 2",
    "falcon": "Falcon 7B, 40B",
    "gpt_neox": "GPT-NeoX, Pythia",
    "gpt2": "GPT-2",
    "bloom": "BLOOM",
}


def vllm(text_type: str) -> str:
    """Tell what vLLM runs an export of this model type with."""
    name = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(text_type, "")
    if name in VLLM_CLASSES:
        return f"`{VLLM_CLASSES[name]}`"
    if name in VLLM_OVERRIDES:
        return f"`{VLLM_OVERRIDES[name]}`, named to it"
    return "by transformers' code" if name in VLLM_THROUGH_TRANSFORMERS else "no"


def families() -> list[str]:
    """Return all families that the table has, those that were trained first."""
    trained = {name.split("/")[0].removesuffix("-experts") for name in _cells()}
    known = set(LAYER_STYLES) | TESTED_MODEL_TYPES | set(REFUSED_MODEL_TYPES)
    known |= {family for family, text in TEXT_TYPES.items() if text in LAYER_STYLES}
    return [*sorted(trained), *sorted(known - trained)]


def _cells() -> dict[str, Any]:
    cells: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))["cells"]
    return cells


def trained(family: str, method: str) -> str:
    """Return the engines with which a method was trained, saved, and loaded by plain transformers."""
    found = []
    for stage, title in STAGES.items():
        cell = _cells().get(f"{family}/{stage}/{method}")
        if cell is None or "trains" not in cell:
            continue
        failed = [what for what, passed in sorted(cell.items()) if passed is False]
        resumed = ", resumed" if cell.get("resumes") else ""
        found.append(f"{title} FAILS ({', '.join(failed)})" if failed else f"{title}{resumed}")
    return "; ".join(found) or "not run"


def exported(family: str) -> str:
    """Return what was exported and loaded by plain transformers: a full model, and what was merged into one."""
    kinds = {"full model": f"{family}/zero2/full", "merged LoRA": f"{family}/zero3/lora"}
    kinds["of experts too"] = f"{family}-experts/zero3/lora"
    found = {what: _cells().get(cell, {}).get("exports") for what, cell in kinds.items()}
    shown = [what if passed else f"{what} FAILS" for what, passed in found.items() if passed is not None]
    return ", ".join(shown) or "not run"


def packed(family: str) -> str:
    """Return the packed layouts that a test compares with padded rows."""
    if family in TESTED_RECURRENT_TYPES:
        return "prefix_shared; state reset and forked"
    if family in TESTED_MODEL_TYPES:
        return "prefix_shared"
    return f"no: {REFUSED_MODEL_TYPES[family]}" if family in REFUSED_MODEL_TYPES else "not tested"


def table() -> str:
    """Return the table in Markdown."""
    heads = ["family", "models", *METHODS.values(), "export", "packed rows", "planner", "vLLM"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for family in families():
        row = [f"`{family}`", EXAMPLES.get(family, ""), *(trained(family, method) for method in METHODS)]
        text = TEXT_TYPES.get(family, family)
        planner = "formulas" if text in LAYER_STYLES else "`--exact`"
        lines.append(f"| {' | '.join([*row, exported(family), packed(text), planner, vllm(text)])} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """Return the page with a new table."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

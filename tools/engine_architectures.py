"""Write rm_scale/inference/export/engine_architectures.py from the sources of vLLM and SGLang:

    python tools/engine_architectures.py --vllm UNPACKED/vllm --sglang UNPACKED/sglang

Both folders come from their wheels (`pip download --no-deps`, unzip). They are read as text and not imported, so no
accelerator and none of their requirements are needed. The classes are those of the installed transformers.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

REPOSITORY = Path(__file__).resolve().parents[1]
FILE = REPOSITORY / "rm_scale" / "inference" / "export" / "engine_architectures.py"
_REGISTRY = "model_executor/models/registry.py"
_SUFFIXES = "config/model.py"


def our_architectures() -> dict[str, str]:
    """Return the classifiers that an export can be, each with the causal class of its family.

    Decoders of transformers whose head is one linear layer called `score`, which is what an export holds.
    """
    found = {}
    for model_type, name in sorted(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.items()):
        causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
        generates = causal or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)
        cls = getattr(transformers, str(name), None)
        if generates is None or cls is None or model_type == "xlnet":
            continue
        if getattr(AutoConfig.for_model(model_type), "is_encoder_decoder", False) or not _has_score(cls):
            continue
        found[str(name)] = str(generates)
    return found


def _has_score(cls: Any) -> bool:
    """Return whether a class, or what it inherits from, makes the head `score`."""
    return any("self.score =" in inspect.getsource(one) for one in cls.__mro__ if one.__module__ == cls.__module__) or (
        "GenericForSequenceClassification" in {one.__name__ for one in cls.__mro__}
    )


# --- vLLM ------------------------------------------------------------------------------------------------------------


def vllm_registry(source: Path) -> dict[str, str]:
    """Return vLLM's architectures and the module of each class: `transformers` where transformers' code is run."""
    tree = ast.parse((source / _REGISTRY).read_text(encoding="utf-8"))
    tables: list[ast.stmt] = [
        node
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "").endswith("_MODELS")
    ]
    # Some of these dictionaries are made of others, so their literals alone do not do.
    values: dict[str, Any] = {}
    exec(compile(ast.Module(tables, type_ignores=[]), _REGISTRY, "exec"), values)
    return {name: module for name, (module, _) in values["_VLLM_MODELS"].items()}


def vllm_suffixes(source: Path) -> list[str]:
    """Return the suffixes that vLLM tries in place of ForSequenceClassification, in its order."""
    for node in ast.parse((source / _SUFFIXES).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "_SUFFIX_TO_DEFAULTS":
            assert node.value is not None
            return [suffix for suffix, _ in ast.literal_eval(node.value)]
    raise SystemExit(f"{source / _SUFFIXES}: has no _SUFFIX_TO_DEFAULTS any more: read its rules anew")


def vllm_way(name: str, causal: str, registry: dict[str, str], suffixes: list[str]) -> tuple[str, str]:
    """Return how vLLM runs a classifier: `class`, `override`, `transformers` or `none`, and as which architecture.

    `override`: by this name vLLM would find no class of its own, or the bare backbone, whose weights have other names;
    told the causal class by --hf-overrides, it takes that.
    """
    found = [name, *(name.replace("ForSequenceClassification", suffix) for suffix in suffixes)]
    base = next((one for one in found if one in registry), None)
    is_bare = base is not None and base.endswith("Model") and not base.endswith("LMHeadModel")
    if (base is None or is_bare) and registry.get(causal, "transformers") != "transformers":
        return "override", causal
    if base is not None and not is_bare:
        return ("transformers" if registry[base] == "transformers" else "class"), base
    cls = getattr(transformers, name)
    return ("transformers", name) if cls.is_backend_compatible() or cls._can_set_attn_implementation() else ("none", "")


# --- SGLang ----------------------------------------------------------------------------------------------------------


def sglang_classes(source: Path) -> dict[str, ast.ClassDef]:
    """Return the classes that SGLang registers (`EntryClass`)."""
    found = {}
    for file in sorted((source / "srt" / "models").glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        for name in _entry_names(tree):
            if name in classes:
                found[name] = classes[name]
    return found


def _entry_names(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "EntryClass":
            yield from (part.id for part in ast.walk(node.value) if isinstance(part, ast.Name))


def sglang_has_bias(node: ast.ClassDef) -> bool:
    """Return whether the head `score` of one of SGLang's classes has a bias."""
    for part in ast.walk(node):
        if isinstance(part, ast.Assign) and getattr(part.targets[0], "attr", "") == "score":
            assert isinstance(part.value, ast.Call)
            said = [word.value for word in part.value.keywords if word.arg == "bias"]
            return not (said and isinstance(said[0], ast.Constant) and said[0].value is False)
    raise SystemExit(f"{node.name}: has no head called score any more: read its rules anew")


# --- Writing ---------------------------------------------------------------------------------------------------------


def text(vllm: Path, sglang: Path) -> str:
    """Return the module."""
    ours = our_architectures()
    registry, suffixes = vllm_registry(vllm), vllm_suffixes(vllm)
    ways = {name: vllm_way(name, causal, registry, suffixes) for name, causal in ours.items()}
    classes = sglang_classes(sglang)
    biases = {name: sglang_has_bias(classes[name]) for name in ours if name in classes}
    return f'''"""How vLLM and SGLang run each classifier that an export can be, as their sources say.

Written by tools/engine_architectures.py from vLLM {_version(vllm)} ({_REGISTRY}, {_SUFFIXES}), SGLang
{_version(sglang)} (srt/models) and the classes of transformers {transformers.__version__}.
"""

from __future__ import annotations

VLLM_VERSION = "{_version(vllm)}"
SGLANG_VERSION = "{_version(sglang)}"

VLLM_CLASSES: dict[str, str] = {_of(ways, "class")}
"""Classifiers that vLLM runs with a class of its own, and that class."""

VLLM_OVERRIDES: dict[str, str] = {_of(ways, "override")}
"""Classifiers for which vLLM has a class that it does not find by their name: it must be told (--hf-overrides)."""

VLLM_THROUGH_TRANSFORMERS: dict[str, str] = {_of(ways, "transformers")}
"""Classifiers that vLLM runs with transformers' code, slower, and the architecture that it looks up."""

VLLM_NOT: tuple[str, ...] = {tuple(name for name, (way, _) in ways.items() if way == "none")!r}
"""Classifiers that vLLM can't run."""

SGLANG_CLASSES: dict[str, bool] = {biases!r}
"""Classifiers for which SGLang has a class, and whether its head has a bias that no checkpoint of transformers fills.

Of all others SGLang returns a normalised hidden vector, not a score.
"""
'''


def _of(ways: dict[str, tuple[str, str]], wanted: str) -> str:
    return repr({name: base for name, (way, base) in ways.items() if way == wanted})


def _version(source: Path) -> str:
    """Return the version that the wheel's metadata, beside the package or in its version file, names."""
    for file in (source.parent).glob(f"{source.name}*.dist-info/METADATA"):
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("Version: "):
                return line.removeprefix("Version: ")
    for name in ("_version.py",):
        for node in ast.parse((source / name).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                return str(node.value.value)
    raise SystemExit(f"{source}: names no version")


def main() -> None:
    """Write the module anew and format it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--vllm", required=True, type=Path, help="the package's folder, unpacked")
    parser.add_argument("--sglang", required=True, type=Path, help="the package's folder, unpacked")
    options = parser.parse_args()
    FILE.write_text(text(options.vllm, options.sglang), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", str(FILE)], check=True)


if __name__ == "__main__":
    main()

"""Prepare an export for the engines that a user names: what each needs is written, checked and put on record."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rm_scale.files import read_json_object, write_whole
from rm_scale.inference.export.engine_facts import EngineFacts, EngineReady, architecture_of
from rm_scale.inference.export.onnx_export import ONNX_FILE
from rm_scale.inference.export.sglang_engine import BIAS_FILE, prepare_sglang, sglang_class_problem
from rm_scale.inference.export.tei_engine import LIMIT_FILE, prepare_tei
from rm_scale.inference.export.vllm_chat_template import TEMPLATE_FILE
from rm_scale.inference.export.vllm_engine import prepare_vllm, vllm_class_problem
from rm_scale.output_paths import LIST_FILE, list_files

_CLASS_PROBLEMS: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "vllm": vllm_class_problem,
    "sglang": sglang_class_problem,
}
_ONNX_FILES = (ONNX_FILE, f"{ONNX_FILE}.data")
_WRITTEN = ("config.json", LIST_FILE, TEMPLATE_FILE, BIAS_FILE, LIMIT_FILE, *_ONNX_FILES)
"""Files that preparing for an engine can write or change."""


def class_problems(source: Path, engines: Iterable[str]) -> list[str]:
    """Return for which engines a model can't be exported whatever its weights are, as its config.json says.

    Args:
        source: a run's output directory, a checkpoint or another project's model. One whose config.json does not name
            a sequence classifier is not judged: an export gets a class of its own.
        engines: vllm, sglang, tei.
    """
    config = read_json_object(source / "config.json")
    is_classifier = architecture_of(config).endswith("ForSequenceClassification")
    if (source / "adapter_config.json").is_file() or not is_classifier:
        return []
    found = (_CLASS_PROBLEMS[engine](config) for engine in engines if engine in _CLASS_PROBLEMS)
    return [f"--engine: {problem}" for problem in found if problem is not None]


def prepare_for_engines(folder: Path, engines: Iterable[str], trust_remote_code: bool = False) -> list[EngineReady]:
    """Write and check what each engine needs, and record it in `rm_scale_export.json`.

    After an error the folder holds what it held before.

    Args:
        folder: an export.
        engines: vllm, sglang, tei; one that is named twice counts once.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        ModelError: an engine could not serve it rightly.
        CheckpointError: its ONNX form scores differently.
    """
    facts = EngineFacts.read(folder, trust_remote_code)
    with _restored_on_error(folder):
        ready = [_prepare(engine, facts, trust_remote_code) for engine in dict.fromkeys(engines)]
        _record(folder, ready)
    return ready


@contextmanager
def _restored_on_error(folder: Path) -> Iterator[None]:
    """Put back the files that engines write, if an error ends the block."""
    with TemporaryDirectory(prefix=".before-engines-", dir=folder) as kept:
        for name in _WRITTEN:
            if (folder / name).is_file():
                _keep(folder / name, Path(kept) / name)
        try:
            yield
        except BaseException:
            for name in _WRITTEN:
                if (Path(kept) / name).exists():
                    os.replace(Path(kept) / name, folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)
            raise


def _keep(file: Path, copy: Path) -> None:
    """Copy a file; an ONNX form, which is as large as the model and replaced whole, gets a second name instead."""
    if file.name in _ONNX_FILES:
        try:
            os.link(file, copy)
            return
        except OSError:  # a file system without hard links
            pass
    shutil.copy2(file, copy)


def _prepare(engine: str, facts: EngineFacts, trust_remote_code: bool) -> EngineReady:
    if engine == "tei":
        return prepare_tei(facts, trust_remote_code)
    return prepare_vllm(facts) if engine == "vllm" else prepare_sglang(facts)


def _record(folder: Path, ready: Iterable[EngineReady]) -> None:
    """Add the engines to the list of our files, and their files to it; what else lies there stays unlisted."""
    path = folder / LIST_FILE
    if not isinstance(read_json_object(path).get("files"), list):
        list_files(folder)
    record = read_json_object(path)
    engines = record.get("engines")
    record["engines"] = engines if isinstance(engines, dict) else {}
    for one in ready:
        record["engines"][one.engine] = one.record()
        record["files"] += [file for file in one.files if file not in record["files"]]
    write_whole(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")

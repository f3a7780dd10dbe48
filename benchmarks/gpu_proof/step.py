"""The process of one step: `python -m benchmarks.gpu_proof.step SETTINGS.json`; also the one that makes the models."""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu_proof.context import REPOSITORY, Context, Settings, StepError
from benchmarks.gpu_proof.plan import sizes
from rm_scale.files import write_whole
from rm_scale.texts import typed_line

ASSETS = "assets"
"""The name under which the process that makes models and data is started."""


def functions() -> dict[str, Callable[[Context], None]]:
    """Return what each step does."""
    from benchmarks.gpu_proof import checks, measures, ranks

    found: dict[str, Callable[[Context], None]] = {
        "doctor": checks.doctor,
        "zero3": checks.zero3,
        "qlora": checks.qlora,
        "one_billion": checks.one_billion,
        "parity": ranks.parity,
        "stopped_rank": ranks.stopped_rank,
        "syncs": measures.syncs,
        "attention": measures.attention,
        "hardware": measures.hardware,
    }
    return found | {f"{tier}_{method}": measures.throughput for tier in ("1b", "7b") for method in ("lora", "qlora")}


def make_assets(settings: Settings) -> None:
    """Write facts of the machine, then models and pairs in the order in which steps need them; announce each by a file.

    Weights are written in bfloat16, shard by shard, from repeated noise: 13 GB take some ten seconds in memory.
    """
    from rm_scale.reporting.run.run_directory import environment

    folder = settings.assets
    folder.mkdir(parents=True, exist_ok=True)
    announce(folder, "facts", write_text(folder / "facts.json", json.dumps(environment())))
    from rm_scale.demo.assets import make_tiny_model
    from rm_scale.demo.synthetic_preferences import generate_pairs

    announce(folder, "tiny", make_tiny_model(folder / "tiny"))
    rows = "".join(json.dumps(row) + "\n" for row in generate_pairs(120, seed=3, split="train"))
    announce(folder, "pairs", write_text(folder / "pairs.jsonl", rows))
    from rm_scale.demo.random_weights import make_random_model

    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    from workloads import make_data

    wanted = sizes(settings.rehearse)
    for name, shape in wanted.shapes.items():
        require_room(folder, shape, name)
        model = make_random_model(folder / f"random-{name}", shape, name)
        announce(folder, name, model)
        data, _ = make_data(wanted.mix, model, folder / "data", wanted.pairs, wanted.max_length)
        announce(folder, f"data-{name}", data)


def require_room(folder: Path, shape: Any, name: str) -> None:
    """Refuse to fill a disk, or the memory behind it.

    Raises:
        StepError: too little is free.
    """
    from rm_scale.planning.parameters import count_parameters
    from rm_scale.planning.shape import shape_from_config

    needed, free = 2 * count_parameters(shape_from_config(dict(shape))), shutil.disk_usage(folder).free
    if not (folder / f"random-{name}").exists() and free < 1.1 * needed:
        raise StepError(f"{name}: {needed / 1e9:.1f} GB of weights, {free / 1e9:.1f} GB free. Fix: --scratch FOLDER.")


def write_text(path: Path, text: str) -> Path:
    """Write a file; return its path."""
    path.write_text(text, encoding="utf-8")
    return path


def announce(folder: Path, name: str, path: Path) -> None:
    """Say that something is there, whole."""
    write_whole(folder / f"ready-{name}", str(path))


def run_step(settings: Settings) -> int:
    """Run a step and leave its answer; return 0 when it showed what it is to show."""
    context = Context(settings)
    context.answer()
    try:
        functions()[settings.step](context)
    except StepError as error:
        context.answer("failed", str(error))
        return 1
    except Exception as error:
        traceback.print_exc()
        context.answer("failed", typed_line(error, 500))
        return 1
    context.answer("ok")
    return 0


def main(path: str) -> int:
    """Do what the settings say."""
    settings = Settings.load(Path(path))
    if settings.step != ASSETS:
        return run_step(settings)
    try:
        make_assets(settings)
    except Exception as error:
        traceback.print_exc()
        write_text(settings.assets / "failed", f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of libraries must not hold up the end

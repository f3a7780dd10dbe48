"""What `make gpu-proof` runs: choose a Python that sees the GPU, give it the packages that it lacks, start the steps.

Standard library only, since the Python at hand may have nothing else. No network is used: packages come from a folder
of wheels.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_proof import wheels

REPOSITORY = Path(__file__).resolve().parents[2]
OUTPUTS = REPOSITORY / "outputs" / "gpu_proof"
PROBE = """
import json, sys
found = {"python": list(sys.version_info[:3]), "torch": None, "cuda": None, "gpus": [], "memory": [], "why": ""}
try:
    import torch
    found["torch"], found["cuda"] = torch.__version__, torch.version.cuda
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(number)
            found["gpus"].append(device.name)
            found["memory"].append(device.total_memory)
except Exception as error:
    found["why"] = type(error).__name__ + ": " + str(error)[:200]
print(json.dumps(found))
"""
_HELP = """
Steps, the most telling first (--only and --again take their names):

{steps}

Each is a process of its own with a time limit. It leaves a sealed line in
benchmarks/results/<machine>/gpu_proof/steps.jsonl as soon as it ends (and what it knows so far before that), and is not
run again for the same code. A step that no longer fits into --minutes is skipped and said to be. Exit code 1 when a
step failed.

{wheels}

--list-wheels prints the commands that fill the folder of wheels.
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_proof",
        description="What one machine with CUDA must show, in twelve minutes.",
        epilog=_HELP.format(steps=step_table(), wheels=wheels.wheel_table()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, help="for everything (default 12; a rehearsal: 60)")
    parser.add_argument("--only", type=_names, default=[], metavar="NAME,...", help="run these steps alone")
    parser.add_argument("--again", type=_names, default=[], metavar="NAME,...", help="run these although they have a "
                        "record; also: failed, all")  # fmt: skip
    parser.add_argument("--rehearse", nargs="?", const="cpu", choices=["cpu", "cuda"], help="the same steps at small "
                        "sizes, on a processor or on the GPU, with records of their own kind in "
                        "outputs/gpu_proof/rehearsal")  # fmt: skip
    parser.add_argument("--python", help="the Python to use (default: .venv if its torch sees a GPU, else python3)")
    parser.add_argument("--wheels", type=Path, default=REPOSITORY / ".wheels", help="folder of wheels (.wheels)")
    parser.add_argument("--list-wheels", action="store_true", help="print how to fill that folder, and end")
    parser.add_argument("--slim-bitsandbytes", metavar="CUDA", help="cut the folder's bitsandbytes wheel down to one "
                        "CUDA release, e.g. 13.0, and end")  # fmt: skip
    parser.add_argument("--results", type=Path, help="folder of machines (default benchmarks/results)")
    parser.add_argument("--archive", type=Path, help="a .tar.gz that holds all records so far at any time")
    parser.add_argument(
        "--scratch", type=Path, help="for models and runs (default: in memory, if 24 GB are free there)"
    )
    parser.add_argument("--keep", action="store_true", help="leave the scratch folder")
    parser.add_argument("--jobs", type=int, default=1, help="steps at a time; in a rehearsal only")
    parser.add_argument("--commit", help="what to record where there is no repository to ask")
    options = parser.parse_args(arguments)
    if options.jobs != 1 and not options.rehearse:
        parser.error("--jobs: steps that measure run alone. Fix: leave it out, or --rehearse.")
    unknown = [name for name in [*options.only, *options.again] if name not in {*step_names(), "all", "failed"}]
    if unknown or {"all", "failed"} & set(options.only):
        parser.error(f"{(unknown or options.only)[0]!r}: no step. Fix: choose from {', '.join(step_names())}.")
    return options


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _steps() -> list[dict[str, Any]]:
    """Read without importing what they need: the Python at hand may have none of it."""
    import ast

    tree = ast.parse(Path(__file__).with_name("plan.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Step"]
    return [
        {"name": call.args[0].value, "title": call.args[1].value, "seconds": call.args[2].value}  # type: ignore[attr-defined]
        for call in calls
    ]


def step_names() -> list[str]:
    """Return the steps' names in their order."""
    return [step["name"] for step in _steps()]


def step_table() -> str:
    """Return a line per step, with its time limit."""
    return "\n".join(f"  {step['name']:13} {step['seconds']:4} s at most  {step['title']}" for step in _steps())


# --- Which Python ----------------------------------------------------------------------------------------------------


def choose_python(asked: str | None, needs_gpu: bool) -> tuple[str, dict[str, Any]]:
    """Choose the first Python whose torch sees a GPU; return it with what it told.

    Args:
        asked: use this one.
        needs_gpu: else any torch will do.

    Raises:
        SystemExit: there is none.
    """
    names = [asked] if asked else [str(REPOSITORY / ".venv" / "bin" / "python"), "python3", "python"]
    seen = []
    for name in dict.fromkeys(names):
        found = probe(name)
        reason = unfit(found, needs_gpu)
        if reason is None:
            return name, found
        seen.append(f"{name}: {reason}")
    fix = (
        "PYTHON=/path/to/python with a CUDA build of torch, or --rehearse without a GPU"
        if needs_gpu
        else "install torch"
    )
    print(f"no Python for this: {'; '.join(seen)}. Fix: {fix}.", file=sys.stderr)
    raise SystemExit(2)


def probe(name: str) -> dict[str, Any]:
    """Ask a Python about its torch and the GPUs; {"why": ...} where it can't say."""
    if shutil.which(name) is None:
        return {"why": "not there"}
    try:
        done = subprocess.run([name, "-c", PROBE], capture_output=True, text=True, timeout=180, check=False)
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return {"why": f"did not answer ({type(error).__name__})"}


def unfit(found: dict[str, Any], needs_gpu: bool) -> str | None:
    """Return why a Python can't be used, if it can't."""
    if "python" not in found:
        return str(found.get("why"))
    if found["python"] < [3, 11]:
        return f"Python {'.'.join(map(str, found['python']))}, needed 3.11"
    if found["torch"] is None:
        return f"no torch ({found['why']})"
    if needs_gpu and not found["gpus"]:
        return f"torch {found['torch']} " + ("is built without CUDA" if found["cuda"] is None else "sees no GPU")
    return None


# --- Packages --------------------------------------------------------------------------------------------------------


def give_packages(python: str, found: dict[str, Any], folder: Path) -> tuple[Path, dict[str, Any]]:
    """Install what is missing from the folder of wheels; return the folder for PYTHONPATH, and what was done.

    Raises:
        SystemExit: something is missing and there is no wheel of it.
    """
    names = sorted(path.name for path in folder.glob("*.whl")) if folder.is_dir() else []
    key = hashlib.sha256(json.dumps([python, found, names]).encode()).hexdigest()[:12]
    site = OUTPUTS / f"site-{key}"
    command = [python, str(Path(__file__).with_name("wheels.py")), str(folder), str(site)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        answer = dict(json.loads(done.stdout.strip().splitlines()[-1]))
    except (ValueError, IndexError):
        print(f"the check of packages failed: {done.stderr[-800:]}", file=sys.stderr)
        raise SystemExit(2) from None
    if answer["absent"] or answer["error"]:
        missing = ", ".join(answer["absent"])
        said = answer["error"] or f"{python} lacks {missing}, and {folder} has no wheel of it that it can use"
        print(f"{said}. Fix: python -m benchmarks.gpu_proof --list-wheels says how to carry them.", file=sys.stderr)
        raise SystemExit(2)
    return site, answer


def packages_line(answer: dict[str, Any]) -> str:
    """Say in a line what was done about packages."""
    count = len(answer["installed"])
    parts = [f"{count} packages from wheels" if count else "all packages were there"]
    parts += [f"used though of another version: {', '.join(answer['outdated'])}"] if answer["outdated"] else []
    parts += [] if answer["bitsandbytes"] else ["no bitsandbytes: QLoRA steps are skipped"]
    return "; ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare, then become the process that runs the steps."""
    started, options = time.time(), parse_arguments(arguments)
    if options.list_wheels:
        print(wheels.download_lines(str(options.wheels.name)))
        return 0
    if options.slim_bitsandbytes:
        wheel = wheels.slim_bitsandbytes(options.wheels, options.slim_bitsandbytes)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB")
        return 0
    python, found = choose_python(options.python or os.environ.get("PYTHON"), options.rehearse != "cpu")
    site, answer = give_packages(python, found, options.wheels)
    place = "the processor" if options.rehearse == "cpu" else f"{len(found['gpus'])} x {found['gpus'][0]}"
    place = f"a rehearsal on {place}" if options.rehearse else place
    print(f"{place}, torch {found['torch']} (CUDA {found['cuda']}), {packages_line(answer)}", flush=True)
    told = {
        "minutes": options.minutes or (60.0 if options.rehearse else 12.0),
        "started": started,
        "only": options.only,
        "again": options.again,
        "rehearse": bool(options.rehearse),
        "device": "cpu" if options.rehearse == "cpu" else "cuda",
        "results": str(
            options.results
            or (OUTPUTS / "rehearsal" if options.rehearse else wheels.REPOSITORY / "benchmarks" / "results")
        ),
        "scratch": str(options.scratch) if options.scratch else None,
        "archive": str(options.archive) if options.archive else None,
        "jobs": options.jobs,
        "keep": options.keep,
        "commit": options.commit,
        "machine": found,
        "bitsandbytes": answer["bitsandbytes"],
    }
    path = os.pathsep.join(filter(None, [str(site), str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    os.chdir(REPOSITORY)
    command = [python, "-m", "benchmarks.gpu_proof.driver", json.dumps(told)]
    os.execvpe(python, command, {**os.environ, "PYTHONPATH": path})


if __name__ == "__main__":
    sys.exit(main())

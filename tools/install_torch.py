"""Install the pinned torch into the Python that runs this file: the CPU build where there is no NVIDIA GPU.

Standard library only. The CPU build saves several gigabytes of CUDA libraries. In order of preference, without a GPU:

1. what pip is already set up to give, if that is a CPU build (a mirror or a local folder of wheels);
2. PyTorch's own index of CPU builds;
3. what pip gives by default, with a warning, when that index can't be reached.

`RM_SCALE_TORCH_INDEX=URL` overrides the choice, for another CUDA release or a mirror, say.

What is there stays, with two exceptions: a CPU build on a machine with a GPU, as where an environment was made on a
login node; and another build than `RM_SCALE_TORCH_INDEX` has.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE = ["--retries", "0", "--timeout", "5"]


def pip(*arguments: str) -> list[str]:
    """Return the pip command of this Python."""
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]


def has_nvidia_gpu(devices: Path = Path("/dev")) -> bool:
    """Return whether there is a GPU that this process may open, or that `nvidia-smi` finds."""
    nodes = [node for node in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", node.name)]
    if any(os.access(node, os.R_OK | os.W_OK) for node in nodes):
        return True
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    try:
        found = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return found.returncode == 0 and "GPU" in found.stdout


def build_present() -> str | None:
    """Return the build of torch that is installed ("2.13.0+cpu"), `None` without one."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def is_cpu_build() -> bool:
    """Return whether the installed torch is for processors alone, by its `version.py`: its version may not say."""
    file = Path(str(importlib.metadata.distribution("torch").locate_file("torch/version.py")))
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return not re.search(r"^(cuda|hip|xpu)\b[^=\n]*=\s*['\"]", text, re.MULTILINE)


def build_offered(version: str, *options: str) -> str | None:
    """Return the build of torch `version` that pip would install ("2.13.0", "2.13.0+cpu"), `None` if there is none.

    Reads package listings only, so that nothing large is downloaded.
    """
    listed = subprocess.run(
        pip("index", "versions", "torch", *PROBE, *options), capture_output=True, text=True, check=False
    ).stdout
    # pip lists the newest first and prefers a local build ("+cpu") of the same version, as it does when installing.
    builds = re.findall(rf"\b{re.escape(version)}(?:\+[\w.]+)?(?=,|\s|$)", listed.partition("Available versions:")[2])
    return builds[0] if builds else None


def choose_options(version: str) -> tuple[list[str], str]:
    """Return options for `pip install torch==version`, and the reason as text."""
    index = os.environ.get("RM_SCALE_TORCH_INDEX")
    if index:
        return ["--index-url", index], f"from {index} (RM_SCALE_TORCH_INDEX)"
    if has_nvidia_gpu():
        return [], "the CUDA build, as this machine has an NVIDIA GPU"
    if platform.system() != "Linux":
        return [], "the default build of this system"
    offered = build_offered(version)
    if offered is not None and offered.endswith("+cpu"):
        return [], "the CPU build that pip is set up to give"
    if build_offered(version, "--index-url", CPU_INDEX) is not None:
        return ["--index-url", CPU_INDEX], f"the CPU build from {CPU_INDEX}"
    print(
        f"WARNING: no NVIDIA GPU here, but {CPU_INDEX} can't be reached: pip's default build of torch is installed "
        "instead, which on Linux brings several GB of CUDA libraries.\n"
        "  Fix: open that address, or name a mirror: RM_SCALE_TORCH_INDEX=URL make test",
        file=sys.stderr,
    )
    return [], "pip's default build"


def why_replace(present: str, version: str) -> str | None:
    """Return why another build of the same version should replace the installed one; `None` where it should stay.

    Prints a warning where it should and nothing better is to be had.
    """
    index = os.environ.get("RM_SCALE_TORCH_INDEX")
    on_cpu = is_cpu_build() and platform.system() != "Darwin" and has_nvidia_gpu()
    if index is None and not on_cpu:
        return None
    offered = build_offered(version, *(["--index-url", index] if index else []))
    if offered is None or offered == present:
        if on_cpu:
            warn_of_cpu_build(present, index)
        return None
    if index is not None:
        return f"{index} (RM_SCALE_TORCH_INDEX) has {offered}"
    return "it is a CPU build, and this machine has an NVIDIA GPU"


def warn_of_cpu_build(present: str, index: str | None) -> None:
    """Say that GPUs will stay unused."""
    print(
        f"WARNING: torch {present} is a CPU build and this machine has an NVIDIA GPU, but {index or 'pip'} has no "
        "other one, or can't be reached: everything will run on the processor.\n"
        "  Fix: name an index of a CUDA that the driver takes (https://pytorch.org/get-started/locally), on a machine "
        "with a network: RM_SCALE_TORCH_INDEX=https://download.pytorch.org/whl/cu126 tools/make_venv.sh",
        file=sys.stderr,
    )


def main(arguments: list[str]) -> int:
    """Install `arguments[0]`, a version such as 2.13.0, unless it is there already."""
    version = arguments[0]
    present = build_present()
    force = []
    if present is not None and present.partition("+")[0] == version:
        reason = why_replace(present, version)
        if reason is None:
            print(f"torch {present} is already installed")
            return 0
        print(f"replacing torch {present}: {reason}", flush=True)
        force = ["--force-reinstall"]  # to pip one build of a version is as good as another
    options, reason = choose_options(version)
    print(f"installing torch {version}: {reason}", flush=True)
    # Its dependencies come with everything else, from pip's usual place and at the pinned versions.
    code = subprocess.run(
        pip("install", "-qq", "--no-deps", *force, *options, f"torch=={version}"), check=False
    ).returncode
    if code == 0 and platform.system() != "Darwin" and has_nvidia_gpu() and is_cpu_build():
        warn_of_cpu_build(build_present() or version, os.environ.get("RM_SCALE_TORCH_INDEX"))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

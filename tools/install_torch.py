"""Install the pinned torch into the Python that runs this file: the CPU build where there is no NVIDIA GPU.

Standard library only. The CPU build saves several gigabytes of CUDA libraries. In order of preference, without a GPU:

1. what pip is already set up to give, if that is a CPU build (a mirror or a local folder of wheels);
2. PyTorch's own index of CPU builds;
3. what pip gives by default, with a warning, when that index can't be reached.

`RM_SCALE_TORCH_INDEX=URL` overrides the choice, for another CUDA release or a mirror, say.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE = ["--retries", "0", "--timeout", "5"]


def pip(*arguments: str) -> list[str]:
    """The pip command of this Python."""
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]


def has_nvidia_gpu() -> bool:
    """Whether `nvidia-smi` is there and finds a device."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    try:
        found = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return found.returncode == 0 and "GPU" in found.stdout


def build_offered(version: str, *options: str) -> str | None:
    """The build of torch `version` that pip would install ("2.13.0", "2.13.0+cpu"), or `None` if there is none.

    Reads package listings only, so that nothing large is downloaded.
    """
    listed = subprocess.run(
        pip("index", "versions", "torch", *PROBE, *options), capture_output=True, text=True, check=False
    ).stdout
    # pip lists the newest first and prefers a local build ("+cpu") of the same version, as it does when installing.
    builds = re.findall(rf"\b{re.escape(version)}(?:\+[\w.]+)?(?=,|\s|$)", listed.partition("Available versions:")[2])
    return builds[0] if builds else None


def choose_options(version: str) -> tuple[list[str], str]:
    """Options for `pip install torch==version`, and the reason in words."""
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


def main(arguments: list[str]) -> int:
    """Install `arguments[0]`, a version such as 2.13.0, unless it is there already."""
    version = arguments[0]
    try:
        present = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        present = None
    if present is not None and present.partition("+")[0] == version:
        print(f"torch {present} is already installed")
        return 0
    options, reason = choose_options(version)
    print(f"installing torch {version}: {reason}", flush=True)
    # Its dependencies come with everything else, from pip's usual place and at the pinned versions.
    return subprocess.run(pip("install", "-qq", "--no-deps", *options, f"torch=={version}"), check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""CUDA without a card: let torch's CPU build run the CUDA code path on ordinary memory, and catch device mistakes.

torch's CPU build has no kernels under its CUDA dispatch key, so tests may supply some: `kernels.cpp` gives every
operator one that first checks, as a card does, that its tensors are on one device, and then runs the processor's
kernel on the same memory. `device="cuda"`, autograd's device threads, autocast, pinned memory, DeepSpeed's CUDA
accelerator and process groups called "nccl" (carried by gloo, refusing tensors on the host) then work in any process
whose environment comes from `environment()`. What is missing: triton, flash attention, real streams, memory limits and
speed.

Nothing of this is part of the package.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
VARIABLE = "RM_SCALE_CUDA_STANDIN"
"""How many devices there are to be; unset or 0: no stand-in."""

LIBRARY_VARIABLE = "RM_SCALE_CUDA_STANDIN_LIBRARY"


def library() -> Path:
    """Return the compiled kernels, building them on first use (about half a minute)."""
    from filelock import FileLock
    from torch.utils.cpp_extension import load

    folder = _build_folder()
    built = folder / "cuda_standin.so"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "build.lock"):
        if not built.is_file():
            load(
                "cuda_standin",
                [str(FOLDER / "kernels.cpp")],
                extra_cflags=["-O1", "-std=c++20"],
                build_directory=str(folder),
                is_python_module=False,
                is_standalone=False,
            )
    return built


def _build_folder() -> Path:
    """One per source and version of torch, beside the environment's packages."""
    import torch

    key = hashlib.sha256((FOLDER / "kernels.cpp").read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    return Path(sys.prefix) / "cache" / "cuda_standin" / key


def environment(devices: int = 1, **extra: str) -> dict[str, str]:
    """Return this process's environment with so many stand-in devices for the processes it starts."""
    from tests.support.launching import environment as plain

    # bitsandbytes compiles its portable kernels for each shape otherwise, which takes minutes.
    always = {VARIABLE: str(devices), LIBRARY_VARIABLE: str(_library_of_tests()), "TORCHDYNAMO_DISABLE": "1"}
    env = plain(**{**always, **extra})
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        env.pop(name, None)
    paths = [str(FOLDER / "site"), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return env


_BUILT: list[Path] = []


def _library_of_tests() -> Path:
    """The library, built in a process of its own: a process that has loaded it has a card from then on."""
    if not _BUILT:
        code = "from tests.support.cuda_standin import library; print(library())"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=FOLDER.parents[2], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        _BUILT.append(Path(done.stdout.strip().splitlines()[-1]))
    return _BUILT[0]

"""Checks of what is installed on a machine: Python, packages, compiler, and what is left of earlier builds."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from importlib import metadata
from pathlib import Path

from rm_scale.doctor.findings import Asked, Check
from rm_scale.files import existing_parent
from rm_scale.launch.extensions import STALE_LOCK_SECONDS, prepare_extensions
from rm_scale.texts import one_line
from rm_scale.version import PACKAGE

STACK = ("torch", "transformers", "trl", "peft", "deepspeed", "accelerate", "datasets", "bitsandbytes")
"""Packages whose versions decide whether a run works; each has a line of its own."""

_NETWORK_FILE_SYSTEMS = ("nfs", "lustre", "gpfs", "beegfs", "cifs", "smb", "ceph", "fuse.sshfs", "panfs", "9p")


def python_version(asked: Asked) -> Check:
    """Check the interpreter against the package's `Requires-Python`."""
    from packaging.specifiers import SpecifierSet

    required = _package().metadata["Requires-Python"] or ""
    version = platform.python_version()
    seen = f"{version} ({sys.executable})"
    if SpecifierSet(required).contains(version, prereleases=True):
        return Check("python", "pass", seen)
    return Check("python", "fail", f"{seen}, needed {required}", f"Make the environment with Python {required}.")


def package_versions(asked: Asked) -> list[Check]:
    """Check each package of the training stack against the range that rm_scale was tested with, others in one line."""
    required = requirements()
    pins = tested_versions()
    checks = [_version_check(name, required[name], pins.get(name)) for name in STACK if name in required]
    others = [_version_check(name, range_, None) for name, range_ in required.items() if name not in STACK]
    bad = [check for check in others if check.status == "fail"]
    if not bad:
        return [*checks, Check("other packages", "pass", f"{len(others)} as required")]
    return [*checks, *bad]


def requirements() -> dict[str, str]:
    """Return version ranges by package name, from rm_scale's own metadata without its extras."""
    from packaging.requirements import Requirement

    parsed = [Requirement(text) for text in _package().requires or []]
    wanted = [item for item in parsed if item.marker is None or item.marker.evaluate({"extra": ""})]
    return {item.name.lower(): str(item.specifier) for item in wanted}


def tested_versions() -> dict[str, str]:
    """Return the exact versions of `constraints.txt`; empty where the package was installed without the repository."""
    path = PACKAGE.parent / "constraints.txt"
    if not path.is_file():
        return {}
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [line.partition("==") for line in lines if "==" in line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): version for name, _, version in pairs}


def _package() -> metadata.Distribution:
    return metadata.distribution("rm-scale")


def _version_check(name: str, required: str, tested: str | None) -> Check:
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    install = f"pip install '{name}{required}'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "fail", f"not installed, needed {required}", f"{install}.")
    if not SpecifierSet(required).contains(version, prereleases=True):
        return Check(name, "fail", f"{version}, needed {required}", f"{install}.")
    if tested is not None and Version(version).public != tested:
        # In range, so it should work; but when something odd happens this is worth knowing.
        return Check(
            name, "pass", f"{version} (in {required}; constraints.txt, which the tests ran with, has {tested})"
        )
    return Check(name, "pass", version)


def compiler(asked: Asked) -> Check:
    """Check for a C++ compiler that finds Python's headers: DeepSpeed's host optimizer and torch.compile need it."""
    name = "c++ compiler"
    fix = (
        "Install one with Python's headers (apt install g++ python3-dev, or module load gcc). Only offload to the host "
        "and torch_compile need it."
    )
    asked_for = os.environ.get("CXX")
    found = next((path for path in map(shutil.which, [asked_for or "c++", "g++", "clang++"]) if path), None)
    if found is None:
        return Check(name, "warn", "none on PATH", fix)
    include = sysconfig.get_paths()["include"]
    done = subprocess.run(
        [found, "-x", "c++", "-fsyntax-only", f"-I{include}", "-"],
        input="#include <Python.h>\n#include <vector>\n",
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if done.returncode:
        reason = one_line(done.stderr, 200)
        return Check(name, "warn", f"{found} can't compile against Python's headers: {reason}", fix)
    return Check(name, "pass", found)


def ninja(asked: Asked) -> Check:
    """Check for the `ninja` command, by which torch builds operators; its package puts it beside `python`."""
    found = shutil.which("ninja")
    if found is not None:
        return Check("ninja", "pass", found)
    beside = Path(sys.executable).parent
    return Check(
        "ninja",
        "warn",
        "not on PATH: operators can't be built",
        f"Activate the environment, or put {beside} on PATH. Only offload to the host needs it.",
    )


def operator_builds(asked: Asked) -> Check:
    """Check for locks in the folder of compiled operators; a dead one makes every later job wait without a message."""
    name = "operator builds"
    # Local rank 0 clears old locks; looking must not.
    folder = prepare_extensions(local_rank=1)
    system = file_system(folder)
    if system.startswith(_NETWORK_FILE_SYSTEMS):
        return Check(
            name,
            "warn",
            f"{folder} is on a network file system ({system}): nodes would wait for each other's builds",
            "Set TORCH_EXTENSIONS_DIR to a folder on a local disk of each node.",
        )
    ages = _lock_ages(folder)
    if not ages:
        return Check(name, "pass", f"no locks in {folder}")
    newest = min(ages)
    seen = f"{len(ages)} locks in {folder}, the newest {newest / 60:.0f} minutes old"
    if newest > STALE_LOCK_SECONDS:
        return Check(name, "warn", seen, "Nothing to do: dead builds left them, and the next run removes them.")
    return Check(name, "warn", seen, "If no other run is compiling now, delete the files called lock there.")


def _lock_ages(folder: Path) -> list[float]:
    """Return the age of each lock in seconds."""
    ages = []
    for lock in folder.glob("**/lock"):
        try:
            ages.append(time.time() - lock.stat().st_mtime)
        except FileNotFoundError:
            continue  # its owner has just finished
    return ages


def file_system(path: Path) -> str:
    """Return the kind of the file system that holds a path, such as ext4 or nfs4; empty when unknown."""
    import psutil

    place = existing_parent(path)
    mounts = [part for part in psutil.disk_partitions(all=True) if place.is_relative_to(part.mountpoint)]
    return str(max(mounts, key=lambda part: len(part.mountpoint)).fstype) if mounts else ""


def cuda_toolkit(asked: Asked) -> Check:
    """Check the CUDA compiler against torch's CUDA; DeepSpeed builds operators with the same major version only."""
    import torch

    name, built_for = "cuda toolkit", torch.version.cuda
    if built_for is None:
        return Check(name, "skip", "torch is a build without CUDA")
    fix = f"Load a CUDA {built_for} toolkit (module load cuda, CUDA_HOME). Only offload to the host needs it."
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which(str(Path(home) / "bin" / "nvcc")) if home else shutil.which("nvcc")
    if nvcc is None:
        return Check(name, "warn", f"no nvcc; torch was built for CUDA {built_for}", fix)
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=30, check=False)
    release = re.search(r"release (\d+\.\d+)", done.stdout)
    version = release.group(1) if release else "of unknown version"
    if version.split(".")[0] != built_for.split(".")[0]:
        return Check(name, "warn", f"{nvcc} is {version}; torch was built for CUDA {built_for}", fix)
    return Check(name, "pass", f"{nvcc} {version}, torch built for {built_for}")

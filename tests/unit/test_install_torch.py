"""Which build of torch an environment gets: real pip, small wheels in its name, and indexes that are folders."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="a machine without a GPU is part of it")

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "install_torch.py"
VERSION = "9.9.9"


def wheel(folder: Path, build: str, cuda: str | None) -> Path:
    """A wheel called torch, which knows what it was built for."""
    info = f"torch-{build}.dist-info"
    files = {
        "torch/__init__.py": "",
        "torch/version.py": f"from typing import Optional\ncuda: Optional[str] = {cuda!r}\nhip: Optional[str] = None\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: torch\nVersion: {build}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = []
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(text.encode())}\n")
    files[f"{info}/RECORD"] = "".join([*lines, f"{info}/RECORD,,\n"])
    path = folder / f"torch-{build}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def index(folder: Path, *builds: tuple[str, str | None]) -> str:
    """A package index with these builds; gives its address."""
    (folder / "torch").mkdir(parents=True)
    links = [wheel(folder / "torch", build, cuda).name for build, cuda in builds]
    page = "".join(f'<a href="{name.replace("+", "%2B")}">{name}</a>' for name in links)
    (folder / "torch" / "index.html").write_text(f"<!DOCTYPE html><html><body>{page}</body></html>")
    return folder.as_uri()


class Environment:
    """A virtual environment without torch, on a machine with or without a GPU."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        self.python = folder / "venv" / "bin" / "python"
        self.tools = folder / "tools"
        self.tools.mkdir()

    def install(self, default: str, gpu: bool, index: str | None = None) -> str:
        """Run the script; gives what it printed."""
        tool = self.tools / "nvidia-smi"
        tool.unlink(missing_ok=True)
        if gpu:
            tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'\n")
            tool.chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        kept.pop("RM_SCALE_TORCH_INDEX", None)
        variables = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": default, "PATH": f"{self.tools}:/usr/bin:/bin"}
        if index is not None:
            variables["RM_SCALE_TORCH_INDEX"] = index
        done = subprocess.run(
            [str(self.python), str(SCRIPT), VERSION], env=kept | variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def cuda(self) -> str:
        """What the torch that is installed was built for."""
        code = "import torch.version; print(torch.version.cuda)"
        return subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("environment"))


def test_an_environment_moves_from_a_login_node_to_gpu_nodes(environment: Environment, tmp_path: Path) -> None:
    login = index(tmp_path / "login", (f"{VERSION}+cpu", None))
    usual = index(tmp_path / "usual", (VERSION, "13.0"))
    older = index(tmp_path / "older", (f"{VERSION}+cu126", "12.6"))
    assert "the CPU build that pip is set up to give" in environment.install(login, gpu=False)
    assert environment.cuda() == "None"
    assert f"torch {VERSION}+cpu is already installed" in environment.install(usual, gpu=False), "there is no GPU here"

    told = environment.install(login, gpu=True)
    assert (
        f"WARNING: torch {VERSION}+cpu is a CPU build and this machine has an NVIDIA GPU, but pip has no other" in told
    )
    assert "Fix: name an index of a CUDA that the driver takes" in told and environment.cuda() == "None"
    assert "can't be reached" in environment.install((tmp_path / "gone").as_uri(), gpu=True)

    told = environment.install(usual, gpu=True)
    assert f"replacing torch {VERSION}+cpu: it is a CPU build, and this machine has an NVIDIA GPU" in told
    assert environment.cuda() == "13.0" and "WARNING" not in told
    for gpu in (True, False):
        assert f"torch {VERSION} is already installed" in environment.install(login, gpu=gpu), "it is not taken away"

    # For a driver that is too old for it, and from a machine that has no GPU.
    told = environment.install(login, gpu=False, index=older)
    assert f"replacing torch {VERSION}: {older} (RM_SCALE_TORCH_INDEX) has {VERSION}+cu126" in told
    assert environment.cuda() == "12.6"
    assert f"torch {VERSION}+cu126 is already installed" in environment.install(login, gpu=True, index=older)


def test_a_gpu_that_gets_a_cpu_build_at_first_is_told_of(tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    told = environment.install(index(tmp_path / "only", (VERSION, None)), gpu=True)
    assert "the CUDA build, as this machine has an NVIDIA GPU" in told
    assert f"WARNING: torch {VERSION} is a CPU build" in told, "its name does not say so"

"""What `nvidia-smi` says of the GPUs, with a stand-in for it on PATH."""

from __future__ import annotations

from pathlib import Path

import pytest

from rm_scale.launch.machine import local_gpu_names
from rm_scale.launch.nvidia_smi import query_gpus


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in that shows two GPUs and keeps the arguments it was given."""
    path = tmp_path / "nvidia-smi"
    path.write_text(f"""#!/bin/sh
echo "$@" >{tmp_path}/asked
echo '0, NVIDIA H100 80GB HBM3'
echo '1, NVIDIA H100 PCIe'
""")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return path


def test_a_row_for_each_gpu(tool: Path) -> None:
    assert query_gpus("name") == [["NVIDIA H100 80GB HBM3"], ["NVIDIA H100 PCIe"]]
    assert tool.with_name("asked").read_text() == "--query-gpu=index,name --format=csv,noheader,nounits\n"
    assert query_gpus("name", "uuid") == [], "rows of another length are no answer to this"


@pytest.mark.parametrize("code", ["echo 'No devices were found'", "echo '0, x'; exit 9", ""])
def test_no_gpus(code: str, tool: Path) -> None:
    tool.write_text(f"#!/bin/sh\n{code}\n")
    assert query_gpus("name") == []
    tool.unlink()
    assert query_gpus("name") == []


@pytest.mark.parametrize(("visible", "count"), [("0,1", 2), ("1", 1), ("", 0), ("-1", 0), ("NoDevFiles", 0)])
def test_a_run_gets_the_gpus_that_are_visible(
    visible: str, count: int, tool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(local_gpu_names()) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert len(local_gpu_names()) == count

"""Which device a rank takes, and GPUs of a machine that torch leaves unused: by made-up trees of /dev and /proc."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rm_scale import train
from rm_scale.cli import main
from rm_scale.distributed import World
from rm_scale.errors import UserError
from rm_scale.launch import devices
from rm_scale.launch.devices import (
    MachineGpus,
    TorchBuild,
    are_hidden,
    device_number,
    install_command,
    machine_gpus,
    newest_cuda,
    rank_device,
    training_device,
    unused_gpus,
)
from rm_scale.launch.ranks import device_flags

CPU_BUILD = TorchBuild("2.13.0+cpu", None)
CUDA_13 = TorchBuild("2.13.0+cu130", "13.0")
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC version: 11.4\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder@U22-A1)\n"


def machine(root: Path, num_listed: int = 1, num_nodes: int = 1, driver: str = OPEN) -> Path:
    """A tree as NVIDIA's driver leaves it."""
    for number in range(num_listed):
        (root / f"proc/driver/nvidia/gpus/0000:{number:02x}:00.0").mkdir(parents=True)
    (root / "dev").mkdir(parents=True)
    for name in [f"nvidia{number}" for number in range(num_nodes)] + ["nvidiactl", "nvidia-uvm", "null"]:
        (root / "dev" / name).touch()
    if num_listed:
        (root / "proc/driver/nvidia/version").write_text(driver)
    return root


@pytest.fixture(autouse=True)
def no_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A PATH of nothing but what a test puts there."""
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield tools


def nvidia_smi(tools: Path, script: str) -> None:
    tool = tools / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)


# --- What the machine has --------------------------------------------------------------------------------------------


def test_gpus_by_the_drivers_files(tmp_path: Path) -> None:
    assert machine_gpus(machine(tmp_path / "eight", 8, 8, CLOSED)) == MachineGpus(8, 8, "535.129.03")
    assert machine_gpus(machine(tmp_path / "open")) == MachineGpus(1, 1, "580.65.06")
    assert machine_gpus(machine(tmp_path / "none", 0, 0)) == MachineGpus()
    assert machine_gpus(tmp_path / "nothing") == MachineGpus()
    assert machine_gpus(machine(tmp_path / "odd", driver="something else\n")).driver == ""


def test_gpus_of_which_this_process_may_open_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's control groups refuse the others, which the system says when it is asked for access."""
    root = machine(tmp_path / "slurm", 4, 4)
    real = os.access

    def access(path: Path, mode: int) -> bool:
        return path.name != "nvidia0" and real(path, mode)

    monkeypatch.setattr(os, "access", access)
    assert machine_gpus(root) == MachineGpus(4, 3, "580.65.06")


def test_the_drivers_tool_is_asked_where_files_show_none(tmp_path: Path, no_tool: Path) -> None:
    nvidia_smi(no_tool, "echo '0, GPU-1'")
    assert machine_gpus(tmp_path / "windows") == MachineGpus(1, 1, "")
    assert machine_gpus(machine(tmp_path / "not_made_yet", 2, 0)).num_given == 1
    nvidia_smi(no_tool, "echo 'No devices were found'")
    assert machine_gpus(machine(tmp_path / "withheld", 2, 0)) == MachineGpus(2, 0, "580.65.06")
    nvidia_smi(no_tool, "echo '0, NVIDIA-SMI has failed'; exit 9")
    assert machine_gpus(tmp_path / "broken") == MachineGpus()


def test_what_cuda_a_driver_takes() -> None:
    """580 for CUDA 13, 525 for 12, 450 for 11: NVIDIA, "CUDA Compatibility"."""
    found = [newest_cuda(f"{major}.1") for major in (418, 450, 470, 525, 570, 580, 610)]
    assert found == [10, 11, 11, 12, 12, 13, 13] and newest_cuda("") is None


# --- What torch leaves unused ----------------------------------------------------------------------------------------


def test_a_build_without_cuda(tmp_path: Path) -> None:
    new = unused_gpus(CPU_BUILD, machine(tmp_path / "new", 8, 8), {})
    assert new is not None and new.given
    assert new.seen == "this machine has 8 NVIDIA GPUs, but torch 2.13.0+cpu is a build without CUDA"
    assert new.fix.startswith(
        "install a torch for CUDA 13, on any machine that has a network and this environment: RM_"
    )
    assert f"{devices.TORCH_INDEX[13]} " in new.fix and f"make_venv.sh {sys.prefix} " in new.fix
    old = unused_gpus(CPU_BUILD, machine(tmp_path / "old", driver=CLOSED), {})
    assert old is not None and old.seen.startswith("this machine has 1 NVIDIA GPU, but")
    assert f"RM_SCALE_TORCH_INDEX={devices.TORCH_INDEX[12]} " in old.fix, "one that the driver takes"
    oldest = unused_gpus(CPU_BUILD, machine(tmp_path / "oldest", driver=CLOSED.replace("535", "470")), {})
    assert oldest is not None and oldest.fix.startswith(
        "update the driver (driver 470.129.03 takes CUDA 11 at most), th"
    )


def test_a_driver_too_old_for_torch(tmp_path: Path) -> None:
    found = unused_gpus(CUDA_13, machine(tmp_path, driver=CLOSED), {})
    assert found is not None and found.given
    assert found.seen.endswith("torch 2.13.0+cu130 is built for CUDA 13.0, and driver 535.129.03 takes CUDA 12 at most")
    assert found.fix.startswith("update the driver, or install a torch for CUDA 12,")


def test_torch_says_itself_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("Found no NVIDIA driver\non your system.")

    monkeypatch.setattr(torch.cuda, "init", broken)
    found = unused_gpus(CUDA_13, machine(tmp_path), {"CUDA_VISIBLE_DEVICES": "7"})
    assert found is not None and found.seen.endswith(
        "built for CUDA 13.0, sees none (CUDA_VISIBLE_DEVICES='7'): Found no NVIDIA driver on your system"
    )
    assert "apptainer exec --nv" in found.fix


def test_gpus_that_others_have(tmp_path: Path) -> None:
    for build in (CPU_BUILD, CUDA_13):
        found = unused_gpus(build, machine(tmp_path / str(build.cuda), 4, 0), {})
        assert found is not None and not found.given
        assert found.seen == "this machine has 4 NVIDIA GPUs, but this process was given none"
        assert found.fix.startswith("start the job or the container with them (sbatch --gpus-per-node N")


def test_nothing_is_said_where_it_is_meant_or_there_is_none(tmp_path: Path) -> None:
    root = machine(tmp_path / "gpu")
    for value in ("", " ", "-1", "none", "NoDevFiles"):
        assert are_hidden({"CUDA_VISIBLE_DEVICES": value})
        assert unused_gpus(CPU_BUILD, root, {"CUDA_VISIBLE_DEVICES": value}) is None
    assert not are_hidden({}) and not are_hidden({"CUDA_VISIBLE_DEVICES": "1"})
    assert unused_gpus(CPU_BUILD, machine(tmp_path / "cpu", 0, 0), {}) is None


def test_how_another_build_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[3] / "tools" / "make_venv.sh"
    assert script.is_file()
    assert install_command(CPU_BUILD, "URL") == f"RM_SCALE_TORCH_INDEX=URL {script} {sys.prefix}"
    monkeypatch.setattr(devices, "PACKAGE", tmp_path / "site-packages" / "rm_scale")
    pip = f"{sys.executable} -m pip"
    assert (
        install_command(CPU_BUILD, "URL") == f"{pip} uninstall -y torch && {pip} install torch==2.13.0 --index-url URL"
    )


# --- At the start of each command ------------------------------------------------------------------------------------


@pytest.fixture
def gpu_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPU node, and the torch of a login node."""
    root = machine(tmp_path / "node", 8, 8)
    real = machine_gpus
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "machine_gpus", lambda *_: real(root))
    return root


def test_training_does_not_start_on_the_processor_by_mistake(gpu_node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as caught:
        training_device()
    text = str(caught.value)
    assert "8 NVIDIA GPUs, but torch" in text and "is a build without CUDA: training would run on the processor" in text
    assert "Fix: install a torch for CUDA 13" in text
    assert text.endswith('To train on the processor on purpose: CUDA_VISIBLE_DEVICES="" before the command.')
    assert caught.value.met_by == "node", "one rank of a machine speaks for all"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert training_device() == "cpu"


def test_a_run_refuses_to_start(
    gpu_node: Path, tiny_model: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model_name_or_path", str(tiny_model), "--dataset_path", str(pairs_file), "--dry_run"]
    assert train.main([*words, "--output_dir", str(tmp_path / "out")]) == 2
    assert "training would run on the processor. Fix: install a torch" in capsys.readouterr().err


def test_training_where_there_is_no_gpu_or_torch_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "machine_gpus", lambda *_: MachineGpus())
    monkeypatch.setattr(devices, "has_gpu", lambda: False)
    assert training_device() == "cpu"
    monkeypatch.setattr(devices, "has_gpu", lambda: True)
    assert training_device() == "cuda"


def test_a_job_without_gpus_on_a_gpu_node_may_train(
    gpu_node: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(devices, "machine_gpus", lambda *_: MachineGpus(8, 0, "580.1"))
    monkeypatch.setattr(logging.getLogger("rm_scale"), "propagate", True)
    assert training_device() == "cpu"
    assert "this process was given none: the processor does the work. Fix: start the job" in caplog.text


def test_scoring_warns(gpu_node: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(logging.getLogger("rm_scale"), "propagate", True)
    assert rank_device("cpu", World()) == "cpu" and not caplog.text, "what was asked for needs no warning"
    assert rank_device(None, World()) == "cpu"
    assert caplog.records[0].levelname == "WARNING"
    assert "is a build without CUDA: the processor does the work. Fix: install a torch" in caplog.text
    with pytest.raises(UserError, match=r"device=cuda: this machine has 8 NVIDIA GPUs, but torch .*Fix: install"):
        rank_device("cuda", World())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match=r"device=cuda:1: torch sees no GPU here\. Fix: leave --device out"):
        rank_device("cuda:1", World())


@pytest.mark.parametrize("command", ["score", "rank", "eval", "serve"])
def test_every_command_looks(
    command: str, gpu_node: Path, lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As far as the device, which a GPU that torch does not see leaves without one."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"prompt": "a", "completion": "b", "completions": ["b", "c"]}\n')
    words = ["--model", str(lora_run), "--device", "cuda"]
    if command in {"score", "rank"}:
        words += ["--input", str(texts), "--output", str(tmp_path / "out.jsonl")]
    assert main([command, *words]) == 2
    assert "device=cuda: this machine has 8 NVIDIA GPUs, but torch" in capsys.readouterr().err


# --- A rank's own ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("local_rank", "num_visible", "expected"),
    [(0, 1, 0), (3, 1, 0), (0, 4, 0), (3, 4, 3), (4, 4, None), (2, 2, None)],
)
def test_the_gpu_of_a_rank(local_rank: int, num_visible: int, expected: int | None) -> None:
    assert device_number(local_rank, num_visible) == expected


@pytest.fixture
def visible(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """GPUs that torch shows, to be set by the test; then the device that was made current."""
    state = [1]
    monkeypatch.setattr(devices, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: state[0])
    monkeypatch.setattr(torch.cuda, "set_device", state.append)
    return state


def test_each_task_under_srun_may_see_its_own_gpu_alone(visible: list[int]) -> None:
    """`srun --gpus-per-task 1`: every task sees one device, which it calls cuda:0."""
    assert rank_device(None, World(5, 8, 1, "srun", 4)) == "cuda:0"
    assert rank_device("cuda", World(5, 8, 1, "srun", 4)) == "cuda:0"
    assert visible[1:] == [0, 0]


def test_ranks_share_out_what_all_of_them_see(visible: list[int]) -> None:
    visible[0] = 4
    found = [rank_device(None, World(rank, 8, rank % 4, "deepspeed", 4)) for rank in range(8)]
    assert found == [f"cuda:{number}" for number in (0, 1, 2, 3, 0, 1, 2, 3)] and visible[1:] == [0, 1, 2, 3] * 2
    assert rank_device("cuda:2", World(1, 8, 1, "deepspeed", 4)) == "cuda:2", "what was asked for stays"


def test_ranks_without_a_gpu(visible: list[int]) -> None:
    visible[0] = 2
    with pytest.raises(UserError) as caught:
        rank_device(None, World(6, 8, 2, "srun", 4))
    assert str(caught.value) == (
        "rank 6 is number 2 on its node, and it sees 2 GPUs: each rank takes one. Fix: start 2 ranks a node, or show "
        "each its own GPU (srun --gpus-per-task 1)."
    )
    with pytest.raises(UserError, match=r"device=cuda:2: torch sees 2 GPUs, numbered from 0\. Fix: --device cuda\."):
        rank_device("cuda:2", World())
    with pytest.raises(UserError, match=r"device=gpu: is no device of torch\. Fix: cpu, cuda or cuda:0\."):
        rank_device("gpu", World())
    assert visible == [2]


def test_more_processes_than_gpus(
    visible: list[int], lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    visible[0] = 2
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert main(["score", "--model", str(lora_run), *files, "--num_processes", "4"]) == 2
    told = capsys.readouterr().err
    assert "num_processes=4: this machine shows 2 GPUs, and each rank takes one. Fix: --num_processes 2 or less" in told


def test_import_without_torch() -> None:
    code = "import sys, rm_scale.launch.devices; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("visible", "ranks", "on_gpus", "expected"),
    [
        ("2,3", 2, True, ["--include", "localhost:2,3"]),
        ("2, 3,5", 2, True, ["--include", "localhost:2,3"]),
        ("", 2, True, ["--num_accelerators", "2"]),
        ("2,3", 2, False, ["--num_accelerators", "2"]),
        ("2", 2, True, ["--num_accelerators", "2"]),
        ("GPU-1234", 1, True, ["--num_accelerators", "1"]),
    ],
)
def test_the_launcher_is_told_which_gpus(
    visible: str, ranks: int, on_gpus: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told only how many it would take the machine's first, whatever CUDA_VISIBLE_DEVICES says."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device_flags(ranks, on_gpus) == expected

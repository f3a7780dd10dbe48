"""`rm-scale doctor`: every check on this machine, and each of its failures forced."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from rm_scale.commands import doctor
from rm_scale.distributed import World
from rm_scale.doctor import (
    checks_machine,
    checks_model,
    checks_network,
    checks_ranks,
    checks_software,
    examine,
    one_rank,
)
from rm_scale.doctor.checks_machine import DriverView, Gpu
from rm_scale.doctor.findings import Asked, Check, Finding, merge, run_check
from rm_scale.doctor.findings_table import as_json, as_table, exit_code
from rm_scale.doctor.storage import run_storage
from rm_scale.doctor.worker import read_findings
from rm_scale.errors import UserError
from rm_scale.launch import devices
from rm_scale.launch import ranks as starting
from rm_scale.launch.ranks import Ended, num_local_ranks, start_ranks
from rm_scale.planning.hardware import GIB
from rm_scale.planning.shape import ModelShape, read_model_config, shape_from_config

ASKED = Asked()
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80 * GIB)
V100 = Gpu("Tesla V100", (7, 0), 16 * GIB)
IDLE = DriverView("550.1", 0.0, 0)


def executable(path: Path, script: str) -> Path:
    """A shell script that stands in for a tool."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def alone(checks: list[Check] | Check) -> Check:
    """The only check of a list."""
    (check,) = checks if isinstance(checks, list) else [checks]
    return check


# --- Guard, merging, report ------------------------------------------------------------------------------------------


def test_guard_returns_what_the_check_gives() -> None:
    good = Check("a", "pass", "x")
    assert run_check("a", lambda: good, 5) == [good]
    assert run_check("a", lambda: [good, good], 5) == [good, good]


def test_a_check_that_crashes_is_a_failure_with_its_cause() -> None:
    def crash() -> Check:
        raise KeyError("x")

    check = alone(run_check("a", crash, 5))
    assert (check.name, check.status, check.seen) == ("a", "fail", "the check ended with KeyError: 'x'")
    assert check.fix == "Put right what the message names; report it if that is not in your hands."
    assert "SystemExit: 3" in alone(run_check("a", lambda: sys.exit(3), 5)).seen


def test_a_users_error_is_taken_apart() -> None:
    def refuse() -> Check:
        raise UserError("a=1: must be 2. Fix: write 2.")

    assert alone(run_check("a", refuse, 5)) == Check("a", "fail", "a=1: must be 2.", "write 2.")


def test_no_check_hangs() -> None:
    started = time.monotonic()
    check = alone(run_check("slow", lambda: time.sleep(1200) or Check("slow", "pass", ""), 0.2))
    assert time.monotonic() - started < 600
    assert check.status == "fail" and check.seen == "did not finish within 0 s"
    assert check.fix == "See what hangs: slow. --timeout_seconds allows more time."


def test_what_all_saw_is_one_line() -> None:
    same = Check("a", "pass", "x")
    assert merge([Finding("n1", same), Finding("n2", same)]) == [same]


def test_what_some_saw_names_them() -> None:
    good, bad = Check("a", "pass", "x"), Check("a", "fail", "y", "z")
    findings = [Finding("n1", good), *(Finding(f"n{number}", bad) for number in range(2, 8))]
    assert merge(findings) == [
        Check("a", "pass", "n1: x"),
        Check("a", "fail", "n2, n3, n4 and 3 more: y", "z"),
    ]


def test_what_differs_is_shown_by_examples() -> None:
    free = [Finding(f"n{number}", Check("a", "pass", f"{number} GB")) for number in range(5)]
    assert merge(free) == [Check("a", "pass", "n0: 0 GB (4 more alike)")]
    lost = [Finding("", Check("b", "fail", f"rank {number} did not report", "f")) for number in range(5)]
    text = "rank 0 did not report; rank 1 did not report; rank 2 did not report (2 more alike)"
    assert merge(lost) == [Check("b", "fail", text, "f")]


FINDINGS = [Finding("n1", Check("python", "pass", "3.11")), Finding("n1", Check("disk", "fail", "full", "Free space."))]


def test_table_shows_the_fix_below() -> None:
    lines = as_table(FINDINGS).splitlines()
    assert lines[0] == "pass  python  3.11"
    assert lines[1] == "fail  disk    full"
    assert lines[2].strip() == "Fix: Free space."
    assert lines[3] == "2 checks: 1 pass, 0 warn, 1 fail, 0 skip"
    assert exit_code(FINDINGS) == 1 and exit_code(FINDINGS[:1]) == 0


def test_json_holds_all_findings() -> None:
    content = json.loads(as_json(FINDINGS, {"size": 1}))
    assert content["ok"] is False and content["counts"] == {"pass": 1, "warn": 0, "fail": 1, "skip": 0}
    assert content["checks"][1] == {"name": "disk", "status": "fail", "seen": "full", "fix": "Free space."}
    assert [Finding.from_dict(values) for values in content["findings"]] == FINDINGS
    assert content["world"] == {"size": 1}


def test_findings_are_read_from_among_other_output() -> None:
    line = json.dumps(FINDINGS[1].to_dict())
    findings, rest = read_findings(f"noise\nnode1: RM_SCALE_DOCTOR {line}\nRM_SCALE_DOCTOR {line[:20]}")
    assert findings == [FINDINGS[1]] and rest.splitlines() == ["noise", f"RM_SCALE_DOCTOR {line[:20]}"]


# --- This machine ----------------------------------------------------------------------------------------------------


def test_nothing_fails_on_this_machine(tmp_path: Path, tiny_model: Path) -> None:
    """Where the other tests run, a run can start."""
    findings = one_rank.check_node(replace(ASKED, output_dir=str(tmp_path / "new" / "run"), model=str(tiny_model)))
    assert [finding for finding in findings if finding.check.status == "fail"] == []
    assert {finding.where for finding in findings} == {socket.gethostname()}
    names = {finding.check.name for finding in findings}
    assert {*checks_software.STACK, "python", "gpus", "disk", "memory", "open files", "host name", "model"} <= names


def test_python_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks_software.python_version(ASKED).status == "pass"
    monkeypatch.setattr(platform, "python_version", lambda: "3.9.1")
    check = checks_software.python_version(ASKED)
    assert check.status == "fail" and "3.9.1" in check.seen
    assert check.fix == "Make the environment with Python >=3.11."


def test_versions_against_the_tested_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    pretended = {"trl": "1.99.0", "peft": "0.21.9", "pyyaml": "3.0"}

    def version(name: str) -> str:
        if name == "accelerate":
            raise metadata.PackageNotFoundError(name)
        return pretended.get(name) or real(name)

    monkeypatch.setattr(checks_software.metadata, "version", version)
    checks = {check.name: check for check in checks_software.package_versions(ASKED)}
    assert checks["torch"].status == "pass"
    assert checks["trl"] == Check("trl", "fail", "1.99.0, needed <1.17,>=1.16", "pip install 'trl<1.17,>=1.16'.")
    assert checks["accelerate"].seen == "not installed, needed <1.16,>=1.15"
    assert checks["accelerate"].fix == "pip install 'accelerate<1.16,>=1.15'."
    pin = checks_software.tested_versions()["peft"]
    assert (
        checks["peft"].status == "pass"
        and f"constraints.txt, which the tests ran with, has {pin}" in checks["peft"].seen
    )
    assert checks["pyyaml"].status == "fail" and "other packages" not in checks


def test_ranges_come_from_the_metadata() -> None:
    required = checks_software.requirements()
    assert set(checks_software.STACK) <= set(required)
    assert "pytest" not in required, "extras are not asked for"


def test_no_constraints_in_an_installed_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks_software, "PACKAGE", tmp_path / "rm_scale")
    assert checks_software.tested_versions() == {}


COMPILER_FIX = (
    "Install one with Python's headers (apt install g++ python3-dev, or module load gcc). Only offload to the host "
    "and torch_compile need it."
)


def test_no_compiler_and_no_ninja(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert checks_software.compiler(ASKED) == Check("c++ compiler", "warn", "none on PATH", COMPILER_FIX)
    check = checks_software.ninja(ASKED)
    assert check.status == "warn" and check.seen == "not on PATH: operators can't be built"
    beside = Path(sys.executable).parent
    assert check.fix == f"Activate the environment, or put {beside} on PATH. Only offload to the host needs it."


def test_compiler_without_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", str(executable(tmp_path / "cxx", "echo Python.h: no such file >&2; exit 1")))
    check = checks_software.compiler(ASKED)
    assert check.status == "warn" and "can't compile against Python's headers: Python.h: no such" in check.seen
    assert check.fix == COMPILER_FIX


@pytest.mark.parametrize(
    ("age_seconds", "fix"),
    [
        (7200, "Nothing to do: dead builds left them, and the next run removes them."),
        (60, "If no other run is compiling now, delete the files called lock there."),
    ],
)
def test_locks_of_builds(age_seconds: float, fix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert checks_software.operator_builds(ASKED).status == "pass"
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (time.time() - age_seconds, time.time() - age_seconds))
    check = checks_software.operator_builds(ASKED)
    assert check.status == "warn" and check.fix == fix and check.seen.startswith("1 locks in")
    assert lock.exists(), "the doctor looks, and changes nothing"


def test_builds_on_a_network_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(checks_software, "file_system", lambda path: "nfs4")
    check = checks_software.operator_builds(ASKED)
    assert check.status == "warn" and "network file system (nfs4)" in check.seen
    assert check.fix == "Set TORCH_EXTENSIONS_DIR to a folder on a local disk of each node."


def test_file_system_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert checks_software.file_system(tmp_path / "a" / "b") == checks_software.file_system(tmp_path) != ""
    assert checks_software.file_system(Path("/proc/self")) == "proc"


TOOLKIT_FIX = "Load a CUDA 12.8 toolkit (module load cuda, CUDA_HOME). Only offload to the host needs it."


def test_cuda_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert checks_software.cuda_toolkit(ASKED).status == "skip"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    missing = checks_software.cuda_toolkit(ASKED)
    assert missing == Check("cuda toolkit", "warn", "no nvcc; torch was built for CUDA 12.8", TOOLKIT_FIX)
    (tmp_path / "bin").mkdir()
    nvcc = executable(tmp_path / "bin" / "nvcc", "echo 'Cuda compilation tools, release 11.5, V11.5.119'")
    other = checks_software.cuda_toolkit(ASKED)
    assert other == Check("cuda toolkit", "warn", f"{nvcc} is 11.5; torch was built for CUDA 12.8", TOOLKIT_FIX)
    executable(nvcc, "echo 'Cuda compilation tools, release 12.4, V12.4.99'")
    assert checks_software.cuda_toolkit(ASKED).status == "pass"


def test_gpus_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The reasons are tested where they are found, in `test_devices.py`."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(devices, "machine_gpus", lambda *_: devices.MachineGpus(2, 2, "550.54"))
    build = checks_machine.gpus(ASKED)[0]
    assert build.status == "fail" and build.seen.startswith("this machine has 2 NVIDIA GPUs, but torch")
    assert build.seen.endswith("is a build without CUDA") and build.fix.startswith("Install a torch for CUDA 12,")
    monkeypatch.setattr(devices, "machine_gpus", lambda *_: devices.MachineGpus(2, 0, "550.54"))
    withheld = checks_machine.gpus(ASKED)[0]
    assert (withheld.status, withheld.fix[:40]) == ("warn", "Start the job or the container with them")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(checks_machine, "machine_gpus", devices.machine_gpus)
    hidden = checks_machine.gpus(ASKED)[0]
    assert (hidden.status, hidden.fix) == ("warn", "Unset CUDA_VISIBLE_DEVICES to use them.")
    assert hidden.seen == "2 hidden by CUDA_VISIBLE_DEVICES='': runs use the processor"
    monkeypatch.setattr(checks_machine, "machine_gpus", lambda: devices.MachineGpus())
    assert checks_machine.gpus(ASKED)[0] == Check("gpus", "skip", "none: runs use the processor")


def test_state_of_gpus() -> None:
    good = checks_machine.compare_gpus([H100, H100], [IDLE, IDLE], "12.8")
    text = "2 x NVIDIA H100 80GB HBM3, 80 GiB, driver 550.1, torch built for CUDA 12.8"
    assert good == [Check("gpus", "pass", text), Check("gpu memory", "pass", "free, no uncorrected errors")]
    mixed = alone(checks_machine.compare_gpus([H100, V100], [], "12.8"))
    assert mixed.status == "warn"
    assert mixed.fix == "Ranks wait for the slowest: choose alike ones by CUDA_VISIBLE_DEVICES."
    broken = checks_machine.compare_gpus([H100], [IDLE, replace(IDLE, uncorrected_errors=3)], "12.8")[1]
    assert (broken.status, broken.seen) == ("fail", "uncorrected memory errors on GPU 1")
    fix = "Reset the card (nvidia-smi -r) or have it replaced; until then leave it out by CUDA_VISIBLE_DEVICES."
    assert broken.fix == fix
    busy = checks_machine.compare_gpus([H100], [replace(IDLE, used_bytes=5 * GIB)], "12.8")[1]
    assert (busy.status, busy.seen) == ("warn", "5.0 GiB of one GPU are in use already")
    fix = "End what else runs there (nvidia-smi lists it), or leave such cards out by CUDA_VISIBLE_DEVICES."
    assert busy.fix == fix


def test_what_the_driver_tool_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checks_machine.ask_driver() == []
    executable(tmp_path / "nvidia-smi", "echo '0, 550.1, 2048, [N/A]'; echo '1, 550.1, 0, 2'")
    assert checks_machine.ask_driver() == [DriverView("550.1", 2 * GIB, 0), DriverView("550.1", 0.0, 2)]
    executable(tmp_path / "nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9")
    assert checks_machine.ask_driver() == []


def test_nccl_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks_machine, "list_gpus", list)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 3))
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    assert checks_machine.gpus(ASKED)[-1] == Check("nccl", "pass", "2.28.3")
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    check = checks_machine.gpus(ASKED)[-1]
    assert check.status == "warn" and check.seen == "2.28.3, with NCCL_P2P_DISABLE=1"
    assert check.fix == "unset NCCL_P2P_DISABLE, unless you know why it is set: traffic takes a slower way."


def test_bfloat16() -> None:
    assert checks_machine.judge_bfloat16([H100], frozenset()).status == "pass"
    old = checks_machine.judge_bfloat16([H100, V100], frozenset())
    assert old == Check("bfloat16", "warn", "compute capability 7.0: emulated, slow", "Use --bf16 false --fp16 true.")
    assert checks_machine.judge_bfloat16([], frozenset({"avx512_bf16"})).status == "pass"
    plain = checks_machine.judge_bfloat16([], frozenset({"avx2"}))
    assert plain.status == "warn" and plain.fix == "Use --bf16 false."


def test_cores() -> None:
    check = checks_machine.cores(replace(ASKED, ranks_on_node=10_000))
    assert check.status == "warn" and "for 10000 ranks" in check.seen
    assert check.fix == "Ask for more: srun --cpus-per-task N, at least one core per rank. Or start fewer ranks."


def test_numactl() -> None:
    assert checks_machine.judge_numa(1, None).status == checks_machine.judge_numa(2, "/bin/numactl").status == "pass"
    missing = checks_machine.judge_numa(2, None)
    fix = "apt install numactl, for deepspeed --bind_cores_to_rank. Runs work without, at times slower."
    assert missing == Check("numactl", "warn", "missing, with 2 memory regions", fix)


def test_memory(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    asked = replace(ASKED, model=str(tiny_model))
    assert checks_machine.memory(asked).status == "pass"
    assert checks_machine.memory(ASKED).seen.endswith("--model says how much a run needs")
    monkeypatch.setattr(checks_machine, "available_memory", lambda: 1000.0)
    check = checks_machine.memory(asked)
    assert check.status == "warn"
    assert check.fix == "Ask for more (sbatch --mem), end what else runs here, or use a larger machine."


def test_memory_under_a_control_group(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 200\n")
    assert checks_machine.bytes_under_limit(tmp_path, "memory.max", "memory.current") == [500.0]
    (tmp_path / "memory.max").write_text("max\n")
    assert checks_machine.bytes_under_limit(tmp_path, "memory.max", "memory.current") == []
    assert 0 < checks_machine.available_memory() < 2**50


def test_shared_memory() -> None:
    assert checks_machine.judge_shared_memory(2 * GIB).status == "pass"
    small = checks_machine.judge_shared_memory(64 * 2**20)
    assert (small.status, small.seen) == ("warn", "/dev/shm has 0.06 GiB free, wanted 1 GiB")
    assert small.fix == "docker run --shm-size=16g or --ipc=host; elsewhere delete what lies in /dev/shm."


def test_limits() -> None:
    assert checks_machine.judge_open_files(1024, 8).status == "pass"
    assert checks_machine.judge_open_files(resource.RLIM_INFINITY, 8).seen == "no limit"
    few = checks_machine.judge_open_files(1024, 64)
    assert few == Check("open files", "warn", "limit 1024, wanted 4096", "ulimit -n 65536 before the run starts.")
    assert checks_machine.judge_locked_memory(65536, False).status == "skip"
    assert checks_machine.judge_locked_memory(resource.RLIM_INFINITY, True).status == "pass"
    locked = checks_machine.judge_locked_memory(65536, True)
    assert locked.status == "warn"
    assert (
        locked.fix == "ulimit -l unlimited; under Slurm the administrator sets PropagateResourceLimitsExcept=MEMLOCK."
    )


def test_model(tiny_model: Path, tmp_path: Path) -> None:
    assert checks_machine.model(ASKED).status == "skip"
    assert "llama" in checks_machine.model(replace(ASKED, model=str(tiny_model))).seen
    gone = replace(ASKED, model=str(tmp_path / "gone"))
    check = alone(run_check("model", lambda: checks_machine.model(gone), 20))
    assert check.status == "fail" and check.fix == "give a folder that holds config.json."
    assert checks_machine.memory(gone).status == "pass", "only one line is about the missing model"


def test_storage_by_hand() -> None:
    """One layer of width 4: embedding 40, attention 4 x 16, MLP 3 x 32, norms 3 x 4; head 4."""
    shape = ModelShape("llama", 4, 1, 1, 1, 4, 8, 10)
    full = run_storage(shape, "full", 16, 1)
    assert (full.final_bytes, full.checkpoint_bytes, full.num_checkpoints) == (2 * 216, 16 * 216, 2)
    assert full.peak_bytes == 2 * 16 * 216 + 2 * 216
    # Rank 1: per matrix inputs + outputs: 4 x 8 for attention, 3 x 12 for the MLP.
    lora = run_storage(shape, "lora", 1, 3)
    assert (lora.final_bytes, lora.num_checkpoints) == (2 * (32 + 36 + 4), 4)


def test_disk_too_full(tmp_path: Path, tiny_model: Path) -> None:
    asked = replace(ASKED, output_dir=str(tmp_path))
    assert checks_machine.disk(replace(asked, model=str(tiny_model))).status == "pass"
    check = checks_machine.disk(replace(asked, min_free_gb=1e9))
    assert check.status == "fail" and "(--min_free_gb 1e+09)" in check.seen
    assert check.fix == "Free space, give another --output_dir, or keep less: --save_total_limit 1, --save_only_model."
    storage = run_storage(shape_from_config(read_model_config(str(tiny_model))), "full", 16, 1)
    assert checks_machine.judge_disk("d", 1.0, None, storage).status == "fail"
    assert "2 checkpoints of 0.00 GB" in checks_machine.judge_disk("d", 1.0, None, storage).seen
    assert checks_machine.judge_disk("d", 1.0, None, None).status == "warn", "without the model it is a guess"


def test_disk_that_can_not_be_written() -> None:
    check = checks_machine.disk(replace(ASKED, output_dir="/proc/somewhere"))
    assert check.status == "fail" and check.seen.startswith("/proc: can't be written")
    assert check.fix == "Give an --output_dir that you may write to."


# --- Network ---------------------------------------------------------------------------------------------------------

RESOLVE_FIX = "Let it resolve to an address that all nodes reach, or set GLOO_SOCKET_IFNAME (GPUs: NCCL_SOCKET_IFNAME)."
SEVERAL = replace(ASKED, spans_nodes=True)


@pytest.fixture
def no_interface_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)


@pytest.mark.usefixtures("no_interface_named")
def test_host_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "gethostname", lambda: "nowhere")
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    seen = "nowhere does not resolve (Name or service not known)"
    assert checks_network.host_name(SEVERAL) == Check("host name", "fail", seen, RESOLVE_FIX)
    here = checks_network.host_name(ASKED)
    assert (here.status, here.fix) == ("warn", "Add '127.0.0.1 nowhere' to /etc/hosts.")


@pytest.mark.usefixtures("no_interface_named")
def test_host_name_that_is_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    check = checks_network.host_name(SEVERAL)
    assert check.status == "warn" and check.seen.endswith("which other nodes can't reach") and check.fix == RESOLVE_FIX
    assert checks_network.host_name(ASKED).status == "pass"
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    assert checks_network.host_name(SEVERAL).status == "pass"


def test_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", str(starting.free_port()))
    assert checks_network.port(ASKED).status == "pass"
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        number = taken.getsockname()[1]
        for value in (str(number), "abc", "99999"):
            monkeypatch.setenv("MASTER_PORT", value)
            check = checks_network.port(ASKED)
            assert check.status == "fail" and check.seen == f"MASTER_PORT={value} can't be used here"
            assert check.fix == "unset MASTER_PORT, or set it to a free port."
        monkeypatch.delenv("MASTER_PORT")
        monkeypatch.setattr(checks_network, "_DEFAULT_PORT", number)
        check = checks_network.port(ASKED)
    assert check.status == "warn" and check.seen == f"{number}, the launchers' default, is in use"
    assert check.fix.startswith("deepspeed --master_port ") and check.fix.endswith(" ..., or torchrun --standalone ...")
    monkeypatch.setattr(checks_network, "_DEFAULT_PORT", starting.free_port())
    assert checks_network.port(ASKED).status == "pass"


@pytest.mark.parametrize(
    ("variable", "value", "status"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", "pass"),
        ("GLOO_SOCKET_IFNAME", "eth", "fail"),
        ("NCCL_SOCKET_IFNAME", "eth", "pass"),
        ("NCCL_SOCKET_IFNAME", "=eth", "fail"),
        ("NCCL_SOCKET_IFNAME", "=ib0,eth0", "pass"),
        ("NCCL_SOCKET_IFNAME", "^docker,lo", "pass"),
        ("NCCL_SOCKET_IFNAME", "^eth,ib,lo", "fail"),
    ],
)
def test_named_interfaces(variable: str, value: str, status: str) -> None:
    check = checks_network.judge_named_interface(variable, value, ["lo", "eth0", "ib0"], spans_nodes=True)
    assert check.status == status
    if status == "fail":
        assert check.seen == f"{variable}={value}: no such interface is up here"
        assert check.fix == "Set it to one that is up: lo, eth0, ib0."


def test_loopback_reaches_no_other_node() -> None:
    check = checks_network.judge_named_interface("GLOO_SOCKET_IFNAME", "lo", ["lo", "eth0"], spans_nodes=True)
    assert check.status == "fail" and "no other node is reached over loopback" in check.seen
    assert check.fix == "unset GLOO_SOCKET_IFNAME, or name the interface that all nodes share."
    assert checks_network.judge_named_interface("GLOO_SOCKET_IFNAME", "lo", ["lo"], False).status == "pass"


def test_interfaces_to_choose_from(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks_network.judge_interfaces(["eth0", "eth1"], spans_nodes=False).status == "pass"
    assert checks_network.judge_interfaces(["eth0"], spans_nodes=True).status == "pass"
    none = checks_network.judge_interfaces([], spans_nodes=True)
    assert (none.status, none.fix) == ("fail", "Bring up the one that all nodes share.")
    several = checks_network.judge_interfaces(["eth0", "ib0"], spans_nodes=True)
    assert several.seen == "several are up: eth0, ib0"
    assert several.fix == "Name the one that all nodes share: GLOO_SOCKET_IFNAME=eth0 (GPUs: NCCL_SOCKET_IFNAME)."
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    assert alone(checks_network.interface(ASKED)) == Check("interface", "pass", "GLOO_SOCKET_IFNAME=lo")


def test_allocation() -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4"}
    assert checks_network.judge_allocation({}, False).status == "skip"
    assert checks_network.judge_allocation(job, True).status == "pass"
    check = checks_network.judge_allocation(job, False)
    assert (check.status, check.seen) == ("warn", "job 7 has 4 nodes, and only this one is looked at")
    assert check.fix == "srun rm-scale doctor, with as many tasks as the run will have."


# --- Model -----------------------------------------------------------------------------------------------------------


def test_imports_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert alone(checks_model.imports()).status == "pass"

    def load(name: str) -> None:
        if name in {"peft", "bitsandbytes"}:
            raise OSError("undefined symbol")

    monkeypatch.setattr(checks_model.importlib, "import_module", load)
    checks = checks_model.imports()
    fix = "pip install --force-reinstall --no-deps {0}, in the version that the line {0} asks for."
    assert checks[0] == Check("imports", "fail", "peft: OSError: undefined symbol", fix.format("peft"))
    assert checks[1].status == "warn"
    assert checks[1].fix == f"{fix.format('bitsandbytes')} Only QLoRA and 8-bit optimizers need it."


def test_one_pair_through_a_tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    check = checks_model.forward("cpu")
    assert check.status == "pass" and "packed attention matmul" in check.seen
    monkeypatch.setattr(checks_model, "_head_of", lambda model: torch.tensor([[float("nan"), 1.0]]))
    broken = checks_model.forward("cpu")
    fix = "Check the versions of torch and transformers above; report this with the table."
    assert broken == Check("model forward", "fail", "the new head is not finite, or zero", fix)


def test_rewards_are_judged() -> None:
    good = {"packed": [0.5, 0.25], "padded": [0.5, 0.26]}
    assert checks_model.judge_forward(good, "varlen", "cuda:0").status == "pass"
    slow = checks_model.judge_forward(good, "sdpa", "cuda:0")
    assert slow.status == "warn"
    assert slow.fix == "A GPU of compute capability 8 or more runs packed rows by flash attention."
    nan = checks_model.judge_forward({**good, "padded": [float("nan"), 1.0]}, "varlen", "cuda:0")
    assert nan.status == "fail" and "rewards are not finite" in nan.seen
    assert nan.fix == "The device computes wrong: try another one, then other versions of driver and torch."
    apart = checks_model.judge_forward({**good, "padded": [0.5, 1.0]}, "varlen", "cuda:0")
    assert apart.status == "fail" and "packed and padded rows disagree" in apart.seen
    assert apart.fix == "Train with --packing none, and report this with the table."


def test_four_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks_model.four_bits("cpu").status == "pass"
    monkeypatch.setattr("bitsandbytes.functional.dequantize_4bit", lambda packed, state: torch.zeros(64, 64))
    check = checks_model.four_bits("cpu")
    assert check.status == "fail" and "is off by 1.00" in check.seen
    assert check.fix == "Install the tested bitsandbytes, or use --use_peft without --load_in_4bit."


# --- Ranks, played by threads over a real store ----------------------------------------------------------------------


def ranks_of(size: int, answer_seconds: float = 10.0) -> list[checks_ranks.Ranks]:
    """One rank per node."""
    store = torch.distributed.HashStore()
    return [
        checks_ranks.Ranks(World(rank, size, 0, "srun", 1), f"node{rank}", store, answer_seconds)
        for rank in range(size)
    ]


def together(check: Callable[[checks_ranks.Ranks], Any], ranks: list[checks_ranks.Ranks]) -> list[Any]:
    """What the check gives on each rank, all at once."""
    given: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda one=one: given.__setitem__(one.world.rank, check(one)), daemon=True)
        for one in ranks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    return [given[rank] for rank in range(len(ranks))]


def test_size_of_the_world() -> None:
    first, second = together(lambda one: checks_ranks.size(one, 1.0), ranks_of(2))
    assert first == [Check("ranks", "pass", "2 ranks on 2 nodes met after 1.0 s (started by srun)")] and second == []


def test_versions_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = together(checks_ranks.versions, ranks_of(2))
    assert first == [Check("same versions", "pass", "on all 2 ranks")] and second == []
    check = alone(checks_ranks.compare_versions([{"node": "a", "trl": "1"}, {"node": "b", "trl": "2"}, {"node": "c"}]))
    assert (check.status, check.seen) == ("fail", "ranks differ: trl 1 (a) and 2 (b) and missing (c)")
    assert check.fix == "Use one environment on a disk that all nodes share, or install the same versions on each."


OUTPUT_FIX = "Give an --output_dir on a file system that all nodes mount at the same place."


def test_all_nodes_see_the_output_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = replace(ASKED, output_dir=str(tmp_path / "run"))
    first, second = together(lambda one: checks_ranks.output_directory(one, asked), ranks_of(2))
    seen = f"{tmp_path}: all 2 nodes see what the others write"
    assert first == [Check("output directory", "pass", seen)] and second == []
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    monkeypatch.setattr(checks_ranks, "_ATTRIBUTE_CACHE_SECONDS", 0.0)
    answer = checks_ranks._answer_token
    monkeypatch.setattr(
        checks_ranks,
        "_answer_token",
        lambda folder, ranks: answer(folder if ranks.world.is_main else tmp_path / "another_disk", ranks),
    )
    check = alone(together(lambda one: checks_ranks.output_directory(one, asked), ranks_of(2))[0])
    assert check == Check("output directory", "fail", f"{tmp_path}: node1 can't see what rank 0 wrote", OUTPUT_FIX)


def test_what_nodes_write_must_come_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks_ranks, "_ATTRIBUTE_CACHE_SECONDS", 0.0)
    asked = replace(ASKED, output_dir=str(tmp_path))
    monkeypatch.setattr(checks_ranks, "_answer_token", lambda folder, ranks: None)
    check = alone(together(lambda one: checks_ranks.output_directory(one, asked), ranks_of(2))[0])
    assert check.status == "fail" and "rank 0 can't see what node1 wrote" in check.seen and check.fix == OUTPUT_FIX


def test_output_directory_that_rank_0_can_not_make() -> None:
    asked = replace(ASKED, output_dir="/proc/x")

    def check(one: checks_ranks.Ranks) -> list[Check]:
        return run_check("output directory", lambda: checks_ranks.output_directory(one, asked), 20)

    first, second = together(check, ranks_of(2))
    assert alone(first).status == "fail" and "/proc/.rm_scale_doctor_" in alone(first).seen and second == []


def test_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = together(checks_ranks.clocks, ranks_of(3))
    assert alone(first).status == "pass" and "rank 0's node, the furthest of all" in alone(first).seen
    assert second == third == []
    assert alone(checks_ranks.judge_clocks({})) == Check("clocks", "pass", "one node")
    off = alone(checks_ranks.judge_clocks({"a": 0.1, "b": -5.0}))
    assert (off.status, off.fix) == ("warn", "Let the nodes follow one time server (chrony, systemd-timesyncd).")
    assert off.seen == "b is 5.000 s behind rank 0's node, the furthest of all"
    assert alone(checks_ranks.judge_clocks({"a": 100.0})).status == "fail"


def test_clock_offset_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 looks at a clock that is 30 s ahead."""
    real = time.time
    monkeypatch.setattr(
        checks_ranks.time, "time", lambda: real() + (30.0 if threading.current_thread().name == "rank 1" else 0.0)
    )

    def check(one: checks_ranks.Ranks) -> list[Check]:
        threading.current_thread().name = f"rank {one.world.rank}"
        return checks_ranks.clocks(one)

    seen = alone(together(check, ranks_of(2))[0]).seen
    assert seen.startswith("node1 is ") and seen.endswith(" s ahead of rank 0's node, the furthest of all")
    assert 29.5 < float(seen.split()[2]) < 30.5


def test_a_rank_that_does_not_answer() -> None:
    (first, _) = ranks_of(2, answer_seconds=0.2)
    check = alone(run_check("same versions", lambda: checks_ranks.versions(first), 20))
    assert check.seen == "rank 1 did not answer within 0 s."
    assert check.fix == (
        "Look at that rank's node and at what it printed; --timeout_seconds gives slow ones more time."
    )
    assert first.lost == [1]


def test_after_a_loss_nothing_more_is_asked() -> None:
    (first, _) = ranks_of(2)
    first.lost.append(1)
    findings: list[Finding] = []
    examination = one_rank.RankExamination(first.world, ASKED, findings.append)
    examination._check_together(first)
    assert [finding.check.status for finding in findings] == ["skip"] * 4
    assert findings[0].check.seen == "rank 1 is lost"


def test_findings_travel_to_rank_0() -> None:
    own = [[Finding(f"node{rank}", Check("a", "pass", str(rank)))] for rank in range(3)]
    first, second, _ = together(lambda one: one_rank.collect(one, own[one.world.rank], 10), ranks_of(3))
    assert first == [*own[0], *own[1], *own[2]] and second == []
    ranks = ranks_of(3)
    one_rank.collect(ranks[1], own[1], 1)
    (lost,) = one_rank.collect(ranks[0], [], 0.3)[1:]
    assert lost.check == Check(
        "ranks",
        "fail",
        "rank 2 did not report",
        "Read what it printed: it ended in the middle, or its machine is out of reach.",
    )


def test_all_ranks_leave_with_the_code_of_rank_0() -> None:
    assert together(lambda one: one_rank.leave_together(one, 1 - min(one.world.rank, 1), 10), ranks_of(3)) == [1, 1, 1]
    (_, second) = ranks_of(2)
    assert one_rank.leave_together(second, 7, 0.2) == 7, "rank 0 is gone"


def test_ranks_that_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(starting.free_port()))
    place = World(0, 2, 0, "deepspeed", 2)
    (check,) = checks_ranks.no_meeting(place, run_check("ranks", lambda: checks_ranks.meet(place, 1.0), 20))
    assert check.status == "fail" and "1/2 clients joined" in check.seen and "127.0.0.1" in check.seen
    assert check.fix == (
        "All nodes must reach that address: set MASTER_ADDR to the first node's name as the others resolve it and "
        "MASTER_PORT to a port that no firewall closes; look whether every rank started."
    )


def test_collectives_that_are_wrong_or_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    (only,) = ranks_of(1)
    monkeypatch.setattr(checks_ranks, "_wrong_results", lambda world, device: ["all-reduce"])
    try:
        check = alone(checks_ranks.collective(only, 20))
    finally:
        torch.distributed.destroy_process_group()
    assert (check.status, check.seen) == ("fail", "wrong results of all-reduce (gloo)")
    assert check.fix == (
        "Memory or a link is broken: find the machine by starting on fewer of them. NCCL_DEBUG=INFO shows links."
    )
    assert checks_ranks.judge_rate("nccl", 100e9, 8).status == "pass"
    slow = checks_ranks.judge_rate("nccl", 0.1e9, 8)
    assert slow.status == "warn" and slow.seen.endswith("over nccl: 0.10 GB/s a link, slow")
    assert slow.fix == (
        "Traffic takes a slow way: NCCL_DEBUG=INFO says which; name the fast interface (NCCL_SOCKET_IFNAME, "
        "NCCL_IB_HCA; on CPUs GLOO_SOCKET_IFNAME)."
    )


def test_a_rank_without_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    third = replace(ranks_of(4)[2], world=World(2, 4, 2, "srun", 4))
    monkeypatch.setattr(checks_ranks, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check = alone(checks_ranks.collective(third, 5))
    assert (check.status, check.seen) == ("fail", "rank 2 wants GPU 2, but sees 2")
    assert check.fix.startswith("Start one rank per GPU: each task must see all GPUs of its node")
    examination = one_rank.RankExamination(third.world, ASKED, lambda _: None)
    monkeypatch.setattr(one_rank, "has_gpu", lambda: True)
    monkeypatch.setattr(devices, "has_gpu", lambda: True)
    found = alone(run_check("model forward", lambda: checks_model.forward(examination._device()), 30))
    assert found.status == "fail" and found.seen.startswith("rank 2 is number 2 on its node, and it sees 2 GPUs")


# --- The command -----------------------------------------------------------------------------------------------------


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--timeout_seconds", "0"], "timeout_seconds=0: must be above 0. Fix: leave it out, or 60."),
        (["--lora_r", "0"], "lora_r=0: must be at least 1. Fix: give what the run will have."),
        (["--save_total_limit", "0"], "save_total_limit=0: must be at least 1. Fix: give what the run will have."),
        (["--nproc", "0"], "nproc=0: must be at least 1. Fix: give the number of ranks on this machine."),
        (["--hostfile", "/gone"], "hostfile=/gone: can't be read (No such file or directory). Fix: check the path."),
    ],
)
def test_options_that_make_no_sense(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        doctor.run(options(*words))
    assert str(caught.value) == message


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert num_local_ranks(None, 1) == 2
    with pytest.raises(UserError, match=r"nproc=4: this machine shows 2 GPUs\. Fix: --nproc 2 or less\."):
        num_local_ranks(4, 1)


def test_hosts_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = examine.reach({"a": 1})
    assert (missing.status, missing.seen) == ("fail", "ssh and pdsh missing, by which deepspeed starts ranks")
    fix = "Install them on this machine (apt install pdsh openssh-client); under Slurm use srun rm-scale doctor."
    assert missing.fix == fix
    executable(tmp_path / "pdsh", "exit 0")
    executable(
        tmp_path / "ssh", 'case "$5" in good) exit 0;; slow) exec /bin/sleep 60;; esac; echo refused >&2; exit 255'
    )
    monkeypatch.setattr(examine, "_SSH_SECONDS", 1)
    assert examine.reach({"good": 1}) == Check("hosts", "pass", "ssh reaches all 1")
    bad = examine.reach({"good": 1, "closed": 1, "slow": 2})
    assert bad.seen == "ssh does not reach closed (refused), slow (no answer in 1 s)"
    assert bad.fix == "Make `ssh HOST true` work without a password for each (ssh-copy-id), from this machine."
    (tmp_path / "hosts").write_text("closed slots=1\n")
    findings, _ = examine._examine_from_here(ASKED, None, str(tmp_path / "hosts"))
    assert alone([finding.check for finding in findings]).name == "hosts", "no ranks are started in vain"


def test_ranks_that_end_badly() -> None:
    assert examine.judge_end(Ended(0, ""), "", 5) == []
    (finding,) = examine.judge_end(Ended(1, ""), "a\n\nRuntimeError: b", 5)
    assert finding.check.seen == "the ranks ended with code 1; they printed: a | RuntimeError: b"
    assert finding.check.fix == "The last lines say why; `rm-scale --debug doctor` prints all of them."
    assert "were ended, out of time; they printed: nothing" in examine.judge_end(Ended(None, ""), "", 5)[0].check.seen
    assert examine.judge_end(Ended(0, ""), "", 0)[0].check.status == "fail", "no rank reported"


def test_ranks_that_do_not_end_are_ended() -> None:
    started = time.monotonic()
    ended = start_ranks(
        "timeit", ["-n", "1", "-r", "1", "print('begun', flush=True); import time; time.sleep(300)"], 1, 5
    )
    assert time.monotonic() - started < 60
    assert ended.code is None and "begun" in ended.output


def test_a_broken_torch_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: Any, **__: Any) -> int:
        raise ImportError("libtorch_cpu.so: undefined symbol")

    monkeypatch.setattr(examine, "num_local_ranks", broken)
    findings, started = examine._examine_from_here(replace(ASKED, output_dir=str(tmp_path)), None, None)
    assert findings[-1].check == Check("ranks", "skip", "torch can't be imported") and started["size"] == 0


def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One rank in a process of its own; only the disk, asked for too much, fails."""
    code = doctor.run(options("--json", "--output_dir", str(tmp_path), "--method", "qlora", "--min_free_gb", "1e9"))
    content = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in content["checks"]}
    assert [name for name, check in checks.items() if check["status"] == "fail"] == ["disk"]
    assert (code, content["ok"], content["world"]["size"]) == (1, False, 1)
    assert checks["model forward"]["status"] == checks["4-bit weights"]["status"] == "pass"
    assert checks["ranks"]["seen"] == "one alone; --nproc N, --hostfile FILE or srun start more"


def test_import_without_torch() -> None:
    code = "import sys, rm_scale.doctor; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""Starting ranks at a port that another program takes meanwhile."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from rm_scale.launch.deepspeed_command import run_command
from tests.support.launching import REPOSITORY, deepspeed_command

# What a training does until its ranks have met.
MEET = """
from rm_scale.distributed import detect_world, init_process_group, prepare_environment, sum_over_ranks
from rm_scale.guard import leave, run_guarded

def main():
    world = detect_world()
    prepare_environment(world, meets=True)
    init_process_group(world, False, 600)
    print("sum", sum_over_ranks([world.rank + 1.0]), flush=True)
    return 0

leave(run_guarded(main))
"""


def test_ranks_are_started_again_at_another_port(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "meet.py"
    script.write_text(MEET)
    command = deepspeed_command(script)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command[command.index("--master_port") + 1] = port = str(taken.getsockname()[1])
        environment = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
        done = run_command(command, environment)
    output, errors = capfd.readouterr()
    assert done.returncode == 0 and output.count("sum [3.0]") == 2, errors
    assert f"MASTER_PORT={port}: rank 0 can't listen there on" in errors
    assert "another program has taken the port: started again at" in errors and "Traceback" not in errors


def test_in_the_end_rank_0_says_what_to_do() -> None:
    code = "import os, sys; print(sys.argv[2]); sys.exit(86 if 'RM_SCALE_PORTS_TRIED' in os.environ else 2)"
    done = run_command([sys.executable, "-c", code, "--master_port", "1"], {}, capture_output=True)
    assert done.returncode == 2, "without the variable it is a message with a fix"
    assert done.stdout.strip() != "1"

"""The command line that starts a run's ranks with DeepSpeed's launcher, and its start."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rm_scale.errors import ConfigError
from rm_scale.files import free_port
from rm_scale.launch.hostfile import read_hostfile
from rm_scale.launch.machine import Machine
from rm_scale.launch.ranks import device_flags
from rm_scale.meeting import EXIT_PORT_TAKEN, PORTS_TRIED

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
_MAX_PORTS = 5


def launch_command(machine: Machine, settings: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the command that starts the ranks, and the environment variables it needs."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
    environment = {"DS_ACCELERATOR": "cpu"} if machine.device.is_cpu else {}
    if machine.hostfile:
        launcher += ["--hostfile", machine.hostfile, "--num_nodes", str(machine.nodes)]
        if machine.nodes > 1:
            check_remote_arguments(settings)
            # The name by which the others reach it. Left alone DeepSpeed takes the first of the host's addresses,
            # which may be a container's or a management network's.
            launcher += ["--master_addr", next(iter(read_hostfile(machine.hostfile)))]
        launcher += ["--num_accelerators" if machine.device.is_cpu else "--num_gpus", str(machine.per_node)]
    else:
        launcher += device_flags(machine.per_node, not machine.device.is_cpu)
    launcher += ["--master_port", str(free_port())]
    return [*launcher, str(TRAIN), *settings], environment


def run_command(
    command: Sequence[str], environment: Mapping[str, str], capture_output: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run what `launch_command` returned to its end.

    Where another program takes the port before rank 0 does, seconds after it was chosen, it is run again with another.
    """
    words = list(command)
    for tried in range(1, _MAX_PORTS + 1):
        env = {**os.environ, **environment, PORTS_TRIED: str(tried)}
        if tried == _MAX_PORTS:
            del env[PORTS_TRIED]  # rank 0 then says what to do about it
        done = subprocess.run(words, env=env, capture_output=capture_output, text=True, check=False)
        if done.returncode != EXIT_PORT_TAKEN:
            break
        place = words.index("--master_port") + 1
        words[place] = str(free_port())
        print(f"another program has taken the port: started again at {words[place]}", file=sys.stderr, flush=True)
    return done


# Characters that pdsh, ssh and the remote shell leave as they are. DeepSpeed quotes arguments with spaces only.
_REMOTE_WORD = re.compile(r"[\w@+=:,./ -]+", re.ASCII)


def check_remote_arguments(settings: Sequence[str]) -> None:
    """Refuse settings that a start over a hostfile would change on their way to the other nodes.

    Raises:
        ConfigError: pdsh, which DeepSpeed starts other nodes with, is missing; or a shell at the other end would change
            an argument, or run what is in it.
    """
    problems = [
        f"{word!r}: the shells between here and the nodes would change it. Fix: put the setting into a YAML file that "
        "all nodes see, and give --config FILE."
        for word in settings
        if not _REMOTE_WORD.fullmatch(word)
    ]
    if shutil.which("pdsh") is None:
        problems.append(
            "hostfile: DeepSpeed starts other nodes with pdsh, which is not here. Fix: apt install pdsh, or --slurm."
        )
    if problems:
        raise ConfigError(problems)

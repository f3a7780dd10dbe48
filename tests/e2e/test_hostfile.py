"""`rm-scale launch --hostfile`: DeepSpeed starts ranks on two hosts through pdsh and a real ssh server, on loopback."""

from __future__ import annotations

import getpass
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rm_scale.files import free_port
from tests.support.launching import environment, read_json, run

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/bin")
TOOLS = SSHD is not None and all(shutil.which(tool) for tool in ("ssh", "ssh-keygen", "pdsh"))

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.distributed,
    pytest.mark.skipif(not TOOLS, reason="needs sshd, ssh and pdsh (apt install openssh-server openssh-client pdsh)"),
]

HOSTS = ("127.0.0.1", "127.0.0.2")


@pytest.fixture
def ssh_commands(tmp_path: Path) -> Iterator[Path]:
    """A server of our own on both addresses, and a folder whose `ssh` finds it without a password."""
    for name in ("host_key", "user_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    port = free_port()
    server = [f"Port {port}", *(f"ListenAddress {host}" for host in HOSTS), f"HostKey {tmp_path / 'host_key'}"]
    server += [f"AuthorizedKeysFile {tmp_path / 'user_key.pub'}", "StrictModes no", "UsePAM no", "PidFile none"]
    server += ["PasswordAuthentication no", "PermitRootLogin prohibit-password"]
    (tmp_path / "sshd_config").write_text("\n".join(server) + "\n")
    client = ["Host *", f"  Port {port}", f"  User {getpass.getuser()}", f"  IdentityFile {tmp_path / 'user_key'}"]
    client += ["  IdentitiesOnly yes", "  StrictHostKeyChecking no", f"  UserKnownHostsFile {tmp_path / 'known'}"]
    (tmp_path / "ssh_config").write_text("\n".join(client) + "\n")
    commands = tmp_path / "commands"
    commands.mkdir()
    wrapper = commands / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {tmp_path / "ssh_config"} "$@"\n')
    wrapper.chmod(0o755)
    assert SSHD is not None
    if getpass.getuser() == "root":
        Path("/run/sshd").mkdir(exist_ok=True)  # where the server of root leaves its privileges
    with (tmp_path / "sshd.log").open("w") as log:
        process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(tmp_path / "sshd_config")], stderr=log)
    try:
        _wait_for(port, tmp_path / "sshd.log")
        yield commands
    finally:
        process.terminate()
        process.wait(timeout=600)


def _wait_for(port: int, log: Path) -> None:
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex((HOSTS[1], port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail(f"sshd did not start: {log.read_text()}")


def test_launch_trains_over_two_hosts(ssh_commands: Path, tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    hostfile, output = tmp_path / "hosts", tmp_path / "run"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    words = ["launch", "--hostfile", str(hostfile), "--model_name_or_path", str(tiny_model)]
    words += ["--dataset_path", str(pairs_file), "--output_dir", str(output), "--max_length", "256", "--max_steps", "2"]
    words += ["--global_batch_size", "8", "--deepspeed", "zero3", "--disable_tqdm", "true", "--run_name", "two hosts"]
    env = environment()
    env["PATH"] = f"{ssh_commands}:{env['PATH']}"
    done = run([sys.executable, "-m", "rm_scale.cli", *words, "--sample_scores", "0"], env=env)
    assert done.code == 0, done.output[-4000:]
    assert f"--hostfile {hostfile} --num_nodes 2 --master_addr {HOSTS[0]}" in done.output
    plan = read_json(output / "run" / "plan.json")
    assert plan["world_size"] == 2 and plan["zero_stage"] == 3
    assert "run_name: two hosts" in (output / "run" / "run_config.yaml").read_text()
    assert (output / "model.safetensors").is_file()

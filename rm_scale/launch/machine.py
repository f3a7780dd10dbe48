"""The machine or machines that a run goes to: kind of device, devices per node, nodes, hostfile."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

from rm_scale.errors import ConfigError
from rm_scale.launch.devices import are_hidden
from rm_scale.launch.hostfile import read_hostfile
from rm_scale.launch.nvidia_smi import query_gpus
from rm_scale.planning.hardware import Device, device_by_driver_name, device_of_run, find_device


@dataclass(frozen=True)
class Machine:
    """Where a run goes: kind of device, how many on each node, how many nodes, and DeepSpeed's hostfile."""

    device: Device
    per_node: int
    nodes: int
    hostfile: str | None

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.per_node * self.nodes


def find_machine(options: argparse.Namespace) -> Machine:
    """Return the machines that the options name, or this one.

    Raises:
        UserError: an unknown device, a hostfile that can't be used or is too short, or impossible counts.
    """
    names = local_gpu_names()
    device = find_device(options.gpu, options.hardware) if options.gpu else device_here(names, options.hardware)
    hosts = read_hostfile(options.hostfile) if options.hostfile else None
    nodes = options.nodes if hosts is None else (options.nodes if options.nodes > 1 else len(hosts))
    if hosts is not None and nodes > len(hosts):
        raise ConfigError(
            [f"nodes={nodes}: {options.hostfile} names {len(hosts)}. Fix: --nodes {len(hosts)} or fewer."]
        )
    if nodes > 1 and hosts is None:
        raise ConfigError(
            [f"nodes={nodes}: without a hostfile only this machine is known. Fix: --hostfile FILE, or --slurm."]
        )
    slots = min(list(hosts.values())[:nodes]) if hosts else len(names) or 1
    per_node = options.gpus or slots
    if per_node < 1 or nodes < 1:
        raise ConfigError([f"gpus={per_node}, nodes={nodes}: both must be at least 1. Fix: correct them."])
    if hosts and per_node > slots:
        raise ConfigError([f"gpus={per_node}: {options.hostfile} gives a node {slots} slots. Fix: --gpus {slots}."])
    if names and not hosts and per_node > len(names):
        raise ConfigError([f"gpus={per_node}: this machine has {len(names)}. Fix: --gpus {len(names)} or fewer."])
    return Machine(device, per_node, nodes, options.hostfile)


def local_gpu_names() -> list[str]:
    """Return the names of the GPUs that runs on this machine may use; none without NVIDIA's driver."""
    if are_hidden(os.environ):
        return []
    names = [name for (name,) in query_gpus("name")]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names[: len(visible.split(","))] if visible else names


def device_here(names: list[str], file: str | None) -> Device:
    """Return the kind of device that the driver names, or that was measured.

    Raises:
        ConfigError: the device is not a known one.
    """
    if not names:
        return device_of_run(None, file)[0]
    found = device_by_driver_name(names[0])
    if found is None:
        raise ConfigError(
            [
                f"this machine's {names[0]} is not a device we know. Fix: rm-scale bench hardware --output "
                "FILE.yaml, then --hardware FILE.yaml --gpu NAME; or --gpu with the most similar kind."
            ]
        )
    return found

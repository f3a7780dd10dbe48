"""`rm-scale launch`: plan a run, check it, print the exact command, and start it.

The words that are not options of this command are settings of `rm_scale/train.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rm_scale.config import ParsedConfig, parse_config
from rm_scale.errors import ConfigError, UserError
from rm_scale.logs import get_logger
from rm_scale.planning import text
from rm_scale.planning.advise import Choice, Request, changes_that_fit, recommend
from rm_scale.planning.estimate import Estimate, estimate
from rm_scale.planning.hardware import Device, device_by_driver_name, device_of_run, find_device
from rm_scale.planning.lengths import LengthMix, full_rows
from rm_scale.planning.packing import choose_packing
from rm_scale.planning.plan import Plan, make_plan
from rm_scale.planning.run_estimate import scenario_of_run
from rm_scale.planning.shape import read_model_config, shape_from_config
from rm_scale.tiers import model_tier

logger = get_logger(__name__)

TRAIN = Path(__file__).resolve().parents[1] / "train.py"


@dataclass(frozen=True)
class Machine:
    """Where a run goes: kind of device, how many on each node, how many nodes, and DeepSpeed's hostfile."""

    device: Device
    per_node: int
    nodes: int
    hostfile: str | None

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.per_node * self.nodes


@dataclass(frozen=True)
class PlannedRun:
    """A run with everything that the planner filled in.

    Attributes:
        settings: words for `rm_scale/train.py`.
        parsed: what they come to.
        plan: what will run.
        lengths: of the data, where they were measured.
        predicted: what it takes.
    """

    settings: list[str]
    parsed: ParsedConfig
    plan: Plan
    lengths: LengthMix
    predicted: Estimate

    def lines(self) -> str:
        """Plan and prediction, for people."""
        return "\n".join([self.plan.summary(), *text.estimate_lines(self.predicted)])


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Plan, check, and start the run; gives its exit code.

    Raises:
        ConfigError: settings are wrong, or the plan does not fit and was not forced.
    """
    # A run compares itself with the same figures.
    figures = ["--hardware", str(Path(options.hardware).resolve())] if options.hardware else []
    settings = [*figures, *words, *_forced_settings(options.force)]
    if options.slurm:
        from rm_scale.launch.slurm.launch import run as hand_to_slurm

        return hand_to_slurm(options, settings)
    machine = find_machine(options)
    planned = plan_run(options.tier, settings, machine, check_output=not options.dry_run)
    print(planned.lines())
    refuse_what_does_not_fit(planned, machine, "plan" in options.force)
    settings = planned.settings
    if options.auto_batch:
        settings += auto_batch(settings, planned.parsed, planned.plan, machine)
    command, environment = launch_command(machine, settings)
    print(f"\n{_as_typed(command, environment)}", flush=True)
    if options.dry_run:
        return 0
    return subprocess.run(command, env={**os.environ, **environment}, check=False).returncode


def plan_run(tier: str | None, settings: Sequence[str], machine: Machine, check_output: bool) -> PlannedRun:
    """Fill in what the settings leave open, and work out what the run takes.

    Args:
        tier: whose model is taken unless the settings name one.
        settings: words for `rm_scale/train.py`.
        machine: where it will run.
        check_output: probe that the output directory can be written.

    Raises:
        ConfigError: settings are wrong.
    """
    settings = list(settings)
    parsed = parse_config([*_tier_words(tier, settings), *settings])
    lengths = measure(parsed)
    settings = [*_tier_words(tier, settings), *chosen_settings(parsed, machine, lengths), *settings]
    parsed = parse_config(settings)
    device = "cpu" if machine.device.is_cpu else "cuda"
    plan = make_plan(parsed, machine.world_size, device, check_output=check_output)
    predicted = estimate(scenario_for(parsed, plan, machine, lengths))
    return PlannedRun(settings, parsed, plan, lengths, predicted)


def _forced_settings(forced: list[str]) -> list[str]:
    """`--force plan` is ours; other rules are the run's."""
    rules = [rule for rule in forced if rule != "plan"]
    return ["--force", *rules] if rules else []


def _tier_words(tier: str | None, settings: Sequence[str]) -> list[str]:
    """The tier's model, unless the settings name one."""
    if tier is None:
        return []
    chosen = model_tier(tier)
    named = any(word.split("=")[0] == "--model_name_or_path" for word in settings)
    return [] if named else ["--model_name_or_path", chosen.model]


# --- The machine -----------------------------------------------------------------------------------------------------


def find_machine(options: argparse.Namespace) -> Machine:
    """What the options name, or what is here.

    Raises:
        ConfigError: an unknown device, a hostfile that doesn't fit, or impossible counts.
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
    """Names of the GPUs here, by their driver's tool; none without one."""
    tool = shutil.which("nvidia-smi")
    if tool is None or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return []
    command = [tool, "--query-gpu=name", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    names = [line.strip() for line in answer.stdout.splitlines() if line.strip()] if answer.returncode == 0 else []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names[: len(visible.split(","))] if visible else names


def device_here(names: list[str], file: str | None) -> Device:
    """The kind of device that the driver names, or that was measured.

    Raises:
        ConfigError: nobody knows it.
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


def read_hostfile(file: str) -> dict[str, int]:
    """Hosts and their slots.

    Raises:
        ConfigError: the file can't be read, or a line is not 'HOST slots=N'.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError([f"hostfile={file}: can't be read ({error.strerror}). Fix: check the path."]) from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        slots = words[1].removeprefix("slots=") if len(words) == 2 and words[1].startswith("slots=") else ""
        if not slots.isdigit() or int(slots) < 1 or words[0] in hosts:
            raise ConfigError(
                [f"hostfile={file}, line {number}: {line.strip()!r} is not one new host. Fix: write 'HOST slots=N'."]
            )
        hosts[words[0]] = int(slots)
    if not hosts:
        raise ConfigError([f"hostfile={file}: names no host. Fix: write 'HOST slots=N' lines."])
    return hosts


# --- The plan --------------------------------------------------------------------------------------------------------


def measure(parsed: ParsedConfig) -> LengthMix:
    """Lengths of the run's own data where they lie here, else full rows."""
    config = parsed.config
    if not config.dataset_path or parsed.problems:
        return full_rows(config.max_length)
    from rm_scale.launch.lengths import measure_lengths

    measured = measure_lengths(config.dataset_path, config.model_name_or_path)
    kept = measured.cut(config.max_length)
    return kept if kept.groups else full_rows(config.max_length)


def request_for(parsed: ParsedConfig, machine: Machine, lengths: LengthMix) -> Request:
    """What a run asks of the planner, with what the settings leave open."""
    config = parsed.config
    model = read_model_config(config.model_name_or_path, config.model_revision)
    return Request(
        name=config.model_name_or_path,
        shape=shape_from_config(model),
        method=config.method,
        device=machine.device,
        num_devices=machine.world_size,
        num_nodes=machine.nodes,
        max_length=config.max_length,
        lengths=lengths,
        packing=choose_packing(config, model)[0],
        global_batch_size=config.global_batch_size or max(64, machine.world_size),
        checkpointing=config.gradient_checkpointing if "gradient_checkpointing" in parsed.given else None,
        max_tokens=config.max_tokens_per_device,
        micro_batch=config.per_device_train_batch_size,
        lora_rank=config.lora_r,
        lora_targets=tuple(config.lora_target_modules) if config.lora_target_modules else None,
        nested_quant=config.use_bnb_nested_quant,
    )


def chosen_settings(parsed: ParsedConfig, machine: Machine, lengths: LengthMix) -> list[str]:
    """Settings that the planner fills in where the user gave none: ZeRO, offload, checkpointing, rows, batch."""
    if parsed.problems:
        return []  # all problems are reported together, by the plan
    try:
        request = request_for(parsed, machine, lengths)
    except UserError:
        return []  # likewise
    best = recommend(request)
    given, chosen = parsed.given, {}
    if "deepspeed" not in given and best.zero_stage:
        chosen["deepspeed"] = deepspeed_name(best)
    if "gradient_checkpointing" not in given:
        chosen["gradient_checkpointing"] = str(best.checkpointing).lower()
    if not given & {"global_batch_size", "gradient_accumulation_steps", "per_device_train_batch_size"}:
        chosen["global_batch_size"] = str(request.global_batch_size)
    if best.micro_batch is not None and "per_device_train_batch_size" not in given:
        chosen["per_device_train_batch_size"] = str(best.micro_batch)
    if best.micro_batch is None and "max_tokens_per_device" not in given:
        chosen["max_tokens_per_device"] = str(best.max_tokens)
    for name, value in chosen.items():
        logger.info(f"{name} not given: {value}, by the plan")
    return [word for name, value in chosen.items() for word in (f"--{name}", value)]


def deepspeed_name(choice: Choice) -> str:
    """The shipped DeepSpeed file for a choice."""
    if choice.offload == "nvme":
        return "zero3_nvme"
    if choice.offload in {"optimizer", "all"}:
        return "zero3_offload"
    return f"zero{choice.zero_stage}"


def scenario_for(parsed: ParsedConfig, plan: Plan, machine: Machine, lengths: LengthMix):  # type: ignore[no-untyped-def]
    """The scenario of the run as it will be started."""
    config = parsed.config
    shape = shape_from_config(read_model_config(config.model_name_or_path, config.model_revision))
    return scenario_of_run(config, plan, shape, machine.device, machine.nodes, lengths)


def refuse_what_does_not_fit(planned: PlannedRun, machine: Machine, forced: bool) -> None:
    """Stop a run that does not fit.

    Raises:
        ConfigError: it was not forced; what would make it fit is in the text.
    """
    predicted = planned.predicted
    if predicted.fits:
        return
    need = max(predicted.peak_memory_bytes, predicted.load_peak_memory_bytes) / 1e9
    problem = f"the plan needs {need:.1f} GB per device, and there are {predicted.limit_bytes / 1e9:.1f}"
    if forced:
        logger.warning(f"{problem}: started all the same, as --force plan asks")
        return
    request = request_for(planned.parsed, machine, planned.lengths)
    changes = "; ".join(change for change, _ in changes_that_fit(request)[:4])
    raise ConfigError([f"{problem}. Fix: {changes or 'a larger device'}; or --force plan to try it."])


# --- Starting --------------------------------------------------------------------------------------------------------


def launch_command(machine: Machine, settings: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command that starts the ranks, and the variables it needs."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
    environment = {"DS_ACCELERATOR": "cpu"} if machine.device.is_cpu else {}
    if machine.hostfile:
        launcher += ["--hostfile", machine.hostfile, "--num_nodes", str(machine.nodes)]
        if machine.nodes > 1:
            check_remote_words(settings)
            # The name by which the others reach it. Left alone DeepSpeed takes the first of the host's addresses,
            # which may be a container's or a management network's.
            launcher += ["--master_addr", next(iter(read_hostfile(machine.hostfile)))]
    count = "--num_accelerators" if machine.device.is_cpu else "--num_gpus"
    launcher += [count, str(machine.per_node), "--master_port", str(_free_port())]
    return [*launcher, str(TRAIN), *settings], environment


# What pdsh, ssh and the shell at the other end leave as it is. DeepSpeed quotes words with spaces, and only these.
_REMOTE_WORD = re.compile(r"[\w@+=:,./ -]+", re.ASCII)


def check_remote_words(settings: Sequence[str]) -> None:
    """Refuse to start over a hostfile what would not arrive as it was typed.

    Raises:
        ConfigError: pdsh, which DeepSpeed starts other nodes with, is missing; or a shell at the other end would change
            a word, or run what is in it.
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


def _as_typed(command: Sequence[str], environment: dict[str, str]) -> str:
    return shlex.join([*(f"{name}={value}" for name, value in environment.items()), *command])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


# --- Trying rows -----------------------------------------------------------------------------------------------------

TRIAL_STEPS = 2
MAX_TRIALS = 6


def auto_batch(settings: Sequence[str], parsed: ParsedConfig, plan: Plan, machine: Machine) -> list[str]:
    """Find the largest token budget that trains, by short real runs that begin at the plan's.

    A row larger than a rank's share of the global batch brings nothing, so the search ends there.

    Raises:
        ConfigError: the run has padded rows, or not even the longest group's row trains.
    """
    start = plan.max_tokens_per_device
    if start is None:
        raise ConfigError(["auto_batch with packing=none: it searches tokens of packed rows. Fix: leave it out."])
    folder = Path(parsed.config.output_dir).with_name(Path(parsed.config.output_dir).name + ".auto_batch")
    best, failed, budget = 0, math.inf, float(start)
    for number in range(MAX_TRIALS):
        tokens = int(budget) // 8 * 8
        works, used = _trial(settings, machine, folder / str(number), tokens)
        logger.info(f"auto_batch: rows of {tokens:,} tokens {'train' if works else 'do not train'}{used}")
        if works:
            best = tokens
            if tokens >= _share_tokens(plan, parsed):
                break
        else:
            failed = tokens
        budget = _next_budget(best, failed, tokens)
        if failed - best <= max(64, 0.1 * best):
            break
    shutil.rmtree(folder, ignore_errors=True)
    if not best:
        raise ConfigError(
            [
                f"auto_batch: not even rows of {int(failed):,} tokens train. Fix: a smaller --max_length, "
                "LoRA, or more devices."
            ]
        )
    return ["--max_tokens_per_device", str(best)]


def _next_budget(best: int, failed: float, tried: int) -> float:
    if not best:
        return tried / 2
    return best * 2 if failed == math.inf else (best + failed) / 2


def _share_tokens(plan: Plan, parsed: ParsedConfig) -> float:
    return 2 * parsed.config.max_length * plan.global_batch_size / plan.world_size


def _trial(settings: Sequence[str], machine: Machine, folder: Path, tokens: int) -> tuple[bool, str]:
    """Two steps with rows of so many tokens; did they work, and with how much memory?"""
    extra = ["--max_tokens_per_device", str(tokens), "--max_steps", str(TRIAL_STEPS), "--output_dir", str(folder)]
    extra += ["--save_strategy", "no", "--eval_strategy", "no", "--logging_steps", "1", "--disable_tqdm", "true"]
    command, environment = launch_command(machine, [*settings, *extra, "--sample_scores", "0"])
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    metrics = folder / "run" / "metrics.jsonl"
    if not metrics.is_file():
        if done.returncode and not _is_memory(done.stdout + done.stderr, done.returncode):
            raise UserError(f"auto_batch: a trial failed, and not for memory:\n{(done.stdout + done.stderr)[-2000:]}")
        return False, ""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    peaks = [line["peak_memory_bytes"] for line in lines if "peak_memory_bytes" in line]
    limit = machine.device.memory_bytes * 0.97
    fits = done.returncode == 0 and bool(peaks) and max(peaks) <= limit
    return fits, f", {max(peaks) / 1e9:.1f} GB at most" if peaks else ""


def _is_memory(output: str, code: int) -> bool:
    return code in {-9, 137} or "out of memory" in output.lower() or "can't allocate memory" in output.lower()

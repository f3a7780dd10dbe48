"""One case of `throughput.py`: its command, the run under a watch on memory and time, and the record it leaves."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import yaml

from rm_scale.files import read_json_lines, read_json_object
from rm_scale.planning.flops import executed_flops, linear_parameters, step_flops
from rm_scale.planning.hardware import peak_flops
from rm_scale.planning.parameters import adapter_tensors, backbone_tensors, total
from rm_scale.planning.shape import ModelShape, read_model_config, shape_from_config
from rm_scale.reporting.benchmarks.sealed_records import Case, Memory, Prediction, Record, Saved, Status, Step

REPOSITORY = Path(__file__).resolve().parents[1]
PEER = Path(__file__).with_name("throughput_peer.py")
MINIMAL_FREE_BYTES = 600e6
"""With less memory left on the host, a case is ended before the kernel ends something else."""

LORA_RANK = 16
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory", "MemoryError")


@dataclass(frozen=True)
class Job:
    """A case with where its things lie.

    Attributes:
        case: what to measure.
        model, data: folder and file.
        data_format: as `--dataset_format` takes it.
        work: for the run's output, logs and caches.
        hardware: figures of the machine.
        steps, warmup: timed steps, and those before them.
        max_tokens: of a packed row; `None` lets the planner choose.
        micro_batch: groups of a padded micro-step.
        time_limit: seconds, the start included.
        launcher: local, or slurm: on all nodes of the job around this process.
        extra: further settings of `rm_scale/train.py`.
    """

    case: Case
    model: Path
    data: Path
    data_format: str
    work: Path
    hardware: Path | None
    steps: int
    warmup: int
    max_tokens: int | None
    micro_batch: int
    time_limit: float
    launcher: str = "local"
    extra: tuple[str, ...] = field(default=())

    @property
    def output(self) -> Path:
        """The run's output directory."""
        return self.work / "run"


def command(job: Job) -> list[str]:
    """Return what starts the case: the real launcher with the real training script, or the peer's."""
    case = job.case
    if case.system == "rm_scale":
        script, arguments = REPOSITORY / "rm_scale" / "train.py", settings(job)
    else:
        script, arguments = PEER, [json.dumps(peer_job(job))]
    if job.launcher == "slurm" and case.system == "rm_scale":
        return ["bash", str(REPOSITORY / "slurm" / "bench.sh"), "--one_case", *arguments]
    if case.num_ranks == 1:
        return [sys.executable, str(script), *arguments]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "deepspeed.launcher.runner", "--num_accelerators", str(case.num_ranks), "--master_port"]
    return [sys.executable, *launcher, str(port), str(script), *arguments]


def settings(job: Job) -> list[str]:
    """Return the command line of `rm_scale/train.py`."""
    case = job.case
    values: dict[str, Any] = {
        "model_name_or_path": job.model,
        "dataset_path": job.data,
        "dataset_format": job.data_format,
        "dataset_cache_dir": job.work.parent / "cache",
        "output_dir": job.output,
        "max_rejected_share": 1,
        "packing": case.packing,
        "global_batch_size": case.global_batch_size,
        "max_length": case.max_length,
        "max_steps": job.steps + job.warmup,
        "learning_rate": 1e-6,  # random weights must not run away
        "shuffle_train": "false",  # the steps of all cases and peers have the same groups
        "bf16": "true" if case.compute_dtype == "bfloat16" else "false",
        "gradient_checkpointing": "true" if case.gradient_checkpointing else "false",
        "logging_steps": 1,
        "save_strategy": "no",
        "sample_scores": 0,
        "disable_tqdm": "true",
    }
    if case.packing == "none":
        values["per_device_train_batch_size"] = job.micro_batch
    elif job.max_tokens is not None:
        values["max_tokens_per_device"] = job.max_tokens
    if case.method != "full":
        values |= {"use_peft": "true", "lora_r": LORA_RANK, "lora_alpha": 2 * LORA_RANK, "lora_dropout": 0}
    if case.method == "qlora":
        values["load_in_4bit"] = "true"
    if deepspeed_file(case) is not None:
        values["deepspeed"] = deepspeed_file(case)
    if job.hardware is not None:
        values["hardware"] = job.hardware
    return [word for name, value in values.items() for word in (f"--{name}", str(value))] + list(job.extra)


def deepspeed_file(case: Case) -> Path | None:
    """Return the shipped DeepSpeed settings of a stage."""
    if case.zero_stage == 0:
        return None
    return REPOSITORY / "ds_configs" / f"zero{case.zero_stage}{'_offload' if case.offload else ''}.json"


def peer_job(job: Job) -> dict[str, Any]:
    """Return what `throughput_peer.py` takes; names are those of `packing_worker.py`."""
    case = job.case
    return {
        "name": "peer",
        "folder": str(job.output),
        "model": str(job.model),
        "data": str(job.data),
        "steps": job.steps + job.warmup,
        "micro_batch": job.micro_batch,
        "batch": case.global_batch_size,
        "max_length": case.max_length,
        "learning_rate": 1e-6,
        "optim": "adamw_torch",
        "lora": case.method != "full",
        "qlora": case.method == "qlora",
        "checkpointing": case.gradient_checkpointing,
        "deepspeed": str(deepspeed_file(case)) if deepspeed_file(case) else None,
        "bf16": case.compute_dtype == "bfloat16",
        # As ours: masters in fp32 where all weights are trained, a frozen backbone in the type that it computes in.
        "dtype": "float32" if case.method == "full" else case.compute_dtype,
    }


# --- Running ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How a case's process ended, and the most bytes that were seen resident in one of its processes."""

    status: Status
    reason: str
    seconds: float
    seen_bytes: int = 0


def run_case(job: Job) -> Record:
    """Run the case; return its record, whatever came of it."""
    shutil.rmtree(job.work, ignore_errors=True)
    job.output.mkdir(parents=True)
    arguments, load = command(job), os.getloadavg()
    if job.case.system == "rm_scale":
        job.output.rmdir()  # the run makes it
    outcome = watched(arguments, job)
    record = record_of(job, outcome)
    protocol = {
        "command": public_command(arguments, job),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average_at_start": [round(value, 2) for value in load],
        "seconds_in_all": round(outcome.seconds, 1),
        "warm_up_steps": job.warmup,
        "timed_steps": job.steps,
    }
    return record.model_copy(update={"protocol": protocol})


def watched(arguments: Sequence[str], job: Job) -> Outcome:
    """Run a command until it ends, takes too long, or the host runs out of memory."""
    started, kills = time.monotonic(), kernel_kills()
    log = job.work / "log.txt"
    seen, turn = 0, 0
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            arguments,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
            env=environment(job),
            start_new_session=True,
        )
        why = ""
        try:
            while process.poll() is None:
                if psutil.virtual_memory().available < MINIMAL_FREE_BYTES:
                    why = f"ended when less than {MINIMAL_FREE_BYTES / 1e6:.0f} MB of the host's memory were left"
                elif time.monotonic() - started > job.time_limit:
                    why = f"not done after {job.time_limit:.0f} s"
                if why:
                    seen = max(seen, resident(process.pid))
                    break
                if turn % 10 == 0:  # once a second: this looks at every process of the case
                    seen = max(seen, resident(process.pid))
                turn += 1
                time.sleep(0.1)
        finally:  # also when this program is interrupted
            if process.poll() is None:
                _end(process)
        code = process.wait()
    text = log.read_text(encoding="utf-8", errors="replace")
    if not why and code != 0 and kernel_kills() > kills:
        why = "ended by the kernel, which had run out of memory"
    return replace(judge(code, why, text, time.monotonic() - started), seen_bytes=seen)


def resident(process: int) -> int:
    """Return the most bytes that are resident in one process of a case."""
    try:
        first = psutil.Process(process)
        members = [first, *first.children(recursive=True)]
    except psutil.Error:
        return 0
    sizes = [0]
    for member in members:
        with contextlib.suppress(psutil.Error):
            sizes.append(int(member.memory_info().rss))
    return max(sizes)


def kernel_kills() -> int:
    """Return how many processes the kernel has ended for memory since it started, as far as it says."""
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
    return 0


def judge(code: int, why: str, log: str, seconds: float) -> Outcome:
    """Return what an exit code and a log's end mean."""
    if code == 0 and not why:
        return Outcome("ok", "", seconds)
    if why:
        return Outcome("out_of_memory" if "memory" in why else "killed", why, seconds)
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    told = next((line for line in reversed(lines) if any(word in line for word in _OUT_OF_MEMORY)), None)
    if told is not None:
        return Outcome("out_of_memory", told[:400], seconds)
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL) or "exits with return code = -9" in log:
        return Outcome("killed", "SIGKILL, and not the kernel's for want of memory, as far as it says", seconds)
    error = next((line for line in reversed(lines) if "Error" in line or "Fix:" in line), lines[-1] if lines else "")
    return Outcome("failed", f"exit code {code}: {error[:400]}", seconds)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the whole group: a launcher has children."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
            process.wait(3 if kind == signal.SIGTERM else None)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def environment(job: Job) -> dict[str, str]:
    """Return the environment of the case: all cores, no traces of another launcher, the package of this checkout."""
    drop = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_DEEPSPEED"}
    kept = {name: value for name, value in os.environ.items() if name not in drop}
    threads = str(max(1, len(os.sched_getaffinity(0)) * job.case.num_nodes // job.case.num_ranks))
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    logs = {"RM_SCALE_LOGS": str(job.work / "logs")} if job.launcher == "slurm" else {}
    return {"OMP_NUM_THREADS": threads, **kept, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **logs}


def public_command(arguments: Sequence[str], job: Job) -> str:
    """Return the command without this machine's folders."""
    return without_places(" ".join(arguments), job)


def without_places(text: str, job: Job) -> str:
    """Return a text without this machine's folders."""
    places = [(str(job.work), "WORK"), (str(job.work.parent), "WORK/.."), (str(job.model), "MODEL")]
    places += [(str(job.hardware), "HARDWARE")] if job.hardware is not None else []
    for place, name in ((sys.executable, "python"), *places, (str(job.data), "DATA"), (str(REPOSITORY) + "/", "")):
        text = text.replace(place, name)
    return text


# --- The record ------------------------------------------------------------------------------------------------------


def record_of(job: Job, outcome: Outcome) -> Record:
    """Return what the run left behind, as a record."""
    folder = job.output / "run" if job.case.system == "rm_scale" else job.output
    shape = shape_from_config(read_model_config(str(job.model)))
    hardware = yaml.safe_load(job.hardware.read_text(encoding="utf-8")) if job.hardware is not None else {}
    device: dict[str, Any] = next(iter((hardware or {}).get("devices", {}).values()), {})
    env = read_json_object(folder / "environment.json") or environment_here()
    env.pop("working_directory", None)  # records are published: they name no folder of the machine
    gpus = env.get("gpus") or []
    timing = read_json_object(folder / "timing.json")
    steps = read_steps(folder, job, shape)
    status, reason = outcome.status, outcome.reason
    if status == "ok" and len(steps) <= job.warmup:
        status, reason = "failed", f"only {len(steps)} steps were recorded"
    lost = [step.step for step in steps if step.loss is None]
    if status == "ok" and lost:
        reason = f"the loss was not finite in {len(lost)} steps, first in step {lost[0]}"
    memory = Memory(**timing.get("peak_memory", {}))
    if memory.host_bytes is None and outcome.seen_bytes:
        memory = Memory(host_bytes=outcome.seen_bytes)
    config = read_yaml(folder / "run_config.yaml")
    return Record(
        status=status,
        reason=without_places(reason, job),
        case=job.case,
        warmup_steps=job.warmup,
        steps=steps,
        memory=memory,
        saved=saved(job) if status == "ok" else None,
        load_seconds=timing.get("load_seconds"),
        load_peak_memory_bytes=timing.get("load_peak_memory_bytes"),
        seconds_to_training=timing.get("seconds_to_training"),
        predicted=read_prediction(folder),
        # The makers' figures that are known here are for bf16.
        peak_flops_per_device=peak_flops(gpus[0]) if gpus and job.case.compute_dtype == "bfloat16" else None,
        matmul_flops_per_device=device.get("matmul_flops"),
        energy_source=timing.get("energy", ""),
        energy_scope=timing.get("energy_scope", ""),
        data_statistics=data_statistics(steps),
        config=without_folders(config, job),
        plan=read_json_object(folder / "plan.json"),
        environment=env,
        hardware=without_host(hardware),
    )


def environment_here() -> dict[str, Any]:
    """Return versions and hardware, for cases that ended before they wrote them."""
    from rm_scale.reporting.run.run_directory import environment

    return environment()


def saved(job: Job) -> Saved | None:
    """Return the model that a run of ours left: it has its name only if it scored the same when loaded again."""
    if job.case.system != "rm_scale" or not (job.output / "scoring_contract.json").is_file():
        return None
    sizes = [file.stat().st_size for file in job.output.glob("*.safetensors")]
    return Saved(files=len(sizes), bytes=sum(sizes), verified=True) if sizes else None


def without_host(hardware: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a machine without its name."""
    measured = {key: value for key, value in hardware.get("measured", {}).items() if key != "host"}
    devices = {f"device-{number}": entry for number, entry in enumerate(hardware.get("devices", {}).values())}
    return {**hardware, "devices": devices, "measured": measured} if hardware else {}


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the content of a YAML file; empty where there is none."""
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}


def read_steps(folder: Path, job: Job, shape: ModelShape) -> list[Step]:
    """Return the times of each step joined with its counts."""
    counts = {line["step"]: line for line in read_json_lines(folder / "metrics.jsonl") if "num_tokens" in line}
    flops = FlopCounter(job.case, shape, read_yaml(folder / "run_config.yaml").get("lora_r", LORA_RANK))
    steps = []
    for line in read_json_lines(folder / "steps.jsonl"):
        metrics = counts.get(line["step"])
        if metrics is None:
            continue  # it ended between the two files
        tokens = metrics["num_tokens"]
        loss = metrics.get("loss")
        steps.append(
            Step(
                **line,
                pairs=metrics.get("num_pairs", 0),
                real_tokens=tokens["real"],
                processed_tokens=tokens["processed"],
                effective_tokens=tokens["effective"],
                useful_flops=flops.useful(tokens["effective"], tokens["squares"]),
                executed_flops=flops.executed(tokens["processed"], tokens["attended_pairs"]),
                loss=loss if isinstance(loss, float | int) else None,
            )
        )
    return steps


class FlopCounter:
    """FLOPs of a step from its counts, by the definitions of `rm_scale.planning.flops`."""

    def __init__(self, case: Case, shape: ModelShape, lora_rank: int = LORA_RANK) -> None:
        self.shape = shape
        self.rank = None if case.method == "full" else lora_rank
        self.checkpointing = case.gradient_checkpointing
        linear = linear_parameters(shape)
        if self.rank is None:
            self.flops = step_flops(shape, linear, 0)
        else:
            adapters = total(adapter_tensors(backbone_tensors(shape), self.rank, None))
            self.flops = step_flops(shape, adapters, linear)

    def useful(self, tokens: float, squares: float) -> float:
        """Return the FLOPs of unshared real tokens."""
        return self.flops.of(tokens, squares)

    def executed(self, tokens: float, attended_pairs: float) -> float:
        """Return the FLOPs of everything that was computed."""
        return executed_flops(self.shape, tokens, attended_pairs, checkpointing=self.checkpointing, lora_rank=self.rank)


def read_prediction(folder: Path) -> Prediction | None:
    """Return what the planner said when training began."""
    found = read_json_object(folder / "plan_check.json").get("predicted")
    if not found:
        return None
    return Prediction(
        peak_memory_bytes=int(found["peak_memory_bytes"]),
        memory={name: int(size) for name, size in found["memory"].items()},
        step_seconds=found["step_seconds"],
    )


def data_statistics(steps: Sequence[Step]) -> dict[str, float]:
    """Return what the steps' data was like."""
    pairs = sum(step.pairs for step in steps)
    if not pairs:
        return {}
    real, processed, effective = (
        sum(getattr(step, f"{name}_tokens") for step in steps) for name in ("real", "processed", "effective")
    )
    return {
        "mean_tokens_per_pair_unshared": round(effective / pairs, 2),
        "padding_share": round(1 - real / processed, 4),
        "shared_share": round(1 - real / effective, 4),
    }


def without_folders(config: dict[str, Any], job: Job) -> dict[str, Any]:
    """Return settings without this machine's folders."""
    names = {str(job.model): "MODEL", str(job.data): "DATA", str(job.output): "OUTPUT"}
    names[str(job.hardware)] = "HARDWARE"
    places = [str(job.work.parent), str(REPOSITORY)]

    def clean(value: Any) -> Any:
        if isinstance(value, list):
            return [clean(one) for one in value]
        if isinstance(value, dict):
            return {key: clean(one) for key, one in value.items()}
        if isinstance(value, str):
            value = names.get(value, value)
            for place in places:
                value = value.replace(place, "...")
        return value

    return {key: clean(value) for key, value in config.items()}

"""Throughput of reward-model training per size tier: a grid of cases, each a real run in processes of its own.

    python benchmarks/throughput.py --tier 135m --methods all --packing all --stages 0,2,3 --ranks 1,2 --peers trl
    python benchmarks/throughput.py --tier 7b --methods qlora --stages 0 --steps 1 --warmup 1

Writes a line per case into `results/<hardware>/<tier>.jsonl`, which `rm-scale report` turns into a page. A case that
has its record is not run again; running out of memory is a result like any other. Definitions and protocol: README.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).resolve().parent)]
os.environ.setdefault("DS_ACCELERATOR", "cpu") if not Path("/dev/nvidia0").exists() else None

from throughput_case import Job, environment_here, run_case, without_host  # noqa: E402
from workloads import MIXES, make_data, make_model  # noqa: E402

from rm_scale.planning.parameters import backbone_tensors, total  # noqa: E402
from rm_scale.planning.shape import read_model_config, shape_from_config  # noqa: E402
from rm_scale.reporting.benchmarks.sealed_records import (  # noqa: E402
    Case,
    Record,
    case_name,
    find_record,
    measures,
    peak_memory_bytes,
    write_record,
)

RESULTS = Path(__file__).with_name("results")
METHODS = ("full", "lora", "qlora")
PACKINGS = ("none", "padding_free", "prefix_shared")
PEERS = {"trl": True, "openrlhf": False, "llamafactory": False}
"""Peers by the module that must be there, and whether there is a runner for them here."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_argument_group("what")
    what.add_argument("--tier", required=True, help="tiny, 135m, 1b, 3b, 7b, 13b, or a model's folder")
    what.add_argument("--methods", type=_names_of(METHODS), default=list(METHODS))
    what.add_argument("--packing", type=_names_of(PACKINGS), default=["prefix_shared"], help="all, or some of them")
    what.add_argument("--stages", type=_names_of(("0", "2", "3", "offload")), default=["0"], help="ZeRO; offload: of 3")
    what.add_argument("--ranks", type=_names_of(None), default=["1"], help="on this machine, e.g. 1,2")
    what.add_argument("--peers", type=_names_of(None), default=[], help=f"beside ours: {', '.join(PEERS)}")
    what.add_argument("--data", default="hh-like", help=f"{', '.join(MIXES)}, or a file of HH texts")
    how = parser.add_argument_group("how")
    how.add_argument("--steps", type=int, default=20, help="timed optimizer steps")
    how.add_argument("--warmup", type=int, default=5, help="steps before them")
    how.add_argument("--repeats", type=int, default=1, help="of the whole grid")
    how.add_argument("--global_batch_size", type=int, default=16)
    how.add_argument("--max_length", type=int, default=1024)
    how.add_argument("--max_tokens", type=int, help="of a packed row; default: the planner's choice")
    how.add_argument("--micro_batch", type=int, default=4, help="groups of a padded micro-step, ours and the peer's")
    how.add_argument("--gradient_checkpointing", action="store_true")
    how.add_argument("--float32", action="store_true", help="compute in fp32 rather than bf16")
    how.add_argument("--time_limit", type=float, default=3600.0, help="seconds of a case")
    how.add_argument("--train", nargs=argparse.REMAINDER, default=[], help="settings of rm_scale/train.py; last")
    where = parser.add_argument_group("where")
    where.add_argument("--launcher", choices=["local", "slurm"], default="local", help="slurm: set by slurm/bench.sh")
    where.add_argument("--work", type=Path, default=REPOSITORY / "outputs" / "bench", help="models, data, runs")
    where.add_argument("--results", type=Path, help="folder of the records; default results/<hardware>")
    where.add_argument("--hardware", type=Path, help="figures of this machine; default: measured once, kept with them")
    where.add_argument("--again", action="store_true", help="run cases that have a record")
    where.add_argument("--keep", action="store_true", help="keep each run's output directory")
    options = parser.parse_args(arguments)
    options.work = options.work.resolve()
    for ranks in options.ranks if options.launcher == "local" else []:
        if options.global_batch_size % (options.micro_batch * int(ranks)) and (
            options.peers or "none" in options.packing
        ):
            parser.error(
                f"--global_batch_size {options.global_batch_size}: padded rows need a multiple of --micro_batch "
                f"{options.micro_batch} x {ranks} ranks. Fix: change one of them."
            )
    return options


def _names_of(known: Sequence[str] | None):  # type: ignore[no-untyped-def]
    def parse(text: str) -> list[str]:
        names = list(known) if known is not None and text == "all" else text.split(",")
        unknown = [word for word in names if known is not None and word not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r}: choose from {', '.join(known or ())}, or all")
        return names

    return parse


def measured_hardware(options: argparse.Namespace, ranks: int) -> Path:
    """Return this machine's figures with so many ranks at once, which share its memory and cores; measured once."""
    if options.hardware is not None:
        return Path(options.hardware).resolve()
    ranks //= options.num_nodes
    folder: Path = options.results or options.work
    file = folder.resolve() / f"hardware-{ranks}.yaml"
    if not file.is_file() or not is_of_this_machine(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        print(f"measuring this machine with {ranks} ranks (half a minute)", flush=True)
        command = [sys.executable, "-m", "rm_scale.cli", "bench", "hardware", "--nproc", str(ranks)]
        subprocess.run([*command, "--output", str(file)], check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    return file


def is_of_this_machine(file: Path) -> bool:
    """Return whether figures were measured on this machine; a folder may be shared by several."""
    measured = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("measured", {})
    here = environment_here()
    name = here["gpus"][0] if here["gpus"] else here["cpu"]
    host = socket.gethostname()
    return bool(measured.get("device_name") == name and measured.get("host", host) == host)


def keep_hardware(file: Path, folder: Path) -> None:
    """Put the machine's figures beside the records, without its name."""
    if not (folder / file.name).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        figures = without_host(yaml.safe_load(file.read_text(encoding="utf-8")))
        (folder / file.name).write_text(yaml.safe_dump(figures, sort_keys=False), encoding="utf-8")


def allocation() -> tuple[int, int]:
    """Return nodes and ranks of the Slurm job around this process, as a training in it would have them."""
    from rm_scale.slurm.allocation import read_allocation
    from rm_scale.slurm.prepare import ranks_per_node

    found = read_allocation(os.environ)
    return len(found.nodes), len(found.nodes) * ranks_per_node(found, os.environ)


def hardware_name(file: Path) -> str:
    """Return a folder's name for the device: its kind, and nothing else of the machine."""
    device = next(iter(yaml.safe_load(file.read_text(encoding="utf-8"))["devices"].values()))
    name = re.sub(r"\(R\)|\(TM\)|CPU|Processor|@.*", "", str(device.get("title") or "unknown"))
    cores = f"-{os.cpu_count()}cores" if "cpu" in str(device.get("like", "")) else ""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + cores


def grid(options: argparse.Namespace, label: str, parameters: int) -> Iterator[Case]:
    """Yield all cases; ours and a peer's of one setting are neighbours, so that what the machine does meets both."""
    for repeat in range(1, options.repeats + 1):
        for ranks, stage, method in itertools.product(options.ranks, options.stages, options.methods):
            shared = Case(
                system="rm_scale",
                model=label,
                num_parameters=parameters,
                method=method,
                packing="none",
                zero_stage=3 if stage == "offload" else int(stage),  # type: ignore[arg-type]
                offload=stage == "offload",
                num_ranks=int(ranks),
                num_nodes=options.num_nodes,
                global_batch_size=options.global_batch_size,
                micro_batch=f"{options.micro_batch} groups",
                max_length=options.max_length,
                gradient_checkpointing=options.gradient_checkpointing,
                compute_dtype="float32" if options.float32 else "bfloat16",
                data=options.data if options.data in MIXES else Path(options.data).name,
                further=" ".join(options.train),
                repeat=repeat,
            )
            for peer in options.peers:
                yield shared.model_copy(update={"system": peer, "packing": "padding"})
            for packing in options.packing:
                tokens = f"{options.max_tokens or 'planned'} tokens"
                micro = shared.micro_batch if packing == "none" else tokens
                yield shared.model_copy(update={"packing": packing, "micro_batch": micro})


def missing_peer(case: Case) -> str | None:
    """Return why a peer can't be measured here; `None` where it can."""
    if case.system == "rm_scale":
        return None
    if case.num_nodes > 1:
        return "peers are run on one node only"
    if case.system not in PEERS:
        return f"unknown peer; known are {', '.join(PEERS)}"
    if importlib.util.find_spec(case.system) is None:
        return f"{case.system} is not installed"
    return None if PEERS[case.system] else f"there is no runner for {case.system} in benchmarks/"


def finished(case: Case, folder: Path, steps: int, warmup: int) -> Record | None:
    """Return the record of an earlier call, if it is sound and holds as many steps. A failed case is tried again."""
    record = find_record(case, folder)
    if record is None:
        return None
    if record.status == "ok":
        return record if record.warmup_steps == warmup and len(record.counted) >= steps else None
    return record if record.status == "out_of_memory" else None


def line(record: Record) -> str:
    """Return a record in a line."""
    case, found = record.case, measures(record)
    start = (
        f"{case.system:9} {case.method:6} {case.packing:14} zero{case.zero_stage}{' offload' if case.offload else ''}"
    )
    start += f" {case.num_ranks} ranks"
    if found is None:
        return f"{start}: {record.status}: {record.reason}"
    memory = (peak_memory_bytes(record) or 0) / 1e9
    return (
        f"{start}: {found.pairs_per_second:.3g} pairs/s/device, {found.effective_tokens_per_second:,.0f} effective "
        f"tokens/s/device, step {found.step_seconds_p50:.2f} s (p95 {found.step_seconds_p95:.2f}), {memory:.2f} GB"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the grid; return 0 when every case has a result, be it that memory ran out."""
    options = parse_arguments(arguments)
    options.num_nodes = 1
    if options.launcher == "slurm":
        options.num_nodes, ranks = allocation()
        options.ranks = [str(ranks)]
    hardware = {int(ranks): measured_hardware(options, int(ranks)) for ranks in options.ranks}
    first = next(iter(hardware.values()))
    folder = options.results or RESULTS / hardware_name(first)
    for file in hardware.values():
        keep_hardware(file, folder)
    model, label = make_model(options.tier, options.work / "models")
    shape = shape_from_config(read_model_config(str(model)))
    wanted = options.global_batch_size * (options.steps + options.warmup + 1)
    data, data_format = make_data(options.data, model, options.work / "data", wanted, options.max_length)
    job = Job(
        case=next(grid(options, label, total(backbone_tensors(shape)))),
        model=model,
        data=data,
        data_format=data_format,
        work=options.work,
        hardware=first,
        steps=options.steps,
        warmup=options.warmup,
        max_tokens=options.max_tokens,
        micro_batch=options.micro_batch,
        time_limit=options.time_limit,
        launcher=options.launcher,
        extra=tuple(options.train),
    )
    failed = 0
    for case in grid(options, label, total(backbone_tensors(shape))):
        record = None if options.again else finished(case, folder, options.steps, options.warmup)
        if record is not None:
            print(f"(have it) {line(record)}", flush=True)
            continue
        work = options.work / "runs" / case_name(case)
        record = measure(replace(job, case=case, work=work, hardware=hardware[case.num_ranks]), options.keep)
        write_record(record, folder)
        failed += record.status in {"failed", "killed"}
        print(line(record), flush=True)
    print(f"records: {folder}\nrm-scale report {folder} --output report.html", flush=True)
    return 1 if failed else 0


def measure(job: Job, keep: bool) -> Record:
    """Return a case's record, also where it can't be run."""
    import shutil

    reason = missing_peer(job.case)
    if reason is not None:
        return Record(
            status="skipped", reason=reason, case=job.case, warmup_steps=job.warmup, environment=environment_here()
        )
    record: Record = run_case(job)
    if not keep and record.status == "ok":
        shutil.rmtree(job.work, ignore_errors=True)
    return record


if __name__ == "__main__":
    sys.exit(main())

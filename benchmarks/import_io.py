"""What the start of one rank reads of its environment, and what that comes to for many nodes on one shared disk.

    python benchmarks/import_io.py [--archive env.tar.zst] [--nodes 1 8 64] [--server_ops 20000] ...

Traces a real training of one step, tiny model, with strace, and counts what it asks of the files of the environment
(Python, site-packages, rm_scale): lookups that found nothing, files opened, bytes read, libraries mapped. The times of
many nodes are an estimate by a stated model of the disk; its parameters are options. Record: results/import_io.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY)]

OUTPUT = REPOSITORY / "benchmarks" / "results" / "import_io.json"
CALLS = "%file,read,pread64,getdents64,mmap"
_LINE = re.compile(r"^(?:\d+ +)?(?:<\.\.\. )?(\w+)[( ](.*)\) += (-?\d+)(?:<([^>]*)>)?(?: (E\w+))?")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_HANDLE = re.compile(r"^(?:\d+|AT_FDCWD)<([^>]*)>")


@dataclass
class Counted:
    """What one process and its children asked of the environment's files."""

    missed: set[str] = field(default_factory=set)
    asked: set[str] = field(default_factory=set)
    opened: dict[str, int] = field(default_factory=dict)
    listed: set[str] = field(default_factory=set)
    mapped: set[str] = field(default_factory=set)
    num_calls: int = 0
    bytes_read: int = 0

    def add(self, name: str, words: str, result: int, answer: str | None, roots: tuple[str, ...]) -> None:
        """Count one system call."""
        handle = _HANDLE.match(words)
        if name in ("read", "pread64", "getdents64", "mmap"):
            place = re.search(r"<(/[^>]*)>", words)
            path = place.group(1) if place else ""
            if not path.startswith(roots) or result < 0:
                return
            if name == "mmap":
                self.mapped.add(path)
            elif name == "getdents64":
                self.listed.add(path)
            else:
                self.bytes_read += result
            return
        quoted = _QUOTED.search(words)
        if quoted is None or not quoted.group(1):
            return  # fstat
        path = os.path.normpath(os.path.join(handle.group(1) if handle else "/", quoted.group(1)))
        if not path.startswith(roots):
            return
        self.num_calls += 1
        if result < 0:
            self.missed.add(path)
        elif name in ("open", "openat") and answer is not None and not os.path.isdir(path):
            self.opened[path] = self.opened.get(path, 0) + 1
        else:
            self.asked.add(path)


def environment_roots() -> tuple[str, ...]:
    """Return where the environment's files lie: virtual environment, interpreter, this repository."""
    places = {sys.prefix, sys.base_prefix, str(REPOSITORY / "rm_scale")} - {"/usr"}
    return tuple(f"{place}/" for place in {*places, *(os.path.realpath(place) for place in places)})


def one_start(folder: Path) -> list[str]:
    """Return the command of a training of one step, as a rank is started."""
    from rm_scale.demo.assets import make_tiny_model
    from rm_scale.demo.synthetic_preferences import generate_pairs

    model = make_tiny_model(folder / "model", vocab_size=400, hidden_size=32)
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in generate_pairs(64, seed=3, split="train")))
    words = ["--model_name_or_path", str(model), "--dataset_path", str(pairs), "--dataset_name", "none"]
    words += ["--dataset_test_split", "none", "--eval_strategy", "no", "--report_to", "none", "--max_steps", "1"]
    words += ["--save_strategy", "no", "--disable_tqdm", "--dataset_cache_dir", str(folder / "cache")]
    return [sys.executable, str(REPOSITORY / "rm_scale" / "train.py"), *words]


def resident_of(maps: str, roots: tuple[str, ...]) -> int:
    """Return the bytes of mapped files of the environment that are in memory, from the text of `smaps`."""
    total, counts = 0, False
    for line in maps.splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counts = line.partition("/")[2] != "" and f"/{line.partition('/')[2]}".startswith(roots)
        elif counts and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def trace(folder: Path, roots: tuple[str, ...]) -> tuple[Counted, int, float]:
    """Run one start twice, plainly and traced; return the counts, the mapped bytes in memory and the plain seconds."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def start(number: int, *before: str) -> subprocess.Popen[bytes]:
        command = [*before, *one_start(folder), "--output_dir", str(folder / f"run-{number}")]
        return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, cwd=folder)

    assert start(0).wait() == 0, "the training failed"  # Python's compiled files are there afterwards
    began, resident = time.monotonic(), 0
    plain = start(1)
    while plain.poll() is None:
        with contextlib.suppress(OSError):  # it has just ended
            resident = max(resident, resident_of(Path(f"/proc/{plain.pid}/smaps").read_text(), roots))
        time.sleep(0.2)
    seconds = time.monotonic() - began
    log = folder / "strace"
    assert start(2, "strace", "-f", "-qq", "-y", "-s", "4096", "-e", f"trace={CALLS}", "-o", str(log)).wait() == 0
    with log.open(errors="replace") as file:
        return count(file, roots), resident, seconds


def count(lines: Iterable[str], roots: tuple[str, ...]) -> Counted:
    """Count the calls of strace's output; those interrupted by another thread's are put together again."""
    counted, begun = Counted(), dict[str, str]()
    for line in lines:
        process, _, call = line.partition(" ")
        if call.rstrip().endswith("<unfinished ...>"):
            begun[process] = call.strip().removesuffix("<unfinished ...>")
            continue
        resumed = re.match(r" *<\.\.\. \w+ resumed>(.*)", call)
        if resumed:
            call = begun.pop(process, "") + resumed.group(1)
        match = _LINE.match(call.strip())
        if match:
            name, words, result, answer, _ = match.groups()
            counted.add(name, words, int(result), answer, roots)
    return counted


# --- The estimate ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disk:
    """A shared disk and the nodes' own. All of it is assumed; see the options."""

    latency_ms: float
    server_ops: float
    server_gb_s: float
    node_gb_s: float
    ranks_per_node: int


def over_nfs(figures: dict[str, Any], disk: Disk, nodes: int) -> dict[str, float]:
    """Estimate the time of all imports over the shared disk.

    A node's cache holds what one of its ranks has looked up or read, so names and bytes count once per node. Each open
    of each rank asks the server all the same whether the file has changed (close-to-open consistency).
    """
    names = figures["lookups_missed"] + figures["names_found"] + figures["files_opened"] + figures["folders_listed"]
    reads = figures["files_opened"]  # at least one each
    of_rank = names + reads + figures["opens"]
    of_node = names + reads + figures["opens"] * disk.ranks_per_node
    data = figures["bytes_read"] + figures["bytes_mapped_resident"]
    client = of_rank * disk.latency_ms / 1e3 + data / 1e9 / disk.node_gb_s
    server = max(nodes * of_node / disk.server_ops, nodes * data / 1e9 / disk.server_gb_s)
    return {"operations": nodes * of_node, "gigabytes": nodes * data / 1e9, "seconds": max(client, server)}


def packed(archive_bytes: float, unpack_seconds: float, disk: Disk, nodes: int) -> dict[str, float]:
    """Estimate the time until each node has read and unpacked one file; reading and unpacking overlap."""
    operations = nodes * (archive_bytes / 2**20 + 10)
    reading = archive_bytes / 1e9 / min(disk.node_gb_s, disk.server_gb_s / nodes)
    seconds = max(reading, unpack_seconds, operations / disk.server_ops)
    return {"operations": operations, "gigabytes": nodes * archive_bytes / 1e9, "seconds": seconds}


def table(record: dict[str, Any]) -> str:
    """Return the estimates as a Markdown table."""
    lines = ["| nodes | ranks | over the shared disk | | | packed | | |", "|---|---|---|---|---|---|---|---|"]
    lines.append("| | | operations | GB | s | operations | GB | s |")
    for row in record["estimates"]:
        cells = [f"{row['nodes']}", f"{row['ranks']}"]
        for way in ("shared_disk", "packed"):
            cells += [f"{row[way]['operations']:,.0f}", f"{row[way]['gigabytes']:,.1f}", f"{row[way]['seconds']:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# --- The command -----------------------------------------------------------------------------------------------------


def measure() -> dict[str, Any]:
    """Return what one start asks of the environment."""
    roots = environment_roots()
    with tempfile.TemporaryDirectory() as folder:
        counted, resident, seconds = trace(Path(folder), roots)
    libraries = [path for path in counted.mapped if ".so" in Path(path).name]
    return {
        "calls_with_a_name": counted.num_calls,
        "lookups_missed": len(counted.missed),
        "names_found": len(counted.asked - counted.opened.keys()),
        "folders_listed": len(counted.listed),
        "files_opened": len(counted.opened),
        "opens": sum(counted.opened.values()),
        "bytes_read": counted.bytes_read,
        "libraries_mapped": len(libraries),
        "bytes_of_libraries": sum(Path(path).stat().st_size for path in libraries if Path(path).exists()),
        "bytes_mapped_resident": resident,
        "seconds_warm": round(seconds, 1),
    }


def unpacked(archive: Path) -> tuple[int, list[float], float]:
    """Return size, seconds of three unpackings to the disk of temporary files, and of a start that finds the copy."""
    command = ["bash", str(REPOSITORY / "slurm" / "common" / "packed_python.sh"), str(archive)]

    def start(root: Path) -> float:
        started = time.monotonic()
        subprocess.run([*command, str(root), "-V"], check=True, stdout=subprocess.DEVNULL)
        return round(time.monotonic() - started, 2)

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        seconds = []
        for _ in range(3):
            shutil.rmtree(root, ignore_errors=True)
            seconds.append(start(root))
        return archive.stat().st_size, seconds, start(root)


def main() -> None:
    """Measure, estimate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", type=Path, help="of rm-scale slurm pack, to unpack and measure")
    parser.add_argument("--archive_gb", type=float, help="assume an archive of this size instead")
    parser.add_argument("--unpack_gb_s", type=float, default=0.3, help="for --archive_gb; GB of the archive per second")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--ranks_per_node", type=int, default=8)
    parser.add_argument("--latency_ms", type=float, default=1.0, help="of one question to a busy server (assumed)")
    parser.add_argument("--server_ops", type=float, default=20000, help="questions it answers a second (assumed)")
    parser.add_argument("--server_gb_s", type=float, default=5.0, help="what it sends to all nodes together (assumed)")
    parser.add_argument("--node_gb_s", type=float, default=1.0, help="what one node receives (assumed: 10 Gbit/s)")
    parser.add_argument("--counts", type=Path, help="an earlier record, whose counts are used instead of new ones")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    if not options.counts and shutil.which("strace") is None:
        parser.error("there is no strace. Fix: apt-get install strace")
    if (options.archive is None) == (options.archive_gb is None):
        parser.error("give --archive FILE or --archive_gb SIZE")
    figures = json.loads(options.counts.read_text())["one_rank"] if options.counts else measure()
    if options.archive:
        size, times, found = unpacked(options.archive)
        archive = {"name_ends_in": options.archive.suffix, "seconds_of_unpackings": times, "seconds_when_found": found}
    else:
        size, times, archive = int(options.archive_gb * 1e9), [options.archive_gb / options.unpack_gb_s], {}
    seconds = statistics.median(times)
    names = ("latency_ms", "server_ops", "server_gb_s", "node_gb_s", "ranks_per_node")
    disk = Disk(**{name: getattr(options, name) for name in names})
    import torch

    record = {
        "schema": "rm_scale.import_io/1",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "one_rank": figures,
        "archive": {"bytes": size, "unpack_seconds": round(seconds, 1), **archive},
        "assumed": asdict(disk),
        "estimates": [
            {
                "nodes": nodes,
                "ranks": nodes * disk.ranks_per_node,
                "shared_disk": over_nfs(figures, disk, nodes),
                "packed": packed(size, seconds, disk, nodes),
            }
            for nodes in options.nodes
        ],
    }
    print(json.dumps(figures, indent=2), table(record), sep="\n")
    options.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

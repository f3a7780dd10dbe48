"""ZeRO-3 over links of limited speed: measured step times against the planner's bands.

    python benchmarks/network.py --model MODEL_DIR --data HH.jsonl.gz [--nodes 2 4] [--mbit 200 500 2000]

Needs root on Linux: `tests/slurm/cluster.sh` (or --cluster) brings up a Slurm cluster whose nodes are network
namespaces on this machine, `tc` limits what each node's link carries in both directions, and `srun` starts one rank per
node. The ranks' rates are measured first, all ranks at once; the planner is told these and the links' nominal speed,
nothing that was measured over them. Bytes are the link's own counters. Results: docs/planning.md.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.pictures import save, start_pyplot  # noqa: E402
from rm_scale.hardware_bench.device_file import device_entry  # noqa: E402
from rm_scale.hardware_bench.measured import Measured  # noqa: E402

OUTPUT = REPOSITORY / "benchmarks" / "results" / "cpu" / "network.json"
PICTURE = REPOSITORY / "docs" / "pictures" / "network.svg"
METHODS = {"full": [], "lora": ["--use_peft"]}
GROUPS_PER_RANK = 4
MIN_CHARACTERS, MAX_CHARACTERS = 900, 1100
"""Of a pair with its prompt once: about 240 tokens."""
LOOKS = 5
"""At the rates; the best counts, since whatever else runs only takes away."""
MAX_TOKENS = 1536
"""More than the groups of a rank have, so that a step is one micro-step."""


@dataclass(frozen=True)
class Cluster:
    """The script that brings nodes up, and the environment its commands need."""

    script: Path
    environment: dict[str, str]

    @classmethod
    def up(cls, script: Path, nodes: int) -> Cluster:
        """Start so many nodes, or find them started."""
        subprocess.run(["bash", str(script), "up", str(nodes)], check=True)
        answer = subprocess.run(["bash", str(script), "env"], check=True, capture_output=True, text=True).stdout
        shown = subprocess.run(["bash", "-c", f"{answer}\nenv -0"], check=True, capture_output=True, text=True).stdout
        return cls(script, dict(item.split("=", 1) for item in shown.split("\0") if "=" in item))

    def down(self) -> None:
        """Stop what `up` started."""
        subprocess.run(["bash", str(self.script), "down"], check=True)

    def namespaces(self) -> dict[str, str]:
        """Return the network namespaces of this cluster by node, the head's included."""
        checksum = subprocess.run(
            ["cksum"], input=self.environment["SLURM_CLUSTER_DIR"], capture_output=True, text=True, check=True
        ).stdout[:5]
        listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
        names = [line.split()[0] for line in listed.splitlines() if line]
        return {name.split(".", 1)[1]: name for name in names if re.match(rf"[a-z]+{checksum}\.", name)}

    def limit(self, mbit: float | None) -> None:
        """Limit what each node sends and receives; `None`: no limit."""
        spaces = self.namespaces()
        for node, space in spaces.items():
            if node == "head":
                continue
            number = node.removeprefix("node")
            for where, link in ((space, "eth0"), (spaces["head"], f"port{number}")):
                subprocess.run(
                    ["ip", "netns", "exec", where, "tc", "qdisc", "del", "dev", link, "root"], stderr=subprocess.DEVNULL
                )
                if mbit is not None:
                    arguments = ["tbf", "rate", f"{mbit:g}mbit", "burst", "256kb", "latency", "100ms"]
                    command = ["ip", "netns", "exec", where, "tc", "qdisc", "add", "dev", link, "root", *arguments]
                    subprocess.run(command, check=True)

    def sent_bytes(self) -> int:
        """Return the bytes that node 1 has sent since its link came up."""
        counter = "/sys/class/net/eth0/statistics/tx_bytes"
        command = ["ip", "netns", "exec", self.namespaces()["node1"], "cat", counter]
        # A namespace's /sys shows its own links only when mounted in it, which `ip netns exec` does.
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    def srun(self, nodes: int, command: Sequence[str], threads: int) -> None:
        """Return the command that starts one rank on each node, with the node's share of the real cores."""
        own = {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "eth0", "DS_ACCELERATOR": "cpu"}
        arguments = ["srun", f"--nodes={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--time=30"]
        arguments += ["--cpus-per-task=4", f"--chdir={REPOSITORY}", *command]
        done = subprocess.run(arguments, env={**self.environment, **own}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{shlex.join(command)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def even_pairs(source: Path, target: Path) -> Path:
    """Return the pairs of about the mean length: every step is then as long as the mean one, on every rank."""
    chosen = []
    with gzip.open(source, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            both = zip(row["chosen"], row["rejected"], strict=False)
            shared = next((place for place, (one, other) in enumerate(both) if one != other), 0)
            if MIN_CHARACTERS <= len(row["chosen"]) + len(row["rejected"]) - shared <= MAX_CHARACTERS:
                chosen.append(line)
    target.write_text("".join(chosen), encoding="utf-8")
    return target


def measure_rates(cluster: Cluster, nodes: int, threads: int, folder: Path) -> dict[str, Any]:
    """Measure what each rank reaches while all work, links unlimited; return the planner's figures of such a device."""
    cluster.limit(None)
    found = []
    for look in range(LOOKS):
        answer = folder / f"rates_{nodes}_{look}.json"
        job = json.dumps({"answer": str(answer), "seconds": 6})
        cluster.srun(nodes, [sys.executable, "-m", "rm_scale.hardware_bench.worker", job], threads)
        found.append(device_entry(Measured.from_dict(json.loads(answer.read_text(encoding="utf-8")))))
    best = max(found, key=lambda entry: float(entry["matmul_flops"]))
    return {**best, "devices_per_node": 1}


def train(
    cluster: Cluster, options: argparse.Namespace, case: tuple[int, str, float], rates: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Train a few steps under ZeRO-3; return what the run said of its plan, and bytes per step."""
    nodes, method, mbit = case
    hardware = folder / "hardware.yaml"
    figures = {"devices": {"cpu-node": {**rates, "node_bandwidth": mbit * 1e6 / 8}}}
    folder.mkdir(parents=True)
    hardware.write_text(json.dumps(figures), encoding="utf-8")
    cluster.limit(mbit)
    arguments = ["--model_name_or_path", options.model, "--dataset_path", options.data, "--hardware", str(hardware)]
    arguments += ["--output_dir", str(folder / "run"), "--max_length", "512", "--max_rejected_share", "1"]
    arguments += ["--global_batch_size", str(GROUPS_PER_RANK * nodes), "--max_tokens_per_device", str(MAX_TOKENS)]
    arguments += ["--max_steps", str(options.steps), "--logging_steps", "1", "--disable_tqdm", "true"]
    arguments += ["--sample_scores", "0", "--deepspeed", "zero3", "--gradient_checkpointing", "false", *METHODS[method]]
    sent = cluster.sent_bytes()
    cluster.srun(nodes, [sys.executable, str(REPOSITORY / "rm_scale" / "train.py"), *arguments], options.threads[nodes])
    record = json.loads((folder / "run" / "run" / "plan_check.json").read_text(encoding="utf-8"))
    return {"nodes": nodes, "method": method, "mbit": mbit, "sent_bytes": cluster.sent_bytes() - sent, **record}


def inside(record: dict[str, Any]) -> float:
    """Return how far the measured time lies outside the band: 0 within it, else relative to the nearer end."""
    band, seconds = record["predicted"]["step_seconds"], record["measured"]["step_seconds"]
    return float(seconds / min(max(seconds, band["low"]), band["high"]) - 1)


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return Markdown with a line per case."""
    lines = [
        "| method | nodes | link, Mbit/s | predicted, s | measured, s | outside the band |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        band, seconds = record["predicted"]["step_seconds"], record["measured"]["step_seconds"]
        predicted = f"{band['low']:.1f} to {band['high']:.1f}"
        case = f"{record['method']} | {record['nodes']} | {record['mbit']:g}"
        off = inside(record)
        lines.append(f"| {case} | {predicted} | {seconds:.1f} | {f'{off:+.0%}' if off else 'no'} |")
    return "\n".join(lines)


def draw(records: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw bands and measured times over link speed, a panel per method and number of nodes."""
    pyplot = start_pyplot("network")
    kinds = sorted({(record["method"], record["nodes"]) for record in records})
    figure, panels = pyplot.subplots(1, len(kinds), figsize=(3 * len(kinds), 3.2), sharey=True, squeeze=False)
    for (method, nodes), axes in zip(kinds, panels[0], strict=True):
        chosen = sorted(
            (record for record in records if (record["method"], record["nodes"]) == (method, nodes)),
            key=lambda record: record["mbit"],
        )
        speeds = [record["mbit"] for record in chosen]
        bands = [record["predicted"]["step_seconds"] for record in chosen]
        axes.fill_between(speeds, [b["low"] for b in bands], [b["high"] for b in bands], alpha=0.25, label="predicted")
        axes.plot(
            speeds, [record["measured"]["step_seconds"] for record in chosen], "ko", markersize=4, label="measured"
        )
        axes.set(xscale="log", yscale="log", xlabel="link, Mbit/s", title=f"{method}, {nodes} nodes")
    panels[0][0].set_ylabel("seconds per step")
    panels[0][0].legend(fontsize=7)
    save(pyplot, figure, file)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--nodes", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--mbit", nargs="+", type=float, default=[200, 500, 2000])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--cluster", default=str(REPOSITORY / "tests" / "slurm" / "cluster.sh"))
    parser.add_argument("--output", default=str(OUTPUT))
    options = parser.parse_args()
    options.model, source = str(Path(options.model).resolve()), Path(options.data)
    cores = len(os.sched_getaffinity(0))
    options.threads = {nodes: max(1, cores // nodes) for nodes in options.nodes}
    cluster = Cluster.up(Path(options.cluster).resolve(), max(options.nodes))
    records, rates = [], {}
    with tempfile.TemporaryDirectory() as folder:
        options.data = str(even_pairs(source, Path(folder) / "pairs.jsonl"))
        for nodes in options.nodes:
            rates[nodes] = measure_rates(cluster, nodes, options.threads[nodes], Path(folder))
            print(f"{nodes} nodes: {rates[nodes]['matmul_flops'] / 1e9:.0f} GFLOP/s per rank", flush=True)
            for method in options.methods:
                for mbit in options.mbit:
                    case = (nodes, method, mbit)
                    place = Path(folder) / f"{nodes}_{method}_{mbit:g}"
                    records.append(train(cluster, options, case, rates[nodes], place))
                    print(table(records[-1:]).splitlines()[-1], f"{records[-1]['sent_bytes'] / 1e6:.0f} MB", flush=True)
        cluster.limit(None)
    settings = {"model": Path(options.model).name, "data": source.name, "steps": options.steps}
    settings |= {"groups_per_rank": GROUPS_PER_RANK, "threads": options.threads}
    result = {"settings": settings, "rates": rates, "records": records}
    Path(options.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(records))
    if Path(options.output) == OUTPUT:
        draw(records, PICTURE)


if __name__ == "__main__":
    main()

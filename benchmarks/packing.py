"""Compare packed training with plain `trl.RewardTrainer` and with our other layouts, step by step in one run.

    python benchmarks/packing.py --model DIR --data FILE [--cases hh lora ...] [--steps 5] [--output FILE.json]

Each side is a process of its own that does one optimizer step when told, so the sides take turns and the same step is
compared. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).resolve().parent)]

from packing_worker import MARK, linear_shapes  # noqa: E402
from workloads import WORDS, hh_file, write_rows  # noqa: E402

WORKER = Path(__file__).with_name("packing_worker.py")
CASES = ("hh", "lora", "long_prompt", "short_prompt", "k4", "zero3")


# --- Workers ---------------------------------------------------------------------------------------------------------


class Side:
    """A worker process and what it has answered.

    Args:
        job: what the worker does.
        ranks: more than one starts it under the `deepspeed` launcher.
    """

    def __init__(self, job: dict[str, Any], ranks: int = 1) -> None:
        self.job = job
        self.name = str(job["name"])
        self.seconds: list[float] = []
        self.rates: list[float] = []
        self.log_path = Path(job["folder"]) / f"{self.name}.log"
        self.log = self.log_path.open("w", encoding="utf-8")
        self.process = subprocess.Popen(
            _command(ranks, json.dumps(job)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            errors="replace",
            env=_environment(ranks),
            cwd=REPOSITORY,
        )

    def hear(self) -> dict[str, Any]:
        """Return the worker's next message.

        Raises:
            RuntimeError: it has ended instead; the end of its log is in the message.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if MARK in line:
                return dict(json.loads(line.split(MARK, 1)[1]))
            self.log.write(line)
        self.log.flush()
        raise RuntimeError(f"{self.name} ended early:\n{self.log_path.read_text()[-4000:]}")

    def step(self) -> float:
        """Let it do one step; return the seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        message = self.hear()
        self.seconds.append(message["seconds"])
        if "rate" in message:
            self.rates.append(message["rate"])
        return self.seconds[-1]

    def end(self) -> None:
        """Make sure that the process is gone."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.terminate()
        self.log.close()


def _command(ranks: int, job: str) -> list[str]:
    if ranks == 1:
        return [sys.executable, str(WORKER), job]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks), "--master_port", str(port)]
    return [sys.executable, *launcher, str(WORKER), job]


def _environment(ranks: int) -> dict[str, str]:
    """Return the environment of a side: the same cores for each, no GPU, no hub, no traces of another launcher."""
    drop = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_DEEPSPEED"}
    kept = {name: value for name, value in os.environ.items() if name not in drop}
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    fixed = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": threads}
    return {**kept, **fixed, "PYTHONPATH": path}


def take_turns(jobs: list[dict[str, Any]], steps: int, ranks: int) -> list[dict[str, Any]]:
    """Run all jobs with their steps interleaved; return each one's seconds, losses, tokens and memory."""
    sides: list[Side] = []
    try:
        for job in jobs:  # one after the other, so that none waits for another's start
            sides.append(Side(job, 1 if job["side"] == "products" else ranks))
            sides[-1].hear()
        finals: list[dict[str, Any]] = []
        for number in range(steps):
            taken = [(side.name, side.step()) for side in sides]
            print(f"  step {number + 1}: " + ", ".join(f"{name} {t:.2f} s" for name, t in taken), flush=True)
        finals = [side.hear() for side in sides]
        return [_answers(side, final) for side, final in zip(sides, finals, strict=True)]
    finally:
        for side in sides:
            side.end()


def _answers(side: Side, final: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in final.items() if name != "event"}
    return {"name": side.name, "seconds": side.seconds, **kept, **({"rates": side.rates} if side.rates else {})}


# --- Model and data --------------------------------------------------------------------------------------------------


def save_reward_model(model: str, folder: Path) -> Any:
    """Write a reward model with a fixed head, so that all sides start alike; return its tokenizer."""
    import torch
    from transformers import AutoModelForSequenceClassification, set_seed

    from rm_scale.modeling.tokenizers import load_tokenizer

    set_seed(0)
    tokenizer = load_tokenizer(model)
    scorer = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    if len(tokenizer) > scorer.config.vocab_size:
        scorer.resize_token_embeddings(len(tokenizer))
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    scorer.config.pad_token_id = tokenizer.pad_token_id
    scorer.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _text(tokenizer: Any, tokens: int, source: random.Random) -> str:
    """Return random common words of about this many tokens."""
    ids = tokenizer(" ".join(source.choices(WORDS, k=tokens + 8)), add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids[:tokens], skip_special_tokens=True)).strip()


def synthetic_rows(tokenizer: Any, groups: int, prompt: int, response: int, size: int) -> list[dict[str, Any]]:
    """Return groups of `size` ranked responses to one prompt, in random words."""
    source = random.Random(0)
    return [
        {
            "prompt": _text(tokenizer, prompt, source),
            "responses": [" " + _text(tokenizer, response - 1, source) for _ in range(size)],
            "ranks": list(range(size)),
        }
        for _ in range(groups)
    ]


def as_pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the comparisons of ranked groups, written out as pairs."""
    return [
        {"prompt": row["prompt"], "chosen": row["responses"][a], "rejected": row["responses"][b]}
        for row in rows
        for a in range(len(row["responses"]))
        for b in range(a + 1, len(row["responses"]))
    ]


# --- Cases -----------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """What all cases share."""

    args: argparse.Namespace
    folder: Path
    model: str
    tokenizer: Any
    made: dict[str, Any] = field(default_factory=dict)

    def job(self, name: str, side: str, data: str, **more: Any) -> dict[str, Any]:
        """Return a worker's job with this run's settings."""
        args = self.args
        base: dict[str, Any] = {
            "name": name,
            "side": side,
            "model": self.model,
            "data": data,
            "folder": str(self.folder),
        }
        base |= {"format": "explicit_prompt", "packing": "prefix_shared", "batch": args.global_batch_size}
        base |= {"max_length": args.max_length, "max_tokens": args.max_tokens, "steps": args.steps + args.warmup}
        base |= {"optim": args.optim, "learning_rate": 1e-5, "lora": False, "deepspeed": None}
        base |= {"torch_compile": args.torch_compile}
        return base | {"dtype": args.trl_dtype, "micro_batch": 1, "product_tokens": 2048} | more


def compare(bench: Bench, jobs: list[dict[str, Any]], pairs_per_step: int, ranks: int = 1) -> dict[str, Any]:
    """Run the jobs in turns. The first is ours; its ratio to each of the others is of pairs per second."""
    steps, skip = jobs[0]["steps"], bench.args.warmup
    results = {result["name"]: result for result in take_turns(jobs, steps, ranks)}
    mine = results[jobs[0]["name"]]
    for result in results.values():
        timed = result["seconds"][skip:]
        result["median_seconds"] = median(timed)
        if "rates" in result:
            result["median_rate"] = median(result["rates"][skip:])
            continue
        result["pairs_per_second"] = pairs_per_step / median(timed)
        if result is not mine:
            result["ratio_median_of_steps"] = median(
                theirs / ours for theirs, ours in zip(timed, mine["seconds"][skip:], strict=True)
            )
            result["ratio_of_medians"] = median(timed) / mine["median_seconds"]
    if "products" in results:
        _add_rate(mine, results["products"], bench, jobs[0])
    return {"warmup": skip, "pairs_per_step": pairs_per_step, "ranks": ranks, "sides": results}


def _add_rate(mine: dict[str, Any], products: dict[str, Any], bench: Bench, job: dict[str, Any]) -> None:
    """Add the FLOP/s that the linear layers need for the real tokens, and their share of what is possible."""
    parameters = sum(a * b * count for (a, b), count in linear_shapes(bench.model).items())
    factor, skip = (4 if job["lora"] else 6), bench.args.warmup
    rates = [
        factor * parameters * tokens[1] / seconds
        for tokens, seconds in zip(mine["tokens"][skip:], mine["seconds"][skip:], strict=True)
    ]
    mine["linear_parameters"] = parameters
    mine["achieved_rate"] = median(rates)
    mine["share_of_products"] = median(r / p for r, p in zip(rates, products["rates"][skip:], strict=True))


def against_trl(bench: Bench, case: str) -> dict[str, Any]:
    """Measure ours against TRL, once per TRL micro-batch."""
    args, ranks = bench.args, 2 if case == "zero3" else 1
    wanted = args.global_batch_size * (args.steps + args.warmup + 1)
    if "hh" not in bench.made:
        bench.made["hh"] = hh_file(args.data, bench.model, bench.folder, wanted, args.max_length)
    data, counts = bench.made["hh"]
    print(f"  pairs: {counts['kept']} kept of {counts['read']} read, {counts['refused']} refused")
    more = {"format": "hh_text", "lora": case == "lora"}
    if case == "zero3":
        more["deepspeed"] = str(REPOSITORY / "ds_configs" / "zero3.json")
    runs = {}
    for size in args.trl_micro_batches:
        if args.global_batch_size % (size * ranks):
            print(f"  TRL micro-batch {size} does not divide the batch; left out")
            continue
        jobs = [
            bench.job("ours", "ours", data, **more),
            bench.job("trl", "trl", data, micro_batch=size, **more),
        ]
        if ranks == 1:
            jobs.append(bench.job("products", "products", data, **more))
        print(f"  {case}: TRL micro-batch {size}")
        runs[f"trl_micro_batch_{size}"] = compare(bench, jobs, args.global_batch_size, ranks)
    return {"data": counts, "runs": runs}


def prompt_case(bench: Bench, case: str) -> dict[str, Any]:
    """Measure shared prompts against repeated ones, both ours, where prompts are long or short."""
    args, long = bench.args, case == "long_prompt"
    prompt, response = (1024, 64) if long else (4, 60)
    steps = min(args.long_steps, args.steps) if long else args.steps
    batch = args.long_batch_size if long else args.global_batch_size
    rows = as_pairs(synthetic_rows(bench.tokenizer, batch * (steps + args.warmup + 1), prompt, response, 2))
    data = write_rows(rows, bench.folder / f"{case}.jsonl")
    more: dict[str, Any] = {"batch": batch, "steps": steps + args.warmup}
    if long:
        more |= {"max_length": 1200, "max_tokens": max(args.max_tokens, 2400)}
    names = ("prefix_shared", "padding_free")
    jobs = [bench.job(name, "ours", data, packing=name, **more) for name in names]
    result = compare(bench, jobs, batch)
    tokens = [result["sides"][name]["tokens"] for name in names]
    result["token_ratio"] = median(b[1] / a[1] for a, b in zip(*tokens, strict=True))
    result["ideal_ratio"] = 2 * (prompt + response) / (prompt + 2 * response)
    return {"prompt": prompt, "response": response, "runs": {"prefix_shared": result}}


def k4_case(bench: Bench, case: str) -> dict[str, Any]:
    """Measure groups of four against the same six comparisons as pairs, with and without shared prompts."""
    args = bench.args
    groups = max(1, args.global_batch_size // 2)
    rows = synthetic_rows(bench.tokenizer, groups * (args.steps + args.warmup + 1), 150, 45, 4)
    together = write_rows(rows, bench.folder / "k4_groups.jsonl")
    apart = write_rows(as_pairs(rows), bench.folder / "k4_pairs.jsonl")
    jobs = [
        bench.job("groups", "ours", together, batch=groups, format="ranked"),
        bench.job("pairs_prefix_shared", "ours", apart, batch=6 * groups),
        bench.job("pairs_padding_free", "ours", apart, batch=6 * groups, packing="padding_free"),
    ]
    return {"prompt": 150, "response": 45, "runs": {"groups": compare(bench, jobs, 6 * groups)}}


# --- Report ----------------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Return where the numbers come from."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    names = ("torch", "transformers", "trl", "peft", "deepspeed", "accelerate")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load_average_at_start": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in names},
    }


def table(results: dict[str, Any]) -> str:
    """Return all sides of all cases as text."""
    head = f"{'case':13} {'run':19} {'side':20} {'s/step':>8} {'pairs/s':>8} {'ours/it':>8} {'of med.':>8} {'GB':>6}"
    lines = [head]
    for case, result in results.items():
        for run_name, run in result["runs"].items():
            lines += [f"{case:13} {run_name:19} {_side_line(side)}" for side in run["sides"].values()]
            if "ideal_ratio" in run:
                lines.append(f"{case:13} ideal ratio {run['ideal_ratio']:.2f}, tokens {run['token_ratio']:.2f}")
    return "\n".join(lines)


def _side_line(side: dict[str, Any]) -> str:
    start = f"{side['name']:20} {side['median_seconds']:8.2f}"
    if "rates" in side:
        return f"{start} {side['median_rate'] / 1e9:8.1f} GFLOP/s, matrix products alone"
    ratios = [f"{side[n]:8.2f}" if n in side else " " * 8 for n in ("ratio_median_of_steps", "ratio_of_medians")]
    rate = ""
    if "achieved_rate" in side:
        rate = f"  {side['achieved_rate'] / 1e9:.1f} GFLOP/s = {side['share_of_products']:.0%} of the products"
    return f"{start} {side['pairs_per_second']:8.2f} {' '.join(ratios)} {sum(side['peak_bytes']) / 1e9:6.2f}{rate}"


def losses_table(results: dict[str, Any]) -> str:
    """Return each side's loss at each step; those of one run should agree to bf16's precision."""
    lines = ["losses"]
    for case, result in results.items():
        for run_name, run in result["runs"].items():
            for name, side in run["sides"].items():
                if "losses" in side:
                    lines.append(f"{case:13} {run_name:19} {name:20} " + " ".join(f"{x:.4f}" for x in side["losses"]))
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--data", type=Path, help="JSONL[.gz] of HH texts; needed by hh, lora and zero3")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["hh"])
    parser.add_argument("--steps", type=int, default=5, help="timed optimizer steps")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them")
    parser.add_argument("--trl_micro_batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--trl_dtype", choices=["float32", "bfloat16"], default="float32", help="TRL's weights")
    parser.add_argument("--torch_compile", action="store_true", help="compile our decoder layers (not under ZeRO-3)")
    parser.add_argument("--global_batch_size", type=int, default=16)
    parser.add_argument("--max_tokens", type=int, default=4096, help="our tokens per row and device")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--optim", default="adamw_torch_fused")
    parser.add_argument("--long_steps", type=int, default=3, help="at most so many timed steps of long_prompt")
    parser.add_argument("--long_batch_size", type=int, default=4, help="pairs per step of long_prompt")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results/cpu/packing.json")
    args = parser.parse_args()
    if args.data is None and {"hh", "lora", "zero3"} & set(args.cases):
        parser.error("--data is needed by hh, lora and zero3")
    return args


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings as they go into the result; of paths only the last part."""
    return {name: Path(value).name if name in {"model", "data", "output"} and value else value
            for name, value in vars(args).items()}  # fmt: skip


def main() -> int:
    """Run the cases asked for, print them and write the JSON file after each."""
    args = parse_arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"
    report: dict[str, Any] = {"environment": environment(), "settings": settings(args), "cases": {}}
    runners = {"long_prompt": prompt_case, "short_prompt": prompt_case, "k4": k4_case}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = save_reward_model(args.model, folder / "model")
        bench = Bench(args, folder, str(folder / "model"), tokenizer)
        for case in args.cases:
            print(f"{case}:", flush=True)
            report["cases"][case] = runners.get(case, against_trl)(bench, case)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(losses_table(report["cases"]))
    print(table(report["cases"]))
    print(f"written: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How fast preferences become tokens: rows a second of trl.RewardTrainer, of the tokenizer alone, and of rm_scale.

    RM_SCALE_HH_DATA=harmless-base.jsonl.gz python benchmarks/encoding.py --tokenizer SMOLLM2_DIR [--repeats 3]

Every figure is of a process of its own, in turns, and the median of the repeats. Imports are not counted, nor a first
call with a few rows, nor, for TRL and the tokenizer, reading the file. For rm_scale all else is: reading, checks,
hashes, rendering, tokens, the files of the cache, statistics. HH pairs are repeated to make enough work for two
processes. Record: results/encoding.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).resolve().parent)]

OUTPUT = REPOSITORY / "benchmarks" / "results" / "encoding.json"
KINDS = ("trl", "tokenizer", "rm_scale_1", "rm_scale_2")
MAX_LENGTH = 2048
_AT_ONCE = 1_000
_WARM_UP_ROWS = 50


def main() -> None:
    """Measure, or start a process for each measurement and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="folder of a model's tokenizer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=40_000, help="generated rows")
    parser.add_argument("--hh_times", type=int, default=6, help="how often the HH pairs are repeated")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.data, options.tokenizer)))
        return
    with tempfile.TemporaryDirectory() as folder:
        files = {"generated": write_generated(Path(folder) / "generated.jsonl", options.rows)}
        if os.environ.get("RM_SCALE_HH_DATA"):
            files["hh"] = write_hh(Path(folder) / "hh.jsonl", os.environ["RM_SCALE_HH_DATA"], options.hh_times)
        record = {**environment(options), "data": {name: compare(path, options) for name, path in files.items()}}
    options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


def compare(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the medians of one file and what is to be reached."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(options.repeats):
        for kind in KINDS:
            found[kind].append(in_a_process(kind, path, options.tokenizer))
            print(f"{path.name} {kind}: {found[kind][-1]}", file=sys.stderr)
    rates = {kind: statistics.median(run["rows"] / run["seconds"] for run in runs) for kind, runs in found.items()}
    return {
        "rows": int(found["trl"][0]["rows"]),
        "tokens": int(found["tokenizer"][0]["tokens"]),
        "rows_per_second": {kind: round(rate, 1) for kind, rate in rates.items()},
        "seconds": {kind: [round(run["seconds"], 3) for run in runs] for kind, runs in found.items()},
        "cpu_seconds": {kind: [round(run["cpu_seconds"], 3) for run in runs] for kind, runs in found.items()},
        "times_trl": round(rates["rm_scale_1"] / rates["trl"], 3),
        "times_trl_by_cpu": round(_cpu(found["trl"]) / _cpu(found["rm_scale_1"]), 3),
        "times_tokenizer": round(rates["rm_scale_1"] / rates["tokenizer"], 3),
        "times_tokenizer_by_cpu": round(_cpu(found["tokenizer"]) / _cpu(found["rm_scale_1"]), 3),
        "times_with_two_processes": round(rates["rm_scale_2"] / rates["rm_scale_1"], 3),
    }


def _cpu(runs: list[dict[str, float]]) -> float:
    return statistics.median(run["cpu_seconds"] for run in runs)


def in_a_process(kind: str, path: Path, tokenizer: str) -> dict[str, float]:
    """Return what a measurement in a process of its own found."""
    # One thread a process: what is compared is the work, and ranks share a machine's cores anyway.
    alone = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--tokenizer", tokenizer, "--measure", kind, "--data", str(path)]
    ended = subprocess.run(command, env={**os.environ, **alone}, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{kind} failed:\n{ended.stderr[-3000:]}")
    found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return found


# --- One measurement -----------------------------------------------------------------------------------------------


def measure(kind: str, data: str, folder: str) -> dict[str, float]:
    """Return rows, seconds and seconds of processors (children included) of one way to prepare a file."""
    from rm_scale.modeling.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(folder)
    run = {"trl": _trl, "tokenizer": _tokenizer_alone}.get(kind, _rm_scale)
    return run(data, tokenizer, kind)


def _timed(work: Any) -> dict[str, float]:
    cpu, started = os.times(), time.perf_counter()
    found: dict[str, float] = work()
    seconds, ended = time.perf_counter() - started, os.times()
    cpu_seconds = sum(ended[:4]) - sum(cpu[:4])
    return {**found, "seconds": seconds, "cpu_seconds": cpu_seconds}


def _trl(data: str, tokenizer: Any, kind: str) -> dict[str, float]:
    import datasets
    import trl

    with tempfile.TemporaryDirectory() as work:
        datasets.disable_caching()
        rows = datasets.load_dataset("json", data_files=[data], split="train", cache_dir=work)
        arguments = SimpleNamespace(max_length=MAX_LENGTH, dataset_num_proc=None)
        trainer = object.__new__(trl.RewardTrainer)

        def prepare(rows: datasets.Dataset) -> dict[str, float]:
            trainer._prepare_dataset(rows, tokenizer, arguments, "train")
            return {"rows": len(rows)}

        prepare(rows.select(range(_WARM_UP_ROWS)))
        return _timed(lambda: prepare(rows))


def _tokenizer_alone(data: str, tokenizer: Any, kind: str) -> dict[str, float]:
    with open(data, encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    texts = [row.get("prompt", "") + row[name] + tokenizer.eos_token for row in rows for name in ("chosen", "rejected")]

    tokenizer(texts[:_WARM_UP_ROWS], verbose=False)

    def tokenise() -> dict[str, float]:
        tokens = 0
        for start in range(0, len(texts), _AT_ONCE):
            tokens += sum(map(len, tokenizer(texts[start : start + _AT_ONCE], verbose=False)["input_ids"]))
        return {"rows": len(rows), "tokens": tokens}

    return _timed(tokenise)


def _rm_scale(data: str, tokenizer: Any, kind: str) -> dict[str, float]:
    from rm_scale.config import RunConfig
    from rm_scale.data.encoding import EncodingRules, TextEncoder
    from rm_scale.data.preparation import prepare_data

    encoder = TextEncoder(tokenizer, EncodingRules(max_length=MAX_LENGTH))

    def prepare(path: Path, cache: Path) -> dict[str, float]:
        settings: dict[str, Any] = {"dataset_cache_dir": str(cache), "dataset_num_proc": int(kind.rpartition("_")[2])}
        config = RunConfig(model_name_or_path="none", dataset_path=[str(path)], max_length=MAX_LENGTH, **settings)
        return {"rows": prepare_data(config, encoder).report.rows_read}

    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "first.jsonl"
        with open(data, encoding="utf-8") as stream:
            first.write_text("".join(islice(stream, _WARM_UP_ROWS)), encoding="utf-8")
        prepare(first, Path(folder))
        return _timed(lambda: prepare(Path(data), Path(folder)))


# --- Data ----------------------------------------------------------------------------------------------------------


def write_generated(path: Path, count: int, words: int = 14, seed: int = 0) -> Path:
    """Write pairs of random words: a prompt and two responses, each of about as many words.

    With 14 words and SmolLM2's tokenizer prompt and response have 32 tokens together.
    """
    draw = random.Random(seed)
    known = _words()
    with path.open("w", encoding="utf-8") as stream:
        for number in range(count):
            texts = [" ".join(draw.choices(known, k=words)) for _ in range(3)]
            row = {"prompt": f"{number}: {texts[0]}?", "chosen": f" {texts[1]}.", "rejected": f" {texts[2]}."}
            stream.write(json.dumps(row) + "\n")
    return path


def _words() -> list[str]:
    from rm_scale.demo.synthetic_preferences import generate_pairs

    rows = generate_pairs(200, seed=1, split="train")
    return sorted(
        {word for row in rows for word in f"{row['prompt']} {row['chosen']}".lower().split() if word.isalpha()}
    )


def write_hh(path: Path, given: str, times: int) -> Path:
    """Write the HH pairs several times."""
    whole = Path(given).read_bytes()
    text = (gzip.decompress(whole) if given.endswith(".gz") else whole).decode("utf-8")
    rows = text.splitlines(keepends=True)
    path.write_text("".join(rows * times), encoding="utf-8")
    return path


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        "schema": "rm_scale.encoding/1",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("trl", "transformers", "tokenizers", "datasets", "pyarrow")},
        "cpus": len(os.sched_getaffinity(0)),
        "load_average": list(os.getloadavg()),
        "tokenizer": Path(options.tokenizer).name,
        "repeats": options.repeats,
        "max_length": MAX_LENGTH,
    }


if __name__ == "__main__":
    main()

"""Ten million pairs: memory of `rm-scale data`, a second start, memory of training, and what a kill costs.

    python benchmarks/encoding_scale.py [--rows 10000000] [--few_rows 10000] [--work DIR] [--model MODEL_DIR]

Pairs are made of random words, some 32 tokens each with their prompt. Ten million are about 3.5 GB as JSONL and 5 GB in
the cache, twice for the runs that are killed. Memory is RssAnon of a process and its children together: what they hold
besides mapped files, which the system takes back when it needs them. Record: results/encoding_scale.json.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).resolve().parent)]

OUTPUT = REPOSITORY / "benchmarks" / "results" / "encoding_scale.json"
KILLED_AT = (0.02, 0.2, 0.45, 0.7, 0.95)
"""Shares of the chunks that are there when a run is killed."""
_LOOK_SECONDS = 0.1


def main() -> None:
    """Measure and write the record."""
    from benchmarks.encoding import environment, write_generated

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--few_rows", type=int, default=10_000, help="of the run that memory is held against")
    parser.add_argument("--work", help="folder on the disk to use; default a temporary one")
    parser.add_argument("--model", help="default: a tiny one, made here")
    parser.add_argument("--no_kills", action="store_true")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        model = options.model or str(_tiny_model(work))
        many, few = (write_generated(work / f"{n}.jsonl", n) for n in (options.rows, options.few_rows))
        options.tokenizer, options.repeats = model, 1
        record: dict[str, Any] = {**environment(options), "schema": "rm_scale.encoding_scale/1", "rows": options.rows}
        record["file_bytes"] = many.stat().st_size
        first = watch(_data_command(many, work / "cache", model), work)
        record["first_encoding"] = {
            **first.as_json(),
            "rows_per_second": round(options.rows / first.seconds, 1),
            "cache_bytes": sum(path.stat().st_size for path in (work / "cache").rglob("*") if path.is_file()),
        }
        record["encoded_before"] = watch(_data_command(many, work / "cache", model), work).as_json()
        watch(_data_command(few, work / "cache", model), work)
        runs = {
            name: train(path, work / "cache", model, work / name) for name, path in {"few": few, "many": many}.items()
        }
        record["training"] = {name: run.as_json() for name, run in runs.items()}
        record["training_bytes_more"] = runs["many"].peak_bytes - runs["few"].peak_bytes
        if not options.no_kills:
            record["kills"] = killed_runs(many, work / "killed", model, work)
            record["same_after_kills"] = _same(work / "cache", work / "killed")
    options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


@dataclass(frozen=True)
class Watched:
    """A run that was looked at while it went on.

    Attributes:
        seconds: until it ended, or until its first step.
        peak_bytes: the most memory that its processes together held at once, mapped files not counted.
    """

    seconds: float
    peak_bytes: int

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"seconds": round(self.seconds, 2), "peak_anonymous_bytes": self.peak_bytes}


def watch(command: list[str], work: Path, until: Path | None = None) -> Watched:
    """Start a command and look at its memory until it has ended.

    Args:
        command: what to start.
        work: folder for its log.
        until: a file whose first line ends the clock, not the run.
    """
    started, peak, seconds = time.perf_counter(), 0, None
    with (work / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=_environment(), start_new_session=True)
    while process.poll() is None:
        peak = max(peak, sum(map(_anonymous_bytes, _with_children(process.pid))))
        if until is not None and seconds is None and until.is_file() and until.stat().st_size:
            seconds = time.perf_counter() - started
        time.sleep(_LOOK_SECONDS)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{(work / 'log.txt').read_text()[-3000:]}")
    return Watched(time.perf_counter() - started if seconds is None else seconds, peak)


def train(data: Path, cache: Path, model: str, output: Path) -> Watched:
    """Train for three steps on what lies in the cache."""
    command = [sys.executable, str(REPOSITORY / "rm_scale" / "train.py"), *_settings(data, cache, model)]
    command += ["--output_dir", str(output), "--max_steps", "3", "--global_batch_size", "8", "--logging_steps", "1"]
    command += ["--save_strategy", "no", "--sample_scores", "0", "--disable_tqdm", "true"]
    return watch(command, output.parent, output / "run" / "steps.jsonl")


def killed_runs(data: Path, cache: Path, model: str, work: Path) -> list[dict[str, Any]]:
    """Kill encoding at several moments; return what was there, and how many parts the next run made again."""
    kills: list[dict[str, Any]] = []
    before: dict[str, int] = {}
    for share in KILLED_AT:
        process = subprocess.Popen(
            _data_command(data, cache, model),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            start_new_session=True,
        )
        while process.poll() is None and len(_chunks(cache)) < share * _num_chunks(cache):
            time.sleep(_LOOK_SECONDS)
        with contextlib.suppress(ProcessLookupError):  # it has ended before
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        there = _chunks(cache)
        begun = [path for path in cache.glob("encoded-*/chunk-*") if ".tmp-" in path.name]
        kills.append({"parts_there": len(there), "of": _num_chunks(cache), "parts_begun": len(begun)})
        if len(kills) > 1:
            kills[-2]["made_again"] = sum(there.get(name) != made for name, made in before.items())
        before = there
    watch(_data_command(data, cache, model), work)
    there = _chunks(cache)
    kills[-1]["made_again"] = sum(there.get(name) != made for name, made in before.items())
    return kills


def _chunks(cache: Path) -> dict[str, int]:
    """Return the time at which each complete part was made."""
    found = [path for path in cache.glob("encoded-*/chunk-*") if ".tmp-" not in path.name]
    return {path.name: (path / "used.arrow").stat().st_mtime_ns for path in found}


def _num_chunks(cache: Path) -> float:
    layouts = list(cache.glob("encoded-*/layout.json"))
    return len(json.loads(layouts[0].read_text())["chunks"]) if layouts else float("inf")


def _same(one: Path, other: Path) -> bool:
    """Tell whether two caches hold the same encoding of the large file, byte for byte."""

    def largest(cache: Path) -> Path:
        return max(cache.glob("encoded-*/"), key=lambda entry: sum(path.stat().st_size for path in entry.rglob("*")))

    first, second = largest(one), largest(other)
    names = sorted(path.relative_to(first) for path in first.rglob("*.arrow"))
    names += sorted(path.relative_to(first) for path in first.glob("*.npy"))
    return bool(names) and all(filecmp.cmp(first / name, second / name, shallow=False) for name in names)


# --- Small things --------------------------------------------------------------------------------------------------


def _settings(data: Path, cache: Path, model: str) -> list[str]:
    return [
        *("--dataset_path", str(data), "--dataset_cache_dir", str(cache), "--model_name_or_path", model),
        *("--max_length", "128"),
    ]


def _data_command(data: Path, cache: Path, model: str) -> list[str]:
    return [sys.executable, "-m", "rm_scale.cli", "data", *_settings(data, cache, model)]


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _tiny_model(work: Path) -> Path:
    from rm_scale.demo.assets import make_tiny_model

    return make_tiny_model(work / "model", hidden_size=64)


def _with_children(pid: int) -> list[int]:
    found = [pid]
    for task in found:
        try:
            found += map(int, Path(f"/proc/{task}/task/{task}/children").read_text().split())
        except (OSError, ValueError):
            continue
    return found


def _anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


if __name__ == "__main__":
    main()

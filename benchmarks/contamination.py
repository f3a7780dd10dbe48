"""Measure what `rm-scale data --against` finds of texts that were changed by rules, and what it finds wrongly.

    python benchmarks/contamination.py --data DIR

DIR holds real preference data (hh-rlhf, llmbar, dpo_demo; default: the variable RM_SCALE_PREFERENCE_DATA). Every prompt
and every response is changed by each rule of `paraphrases.py`, at each rate, and looked up among all of them as they
were; recall is the share whose own original is found. False alarms: halves of real files against each other. Record:
results/contamination.json; the tables of docs/contamination.md are made from it (`--table` writes them alone).
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY)]

from benchmarks.paraphrases import ENGLISH_ONLY, RULES, Rule  # noqa: E402
from rm_scale.contamination.benchmark_texts import read_benchmark_texts  # noqa: E402
from rm_scale.contamination.compare import PROMPT_RULES, ComparedRow, compare_with_files  # noqa: E402
from rm_scale.contamination.source_rows import SourceRows  # noqa: E402
from rm_scale.data.sources import local_sources  # noqa: E402
from rm_scale.files import write_whole  # noqa: E402
from rm_scale.overlap.normalisation import normalise, tokens  # noqa: E402
from rm_scale.overlap.text_index import KINDS, TextIndex  # noqa: E402

OUTPUT = REPOSITORY / "benchmarks" / "results" / "contamination.json"
PAGE = REPOSITORY / "docs" / "contamination.md"
HH, EN, ZH = "hh-rlhf/harmless-base.jsonl.gz", "dpo_demo/dpo_en_demo.json.gz", "dpo_demo/dpo_zh_demo.json.gz"
LLMBAR_SETS = ("Natural", "Adversarial_GPTInst", "Adversarial_GPTOut", "Adversarial_Manual", "Adversarial_Neighbor")
LLMBAR = [f"llmbar/{name}.json" for name in LLMBAR_SETS]
ENGLISH = [HH, EN, *LLMBAR]
LENGTHS = (("up to 12 tokens", 0, 12), ("13 to 39", 13, 39), ("40 or more", 40, 10**9))
CHINESE = "Chinese, 13 or more"


def main() -> None:
    """Measure, and write the record and the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("RM_SCALE_PREFERENCE_DATA"), metavar="DIR")
    parser.add_argument("--table", action="store_true", help="only write the tables of the page from the record")
    options = parser.parse_args()
    if not options.table:
        if not options.data:
            parser.error("--data DIR: where hh-rlhf, llmbar and dpo_demo lie")
        record = {
            "schema": "rm_scale.contamination/1",
            "seed": 0,
            "recall": measure_recall(Path(options.data)),
            "halves": measure_halves(Path(options.data)),
            "speed": measure_speed(Path(options.data)),
        }
        write_whole(OUTPUT, json.dumps(record, indent=1) + "\n")
    write_whole(PAGE, with_tables(PAGE.read_text(encoding="utf-8"), json.loads(OUTPUT.read_text(encoding="utf-8"))))


# --- Recall ----------------------------------------------------------------------------------------------------------


def texts_of(files: Sequence[str], data: Path) -> list[str]:
    """Return the different prompts and responses of files."""
    found: dict[str, None] = {}
    for file in files:
        for texts in read_benchmark_texts(str(data / file)):
            for row in texts.rows:
                found |= dict.fromkeys(text for text in (row.prompt, *row.responses) if tokens(text))
    return list(found)


def measure_recall(data: Path) -> list[dict[str, Any]]:
    """Return, per kind and rate, recall by length of the text and how it was found."""
    english = texts_of(ENGLISH, data)
    chinese = [text for text in texts_of([ZH], data) if len(tokens(text)) >= 13]
    rows = []
    for kind, (rule, rates, of_what) in RULES.items():
        for rate in rates:
            row: dict[str, Any] = {"kind": kind, "rate": rate, "of_what": of_what, "recall": {}, "found_by": {}}
            for label, texts in classes(english, chinese):
                if label == CHINESE and kind in ENGLISH_ONLY:
                    continue
                found = look_up_changed(texts, english if label != CHINESE else chinese, rule, rate)
                row["recall"][label] = {"texts": len(texts), "found": sum(found.values())}
                row["found_by"] = {name: row["found_by"].get(name, 0) + found[name] for name in KINDS}
            rows.append(row)
    return rows


def classes(english: Sequence[str], chinese: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return the texts by length, and the Chinese ones."""
    sizes = [len(tokens(text)) for text in english]
    found = [(label, [t for t, n in zip(english, sizes, strict=True) if a <= n <= b]) for label, a, b in LENGTHS]
    return [*found, (CHINESE, list(chinese))]


def look_up_changed(texts: Sequence[str], indexed: Sequence[str], rule: Rule, rate: float) -> dict[str, int]:
    """Change the texts, look them up among the originals of all, and count those that find their own, by kind."""
    place = {text: number for number, text in enumerate(indexed)}
    generator = random.Random(0)
    changed = [rule(text, rate, generator) for text in texts]
    matches = index_of(tuple(indexed)).look_up(changed)
    counts: dict[str, int] = dict.fromkeys(KINDS, 0)
    for query, found, kind in zip(matches.queries, matches.indexed, matches.kinds, strict=True):
        if place[texts[query]] == found:
            counts[KINDS[kind]] += 1
    return counts


_INDEXES: dict[int, TextIndex] = {}


def index_of(texts: tuple[str, ...]) -> TextIndex:
    """Return the index over texts, made once, with the rules for prompts."""
    key = hash(texts)
    if key not in _INDEXES:
        _INDEXES[key] = TextIndex(texts, PROMPT_RULES)
    return _INDEXES[key]


# --- False alarms and speed ------------------------------------------------------------------------------------------


def measure_halves(data: Path) -> list[dict[str, Any]]:
    """Hold random halves of each file against each other, and files against files of other origin."""
    rows = [halves(data / file, file) for file in (HH, EN, ZH)]
    for train, against in ((HH, LLMBAR), (HH, [EN, ZH]), (EN, LLMBAR)):
        name = f"{train.split('/')[0]} against {against[0].split('/')[0]}"
        rows.append(compared(name, data / train, [data / file for file in against]))
    return rows


def halves(path: Path, name: str) -> dict[str, Any]:
    """Hold a random half of a file's rows against the other."""
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        text = stream.read()
    rows = json.loads(text) if path.name.endswith(".json.gz") else [json.loads(line) for line in text.splitlines()]
    random.Random(0).shuffle(rows)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "one.jsonl", Path(folder) / "two.jsonl"]
        for file, part in zip(files, (rows[: len(rows) // 2], rows[len(rows) // 2 :]), strict=True):
            file.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        return compared(f"{name.split('/')[1].partition('.')[0]}, half against half", files[0], files[1:])


def compared(name: str, train: Path, against: Sequence[Path]) -> dict[str, Any]:
    """Return the training rows that match, by side and kind, and those of which one text holds the other whole."""
    whole: set[int] = set()

    def keep_whole(_: SourceRows, __: int, rows: Sequence[ComparedRow]) -> None:
        for row in rows:
            for match in row.matches:
                texts = sorted((normalise(text) for text in (match.text, match.against_text)), key=len)
                if texts[0] in texts[1]:
                    whole.add(row.row)

    found = compare_with_files(local_sources([str(train)]), [str(path) for path in against], keep_whole)
    sides = {
        side: {kind: sum(getattr(file, side).train_rows[kind] for file in found.files) for kind in KINDS}
        for side in ("prompts", "responses")
    }
    return {
        "what": name,
        "train_rows": found.train_rows_read,
        "matched": found.train_rows_matched,
        "whole": len(whole),
        **sides,
    }


def measure_speed(data: Path) -> dict[str, Any]:
    """Time HH against LLMBar, reading of all files included; one process, and others may share the machine."""
    started, on_processor = time.perf_counter(), time.process_time()
    found = compare_with_files(local_sources([str(data / HH)]), [str(data / file) for file in LLMBAR])
    seconds, busy = time.perf_counter() - started, time.process_time() - on_processor
    return {
        "rows": found.train_rows,
        "seconds": round(seconds, 2),
        "processor_seconds": round(busy, 2),
        "rows_per_processor_second": round(found.train_rows / busy),
        "load": os.getloadavg()[0],
    }


# --- Tables ----------------------------------------------------------------------------------------------------------


def with_tables(page: str, record: dict[str, Any]) -> str:
    """Return the page with its tables made anew from the record."""
    for name, table in (("recall", recall_table(record)), ("halves", halves_table(record))):
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        before, _, rest = page.partition(begin)
        page = before + begin + "\n" + table + "\n" + end + rest.partition(end)[2]
    return page


def recall_table(record: dict[str, Any]) -> str:
    """Return recall per kind and rate."""
    labels = [*(label for label, _, _ in LENGTHS), CHINESE]
    texts = {label: part["texts"] for row in record["recall"] for label, part in row["recall"].items()}
    lines = ["| what was done to the text | rate | " + " | ".join(f"{x} ({texts[x]:,})" for x in labels) + " |"]
    lines.append("|---|---|" + "---|" * len(labels))
    for row in record["recall"]:
        rate = f"{row['rate']:.0%} {row['of_what']}" if row["of_what"] else ""
        cells = [share(row["recall"].get(label)) for label in labels]
        lines.append(f"| {row['kind']} | {rate} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def share(part: dict[str, int] | None) -> str:
    """Return recall as percent, never rounded up to all."""
    if part is None:
        return ""
    percent = 100 * part["found"] / part["texts"]
    return "100 %" if part["found"] == part["texts"] else f"{min(percent, 99.9):.1f} %"


def halves_table(record: dict[str, Any]) -> str:
    """Return what unrelated parts of real data share."""
    lines = [
        "| what | training rows | prompts: exact | normalised | 13-grams | MinHash | responses: any | rows that match "
        "| of these, one text holds the other whole |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["halves"]:
        prompts = " | ".join(str(row["prompts"][kind]) for kind in KINDS)
        responses = sum(row["responses"].values())
        lines.append(
            f"| {row['what']} | {row['train_rows']:,} | {prompts} | {responses} | {row['matched']} | {row['whole']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

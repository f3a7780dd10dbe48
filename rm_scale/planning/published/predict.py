"""Predict published measurements: each row of a CSV file becomes a scenario, answered in the row's own units.

Columns are those of benchmarks/data/published_measurements.csv. Measured figures in a row are never read.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rm_scale.errors import ConfigError
from rm_scale.files import read_small_text, replacing
from rm_scale.output_paths import file_problem
from rm_scale.planning.published.reported_memory import peak_memory_of_row
from rm_scale.planning.published.scenario_of_row import (
    NotModelled,
    Row,
    assumptions,
    lengths_of,
    names_its_device,
    scenario_of_row,
)
from rm_scale.planning.scenario import Scenario
from rm_scale.planning.step_time import step_time
from rm_scale.texts import one_line

COLUMNS = (
    "id",
    "model",
    "layers",
    "hidden",
    "heads",
    "kv_heads",
    "ffn",
    "vocab",
    "glu",
    "head",
    "gpu",
    "n_gpus",
    "interconnect",
    "seq_len",
    "micro_batch",
    "grad_accum",
    "act_ckpt",
    "attn",
    "precision",
    "sharding",
    "method",
    "lora_rank",
    "lora_targets",
    "optimizer",
    "mem_unit",
    "mem_kind",
    "notes",
    "source",
)
"""What a row must have; a cell may be empty where the setup doesn't need it."""

_MOST_BYTES = 10_000_000
OUTPUT_COLUMNS = ("id", "peak_memory_gb", "tokens_per_second_per_device", "note")


@dataclass(frozen=True)
class Prediction:
    """The answer to one row.

    Attributes:
        id: the row's.
        peak_memory: in the row's unit, of its kind; `None`: not modelled.
        tokens_per_second: processed tokens per device; `None`: not modelled.
        note: why a figure is missing, or what was assumed.
    """

    id: str
    peak_memory: float | None
    tokens_per_second: float | None
    note: str = ""


def predict_cases(cases: str, output: str | None, overwrite: bool = False) -> int:
    """Predict every row of a file and return exit status 0.

    Args:
        cases: CSV file with `COLUMNS`.
        output: CSV file to write; `None`: standard output. Earlier predictions there are replaced.
        overwrite: replace any other file, too.

    Raises:
        ConfigError: the file can't be read or lacks columns, or the output can't be written.
    """
    problem = None
    if output is not None:
        problem = file_problem(f"output={output}", output, overwrite=overwrite, read=[cases], ours=_holds_predictions)
    if problem is not None:
        raise ConfigError([problem])
    predictions = [predict_row(row) for row in read_cases(cases)]
    if output is None:
        write_predictions(predictions, sys.stdout)
        return 0
    try:
        with replacing(output) as aside, aside.open("w", encoding="utf-8", newline="") as file:
            write_predictions(predictions, file)
    except OSError as error:
        raise ConfigError(
            [f"output={output}: can't be written ({error.strerror}). Fix: name a file in a folder that exists."]
        ) from error
    print(f"{len(predictions)} rows predicted: {output}", file=sys.stderr)
    return 0


def _holds_predictions(path: Path) -> bool:
    """Return whether a file is one that `predict_cases` wrote, by its first line."""
    try:
        with path.open("rb") as file:
            return file.readline(200).strip() == ",".join(OUTPUT_COLUMNS).encode()
    except OSError:
        return False


def read_cases(cases: str) -> list[Row]:
    """Read the file's rows.

    Raises:
        ConfigError: it can't be read, holds no row, or lacks columns.
    """
    try:
        reader = csv.DictReader(io.StringIO(read_small_text(cases, _MOST_BYTES), newline=""))
        rows = [{name: (value or "").strip() for name, value in row.items() if name} for row in reader]
        names = reader.fieldnames or []
    except (ValueError, csv.Error) as error:
        raise ConfigError(
            [f"cases={cases}: can't be read ({one_line(error)}). Fix: give a CSV file in UTF-8."]
        ) from error
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise ConfigError(
            [
                f"cases={cases}: lacks the columns {', '.join(missing)}. Fix: use the columns of "
                "benchmarks/data/published_measurements.csv; cells may be empty."
            ]
        )
    if not rows:
        raise ConfigError([f"cases={cases}: holds no rows. Fix: one setup per line under the header."])
    return rows


def write_predictions(predictions: Iterable[Prediction], file: TextIO) -> None:
    """Write CSV with `OUTPUT_COLUMNS`; a figure that is not modelled stays empty."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(OUTPUT_COLUMNS)
    for answer in predictions:
        memory = "" if answer.peak_memory is None else f"{answer.peak_memory:.2f}"
        tokens = "" if answer.tokens_per_second is None else f"{answer.tokens_per_second:.1f}"
        writer.writerow([answer.id, memory, tokens, answer.note])


# --- One row ----------------------------------------------------------------------------------------------------------


def predict_row(row: Row) -> Prediction:
    """Predict one row; the note says what was assumed or why a figure is missing."""
    try:
        scenario = scenario_of_row(row)
    except NotModelled as reason:
        return Prediction(row["id"], None, None, str(reason))
    notes = assumptions(row)
    speed = memory = None
    try:
        speed = tokens_per_second_of_row(row, scenario)
    except NotModelled as reason:
        notes.append(f"no speed: {reason}")
    try:
        memory = peak_memory_of_row(row, scenario)
    except NotModelled as reason:
        notes.append(f"no memory: {reason}")
    return Prediction(row["id"], memory, speed, "; ".join(notes))


def tokens_per_second_of_row(row: Row, scenario: Scenario) -> float:
    """Return processed tokens per second and device; of padded sequences the real ones, as their sources count."""
    if "fp8" in row["precision"].lower():
        raise NotModelled("FP8 products")
    if not names_its_device(row):
        raise NotModelled("the card that was measured is not named")
    if lengths_of(row) is None:
        raise NotModelled(f"mean length of sequences ({row['seq_len']}) is not given")
    load = scenario.load
    tokens = min(load.tokens, load.effective_tokens)
    return tokens * scenario.num_micro_steps / step_time(scenario).expected

"""A training run as a page, from the records in its `run/`: readable while it runs, and afterwards."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rm_scale.errors import DataError
from rm_scale.files import read_json_lines, read_json_object
from rm_scale.json_values import as_list, as_mapping, as_number, as_whole
from rm_scale.reporting.chart_parts import Axis
from rm_scale.reporting.charts import Series, histogram, lines
from rm_scale.reporting.page import Page, interval, number
from rm_scale.texts import duration
from rm_scale.training.attempts import read_attempts
from rm_scale.training.run_warnings import read_warnings
from rm_scale.yaml_files import read_yaml

_LOAD = ("load_seconds", "load_peak_memory_bytes", "seconds_to_training")
_WORDS = {"world_size": "ranks", "zero_stage": "ZeRO stage", "global_batch_size": "groups per step", "dtype": "weights"}
_NO_LENGTH_OF_TIME = 1e11
"""Seconds in some thousand years."""
_SMOOTHED_ABOVE = 60
"""So many points and more get a running mean beside them."""


class RunRecords:
    """What a run has written so far. Files that are missing or half-written leave their part empty.

    So do values of another type than a run writes, a text for a step, say: the page shows what can be shown.

    Args:
        output_dir: the run's output directory, or its `run/`.

    Raises:
        DataError: there are no records of a run.
    """

    def __init__(self, output_dir: Path) -> None:
        folder = output_dir if (output_dir / "run_config.yaml").is_file() else output_dir / "run"
        if not (folder / "run_config.yaml").is_file():
            raise DataError(
                f"{output_dir}: holds neither a run (run/run_config.yaml) nor benchmark records. "
                "Fix: give an output directory of rm_scale/train.py, or a folder of records."
            )
        self.folder = folder
        try:
            config = read_yaml(folder / "run_config.yaml")
        except ValueError as error:
            raise DataError(f"{folder / 'run_config.yaml'}: can't be read ({error}). Fix: restore the file.") from error
        self.config: dict[str, Any] = config if isinstance(config, dict) else {}
        self.plan, self.environment = self._json("plan.json"), self._json("environment.json")
        self.evaluation, self.data = self._json("evaluation.json"), self._json("data_report.json")
        self.check, self.timing = self._json("plan_check.json"), self._json("timing.json")
        logged = self._lines("metrics.jsonl")
        self.steps = [line for line in logged if "loss" in line]
        self.evaluations = [line for line in logged if "eval_accuracy" in line]
        self.times, self.attempts = self._lines("steps.jsonl"), read_attempts(folder)
        self.warnings = read_warnings(folder)

    def _json(self, name: str) -> dict[str, Any]:
        return read_json_object(self.folder / name)

    def _lines(self, name: str) -> list[dict[str, Any]]:
        lines = read_json_lines(self.folder / name)
        return [line for line in lines if "step" not in line or as_whole(line["step"]) is not None]

    @property
    def name(self) -> str:
        """What the run is called."""
        return str(self.config.get("run_name") or self.folder.resolve().parent.name)

    @property
    def total_steps(self) -> int | None:
        """Steps in all."""
        return as_whole(self.plan.get("total_steps")) or None

    @property
    def last_step(self) -> int:
        """The step that the run has come to; more than the last logged one where not every step is logged."""
        known = [*self.steps[-1:], *self.times[-1:], *self.attempts[-1:]]
        return max((_step_of(record) for record in known), default=0)

    @property
    def has_ended(self) -> bool:
        """True when the last attempt has come to an end."""
        return bool(self.attempts) and self.attempts[-1].get("event") == "end"


def build_run_page(run: RunRecords, refresh_seconds: int | None = None) -> Page:
    """Return the page of a run.

    Args:
        run: its records.
        refresh_seconds: the page loads itself again so often, for a run that goes on.
    """
    page = Page(f"Run {run.name}", None if run.has_ended else refresh_seconds)
    _headline(page, run)
    _learning(page, run)
    _speed_and_memory(page, run)
    _attempts(page, run)
    _evaluation(page, run)
    _data(page, run)
    _settings(page, run)
    return page


def value_of(record: dict[str, Any], name: str) -> float | None:
    """Return a finite number, or none: not-a-number is written as a word."""
    return as_number(record.get(name))


def _step_of(record: dict[str, Any]) -> int:
    return as_whole(record.get("step")) or 0


def _headline(page: Page, run: RunRecords) -> None:
    last = run.steps[-1] if run.steps else {}
    logged = _step_of(last)
    step = run.last_step
    state = _state(run)
    total = run.total_steps
    tiles = [
        (f"{step:,}" + (f" / {total:,}" if total else ""), "step", state),
        (number(value_of(last, "loss")), "loss", f"logged at step {logged:,}" if run.steps else "not logged yet"),
        (number(value_of(last, "accuracy")), "training accuracy", "of the steps logged there"),
        (number(value_of(last, "pairs_per_second"), 3), "pairs/s", "all ranks"),
    ]
    if run.evaluation:
        ends = interval(run.evaluation.get("accuracy_ci95"), 3)
        tiles.append((number(value_of(run.evaluation, "accuracy")), "held-out accuracy", f"95 %: {ends}"))
    left = _seconds_left(run, step)
    if left is not None and not run.has_ended:
        tiles.append((duration(left), "left", "by the last steps' pace"))
    page.tiles(tiles)
    if run.warnings:
        page.warnings(run.warnings)
    if not run.steps:
        page.paragraph("No step has been logged yet.")


def _state(run: RunRecords) -> str:
    if not run.attempts:
        return "not begun"
    last = run.attempts[-1]
    if last.get("event") == "end":
        return str(last.get("reason", "ended"))
    seconds = max(0.0, time.time() - last.get("time", time.time()))
    return f"running; last event {last.get('event')} {duration(seconds)} ago"


def _seconds_left(run: RunRecords, step: int) -> float | None:
    recent = [seconds for line in run.times[-20:] if (seconds := value_of(line, "seconds")) is not None]
    if not recent or run.total_steps is None:
        return None
    left = sum(recent) / len(recent) * max(0, run.total_steps - step)
    return left if 0 <= left < _NO_LENGTH_OF_TIME else None


def _line(records: Sequence[dict[str, Any]], name: str, title: str, dashed: bool = False) -> Series:
    return Series(title, _steps(records), [value_of(r, name) for r in records], dashed=dashed)


def _steps(records: Sequence[dict[str, Any]]) -> list[float]:
    return [float(_step_of(record)) for record in records]


def _smoothed(series: Series, width: int) -> Series:
    """Return a running mean over the points behind; missing ones are left out."""
    found: list[float | None] = []
    for place in range(len(series.y)):
        seen = [float(v) for v in series.y[max(0, place - width + 1) : place + 1] if v is not None]
        found.append(sum(seen) / len(seen) if seen else None)
    return Series(f"{series.name}, mean of {width}", series.x, found)


def _curve(run: RunRecords, name: str, title: str, axis: Axis, more: Sequence[Series] = ()) -> str:
    series = _line(run.steps, name, title)
    drawn = [series]
    if len(series.y) >= _SMOOTHED_ABOVE:
        drawn = [Series(series.name, series.x, series.y, marks=True), _smoothed(series, max(5, len(series.y) // 30))]
    return lines(title, [*drawn, *more], Axis("step"), axis)


def _learning(page: Page, run: RunRecords) -> None:
    page.section("Learning")
    held_out = [_line(run.evaluations, "eval_accuracy", "held-out")] if run.evaluations else []
    held_out_loss = [_line(run.evaluations, "eval_loss", "held-out")] if run.evaluations else []
    rewards = Series(
        "mean reward, band from lowest to highest",
        _steps(run.steps),
        [value_of(r, "mean_reward") for r in run.steps],
        low=[value_of(r, "min_reward") for r in run.steps],
        high=[value_of(r, "max_reward") for r in run.steps],
    )
    page.figures(
        [
            (_curve(run, "loss", "training loss", Axis("loss"), held_out_loss), "Loss. 0.693 is a guess."),
            (_curve(run, "accuracy", "training accuracy", Axis("accuracy", percent=True), held_out), "Accuracy."),
            (_curve(run, "margin", "mean margin", Axis("chosen less rejected")), "Margin of chosen over rejected."),
            (lines("Rewards", [rewards], Axis("step"), Axis("reward")), "Rewards of all responses of each step."),
            (
                lines("Rate", [_line(run.steps, "learning_rate", "rate")], Axis("step"), Axis("learning rate")),
                "Learning rate.",
            ),
            (_curve(run, "grad_norm", "gradient norm", Axis("norm before clipping")), "Gradient norm."),
        ]
    )
    bins = as_mapping(run.evaluation.get("score_histogram"))
    edges = [edge for one in as_list(bins.get("edges")) if (edge := as_number(one)) is not None]
    if edges and len(edges) == len(as_list(bins.get("edges"))):
        counts = [as_number(one) for one in as_list(bins.get("counts"))]
        chart = histogram("Rewards of the evaluation set", edges, counts, Axis("reward"))
        page.figure(chart, "Rewards of the evaluation set.")


def _speed_and_memory(page: Page, run: RunRecords) -> None:
    page.section("Throughput and memory")
    rates = ("effective_tokens_per_second", "real_tokens_per_second", "processed_tokens_per_second")
    tokens = [_line(run.steps, name, name.split("_")[0]) for name in rates]
    timed = [line for line in run.times if "step" in line]
    waits = [
        Series(title, _steps(timed), [_share(line, name) for line in timed])
        for name, title in (("data_wait_seconds", "data"), ("communication_seconds", "other ranks"))
    ]
    figures = [
        (_curve(run, "pairs_per_second", "pairs/s", Axis("pairs/s, all ranks", low=0)), "Pairs per second."),
        (lines("Tokens", tokens, Axis("step"), Axis("tokens/s, all ranks", low=0)), "Tokens per second, all ranks."),
        (_memory(run), "Peak memory so far of the fullest rank; dashed: predicted by the planner."),
        (lines("Waiting", waits, Axis("step"), Axis("share of step", low=0, percent=True)), "Time spent waiting."),
    ]
    page.figures(figures)
    measured, predicted = as_mapping(run.check.get("measured")), as_mapping(run.check.get("predicted"))
    if predicted:
        band = as_mapping(predicted.get("step_seconds"))
        rows = [
            ["peak memory, GB", _gb(predicted.get("peak_memory_bytes")), _gb(measured.get("peak_memory_bytes"))],
            [
                "step, s",
                interval([band.get("low"), band.get("high")], 3) if band else None,
                measured.get("step_seconds"),
            ],
        ]
        page.table(["", "predicted", "measured"], rows, digits=3)
    for warning in as_list(run.check.get("warnings")):
        page.paragraph(str(warning))
    if run.timing:
        load, peak, began = (run.timing.get(name) for name in _LOAD)
        page.paragraph(
            f"Loading took {number(load, 3)} s and {number(_gb(peak), 3)} GB; "
            f"training began {number(began, 3)} s after the start.",
            kind="measured",
        )


def _memory(run: RunRecords) -> str:
    peaks = [value_of(r, "peak_memory_bytes") for r in run.steps]
    x = _steps(run.steps)
    series = [Series("measured", x, [_gb(peak) for peak in peaks])]
    predicted = _gb(as_mapping(run.check.get("predicted")).get("peak_memory_bytes"))
    if predicted and x:
        series.append(Series("predicted", [x[0], x[-1]], [predicted] * 2, dashed=True))
    return lines("Memory", series, Axis("step"), Axis("GB", low=0))


def _gb(size: Any) -> float | None:
    number_of_bytes = as_number(size)
    return None if number_of_bytes is None else number_of_bytes / 1e9


def _share(record: dict[str, Any], name: str) -> float | None:
    part, whole = value_of(record, name), value_of(record, "seconds")
    return part / whole if part is not None and whole else None


def _attempts(page: Page, run: RunRecords) -> None:
    page.section("Starts, saves and ends")
    attempts = {event["attempt"] for event in run.attempts if "attempt" in event}
    saves = [event for event in run.attempts if event.get("event") == "saved"]
    page.paragraph(f"Attempts: {len(attempts)}. Checkpoints: {len(saves)}.")
    shown = [event for event in run.attempts if event.get("event") != "saved"] + saves[-10:]
    rows = [
        [
            time.strftime("%F %T", time.gmtime(event.get("time", 0))),
            event.get("attempt"),
            str(event.get("event", "")).replace("_", " "),
            event.get("step"),
            event.get("reason") or (f"{number(event.get('seconds'), 3)} s" if "seconds" in event else ""),
        ]
        for event in sorted(shown, key=lambda event: event.get("time", 0))
    ]
    page.table(["time (UTC)", "attempt", "event", "step", ""], rows)


def _evaluation(page: Page, run: RunRecords) -> None:
    found = run.evaluation
    if not found:
        return
    page.section("Final evaluation")
    names = ("accuracy", "loss", "mean_margin", "num_pairs", "num_ties")
    rows = [["all", *[found.get(name) for name in names], interval(found.get("accuracy_ci95"), 3)]]
    for subset, values in as_mapping(found.get("subsets")).items():
        part = as_mapping(values)
        rows.append(
            [subset or "(no subset)", *[part.get(name) for name in names], interval(part.get("accuracy_ci95"), 3)]
        )
    for source, values in as_mapping(found.get("sources")).items():
        part = as_mapping(values)
        figures = [part.get(name) for name in names]
        rows.append([f"source {source}", *figures, interval(part.get("accuracy_ci95"), 3)])
    page.table(["", "accuracy", "loss", "mean margin", "pairs", "ties", "accuracy, 95 %"], rows)


def _data(page: Page, run: RunRecords) -> None:
    report = run.data
    if not report:
        return
    page.section("Data")
    read, used = report.get("rows_read"), report.get("rows_used")
    page.paragraph(f"{number(read)} rows read, {number(used)} used, {number(report.get('rows_rejected'))} rejected.")
    reasons = as_mapping(report.get("reasons"))
    if reasons:
        page.table(
            ["reason", "rows"],
            [[name, len(count) if isinstance(count, list | dict) else count] for name, count in reasons.items()],
        )
    sources = [
        [Path(str(s.get("name"))).name, s.get("split"), s.get("format"), s.get("rows_used")]
        for s in map(as_mapping, as_list(report.get("sources")))
    ]
    page.table(["source", "split", "format", "rows used"], sources)
    mixture = [
        [part.get(key) for key in ("name", "split", "rows_read", "rows_filtered", "groups", "weight", "share")]
        for part in map(as_mapping, as_list(report.get("mixture")))
    ]
    if mixture:
        page.table(["source of the mixture", "split", "rows", "filtered", "groups", "weight", "share"], mixture)
    for part in ("train", "eval"):
        facts = as_mapping(report.get(part))
        if facts:
            rows = [[name, _flat(value)] for name, value in facts.items()]
            page.details(f"{part} set", ["", ""], rows)


def _flat(value: Any) -> Any:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number(one)}" for name, one in value.items())
    return value


def _settings(page: Page, run: RunRecords) -> None:
    page.section("Settings and environment")
    packages = as_mapping(run.environment.get("packages"))
    device = (as_list(run.environment.get("gpus")) or [run.environment.get("cpu")])[0]
    rows = [
        ["device", device],
        ["rm_scale", run.environment.get("rm_scale")],
        ["commit", run.environment.get("commit")],
    ]
    rows += [[name, packages.get(name)] for name in ("torch", "transformers", "trl", "peft", "deepspeed")]
    keys = ("method", "world_size", "zero_stage", "offload", "packing", "global_batch_size", "learning_rate", "dtype")
    rows += [[_WORDS.get(name, name.replace("_", " ")), run.plan.get(name)] for name in keys]
    page.table(["", ""], rows)
    page.details("All settings", ["", ""], [[name, _text(value)] for name, value in run.config.items()])


def _text(value: Any) -> Any:
    try:
        return json.dumps(value, default=str) if isinstance(value, list | dict) else value
    except TypeError:  # YAML has dates for names too
        return str(value)

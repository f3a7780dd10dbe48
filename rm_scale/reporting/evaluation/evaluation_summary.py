"""The results of `rm-scale eval` for people: lines for a terminal, `evaluation.md`, and the model card's section."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rm_scale.evaluation.evaluation_document import Comparison, DataUse, EvaluationDocument, ModelEvaluation, Slice
from rm_scale.evaluation.final_evaluation import results_table
from rm_scale.evaluation.requirements import gate_text
from rm_scale.texts import one_line, printable

NONE = "-"


def number(value: Any, digits: int = 4) -> str:
    """Return a number for a table; a dash for one that does not exist."""
    if value is None:
        return NONE
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"


def interval(values: Sequence[float] | None, digits: int = 4) -> str:
    """Return an interval for a table."""
    return NONE if values is None else f"{values[0]:.{digits}f} to {values[1]:.{digits}f}"


# --- Terminal ------------------------------------------------------------------------------------------------------


def text_summary(document: EvaluationDocument) -> str:
    """Return what the command prints."""
    lines: list[str] = []
    for model in document["models"]:
        lines += [f"{model['name']}:", *(f"  {line}" for line in _model_lines(model))]
    lines += [_comparison_line(comparison) for comparison in document["comparisons"]]
    for name, results in document["benchmarks"].items():
        lines += [f"{name}, {benchmark}: {_benchmark_line(values)}" for benchmark, values in results.items()]
    return "\n".join(lines)


def _model_lines(model: ModelEvaluation) -> list[str]:
    lines = results_table(model, model["subsets"]).splitlines()
    if model["num_groups"] > model["num_prompts"]:
        lines.append(
            f"over {model['num_prompts']:,} prompts the interval is {interval(model['accuracy_ci95_prompts'])}"
        )
    lines += [_calibration_line(model), _length_line(model)]
    data = model["data"]
    if data is not None:
        lines += column_lines(data)
        lines += [
            f"rows not used: {entry['source']}: {entry['reason']} {entry['count']} (rows {_first(entry)}): "
            f"{entry['meaning']}"
            for entry in data["rejected"]
        ]
    return lines


def column_lines(data: DataUse) -> list[str]:
    """Return how scores were read from columns; nothing where a model computed them."""
    if "read_as" not in data:
        return []
    sizes = ", ".join(f"{count:,} of {size}" for size, count in data["group_sizes"].items())
    lines = [f"read: {data['read_as']}; groups by their number of scores: {sizes}"]
    tied = data["tied_rows"]
    if tied["count"]:
        lines.append(f"equal scores, which count as wrong: in {tied['count']:,} rows ({_first(tied)})")
    if data["num_pairs_lost"]:
        lines.append(
            f"with the {data['num_pairs_lost']:,} pairs of rows that can't be used counted as wrong, accuracy is "
            f"{number(data['accuracy_if_lost'])}"
        )
    return lines


def _first(entry: Mapping[str, Any]) -> str:
    shown = ", ".join(map(str, entry["first_rows"]))
    return f"{shown}, ..." if entry["count"] > len(entry["first_rows"]) else shown


def _calibration_line(part: Slice) -> str:
    values = part["calibration"]
    temperature = number(values["temperature"], 3)
    note = f" ({values['temperature_note']})" if values["temperature_note"] else ""
    return (
        f"calibration: error {number(values['ece'])} (chance alone: {number(values['ece_if_calibrated'])}); "
        f"temperature {temperature}{note}, error with it, cross-validated: {number(values['ece_after'])}"
    )


def _length_line(part: Slice) -> str:
    values = part["length_bias"]
    if not values["num_pairs"]:
        return "length: not known"
    longer, shorter = values["better_longer"], values["better_shorter"]
    return (
        f"length: accuracy {number(longer['accuracy'])} where the better one is longer ({longer['num_pairs']:,}), "
        f"{number(shorter['accuracy'])} where it is shorter ({shorter['num_pairs']:,}); reward per 100 tokens: "
        f"{number(values['slope_std_per_100_tokens'], 3)} standard deviations"
    )


def _comparison_line(values: Comparison) -> str:
    verdict = {
        "first": f"{values['first']} is better",
        "second": f"{values['second']} is better",
        "undecided": "the data can't tell them apart",
    }[values["verdict"]]
    difference = values["accuracy_difference"]
    return (
        f"{values['first']} against {values['second']}: accuracy "
        f"{NONE if difference is None else f'{difference:+.4f}'} ({interval(values['accuracy_difference_ci95'])}), "
        f"p {number(values['p_value'])}; McNemar p {number(values['mcnemar_p_value'])}: {verdict}"
    )


def _benchmark_line(values: Mapping[str, Any]) -> str:
    parts = [f"{values['name']} {number(values['score'])}"]
    parts += [f"{name} {number(value)}" for name, value in values["parts"].items()]
    if values["missing"]:
        parts.append(f"no overall score, as the file lacks {', '.join(values['missing'])}")
    if values["num_unscored"]:
        said = f"{values['num_unscored']:,} of {values['num_items']:,} items could not be scored and are lost"
        reasons = [
            f"{reason} {entry['count']}, rows {_first(entry)}" for reason, entry in values.get("unscored", {}).items()
        ]
        parts.append(said + (f" ({'; '.join(reasons)})" if reasons else ""))
    return "; ".join(parts)


def _benchmark_parts(values: Mapping[str, Any]) -> list[str]:
    """Return a benchmark's result in Markdown."""
    rows = [("**overall**", NONE, number(values["score"]))]
    rows += [(escape(name), NONE, number(value)) for name, value in values["parts"].items()]
    rows += [
        (f"subset {escape(name)}", number(part["num_items"]), number(part["score"]))
        for name, part in values["subsets"].items()
    ]
    parts = [f"{values['name']}, by the rule of {values['source']}.", table(["", "items", "score"], rows)]
    if values["missing"]:
        parts.append(f"No overall score: the file lacks {escape(', '.join(values['missing']))}.")
    if values["num_unscored"]:
        parts.append(
            f"{values['num_unscored']:,} of {values['num_items']:,} items could not be scored and count as lost."
        )
    return parts


# --- Markdown ------------------------------------------------------------------------------------------------------


def markdown_summary(document: EvaluationDocument) -> str:
    """Return the content of `evaluation.md`: the tables, without pictures."""
    parts = ["# Evaluation", f"{document['created']}, {_versions(document['versions'])}"]
    if document["gate"] is not None:
        parts += ["## Requirements", _gate_table(document)]
    for model in document["models"]:
        parts += [f"## {escape(model['name'])}", *_model_parts(model)]
    if document["comparisons"]:
        parts += ["## Comparison", _comparison_table(document), _agreement_table(document)]
    for name, results in document["benchmarks"].items():
        for benchmark, values in results.items():
            parts += [f"## {escape(name)} on {escape(benchmark)}", *_benchmark_parts(values)]
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Return a text from the data, safe inside a Markdown table."""
    safe = "".join(f"\\{c}" if c in "\\|`*_[]<>#" else c for c in printable(one_line(text)))
    return safe or "(no name)"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _gate_table(document: EvaluationDocument) -> str:
    gate = document["gate"]
    assert gate is not None
    rows = [
        (escape(one["text"]), number(one["value"], 6), "passed" if one["passed"] else "**failed**")
        for one in gate["requirements"]
    ]
    return table(["requirement", "value", ""], rows) + f"\n\n{gate_text(gate).splitlines()[-1]}"


def _model_parts(model: ModelEvaluation) -> list[str]:
    where = f"`{model['path']}`" + (
        f", {model['dtype']} on {model['device']}" if model["dtype"] else ", scores as read"
    )
    parts = [f"{where}. Loss: {model['loss_type']}.", accuracy_table(model)]
    parts += ["### Calibration", calibration_table(model)]
    if model["length_bias"]["num_pairs"]:
        parts += ["### Length", length_table(model)]
    parts += ["### Ties", _ties_table(model)]
    if model["data"] is not None:
        parts += ["### Rows", _rows_table(model)]
    return parts


def accuracy_table(model: ModelEvaluation, whole_paths: bool = True) -> str:
    """Return accuracy overall, per subset and per source.

    Args:
        model: its results.
        whole_paths: call sources by their paths; otherwise by their files' names, for what is published.
    """
    rows = [_accuracy_row("all", model)]
    rows += [_accuracy_row(f"subset {escape(name)}", part) for name, part in model["subsets"].items()]
    if len(model["sources"]) > 1:
        rows += [
            _accuracy_row(f"source {escape(name if whole_paths else Path(name).name)}", part)
            for name, part in model["sources"].items()
        ]
    head = [
        "",
        "pairs",
        "prompts",
        "accuracy",
        "95 % (pairs)",
        "95 % (prompts)",
        "longer wins",
        "ECE",
        "loss",
        "margin",
    ]
    return table(head, rows)


def _accuracy_row(name: str, part: Slice) -> list[str]:
    return [
        name,
        number(part["num_pairs"]),
        number(part["num_prompts"]),
        number(part["accuracy"]),
        interval(part["accuracy_ci95"]),
        interval(part["accuracy_ci95_prompts"]),
        number(part["length_bias"]["longer_wins"]),
        number(part["calibration"]["ece"]),
        number(part["loss"]),
        number(part["mean_margin"], 3),
    ]


def calibration_table(model: ModelEvaluation) -> str:
    """Return calibration before and after the temperature."""
    values = model["calibration"]
    folds = f"{values['num_folds']}-fold cross-validated" if values["num_folds"] else "not possible"
    rows = [
        ("as it is", NONE, number(values["ece"]), number(values["nll"])),
        (
            f"with temperature, {folds}",
            number(values["temperature"], 3),
            number(values["ece_after"]),
            number(values["nll_after"]),
        ),
        ("a calibrated model, by chance alone", NONE, number(values["ece_if_calibrated"]), NONE),
    ]
    note = f"\n\nNo temperature: {values['temperature_note']}." if values["temperature_note"] else ""
    return table(["rewards", "temperature", "ECE", "negative log-likelihood"], rows) + note


def length_table(model: ModelEvaluation) -> str:
    """Return accuracy where length helps and where it hurts, and the slope."""
    values = model["length_bias"]
    rows = [
        (name, number(part["num_pairs"]), number(part["accuracy"]), interval(part["accuracy_ci95"]))
        for name, part in (
            ("longer", values["better_longer"]),
            ("shorter", values["better_shorter"]),
            ("as long", values["better_equal"]),
        )
    ]
    slope = values["slope_per_token"]
    line = (
        "The margin does not vary with length here."
        if slope is None
        else f"Margin = {number(values['intercept'], 3)} + {slope:.5f} per token of length difference "
        f"({interval(values['slope_ci95'], 5)}); {number(values['slope_std_per_100_tokens'], 3)} standard deviations "
        f"of the score per 100 tokens, correlation {number(values['correlation'], 3)}. By length alone: longer wins "
        f"{number(values['longer_wins'])}, shorter wins {number(values['shorter_wins'])}."
    )
    return table(["the better response is", "pairs", "accuracy", "95 %"], rows) + f"\n\n{line}"


def _ties_table(model: ModelEvaluation) -> str:
    values = model["ties"]
    rows = [
        ("pairs with exactly equal rewards", number(values["num_reward_ties"])),
        ("pairs labelled as ties", number(values["num_label_ties"])),
        ("mean distance of rewards, ties by label", number(values["label_tie_mean_abs_margin"])),
        ("mean distance of rewards, other pairs", number(values["pair_mean_abs_margin"])),
        ("a tie by label is the closer one", number(values["label_tie_auc"])),
    ]
    return table(["", "value"], rows)


def _rows_table(model: ModelEvaluation) -> str:
    data = model["data"]
    assert data is not None
    rows = [
        (escape(entry["source"]), entry["reason"], number(entry["count"]), entry["meaning"])
        for entry in data["rejected"]
    ]
    said = (
        f"{data['rows_read']:,} rows read from {', '.join(map(escape, data['sources']))}, {data['rows_used']:,} used."
    )
    said = "\n\n".join([said, *map(escape, column_lines(data))])
    return f"{said}\n\n{table(['source', 'not used', 'rows', 'why'], rows)}" if rows else said


def _comparison_table(document: EvaluationDocument) -> str:
    rows = [
        (
            escape(one["first"]),
            escape(one["second"]),
            number(one["num_pairs"]),
            number(one["accuracy_difference"]),
            interval(one["accuracy_difference_ci95"]),
            number(one["p_value"]),
            number(one["mcnemar_p_value"]),
            one["verdict"],
        )
        for one in document["comparisons"]
    ]
    head = ["first", "second", "pairs", "difference of accuracy", "95 %", "p", "McNemar p", "better"]
    return table(head, rows)


def _agreement_table(document: EvaluationDocument) -> str:
    rows = [
        (
            escape(one["first"]),
            escape(one["second"]),
            number(one["agreement"]),
            number(one["kappa"], 3),
            number(one["both_correct"]),
            number(one["first_only"]),
            number(one["second_only"]),
            number(one["neither"]),
            number(one["spearman_margins"], 3),
        )
        for one in document["agreement"]
    ]
    head = [
        "first",
        "second",
        "same decision",
        "kappa",
        "both right",
        "first only",
        "second only",
        "neither",
        "rank corr.",
    ]
    return table(head, rows)


# --- Model card ----------------------------------------------------------------------------------------------------


def card_section(document: EvaluationDocument) -> str:
    """Return what `--model_card` writes: the first model's numbers."""
    parts = ["## Evaluation"]
    if document["models"]:
        model = document["models"][0]
        data = ", ".join(escape(Path(name).name) for name in model["sources"]) or "read scores"
        parts += [f"On {data}, {document['created'][:10]}.", accuracy_table(model, False), calibration_table(model)]
        if model["length_bias"]["num_pairs"]:
            parts.append(length_table(model))
    name = document["models"][0]["name"] if document["models"] else next(iter(document["benchmarks"]), "")
    for benchmark, values in document["benchmarks"].get(name, {}).items():
        parts += [f"### {escape(benchmark)}", *_benchmark_parts(values)]
    return "\n\n".join(parts)

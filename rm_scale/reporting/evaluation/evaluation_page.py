"""`evaluation.html`: what `rm-scale eval` found, as one page that can be sent to somebody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rm_scale.reporting.bar_charts import Bar, bars
from rm_scale.reporting.chart_parts import Axis
from rm_scale.reporting.charts import Series, histogram, lines
from rm_scale.reporting.evaluation.evaluation_summary import column_lines
from rm_scale.reporting.page import Mark, Page, interval, number

Part = Mapping[str, Any]
_AGREEMENT = (
    "num_pairs",
    "agreement",
    "kappa",
    "both_correct",
    "first_only",
    "second_only",
    "neither",
    "spearman_scores",
)


def write_page(document: Mapping[str, Any], path: Path) -> Path:
    """Write the page.

    Args:
        document: as `rm_scale.evaluation.evaluation_document` lays it out.
        path: an HTML file.
    """
    names = [model["name"] for model in document["models"]]
    page = Page(f"Evaluation of {', '.join(names)}" if names else "Benchmarks of reward models")
    if document.get("gate"):
        _gate(page, document["gate"])
    for place, model in enumerate(document["models"]):
        _model(page, model, alone=len(names) == 1, first=place == 0)
    _several(page, document)
    for model, results in document["benchmarks"].items():
        for file, result in results.items():
            _benchmark(page, model, file, result)
    for model in document["models"]:
        _data(page, model)
    _provenance(page, document)
    return page.write(path)


def _gate(page: Page, gate: Part) -> None:
    page.section("Requirements")
    page.table(
        ["requirement", "found", ""],
        [
            (one["text"], one["value"], Mark("holds" if one["passed"] else "fails", one["passed"]))
            for one in gate["requirements"]
        ],
    )


def _model(page: Page, model: Part, alone: bool, first: bool) -> None:
    if not alone:
        page.section(f"Model {model['name']}")
    _headline(page, model)
    _subsets(page, model)
    _margins(page, model)
    _calibration(page, model["calibration"])
    _length(page, model["length_bias"])
    _ties(page, model["ties"])


def _headline(page: Page, model: Part) -> None:
    prompts = model.get("accuracy_ci95_prompts")
    better = prompts or model["accuracy_ci95"]
    note = f"95 %: {interval(better)}" + (", over prompts" if prompts else "")
    baselines = model["baselines"]
    page.tiles(
        [
            (number(model["accuracy"]), "accuracy", note),
            (number(model["num_pairs"]), "pairs", f"of {number(model['num_prompts'])} prompts"),
            (number(model["mean_margin"]), "mean margin", f"deviation {number(model['margins']['std'])}"),
            (
                number(model["calibration"]["ece"]),
                "calibration error",
                f"{number(model['calibration']['ece_after'])} scaled",
            ),
            (
                number(baselines.get("longer_wins")),
                "“longer wins”",
                f"shorter: {number(baselines.get('shorter_wins'))}",
            ),
            (number(model["loss"]), "loss", str(model["loss_type"])),
        ]
    )


def _subsets(page: Page, model: Part) -> None:
    for title, key in (("Subsets", "subsets"), ("Sources", "sources")):
        parts: Mapping[str, Part] = model[key]
        if not parts or (key == "sources" and len(parts) < 2):
            continue
        page.section(title)
        page.figure(
            bars(
                f"Accuracy by {title.lower()}",
                [_accuracy_bar(name, part) for name, part in parts.items()],
                Axis("accuracy, with 95 % intervals", 0.0, 1.0, percent=True),
                reference=model["accuracy"],
            ),
            "The dashed line is the accuracy over all pairs.",
        )
        page.table(
            [
                title[:-1].lower(),
                "pairs",
                "accuracy",
                "95 % interval",
                "mean margin",
                "calibration error",
                "reward ties",
            ],
            [
                (
                    name,
                    p["num_pairs"],
                    p["accuracy"],
                    interval(p["accuracy_ci95"]),
                    p["mean_margin"],
                    p["calibration"]["ece"],
                    p["ties"]["num_reward_ties"],
                )
                for name, p in parts.items()
            ],
        )


def _accuracy_bar(name: str, part: Part) -> Bar:
    low, high = part["accuracy_ci95"] if part["num_pairs"] else (None, None)
    return Bar(name, part["accuracy"], low, high)


def _margins(page: Page, model: Part) -> None:
    margins = model["margins"]
    page.section("Margins")
    page.figure(
        histogram(
            "Margins of the pairs",
            margins["edges"],
            margins["counts"],
            Axis("reward of the better response – reward of the other"),
            split_at=0.0,
        ),
        "Below zero the model prefers the wrong response.",
    )
    quantiles = margins["quantiles"]
    page.table([f"{int(name[1:])} %" for name in quantiles], [list(quantiles.values())])


def _calibration(page: Page, calibration: Part) -> None:
    page.section("Calibration")
    temperature = calibration["temperature"]
    note = f"temperature {number(temperature)}" if temperature is not None else calibration["temperature_note"]
    page.paragraph(
        f"Expected calibration error {number(calibration['ece'])} ({number(calibration['ece_if_calibrated'])} would be "
        f"chance for a calibrated model); with rewards divided by a temperature {number(calibration['ece_after'])}, "
        f"fitted on other prompts than it is judged on. {note}."
    )
    diagonal = Series("calibrated", [0.5, 1.0], [0.5, 1.0], dashed=True)
    charts = []
    for title, key in (("as it is", "bins"), ("divided by the temperature", "bins_after")):
        found = [one for one in calibration[key] if one["count"]]
        seen = Series(
            "observed",
            [one["predicted"] for one in found],
            [one["observed"] for one in found],
            [one["observed_ci95"][0] for one in found],
            [one["observed_ci95"][1] for one in found],
            marks=True,
        )
        chart = lines(
            f"Reliability {title}",
            [seen, diagonal] if found else [],
            Axis("predicted probability", 0.5, 1.0, percent=True),
            Axis("share that was right", 0.0, 1.0, percent=True),
        )
        charts.append((chart, f"Reliability, {title}. Points on the dashed line mean what they say."))
    page.figures(charts)


def _length(page: Page, length: Part) -> None:
    if not length["num_pairs"]:
        return
    page.section("Length")
    page.table(
        ["better response is", "pairs", "accuracy", "95 % interval", "mean margin"],
        [
            (name, part["num_pairs"], part["accuracy"], interval(part["accuracy_ci95"]), part["mean_margin"])
            for name, part in (
                ("longer", length["better_longer"]),
                ("shorter", length["better_shorter"]),
                ("as long", length["better_equal"]),
            )
        ],
    )
    found = [one for one in length["bins"] if one["num_pairs"]]
    middle = [(one["low"] + one["high"]) / 2 for one in found]
    series = Series(
        "accuracy",
        middle,
        [one["accuracy"] for one in found],
        [one["accuracy_ci95"][0] for one in found],
        [one["accuracy_ci95"][1] for one in found],
        marks=True,
    )
    page.figure(
        lines(
            "Accuracy by length difference",
            [series],
            Axis("tokens of the better response – tokens of the other"),
            Axis("accuracy", 0.0, 1.0, percent=True),
        ),
        f"Choosing the longer response would be right in {number(length['longer_wins'])} of the pairs. Slope of the "
        f"margin: {number(length['slope_per_token'])} per token ({interval(length['slope_ci95'])}), correlation "
        f"{number(length['correlation'])}; mean accuracy of “longer” and “shorter”: "
        f"{number(length['balanced_accuracy'])}.",
    )


def _ties(page: Page, ties: Part) -> None:
    if not ties["num_label_ties"] and not ties["num_reward_ties"]:
        return
    page.section("Ties")
    page.paragraph(
        f"{number(ties['num_reward_ties'])} pairs have exactly equal rewards and count as wrong. "
        f"{number(ties['num_label_ties'])} pairs are ties by label: their rewards differ by "
        f"{number(ties['label_tie_mean_abs_margin'])} on average, those of other pairs by "
        f"{number(ties['pair_mean_abs_margin'])}."
    )


def _several(page: Page, document: Part) -> None:
    comparisons: Sequence[Part] = document["comparisons"]
    if not comparisons:
        return
    page.section("Comparison")
    page.table(
        ["models", "pairs", "accuracies", "difference", "95 % interval", "p", "McNemar p", "verdict"],
        [
            (
                f"{c['first']} – {c['second']}",
                c["num_pairs"],
                f"{number(c['accuracy_first'])}, {number(c['accuracy_second'])}",
                c["accuracy_difference"],
                interval(c["accuracy_difference_ci95"]),
                c["p_value"],
                c["mcnemar_p_value"],
                _verdict(c),
            )
            for c in comparisons
        ],
    )
    page.paragraph(
        "Intervals and p from a paired bootstrap over prompts; McNemar's test takes pairs as independent.", faint=True
    )
    page.table(
        [
            "models",
            "pairs",
            "same decision",
            "kappa",
            "both right",
            "first only",
            "second only",
            "neither",
            "score ranks",
        ],
        [(f"{a['first']} – {a['second']}", *(a[key] for key in _AGREEMENT)) for a in document["agreement"]],
    )


def _verdict(comparison: Part) -> Mark:
    verdict = comparison["verdict"]
    if verdict == "undecided":
        return Mark("undecided", True)
    return Mark(f"{comparison[verdict]} is better", verdict == "first")


def _benchmark(page: Page, model: str, file: str, result: Part) -> None:
    page.section(f"{result['name']}: {model}")
    score = result["score"]
    page.tiles([(number(score), result["name"], result["source"])])
    if result["missing"]:
        page.paragraph(f"No overall score: {file} lacks {', '.join(result['missing'])}.")
    page.figure(
        bars(
            f"{result['name']} by part",
            [Bar(name, value) for name, value in result["parts"].items()],
            Axis("score", 0.0, 1.0, percent=True),
            reference=score,
        )
    )
    page.details(
        "All subsets",
        ["subset", "items", "score"],
        [(name, part["num_items"], part["score"]) for name, part in result["subsets"].items()],
    )


def _data(page: Page, model: Part) -> None:
    data = model["data"]
    if not data:
        return
    page.section(f"Data read for {model['name']}")
    page.paragraph(f"{number(data['rows_used'])} of {number(data['rows_read'])} rows of {', '.join(data['sources'])}.")
    for line in column_lines(data):
        page.paragraph(line)
    if data["rejected"]:
        page.table(
            ["not used", "rows", "first", "meaning"],
            [
                (
                    f"{one['source']}: {one['reason']}",
                    one["count"],
                    ", ".join(map(str, one["first_rows"])),
                    one["meaning"],
                )
                for one in data["rejected"]
            ],
        )


def _provenance(page: Page, document: Part) -> None:
    facts: dict[str, Any] = {"made": document["created"]}
    facts |= {f"version of {name}": version for name, version in document["versions"].items()}
    for model in document["models"]:
        how = ", ".join(str(model[key]) for key in ("dtype", "device") if model[key])
        facts[f"model {model['name']}"] = f"{model['path']}{f' ({how})' if how else ''}"
    page.provenance(facts)
    page.paragraph("All figures on this page were measured.", kind="measured", faint=True)

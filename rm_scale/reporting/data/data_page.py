"""The page of `rm-scale data`: what was found in the data, with examples, figures and what to set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rm_scale.reporting.bar_charts import Bar, bars
from rm_scale.reporting.chart_parts import Axis
from rm_scale.reporting.charts import Series, histogram, lines
from rm_scale.reporting.data.data_summary import share_text
from rm_scale.reporting.page import Mark, Page, number
from rm_scale.texts import some_names

Part = Mapping[str, Any]
_MOST_ROWS = 200
_MOST_NAMES = 3


def build_page(document: Part) -> Page:
    """Return the page.

    Args:
        document: as `rm_scale.data_review.review.review_data` returns it.
    """
    names = [source["name"] for source in document["report"]["sources"] if source["split"] == "train"]
    page = Page(f"Data: {some_names(names, _MOST_NAMES)}")
    _headline(page, document)
    _findings(page, document["findings"])
    _lengths(page, document["lengths"])
    _form(page, document["form"])
    _words(page, document["words"])
    _languages(page, document["languages"])
    _sources(page, document["report"])
    _provenance(page, document)
    return page


def _headline(page: Page, document: Part) -> None:
    report = document["report"]
    train = report["train"]
    longer = train["longer_wins_accuracy"]
    page.tiles(
        [
            (number(document["num_rows"]), "rows", f"{number(document['num_groups'])} could be read"),
            (number(document["num_pairs"]), "pairs", f"of {number(train['num_prompts'])} prompts"),
            (number(report["rows_rejected"]), "rows not used", "see Rows"),
            (share_text(longer), "“longer wins”", "is right so often"),
        ]
    )


def _findings(page: Page, findings: Sequence[Part]) -> None:
    page.section("What was found")
    seen = [finding for finding in findings if finding["level"] != "nothing"]
    page.table(
        ["", "", "count", "of", "share", "counted in"],
        [
            (
                finding["title"],
                Mark("problem", False) if finding["level"] == "problem" else "note",
                finding["count"],
                f"{number(finding['out_of'])} {finding['unit']}",
                share_text(finding["share"]),
                "the sample" if finding["sampled"] else "all rows",
            )
            for finding in seen
        ],
    )
    for finding in seen:
        page.heading(finding["title"])
        page.paragraph(finding["meaning"])
        _suggestion(page, finding["suggestion"])
        _examples(page, finding["examples"])
    nothing = [finding["title"] for finding in findings if finding["level"] == "nothing"]
    if nothing:
        page.paragraph(f"Looked for and not found: {'; '.join(nothing)}.", faint=True)


def _suggestion(page: Page, suggestion: Part | None) -> None:
    if suggestion is None:
        return
    page.paragraph(suggestion["text"])
    if suggestion["settings"]:
        page.code(suggestion["settings"])


def _examples(page: Page, examples: Sequence[Part]) -> None:
    if not examples:
        return
    with page.folded(f"{len(examples)} example{'s' * (len(examples) != 1)}"):
        for example in examples:
            rows = ", ".join(map(str, example["rows"]))
            page.paragraph(f"{example['source']}, row{'s' * (len(example['rows']) != 1)} {rows}", faint=True)
            page.code("\n\n".join(f"[{name}]\n{said}" for name, said in example["texts"].items()))


def _lengths(page: Page, lengths: Part) -> None:
    if not lengths:
        return
    page.section("Lengths")
    charts = []
    for name, title in (
        ("longest_sequence", "Longest sequence of a group"),
        ("prompt", "Prompt"),
        ("response", "Response"),
    ):
        part = lengths[name]
        above = f"; {number(part['above'])} longer ones are not drawn" if part["above"] else ""
        chart = histogram(title, part["edges"], part["counts"], Axis("tokens"))
        charts.append((chart, f"{title}: mean {number(part['mean'])}, longest {number(part['max'])} tokens{above}."))
    page.figures(charts)
    page.heading("What max_length cuts")
    page.table(
        ["max_length", "drop loses groups", "truncate_prompt_left cuts", "and loses", "tokens cut or lost then"],
        [(number(cut["max_length"]), *(share_text(cut[key]) for key in _CUT_KEYS)) for cut in lengths["cuts"]],
    )
    _layouts(page, lengths["layouts"])


_CUT_KEYS = ("over", "truncated", "lost_even_so", "tokens_cut")


def _layouts(page: Page, layouts: Part) -> None:
    page.heading("What each row layout processes")
    values = [Bar(f"none, micro-batch {size}", value) for size, value in layouts["padded"].items()]
    values += [Bar("padding_free", layouts["padding_free"]), Bar("prefix_shared", layouts["prefix_shared"])]
    page.figure(
        bars("Processed tokens per real token", values, Axis("processed tokens per real token", 0.0), reference=1.0),
        "A real token is one of prompt or response, the prompt counted once per response (--packing).",
    )
    page.table(
        ["max_tokens_per_device", "rows are filled", "groups too large for one"],
        [
            (number(one["max_tokens_per_device"]), share_text(one["filled"]), share_text(one["groups_too_large"]))
            for one in layouts["budgets"]
        ],
    )
    page.paragraph("Steps of 64 groups on one device, prompts shared.", faint=True)


def _form(page: Page, form: Part) -> None:
    """Show what the labels pay for beside content."""
    page.section("Form: what the better response has")
    length = form["length"]
    if length["bins"]:
        page.figure(_length_chart(length), "Over the dashed line the longer response is the better one more often.")
    decided = [row for row in form["marks"] if row["wins"] is not None]
    if decided:
        chart = bars(
            "How often the better response is the one that has it",
            [Bar(row["title"], row["wins"], *(row["wins_ci95"] or (None, None))) for row in decided],
            Axis("of pairs in which exactly one response has it, with 95 % intervals", 0.0, 1.0, percent=True),
            reference=0.5,
        )
        page.figure(chart, "A bar on the dashed line: the labels don't care.")
    header = ["", "better have it", "worse have it", "only the better", "only the worse", "better has it", "95 %"]
    page.details("All marks", header, [_mark_row(row["title"], row) for row in form["marks"]])
    if form["starts"]:
        rows = [_mark_row(f"“{row['start']} …”", row) for row in form["starts"]]
        page.details("First words that decide most", header, rows)


def _length_chart(length: Part) -> str:
    bins = length["bins"]
    middle = [(one["low"] + one["high"]) / 2 for one in bins]
    ends = [one["wins_ci95"] or (None, None) for one in bins]
    wins = [one["wins"] for one in bins]
    seen = Series("longer wins", middle, wins, [low for low, _ in ends], [high for _, high in ends], marks=True)
    even = Series("a coin", [middle[0], middle[-1]], [0.5, 0.5], dashed=True)
    return lines(
        "How often the longer response is the better one",
        [seen, even],
        Axis("tokens by which one response is longer"),
        Axis("longer one is better", 0.0, 1.0, percent=True),
    )


def _mark_row(title: str, row: Part) -> tuple[Any, ...]:
    bounds = row["wins_ci95"]
    return (
        title,
        share_text(row["share_better"]),
        share_text(row["share_worse"]),
        row["num_only_better"],
        row["num_only_worse"],
        share_text(row["wins"]),
        f"{bounds[0]:.1%} – {bounds[1]:.1%}" if bounds else "–",
    )


def _words(page: Page, words: Part) -> None:
    page.section("What a bag of words gets right")
    if "accuracy" not in words:
        page.paragraph(words["note"])
        return
    values = [
        Bar("words alone", words["accuracy"], *words["accuracy_ci95"]),
        Bar("length alone", words["length_accuracy"], *words["length_accuracy_ci95"]),
        Bar("a coin", words["coin"]),
    ]
    page.figure(
        bars("Accuracy without reading", values, Axis("accuracy, with 95 % intervals", 0.0, 1.0, percent=True)),
        f"Logistic regression on the words of {number(words['num_pairs'])} pairs, judged on prompts that it was not "
        "fitted on. It sees neither the order of words nor the prompt.",
    )
    with page.side_by_side():
        for side in ("better", "worse"):
            page.details(
                f"Words that speak for the {side} response",
                ["word", "weight", "more of it in the better", "in the worse"],
                [
                    (one["word"], one["weight"], one["num_more_in_better"], one["num_more_in_worse"])
                    for one in words["words"][side]
                ],
                digits=3,
            )


def _languages(page: Page, rows: Sequence[Part]) -> None:
    page.section("Sources and languages")
    total = sum(row["num_groups"] for row in rows)
    shown = sorted(rows, key=lambda row: -row["num_groups"])[:_MOST_ROWS]
    page.table(
        ["source", "subset", "language (a guess)", "groups", "share"],
        [
            (
                row["source"],
                row["subset"] or "–",
                row["language"],
                row["num_groups"],
                share_text(row["num_groups"] / total),
            )
            for row in shown
        ],
        sortable=len(shown) > 10,
    )
    more = (
        f" {number(len(rows) - len(shown))} smaller parts are in the JSON file alone." if len(rows) > _MOST_ROWS else ""
    )
    page.paragraph(
        "Of the sample. A language is guessed from a text's script and its small words (the, of, and); code, names "
        f"and very short texts are not known.{more}",
        faint=True,
    )


def _sources(page: Page, report: Part) -> None:
    page.section("Rows")
    page.table(
        ["source", "read for", "format", "rows", "used", "not used"],
        [
            (
                source["name"],
                source["split"],
                source["format"],
                source["rows_read"],
                source["rows_used"],
                source["rows_read"] - source["rows_used"],
            )
            for source in report["sources"]
        ],
    )
    rejected = [
        (f"{source['name']}: {reason}", entry["count"], ", ".join(map(str, entry["first_rows"])), meaning)
        for source in report["sources"]
        for reason, entry in source["rejected"].items()
        for meaning in (report["reasons"][reason],)
    ]
    if rejected:
        page.table(["not used", "rows", "first", "meaning"], rejected)


def _provenance(page: Page, document: Part) -> None:
    sample = document["sample"]
    page.provenance(
        {
            "made": document["created"],
            "version of rm_scale": document["rm_scale"],
            "tokenizer and chat template of": document["model"],
            "counted in all rows": "pairs that contradict, repeat or run in circles, by hashes of their texts",
            "the sample": f"{number(sample['num_groups'])} groups of {number(document['num_groups'])}, drawn with seed "
            f"{document['seed']}; of a text {number(sample['max_characters'])} characters are looked at",
        }
    )
    page.paragraph("All figures on this page were measured.", kind="measured", faint=True)

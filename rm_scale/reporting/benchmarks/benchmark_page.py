"""A set of benchmark records as one page and as Markdown; and two sets side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rm_scale.reporting.benchmarks.benchmark_charts import (
    against_chart,
    loss_chart,
    memory_chart,
    scaling_chart,
    speed_chart,
)
from rm_scale.reporting.benchmarks.peer_comparison import (
    answer,
    comparison_cells,
    comparison_chart,
    comparison_header,
    peer_name,
    settings_of,
)
from rm_scale.reporting.benchmarks.record_tables import (
    DETAIL_HEADER,
    PREDICTED_HEADER,
    REPEATED_HEADER,
    SCALING_HEADER,
    THROUGHPUT_HEADER,
    Change,
    Place,
    Row,
    by_place,
    changes,
    detail_cells,
    label,
    machine,
    model_size_text,
    predicted_cells,
    repeated_cells,
    repetitions,
    rows_of,
    scaling_cells,
    signed,
    throughput_cells,
)
from rm_scale.reporting.benchmarks.sealed_records import Record, RecordSet, measures, peak_memory_bytes
from rm_scale.reporting.page import Mark, Page, number

DEFINITIONS = (
    "All rates are per device, medians over the timed steps. Effective tokens count a prompt once per response, real "
    "tokens once per row it stands in, processed tokens include padding. MFU and HFU are over the maker's peak and "
    "undefined without one; beside them the same FLOPs over the rate of large matrix products as measured here. Useful "
    "FLOPs: real, unshared tokens, causal attention, frozen weights twice, trained ones three times, no embedding, no "
    "head. Executed FLOPs: padding, recomputation and adapters in, a shared prompt once. 'To peer': how many times as "
    "fast as the peer on the same steps, with a 95 % bootstrap interval of the median. Communication: time that the "
    "main rank stood still in collectives of a blocking backend; a dash under DDP and NCCL, which overlap them."
)


def build_page(
    found: RecordSet, baseline: RecordSet | None = None, title: str = "Reward-model training throughput"
) -> Page:
    """Return the page. Measured and predicted figures never stand in one column without saying so.

    Args:
        found: the records to show.
        baseline: an earlier set to compare with.
        title: its heading.
    """
    page = Page(title)
    rows = rows_of(found.records)
    _headline(page, rows, found)
    if baseline is not None:
        _comparison(page, baseline, found)
    for place, here in by_place(rows):
        _one_place(page, here, place)
    _without_figures(page, rows, found)
    page.section("What the figures mean")
    page.paragraph(DEFINITIONS)
    _environment(page, found.records)
    _reproduce(page, found.records)
    return page


def _headline(page: Page, rows: Sequence[Row], found: RecordSet) -> None:
    states = Counter(row.record.status for row in rows)
    kinds = len({machine(row.record) for row in rows})
    best = max((row.to_peer.value for row in rows if row.to_peer is not None), default=None)
    tiles = [
        (number(states["ok"]), "cases measured", f"on {kinds} kind{'s' if kinds != 1 else ''} of machine"),
        (number(states["out_of_memory"]), "out of memory", "a result like any other"),
        (number(states["failed"] + states["killed"]), "failed or ended", ""),
    ]
    if best is not None:
        tiles.append((f"{best:.1f} ×", "most over a peer", "same model, data and batch"))
    if found.refused:
        tiles.append((number(len(found.refused)), "records refused", "see below"))
    page.tiles(tiles)


def _one_place(page: Page, rows: Sequence[Row], place: Place) -> None:
    case = rows[0].record.case
    page.section(f"{place.model} on {place.device}")
    parameters = f"{model_size_text(case.num_parameters)}, " if case.num_parameters else ""
    settings = settings_of(rows)
    page.paragraph(answer(settings), kind="measured")
    page.paragraph(f"{parameters}{place.settings_text}.", faint=True)
    chart = comparison_chart(f"Pairs per second, {place.model}", settings)
    peer = peer_name(settings)
    caption = "Pairs per second and rank of our fastest layout"
    caption += f"; in brackets: times {peer}, the median of the steps' ratios." if peer else "."
    with page.side_by_side("answer"):
        page.figure(chart, caption)
        page.table(comparison_header(peer), [comparison_cells(one, peer) for one in settings], digits=3)
    cells = [throughput_cells(row) for row in rows]
    page.details(
        f"All {len(rows)} cases" if len(rows) > 1 else "The case in full",
        THROUGHPUT_HEADER,
        cells,
        digits=3,
        sortable=True,
    )
    _folded_away(page, rows)


def _folded_away(page: Page, rows: Sequence[Row]) -> None:
    """Add what is looked up rather than read."""
    charts = [
        drawn
        for ranks in sorted({row.record.case.num_ranks for row in rows})
        for draw in (speed_chart, memory_chart)
        for drawn in [draw([row for row in rows if row.record.case.num_ranks == ranks], ranks)]
    ]
    with page.folded("Charts: every case, memory by part, scaling, loss over time"):
        page.figures([*charts, scaling_chart(rows), loss_chart(rows)])
    details = [detail_cells(row) for row in rows]
    page.details("Utilisation, waiting, loading, memory of each case", DETAIL_HEADER, details, sortable=True)
    scaling = scaling_cells(rows)
    if scaling:
        page.details("Scaling over ranks", SCALING_HEADER, scaling)
    _predicted(page, rows)
    again = repetitions(rows)
    if again:
        page.details("Repetitions", REPEATED_HEADER, [repeated_cells(one) for one in again])


def _predicted(page: Page, rows: Sequence[Row]) -> None:
    cells = [found for row in rows if (found := predicted_cells(row)) is not None]
    if not cells:
        return
    points = [
        (row.found.step_seconds_p50, row.record.predicted.step_seconds["high"])
        for row in rows
        if row.found is not None and row.record.predicted is not None and row.record.predicted.step_seconds
    ]
    sizes = [
        (size / 1e9, row.record.predicted.peak_memory_bytes / 1e9)
        for row in rows
        if row.found is not None and row.record.predicted is not None and (size := peak_memory_bytes(row.record))
    ]
    charts = [
        (against_chart(points, "s per step", "Step time"), "Step time, predicted over measured; dashed: equal."),
        (against_chart(sizes, "GB", "Peak memory"), "Peak memory, predicted over measured; dashed: equal."),
    ]
    with page.folded("Predicted beside measured"):
        page.paragraph("What rm-scale plan's arithmetic said of each case before its first step.", kind="predicted")
        page.figures(charts)
        page.table(PREDICTED_HEADER, cells, digits=3, sortable=True)


def _noted(rows: Sequence[Row]) -> list[list[object]]:
    """Return the cases without figures, and those with a note."""
    noted = [row.record for row in rows if row.found is None or row.record.reason]
    return [[f"{r.case.model}: {label(r.case)}", r.status.replace("_", " "), r.reason] for r in noted]


def _without_figures(page: Page, rows: Sequence[Row], found: RecordSet) -> None:
    noted = _noted(rows)
    if noted:
        page.section("Cases without figures, or with a note")
        page.table(["case", "", "why"], noted)
    if found.refused:
        page.section("Records that were refused")
        page.table(["file, line", "why"], [list(one) for one in found.refused])


def _facts(records: Sequence[Record]) -> list[list[object]]:
    """Return what the records say of machines and versions, and how many say so."""
    facts: dict[tuple[str, str], int] = Counter()
    for record in records:
        env = record.environment
        packages = env.get("packages") or {}
        versions = ", ".join(
            f"{name} {packages[name]}"
            for name in ("torch", "transformers", "trl", "peft", "deepspeed")
            if packages.get(name)
        )
        changed = " with uncommitted changes" if env.get("uncommitted_changes") else ""
        rate = record.matmul_flops_per_device
        facts["device", machine(record)] += 1
        facts["processor cores", str(env.get("num_cpus"))] += 1
        facts["versions", versions] += 1
        facts["rm_scale", f"{env.get('rm_scale')} at {str(env.get('commit'))[:12]}{changed}"] += 1
        facts["large matrix products", f"{number(rate / 1e12, 3)} TFLOP/s per rank" if rate else "not measured"] += 1
        facts["energy", record.energy_source or "not read"] += 1
    return [[what, value, count] for (what, value), count in facts.items()]


def _environment(page: Page, records: Sequence[Record]) -> None:
    page.section("Environment")
    page.table(["", "", "records"], _facts(records))
    page.details(
        "All records",
        ["record", "status", "date", "load of the machine", "checksum"],
        [
            [r.name, r.status, r.protocol.get("date"), r.protocol.get("load_average_at_start"), r.checksum]
            for r in records
        ],
    )


def _commands(records: Sequence[Record]) -> str:
    """Return one command of each system."""
    first: dict[str, str] = {}
    for record in records:
        if record.protocol.get("command"):
            first.setdefault(record.case.system, str(record.protocol["command"]))
    return "\n\n".join(first.values()) or "no record holds a command"


_REPRODUCE = "Every record holds its exact command and all settings. One of each system:"
_WHOLE_GRID = "The whole grid: python benchmarks/throughput.py; see benchmarks/README.md."


def _reproduce(page: Page, records: Sequence[Record]) -> None:
    page.section("How to reproduce")
    page.paragraph(_REPRODUCE)
    page.code(_commands(records))
    page.paragraph(_WHOLE_GRID)


# --- Two sets --------------------------------------------------------------------------------------------------------

CHANGE_HEADER = ("case", "before, pairs/s", "after", "after / before", "memory after / before", "verdict")


def _comparison(page: Page, baseline: RecordSet, found: RecordSet) -> None:
    both, gone, added = changes(baseline.records, found.records)
    page.section("Against the baseline")
    worse = sum(change.verdict.startswith("regression") for change in both)
    page.paragraph(
        f"{len(both)} cases in both sets, {worse} regressions; {len(gone)} only in the baseline, {len(added)} only "
        "here. A regression is more than 5 % slower with its whole 95 % interval below 1, or no longer runs.",
        kind="measured",
    )
    page.table(CHANGE_HEADER, [change_cells(change) for change in both], digits=3)
    for title, cases in (("Only in the baseline", gone), ("Only here", added)):
        if cases:
            page.details(title, ["case"], [[f"{case.model}: {label(case)}"] for case in cases])
    for file, reason in baseline.refused:
        page.paragraph(f"Baseline's {file} was refused: {reason}")


def change_cells(change: Change) -> list[object]:
    """Return a row of the comparison."""
    ratio = f"{change.ratio.value:.3f} ({change.ratio.low:.3f}–{change.ratio.high:.3f})" if change.ratio else None
    verdict: object = change.verdict
    if change.verdict.startswith(("regression", "faster", "runs now")):
        verdict = Mark(change.verdict, not change.verdict.startswith("regression"))
    speeds = [row.found.pairs_per_second if row.found else None for row in map(_row, (change.before, change.after))]
    return [f"{change.case.model}: {label(change.case)}", *speeds, ratio, signed_ratio(change.memory), verdict]


def _row(record: Record) -> Row:
    return Row(record, measures(record))


def signed_ratio(value: float | None) -> str | None:
    """Return a ratio as a change."""
    return signed(value - 1) if value is not None else None


# --- Markdown --------------------------------------------------------------------------------------------------------


def markdown(found: RecordSet, baseline: RecordSet | None = None) -> str:
    """Return the tables alone, as Markdown."""
    rows = rows_of(found.records)
    parts = []
    if baseline is not None:
        both, gone, added = changes(baseline.records, found.records)
        parts.append("### Against the baseline\n\n" + table(CHANGE_HEADER, [change_cells(one) for one in both]))
        parts += [f"Only in the baseline: {case.model}: {label(case)}" for case in gone]
        parts += [f"Only here: {case.model}: {label(case)}" for case in added]
    parts.append(DEFINITIONS)
    for place, here in by_place(rows):
        parts.append(f"### {place.model} on {place.device}\n\nMeasured; {place.settings_text}.")
        parts.append(table(THROUGHPUT_HEADER, [throughput_cells(row) for row in here]))
        parts.append(
            "Utilisation, waiting, loading, memory:\n\n" + table(DETAIL_HEADER, [detail_cells(row) for row in here])
        )
        parts += derived_tables(here)
    noted = _noted(rows)
    if noted:
        parts.append("### Cases without figures, or with a note\n\n" + table(["case", "", "why"], noted))
    if found.refused:
        parts.append("### Refused records\n\n" + table(["file", "why"], [list(one) for one in found.refused]))
    parts.append("### Environment\n\n" + table(["what", "", "records"], _facts(found.records)))
    parts.append(f"### How to reproduce\n\n{_REPRODUCE}\n\n```\n{_commands(found.records)}\n```\n\n{_WHOLE_GRID}")
    return "\n\n".join(parts) + "\n"


def derived_tables(rows: Sequence[Row]) -> list[str]:
    """Return scaling, predictions and repetitions as Markdown, as far as there are any."""
    parts = []
    if scaling := scaling_cells(rows):
        parts.append("Scaling over ranks:\n\n" + table(SCALING_HEADER, scaling))
    if cells := [cell for row in rows if (cell := predicted_cells(row)) is not None]:
        parts.append("Predicted beside measured:\n\n" + table(PREDICTED_HEADER, cells))
    if again := repetitions(rows):
        parts.append("Repetitions:\n\n" + table(REPEATED_HEADER, [repeated_cells(one) for one in again]))
    return parts


def _markdown_cell(cell: object) -> str:
    if isinstance(cell, Mark):
        return cell.content
    return cell if isinstance(cell, str) else number(cell, 3)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines_ = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        lines_.append("| " + " | ".join(_markdown_cell(cell).replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines_)

"""A set of benchmark records as one page and as Markdown; and two sets side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rm_scale.reporting.charts import Axis, Bar, Series, bars, lines, nothing, stacked
from rm_scale.reporting.page import Mark, Page, number
from rm_scale.reporting.record_tables import (
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
    predicted_cells,
    repeated_cells,
    repetitions,
    rows_of,
    scaling_cells,
    setting,
    signed,
    size_words,
    tag,
    throughput_cells,
)
from rm_scale.reporting.records import Record, RecordSet, measures, peak_memory_bytes

_MAX_BARS = 40
_MAX_PARTS = 5
"""So that no colour stands for two parts."""
_MAX_LINES = 6
_PARTS = {
    "weights": "weights",
    "gathered_weights": "gathered weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "dequantised": "4-bit unpacked",
    "communication_buffers": "buffers",
    "optimizer_step": "optimizer step",
    "framework": "framework",
}
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
    """The page. Measured and predicted figures never stand in one column without saying so.

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
    _environment(page, found.records)
    _reproduce(page, found.records)
    return page


def _headline(page: Page, rows: Sequence[Row], found: RecordSet) -> None:
    states = Counter(row.record.status for row in rows)
    best = max((row.to_peer.value for row in rows if row.to_peer is not None), default=None)
    tiles = [
        (number(states["ok"]), "cases measured", f"on {len({machine(row.record) for row in rows})} kinds of machine"),
        (number(states["out_of_memory"]), "out of memory", "a result like any other"),
        (number(states["failed"] + states["killed"]), "failed or ended", ""),
    ]
    if best is not None:
        tiles.append((f"{best:.1f} ×", "most over a peer", "same model, data and batch"))
    if found.refused:
        tiles.append((number(len(found.refused)), "records refused", "see below"))
    page.tiles(tiles)
    page.paragraph(DEFINITIONS, faint=True)


def _one_place(page: Page, rows: Sequence[Row], place: Place) -> None:
    case = rows[0].record.case
    page.section(f"{place.model} on {place.device}")
    parameters = f"{size_words(case.num_parameters)}, " if case.num_parameters else ""
    page.paragraph(f"{parameters}{place.words}.", kind="measured")
    page.table(THROUGHPUT_HEADER, [throughput_cells(row) for row in rows], digits=3)
    charts = [
        drawn
        for ranks in sorted({row.record.case.num_ranks for row in rows})
        for draw in (_speed, _memory)
        for drawn in [draw([row for row in rows if row.record.case.num_ranks == ranks], ranks)]
    ]
    page.figures([*charts, _scaling(rows), _losses(rows)])
    page.details(
        "Utilisation, waiting, loading, memory of each case", DETAIL_HEADER, [detail_cells(row) for row in rows]
    )
    scaling = scaling_cells(rows)
    if scaling:
        page.details("Scaling over ranks", SCALING_HEADER, scaling)
    _predicted(page, rows)
    again = repetitions(rows)
    if again:
        page.heading("Repetitions")
        page.table(REPEATED_HEADER, [repeated_cells(one) for one in again])


Drawing = tuple[str, str]


def _not_drawn(title: str, why: str) -> Drawing:
    return nothing(title), f"{title}: not drawn, {why}."


def _more(count: int) -> str:
    return f" {count} more are in the table." if count > 0 else ""


def _speed(rows: Sequence[Row], ranks: int) -> Drawing:
    title = f"Throughput, {ranks} rank{'s' if ranks > 1 else ''}"
    good = [row for row in rows if row.found is not None]
    values = [
        Bar(tag(row.record.case), row.found.pairs_per_second) for row in good[:_MAX_BARS] if row.found is not None
    ]
    if not values:
        return _not_drawn(title, "no case has figures")
    chart = bars(title, values, Axis("pairs/s per device"))
    caption = "Pairs per second and device, by case; z: ZeRO stage, o: offload, r: ranks. Measured."
    return chart, caption + _more(len(good) - _MAX_BARS)


def _memory(rows: Sequence[Row], ranks: int) -> Drawing:
    """The planner's parts, since nothing measures parts; the measured whole stands in the table below."""
    title = f"Memory by part, {ranks} rank{'s' if ranks > 1 else ''}"
    all_known = [row for row in rows if row.record.predicted is not None]
    known = all_known[:_MAX_BARS]
    if not known:
        return _not_drawn(title, "no case has a prediction")
    sums: Counter[str] = Counter()
    for row in known:
        sums.update(row.record.predicted.memory if row.record.predicted else {})
    names = [name for name, size in sums.most_common() if size > 0]
    parts = [(_PARTS.get(name, name), [_part(row.record, name) for row in known]) for name in names[:_MAX_PARTS]]
    if names[_MAX_PARTS:]:
        others = [sum(_part(row.record, name) for name in names[_MAX_PARTS:]) for row in known]
        parts.append(("others", others))
    limit = _limit(known[0].record)
    highest = max(sum(values[place] for _, values in parts) for place in range(len(known)))
    # A limit far above all bars would squeeze them.
    shown = limit if limit is not None and limit < 4 * highest else None
    axis = Axis("GB per rank" + (", dashed: the device's memory" if shown else ""), high=shown)
    chart = stacked(title, [tag(row.record.case) for row in known], parts, axis)
    caption = "Peak memory by part. Predicted; measured wholes are in the table of predictions."
    return chart, caption + _more(len(all_known) - _MAX_BARS)


def _part(record: Record, name: str) -> float:
    return record.predicted.memory.get(name, 0) / 1e9 if record.predicted is not None else 0.0


def _limit(record: Record) -> float | None:
    device: dict[str, Any] = next(iter((record.hardware.get("devices") or {}).values()), {})
    size = device.get("memory_bytes")
    return float(size) / 1e9 if size else None


def _scaling(rows: Sequence[Row]) -> Drawing:
    """World throughput over ranks, for cases measured on several numbers of them."""
    groups: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.found is not None and row.record.case.repeat == 1:
            case = row.record.case.model_copy(update={"num_ranks": 1, "num_nodes": 1})
            ranks = row.record.case.num_ranks
            groups.setdefault(tag(case), {})[ranks] = row.found.pairs_per_second * ranks
    series = [
        Series(name, [float(rank) for rank in sorted(points)], [points[r] for r in sorted(points)])
        for name, points in groups.items()
        if len(points) > 1
    ]
    if not series:
        return _not_drawn("Scaling", "no case was measured on several numbers of ranks")
    series.sort(key=lambda one: -max(float(value or 0) for value in one.y))
    chart = lines("Scaling", series[:_MAX_LINES], Axis("ranks"), Axis("pairs/s, all ranks", low=0))
    caption = "Scaling over ranks, measured; the fastest cases. Efficiencies of all are in the table below."
    if machine(rows[0].record) == rows[0].record.environment.get("cpu"):
        caption += " Ranks share this machine's cores, so the same throughput is the most that can be had."
    return chart, caption


def _losses(rows: Sequence[Row]) -> Drawing:
    """Loss over wall time of a peer and of ours in the same setting, where there is one."""
    chosen = next((row for row in rows if row.to_peer is not None and row.record.case.packing == "prefix_shared"), None)
    if chosen is None:
        return _not_drawn("Loss over time", "no case has a peer in the same setting")
    same = setting(chosen.record.case)
    peer = next(
        (r.record for r in rows if r.record.case.system == chosen.peer and setting(r.record.case) == same), None
    )
    if peer is None:
        return _not_drawn("Loss over time", "the peer's record is not among these")
    series = [_loss_line(chosen.record, "rm_scale"), _loss_line(peer, peer.case.system.upper())]
    chart = lines("Loss over time", series, Axis("seconds of training"), Axis("loss"))
    return chart, f"The same steps on the same groups, {label(chosen.record.case)}: what differs is the time. Measured."


def _loss_line(record: Record, name: str) -> Series:
    seconds, x, y = 0.0, [], []
    for step in record.steps:
        seconds += step.seconds
        x.append(seconds)
        y.append(step.loss)
    return Series(name, x, y)


def _predicted(page: Page, rows: Sequence[Row]) -> None:
    cells = [found for row in rows if (found := predicted_cells(row)) is not None]
    if not cells:
        return
    page.heading("Predicted beside measured")
    page.paragraph("What rm-scale plan's arithmetic said of each case before its first step.", kind="predicted")
    page.table(PREDICTED_HEADER, cells, digits=3)
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
        (_against(points, "s per step", "Step time"), "Step time, predicted over measured; dashed: equal."),
        (_against(sizes, "GB", "Peak memory"), "Peak memory, predicted over measured; dashed: equal."),
    ]
    page.figures(charts)


def _against(points: Sequence[tuple[float, float]], unit: str, title: str) -> str:
    ends = [value for point in points for value in point] or [1.0]
    low, high = min(ends) * 0.9, max(ends) * 1.1
    series = [
        Series("cases", [x for x, _ in points], [y for _, y in points], marks=True),
        Series("equal", [low, high], [low, high], dashed=True),
    ]
    return lines(title, series, Axis(f"measured, {unit}", log=True), Axis(f"predicted, {unit}", log=True))


def _noted(rows: Sequence[Row]) -> list[list[object]]:
    """Cases without figures, and those with a word to say."""
    noted = [row.record for row in rows if row.found is None or row.record.reason]
    return [[f"{r.case.model}: {label(r.case)}", r.status.replace("_", " "), r.reason] for r in noted]


def _without_figures(page: Page, rows: Sequence[Row], found: RecordSet) -> None:
    noted = _noted(rows)
    if noted:
        page.section("Cases without figures, or with a note")
        page.table(["case", "", "why"], noted)
    if found.refused:
        page.section("Records that were refused")
        page.table(["file", "why"], [list(one) for one in found.refused])


def _facts(records: Sequence[Record]) -> list[list[object]]:
    """What the records say of machines and versions, and how many say so."""
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
        ["file", "status", "date", "load of the machine", "checksum"],
        [
            [f"{r.name}.json", r.status, r.protocol.get("date"), r.protocol.get("load_average_at_start"), r.checksum]
            for r in records
        ],
    )


def _commands(records: Sequence[Record]) -> str:
    """One command of each system."""
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
    """A row of the comparison."""
    ratio = f"{change.ratio.value:.3f} ({change.ratio.low:.3f}–{change.ratio.high:.3f})" if change.ratio else None
    verdict: object = change.verdict
    if change.verdict.startswith(("regression", "faster", "runs now")):
        verdict = Mark(change.verdict, not change.verdict.startswith("regression"))
    speeds = [row.found.pairs_per_second if row.found else None for row in map(_row, (change.before, change.after))]
    return [f"{change.case.model}: {label(change.case)}", *speeds, ratio, signed_ratio(change.memory), verdict]


def _row(record: Record) -> Row:
    return Row(record, measures(record))


def signed_ratio(value: float | None) -> str | None:
    """As a change."""
    return signed(value - 1) if value is not None else None


# --- Markdown --------------------------------------------------------------------------------------------------------


def markdown(found: RecordSet, baseline: RecordSet | None = None) -> str:
    """The tables alone."""
    rows = rows_of(found.records)
    parts = []
    if baseline is not None:
        both, gone, added = changes(baseline.records, found.records)
        parts.append("### Against the baseline\n\n" + table(CHANGE_HEADER, [change_cells(one) for one in both]))
        parts += [f"Only in the baseline: {case.model}: {label(case)}" for case in gone]
        parts += [f"Only here: {case.model}: {label(case)}" for case in added]
    parts.append(DEFINITIONS)
    for place, here in by_place(rows):
        parts.append(f"### {place.model} on {place.device}\n\nMeasured; {place.words}.")
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
    """Scaling, predictions and repetitions, as far as there are any."""
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
        return cell.words
    return cell if isinstance(cell, str) else number(cell, 3)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines_ = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        lines_.append("| " + " | ".join(_markdown_cell(cell).replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines_)

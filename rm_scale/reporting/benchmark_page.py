"""A set of benchmark records as one page and as Markdown; and two sets side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rm_scale.reporting.charts import Axis, Bar, Series, bars, lines, stacked
from rm_scale.reporting.page import Mark, Page, number
from rm_scale.reporting.record_tables import (
    DETAIL_HEADER,
    PREDICTED_HEADER,
    THROUGHPUT_HEADER,
    Change,
    Row,
    changes,
    detail_cells,
    label,
    machine,
    percent,
    predicted_cells,
    repetitions,
    rows_of,
    signed,
    tag,
    throughput_cells,
)
from rm_scale.reporting.records import Record, RecordSet, measures, peak_memory_bytes

_MAX_BARS = 40
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
    for place in dict.fromkeys(_place(row.record) for row in rows):
        _one_place(page, [row for row in rows if _place(row.record) == place], place)
    _without_figures(page, rows, found)
    _environment(page, found.records)
    _reproduce(page, found.records)
    return page


def _place(record: Record) -> tuple[str, str, str]:
    return record.case.model, record.case.data, machine(record)


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


def _one_place(page: Page, rows: Sequence[Row], place: tuple[str, str, str]) -> None:
    model, data, device = place
    case = rows[0].record.case
    page.section(f"{model} on {device}")
    parameters = f"{case.num_parameters / 1e6:,.0f} M backbone parameters, " if case.num_parameters else ""
    page.paragraph(
        f"{parameters}data {data}, {case.global_batch_size} groups per step, at most {case.max_length} tokens, "
        f"{case.compute_dtype}.",
        kind="measured",
    )
    page.table(THROUGHPUT_HEADER, [throughput_cells(row) for row in rows], digits=3)
    page.figures([chart for chart in (_speed(rows), _memory(rows), _scaling(rows), _losses(rows)) if chart is not None])
    page.details(
        "Utilisation, waiting, loading, memory of each case", DETAIL_HEADER, [detail_cells(row) for row in rows]
    )
    _predicted(page, rows)
    again = repetitions(rows)
    if again:
        page.heading("Repetitions")
        header = ["case", "ratios to the peer", "spread"]
        cells = [[label(one.case), ", ".join(f"{r:.2f}" for r in one.ratios), percent(one.spread)] for one in again]
        page.table(header, cells)


def _speed(rows: Sequence[Row]) -> tuple[str, str] | None:
    good = [row for row in rows if row.found is not None][:_MAX_BARS]
    values = [Bar(tag(row.record.case), row.found.pairs_per_second) for row in good if row.found is not None]
    if not values:
        return None
    return bars(
        "Throughput", values, Axis("pairs/s per device")
    ), "Pairs per second and device, by case; z: ZeRO stage, o: offload, r: ranks. Measured."


def _memory(rows: Sequence[Row]) -> tuple[str, str] | None:
    """The planner's parts, since nothing measures parts; the measured whole stands in the table below."""
    known = [row for row in rows if row.record.predicted is not None][:_MAX_BARS]
    if not known:
        return None
    names = list(dict.fromkeys(name for row in known if row.record.predicted for name in row.record.predicted.memory))
    parts = [
        (_PARTS.get(name, name), [_part(row.record, name) for row in known])
        for name in names
        if any(_part(row.record, name) for row in known)
    ]
    limit = _limit(known[0].record)
    highest = max(sum(values[place] for _, values in parts) for place in range(len(known)))
    # A limit far above all bars would squeeze them.
    shown = limit if limit is not None and limit < 4 * highest else None
    axis = Axis("GB per rank" + (", dashed: the device's memory" if shown else ""), high=shown)
    chart = stacked("Memory by part", [tag(row.record.case) for row in known], parts, axis)
    return chart, "Peak memory by part. Predicted; measured wholes are in the table of predictions."


def _part(record: Record, name: str) -> float:
    return record.predicted.memory.get(name, 0) / 1e9 if record.predicted is not None else 0.0


def _limit(record: Record) -> float | None:
    device: dict[str, Any] = next(iter((record.hardware.get("devices") or {}).values()), {})
    size = device.get("memory_bytes")
    return float(size) / 1e9 if size else None


def _scaling(rows: Sequence[Row]) -> tuple[str, str] | None:
    """World throughput over ranks, for cases measured on several numbers of them."""
    groups: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.found is not None:
            case = row.record.case.model_copy(update={"num_ranks": 1, "num_nodes": 1})
            ranks = row.record.case.num_ranks
            groups.setdefault(tag(case), {})[ranks] = row.found.pairs_per_second * ranks
    series = [
        Series(name, [float(rank) for rank in sorted(points)], [points[r] for r in sorted(points)])
        for name, points in groups.items()
        if len(points) > 1
    ]
    if not series:
        return None
    best = max(series, key=lambda one: max(float(value or 0) for value in one.y))
    ends = [float(value or 0) for value in best.y]
    efficiency = ends[-1] / ends[0] * best.x[0] / best.x[-1]
    chart = lines("Scaling", series[:6], Axis("ranks"), Axis("pairs/s, all ranks", low=0))
    caption = f"Scaling over ranks, measured. {best.name}: efficiency {efficiency:.0%} at {best.x[-1]:.0f} ranks."
    if machine(rows[0].record) == rows[0].record.environment.get("cpu"):
        caption += " Ranks share this machine's cores, so the same throughput is the most that can be had."
    return chart, caption


def _losses(rows: Sequence[Row]) -> tuple[str, str] | None:
    """Loss over wall time of a peer and of ours in the same setting, where there is one."""
    chosen = next((row for row in rows if row.to_peer is not None and row.record.case.packing == "prefix_shared"), None)
    if chosen is None:
        return None
    peer = next(
        row.record
        for row in rows
        if row.record.case.system == chosen.peer
        and row.record.case.model_copy(update={"system": "", "packing": "", "micro_batch": ""})
        == chosen.record.case.model_copy(update={"system": "", "packing": "", "micro_batch": ""})
    )
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


def _without_figures(page: Page, rows: Sequence[Row], found: RecordSet) -> None:
    empty = [row.record for row in rows if row.found is None]
    if empty:
        page.section("Cases without figures")
        cells = [[f"{r.case.model}: {label(r.case)}", r.status.replace("_", " "), r.reason] for r in empty]
        page.table(["case", "", "why"], cells)
    if found.refused:
        page.section("Records that were refused")
        page.table(["file", "why"], [list(one) for one in found.refused])


def _environment(page: Page, records: Sequence[Record]) -> None:
    page.section("Environment")
    facts: dict[tuple[str, str], int] = Counter()
    for record in records:
        env = record.environment
        packages = env.get("packages") or {}
        versions = ", ".join(
            f"{name} {packages[name]}"
            for name in ("torch", "transformers", "trl", "peft", "deepspeed")
            if packages.get(name)
        )
        facts["device", machine(record)] += 1
        facts["processor cores", str(env.get("num_cpus"))] += 1
        facts["versions", versions] += 1
        facts["rm_scale", f"{env.get('rm_scale')} at {str(env.get('commit'))[:12]}"] += 1
        facts[
            "large matrix products", f"{number((record.matmul_flops_per_device or 0) / 1e12, 3)} TFLOP/s per rank"
        ] += 1
        facts["energy", record.energy_source or "not read"] += 1
    page.table(["", "", "records"], [[what, value, count] for (what, value), count in facts.items()])
    page.details(
        "All records",
        ["file", "status", "date", "load of the machine", "checksum"],
        [
            [f"{r.name}.json", r.status, r.protocol.get("date"), r.protocol.get("load_average_at_start"), r.checksum]
            for r in records
        ],
    )


def _reproduce(page: Page, records: Sequence[Record]) -> None:
    page.section("How to reproduce")
    page.paragraph("Every record holds its exact command and all settings. The first of each kind of case:")
    commands = dict.fromkeys(
        str(record.protocol.get("command")) for record in records if record.protocol.get("command")
    )
    page.code("\n\n".join(list(commands)[:2]) or "no record holds a command")
    page.paragraph("The whole grid: python benchmarks/throughput.py; see benchmarks/README.md.")


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
    for place in dict.fromkeys(_place(row.record) for row in rows):
        here = [row for row in rows if _place(row.record) == place]
        parts.append(f"### {place[0]}, {place[1]}, on {place[2]}\n\nMeasured; rates per device.")
        parts.append(table(THROUGHPUT_HEADER, [throughput_cells(row) for row in here]))
        parts.append(
            "Utilisation, waiting, loading, memory:\n\n" + table(DETAIL_HEADER, [detail_cells(row) for row in here])
        )
        cells = [cell for row in here if (cell := predicted_cells(row)) is not None]
        if cells:
            parts.append("Predicted beside measured:\n\n" + table(PREDICTED_HEADER, cells))
    empty = [row.record for row in rows if row.found is None]
    if empty:
        parts.append(
            "Without figures:\n\n" + table(["case", "", "why"], [[label(r.case), r.status, r.reason] for r in empty])
        )
    if found.refused:
        parts.append("Refused records:\n\n" + table(["file", "why"], [list(one) for one in found.refused]))
    return "\n\n".join(parts) + "\n"


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

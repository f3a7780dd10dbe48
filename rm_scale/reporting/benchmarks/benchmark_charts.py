"""Charts of benchmark records: speed, memory by part, scaling over ranks, loss over time, predicted over measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rm_scale.reporting.bar_charts import Bar, bars, stacked
from rm_scale.reporting.benchmarks.record_tables import (
    Row,
    label,
    machine,
    setting,
    tag,
)
from rm_scale.reporting.benchmarks.sealed_records import Record
from rm_scale.reporting.chart_parts import Axis, nothing
from rm_scale.reporting.charts import Series, lines

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


Drawing = tuple[str, str]


def _not_drawn(title: str, why: str) -> Drawing:
    return nothing(title), f"{title}: not drawn, {why}."


def _more(count: int) -> str:
    return f" {count} more are in the table." if count > 0 else ""


def speed_chart(rows: Sequence[Row], ranks: int) -> Drawing:
    """Draw pairs per second of each case."""
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


def memory_chart(rows: Sequence[Row], ranks: int) -> Drawing:
    """Draw the planner's parts, since nothing measures parts; the measured whole stands in the table below."""
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


def scaling_chart(rows: Sequence[Row]) -> Drawing:
    """Draw the throughput of all ranks over ranks, for cases measured on several numbers of them."""
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


def loss_chart(rows: Sequence[Row]) -> Drawing:
    """Draw the loss over wall time of a peer and of ours in the same setting, where there is one."""
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


def against_chart(points: Sequence[tuple[float, float]], unit: str, title: str) -> str:
    """Draw predicted over measured figures, given as (measured, predicted)."""
    ends = [value for point in points for value in point] or [1.0]
    low, high = min(ends) * 0.9, max(ends) * 1.1
    series = [
        Series("cases", [x for x, _ in points], [y for _, y in points], marks=True),
        Series("equal", [low, high], [low, high], dashed=True),
    ]
    return lines(title, series, Axis(f"measured, {unit}", log=True), Axis(f"predicted, {unit}", log=True))

"""Ours beside a peer in one setting (method, ZeRO stage, ranks): what a reader of benchmark records asks first.

The page of `rm-scale report` begins each model with it, and the picture in the README is made of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rm_scale.reporting.bar_charts import Bar, grouped
from rm_scale.reporting.benchmarks.record_tables import Key, Row, gigabytes, parallelism, setting
from rm_scale.reporting.benchmarks.sealed_records import peak_memory_bytes
from rm_scale.reporting.chart_parts import Axis

OURS = "rm_scale"
LAYOUTS = {
    "padding": "padded",
    "none": "padded",
    "padding_free": "without padding",
    "prefix_shared": "prompts once",
}
"""How rows are laid out, by the name of the setting."""
_PEER_COLOUR, _OUR_COLOURS = 5, (0, 2, 3)


@dataclass(frozen=True)
class Setting:
    """What was measured with one method, ZeRO stage and number of ranks.

    Attributes:
        name: the setting in words.
        peer: the peer's case; `None` where none was run.
        ours: our fastest case of each layout, the fastest layout first, cases without figures last.
    """

    name: str
    peer: Row | None
    ours: tuple[Row, ...]

    @property
    def best(self) -> Row | None:
        """Our fastest case; `None` where none was run."""
        return self.ours[0] if self.ours else None


def settings_of(rows: Iterable[Row]) -> list[Setting]:
    """Return the settings of the rows of one table in their order; repetitions are left out."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        if row.record.case.repeat == 1 and row.record.status != "skipped":
            groups.setdefault(setting(row.record.case), []).append(row)
    return [_setting(group) for group in groups.values()]


def _setting(rows: Sequence[Row]) -> Setting:
    case = rows[0].record.case
    peers = sorted((row for row in rows if row.record.case.system != OURS), key=_slowness)
    layouts: dict[str, Row] = {}
    for row in sorted((row for row in rows if row.record.case.system == OURS), key=_slowness):
        layouts.setdefault(row.record.case.packing, row)
    further = f", {case.further}" if case.further else ""
    name = f"{case.method}, {parallelism(case)}{further}"
    return Setting(name, peers[0] if peers else None, tuple(layouts.values()))


def _slowness(row: Row) -> float:
    return -row.found.pairs_per_second if row.found is not None else 1.0


def peer_name(settings: Iterable[Setting]) -> str | None:
    """Return the name of the peer that ours is compared with; `None` where there is none."""
    return next((one.peer.record.case.system.upper() for one in settings if one.peer is not None), None)


def answer(settings: Sequence[Setting]) -> str:
    """Say in a sentence how many times as fast as the peer our fastest layout is."""
    peer = peer_name(settings)
    ratios = [one.best.to_peer.value for one in settings if one.best is not None and one.best.to_peer is not None]
    if not ratios or peer is None:
        return "No peer was measured in the same settings."
    count = f"{len(ratios)} settings" if len(ratios) > 1 else "one setting"
    low, high = f"{min(ratios):.1f}", f"{max(ratios):.1f}"
    span = low if low == high else f"{low} to {high}"
    return f"{span} times {peer}'s pairs per second with our fastest layout, in {count}."


def comparison_header(peer: str | None) -> tuple[str, ...]:
    """Return the header of the small table."""
    if peer is None:
        return ("setting", "pairs/s", "GB", "layout")
    return ("setting", f"{peer} pairs/s", "ours", "times", f"{peer} GB", "ours", "layout")


def comparison_cells(one: Setting, peer: str | None) -> list[object]:
    """Return a row of the small table: our fastest layout beside the peer."""
    best = one.best
    layout = LAYOUTS.get(best.record.case.packing, best.record.case.packing) if best is not None else None
    if peer is None:
        return [one.name, _speed(best), _memory(best), layout]
    ratio = f"{best.to_peer.value:.2f}" if best is not None and best.to_peer is not None else None
    return [one.name, _speed(one.peer), _speed(best), ratio, _memory(one.peer), _memory(best), layout]


def _speed(row: Row | None) -> float | str | None:
    if row is None:
        return None
    return row.found.pairs_per_second if row.found is not None else row.record.status.replace("_", " ")


def _memory(row: Row | None) -> float | None:
    return gigabytes(peak_memory_bytes(row.record)) if row is not None and row.found is not None else None


def comparison_chart(title: str, settings: Sequence[Setting]) -> str:
    """Draw pairs per second of the peer and of our fastest layout, setting by setting."""
    parts, colours = [("rm_scale", [_bar("rm_scale", one.best) for one in settings])], [_OUR_COLOURS[0]]
    peer = peer_name(settings)
    if peer is not None:
        parts.insert(0, (peer, [_bar(peer, one.peer) for one in settings]))
        colours.insert(0, _PEER_COLOUR)
    return grouped(title, [one.name for one in settings], parts, Axis("pairs/s per rank"), colours)


def layouts_chart(title: str, settings: Sequence[Setting], layouts: Sequence[str]) -> str:
    """Draw pairs per second of the peer and of each of our layouts, setting by setting.

    Args:
        title: for those who don't see it.
        settings: from top to bottom.
        layouts: `packing` of the cases to draw.
    """
    peer = peer_name(settings) or "peer"
    parts = [(peer, [_bar(peer, one.peer) for one in settings])]
    for layout in layouts:
        name = f"rm_scale, {LAYOUTS[layout]}"
        found = [next((row for row in one.ours if row.record.case.packing == layout), None) for one in settings]
        parts.append((name, [_bar(name, row) for row in found]))
    axis = Axis(f"pairs/s per rank; in brackets: times {peer}, step by step")
    return grouped(title, [one.name for one in settings], parts, axis, [_PEER_COLOUR, *_OUR_COLOURS])


def _bar(name: str, row: Row | None) -> Bar:
    if row is None:
        return Bar(name, None, note="not run")
    if row.found is None:
        return Bar(name, None, note=row.record.status.replace("_", " "))
    layout = row.record.case.packing
    told = name if row.record.case.system != OURS else f"rm_scale, {LAYOUTS.get(layout, layout)}"
    ratio = f"({row.to_peer.value:.1f} ×)" if row.to_peer is not None else ""
    return Bar(told, row.found.pairs_per_second, note=ratio)

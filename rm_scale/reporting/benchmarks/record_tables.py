"""Benchmark records as tables: what the page and the Markdown both show. Every row names the record it is from."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from rm_scale.reporting.benchmarks.sealed_records import Case, Measures, Record, measures, peak_memory_bytes

NUM_RESAMPLES = 2000
REGRESSION = 0.05
"""A case that is slower by more than this, with its whole interval below 1, is a regression."""
MIN_STEPS = 3
"""With fewer common steps an interval means nothing."""

Key = tuple[object, ...]


@dataclass(frozen=True)
class Ratio:
    """How many times as fast, step by step on the same data: the median, and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    num_steps: int


@dataclass(frozen=True)
class Row:
    """A record with what is derived from it, and its peer's in the same setting."""

    record: Record
    found: Measures | None
    to_peer: Ratio | None = None
    peer: str = ""


def setting(case: Case) -> Key:
    """Return what a case and its peer have in common."""
    left_out = {"system", "packing", "micro_batch", "num_parameters"}
    return tuple(sorted((name, value) for name, value in case.model_dump().items() if name not in left_out))


def identity(case: Case) -> Key:
    """Return what two measurements of one case have in common."""
    return tuple(
        sorted((name, value) for name, value in case.model_dump().items() if name not in {"repeat", "num_parameters"})
    )


class Place(NamedTuple):
    """What the rows of one table have in common."""

    model: str
    data: str
    device: str
    global_batch_size: int
    max_length: int
    gradient_checkpointing: bool
    compute_dtype: str

    @property
    def settings_text(self) -> str:
        """The settings, as a sentence's end."""
        recomputed = ", activations recomputed" if self.gradient_checkpointing else ""
        return (
            f"data {self.data}, {self.global_batch_size} groups per step, at most {self.max_length} tokens, "
            f"{self.compute_dtype}{recomputed}"
        )


def place_of(record: Record) -> Place:
    """Return the table that a record belongs to."""
    case = record.case
    settings = (case.global_batch_size, case.max_length, case.gradient_checkpointing, case.compute_dtype)
    return Place(case.model, case.data, machine(record), *settings)


def by_place(rows: Sequence[Row]) -> list[tuple[Place, list[Row]]]:
    """Put rows into their tables, in the order of the first of each."""
    places: dict[Place, list[Row]] = {}
    for row in rows:
        places.setdefault(place_of(row.record), []).append(row)
    return list(places.items())


def machine(record: Record) -> str:
    """Return the device by its name."""
    gpus = record.environment.get("gpus")
    name = gpus[0] if gpus else record.environment.get("cpu")
    return str(name or "machine unknown")


def rows_of(records: Iterable[Record]) -> list[Row]:
    """Return all records with their figures, ordered as one reads them. A peer counts on the same machine only."""
    records = sorted(records, key=lambda record: _order(record.case))
    others = [record for record in records if record.case.system != "rm_scale" and record.status == "ok"]
    peers = {(machine(record), setting(record.case)): record for record in others}
    rows = []
    for record in records:
        peer = peers.get((machine(record), setting(record.case))) if record.case.system == "rm_scale" else None
        ratio = ratio_of(peer, record) if peer is not None else None
        rows.append(Row(record, measures(record), ratio, peer.case.system if peer is not None and ratio else ""))
    return rows


def _order(case: Case) -> Key:
    sizes = {"tiny": 0.0, "135m": 1.0}
    size = sizes.get(case.model, float(case.num_parameters or 0))
    method = ("full", "lora", "qlora").index(case.method)
    layouts = ("padding", "none", "padding_free", "prefix_shared")
    layout = layouts.index(case.packing) if case.packing in layouts else len(layouts)
    where = (case.num_nodes, case.num_ranks, case.zero_stage, case.offload)
    return (size, case.model, case.data, *where, method, case.system == "rm_scale", layout, case.repeat)


def ratio_of(slow: Record, fast: Record, seed: int = 0) -> Ratio | None:
    """Return how many times as fast the second is, by pairs per second of each counted step.

    Steps are compared one by one where both have them on the same pairs, since steps differ in length.
    """
    first = {step.step: step for step in slow.counted}
    pairs = [(first[step.step], step) for step in fast.counted if step.step in first]
    if not pairs or any((a.pairs, a.effective_tokens) != (b.pairs, b.effective_tokens) for a, b in pairs):
        return None
    ratios = [a.seconds / b.seconds for a, b in pairs]
    low, high = bootstrap_median(ratios, seed)
    return Ratio(median(ratios), low, high, len(ratios))


def bootstrap_median(values: Sequence[float], seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> tuple[float, float]:
    """Return the 95 % percentile interval of the median."""
    rng = random.Random(seed)
    medians = sorted(median(rng.choices(values, k=len(values))) for _ in range(num_resamples))
    return medians[int(0.025 * num_resamples)], medians[int(0.975 * num_resamples) - 1]


# --- Two sets --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A case that both sets have.

    Attributes:
        case: it.
        before, after: pairs per second and device; `None` where there is no figure.
        ratio: after over before; above 1 is faster.
        memory: peak after over before.
        verdict: regression, faster, same, or why it can't be said.
    """

    case: Case
    before: Record
    after: Record
    ratio: Ratio | None
    memory: float | None
    verdict: str


def changes(before: Iterable[Record], after: Iterable[Record]) -> tuple[list[Change], list[Case], list[Case]]:
    """Return the cases of both sets, those only of the first, and those only of the second.

    A case meets its own measurement on the same machine; one that the first set has on another machine only meets that.
    """
    old = {(machine(record), _case_key(record)): record for record in before}
    anywhere = {_case_key(record): record for record in old.values()}
    both, added, met = [], [], set()
    for record in after:
        earlier = old.get((machine(record), _case_key(record))) or anywhere.get(_case_key(record))
        if earlier is None:
            added.append(record.case)
        else:
            both.append(_change(earlier, record))
            met.add(_case_key(record))
    gone = [record.case for record in old.values() if _case_key(record) not in met]
    return sorted(both, key=lambda change: _order(change.case)), gone, added


def _case_key(record: Record) -> Key:
    return (*identity(record.case), record.case.repeat)


def _change(before: Record, after: Record) -> Change:
    ratio = ratio_of(before, after) if before.status == after.status == "ok" else None
    peaks = peak_memory_bytes(before), peak_memory_bytes(after)
    memory = peaks[1] / peaks[0] if peaks[0] and peaks[1] else None
    return Change(after.case, before, after, ratio, memory, _verdict(before, after, ratio))


def _verdict(before: Record, after: Record, ratio: Ratio | None) -> str:
    if machine(before) != machine(after):
        return "other hardware: not judged"
    if "skipped" in (before.status, after.status):
        return "skipped: not judged"
    if before.status == "ok" and after.status != "ok":
        return f"regression: {after.status}"
    if after.status == "ok" and before.status != "ok":
        return f"runs now (was {before.status})"
    if ratio is None:
        return "no figures on both sides"
    if ratio.num_steps < MIN_STEPS:
        return f"too few steps: {ratio.num_steps}"
    if ratio.high < 1 and ratio.value < 1 - REGRESSION:
        return "regression"
    if ratio.low > 1 and ratio.value > 1 + REGRESSION:
        return "faster"
    return "same"


# --- Repetitions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Repeated:
    """The ratio to a peer in repetitions of a case.

    Attributes:
        case: it.
        peer: the other.
        ratios: one per repetition.
    """

    case: Case
    peer: str
    ratios: tuple[float, ...]

    @property
    def spread(self) -> float:
        """The largest over the smallest, less 1."""
        return max(self.ratios) / min(self.ratios) - 1


def repetitions(rows: Iterable[Row]) -> list[Repeated]:
    """Return the cases whose ratio to a peer was measured more than once."""
    found: dict[Key, dict[int, Row]] = {}
    for row in rows:
        if row.to_peer is not None:
            group = found.setdefault((machine(row.record), *identity(row.record.case)), {})
            group[row.record.case.repeat] = row
    return [
        Repeated(first.record.case, first.peer, tuple(row.to_peer.value for row in group.values() if row.to_peer))
        for group in found.values()
        if len(group) > 1
        for first in [next(iter(group.values()))]
    ]


REPEATED_HEADER = ("repeated case", "ratios to the peer", "spread")


def repeated_cells(one: Repeated) -> list[object]:
    """Return a repeated case's ratios."""
    return [label(one.case), ", ".join(f"{ratio:.2f}" for ratio in one.ratios), percent(one.spread)]


# --- Scaling ---------------------------------------------------------------------------------------------------------

SCALING_HEADER = ("case", "ranks", "pairs/s, all ranks", "fewest ranks", "pairs/s, all of them", "efficiency")


def scaling_cells(rows: Iterable[Row]) -> list[list[object]]:
    """Compare throughput with what as many times the fewest ranks would give."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        case = row.record.case.model_copy(update={"num_ranks": 1, "num_nodes": 1})
        if row.found is not None and row.record.case.repeat == 1:
            groups.setdefault((machine(row.record), *identity(case)), []).append(row)
    cells: list[list[object]] = []
    for group in groups.values():
        first, *more = sorted(group, key=lambda row: row.record.case.num_ranks)
        for row in more:
            ranks, fewest = row.record.case.num_ranks, first.record.case.num_ranks
            ends = [one.found.pairs_per_second for one in (row, first) if one.found is not None]
            name = label(row.record.case.model_copy(update={"num_ranks": 1})).removesuffix(", 1 rank")
            cells.append([name, ranks, ends[0] * ranks, fewest, ends[1] * fewest, percent(ends[0] / ends[1])])
    return cells


# --- Tables ----------------------------------------------------------------------------------------------------------

THROUGHPUT_HEADER = (
    "case",
    "pairs/s",
    "to peer",
    "effective tok/s",
    "real",
    "processed",
    "step, s",
    "p95",
    "GB",
    "record",
)


def throughput_cells(row: Row) -> list[object]:
    """Return a row of the main table; rates are per device."""
    found, record = row.found, row.record
    if found is None:
        return [label(record.case), record.status.replace("_", " "), *[None] * 7, short(record)]
    ratio = f"{row.to_peer.value:.2f} ({row.to_peer.low:.2f}–{row.to_peer.high:.2f})" if row.to_peer else None
    return [
        label(record.case),
        found.pairs_per_second,
        ratio,
        found.effective_tokens_per_second,
        found.real_tokens_per_second,
        found.processed_tokens_per_second,
        found.step_seconds_p50,
        found.step_seconds_p95,
        gigabytes(peak_memory_bytes(record)),
        short(record),
    ]


DETAIL_HEADER = (
    "case",
    "MFU",
    "HFU",
    "useful / matmul rate",
    "executed / matmul rate",
    "data wait",
    "communication",
    "J/pair",
    "load, s",
    "load peak, GB",
    "reserved, GB",
    "host, GB",
)


def detail_cells(row: Row) -> list[object]:
    """Return what a step was made of; a dash where something is undefined here or was not measured."""
    found, record = row.found, row.record
    if found is None:
        return [label(record.case), *[None] * 8, gigabytes(record.load_peak_memory_bytes), None, None]
    return [
        label(record.case),
        percent(found.mfu),
        percent(found.hfu),
        percent(found.useful_share),
        percent(found.executed_share),
        percent(found.data_wait_share),
        percent(found.communication_share),
        found.joules_per_pair,
        record.load_seconds,
        gigabytes(record.load_peak_memory_bytes),
        gigabytes(record.memory.reserved_bytes),
        gigabytes(record.memory.host_bytes),
    ]


PREDICTED_HEADER = ("case", "memory predicted, GB", "measured", "off", "step predicted, s", "measured", "off")


def predicted_cells(row: Row) -> list[object] | None:
    """Return the planner's figures beside the measured ones; `None` where it said nothing."""
    predicted, found, record = row.record.predicted, row.found, row.record
    if predicted is None:
        return None
    measured = peak_memory_bytes(record) if found is not None else None
    memory_off = predicted.peak_memory_bytes / measured - 1 if measured else None
    band = predicted.step_seconds
    cells: list[object] = [label(record.case), gigabytes(predicted.peak_memory_bytes), gigabytes(measured)]
    cells += [signed(memory_off), f"{band['low']:.3g} – {band['high']:.3g}" if band else None]
    if found is None or band is None:
        return [*cells, found.step_seconds_p50 if found else None, None]
    nearest = min(max(found.step_seconds_p50, band["low"]), band["high"])
    return [*cells, found.step_seconds_p50, signed(nearest / found.step_seconds_p50 - 1)]


def label(case: Case) -> str:
    """Return a case in words, without its model."""
    system = "" if case.system == "rm_scale" else f"{case.system.upper()} "
    further = f", {case.further}" if case.further else ""
    repeat = f", repeat {case.repeat}" if case.repeat > 1 else ""
    return f"{system}{case.method}, {case.packing}, {parallelism(case)}{further}{repeat}"


def parallelism(case: Case) -> str:
    """Return ZeRO stage, ranks and nodes in words."""
    zero = "no ZeRO" if case.zero_stage == 0 else f"ZeRO-{case.zero_stage}{' offload' if case.offload else ''}"
    ranks = f"{case.num_ranks} rank{'s' if case.num_ranks > 1 else ''}"
    nodes = f" on {case.num_nodes} nodes" if case.num_nodes > 1 else ""
    return f"{zero}, {ranks}{nodes}"


def tag(case: Case) -> str:
    """Return the same, short enough for a chart's axis."""
    system = "" if case.system == "rm_scale" else f"{case.system.upper()} "
    layout = {"padding_free": "free", "prefix_shared": "shared", "padding": "padded", "none": "padded"}
    zero = f" z{case.zero_stage}{'o' if case.offload else ''}" if case.zero_stage else ""
    ranks = f" {case.num_ranks}r" if case.num_ranks > 1 else ""
    return f"{system}{case.method} {layout.get(case.packing, case.packing)}{zero}{ranks}"


def short(record: Record) -> str:
    """Return enough of the checksum to find the record."""
    return record.checksum.removeprefix("sha256:")[:8]


def model_size_text(num_parameters: int) -> str:
    """Return a model's size as one says it."""
    unit, name = (1e6, "M") if num_parameters >= 1e6 else (1e3, "k")
    return f"{num_parameters / unit:,.0f} {name} backbone parameters"


def gigabytes(size: int | None) -> float | None:
    """Return a size in units of 10^9 bytes."""
    return None if size is None else round(size / 1e9, 2)


def percent(share: float | None) -> str | None:
    """Return a share in percent, with one digit."""
    return None if share is None else f"{share:.1%}"


def signed(share: float | None) -> str | None:
    """Return a relative error in percent, with its sign."""
    return None if share is None else f"{share:+.1%}"

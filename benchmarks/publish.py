"""Put the committed throughput records into docs/results.md, as tables and pictures.

    python benchmarks/publish.py

Rewrites what stands between the two markers there, and docs/pictures/throughput_*.svg, the README's among them. Nothing
is typed by hand.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks import pictures  # noqa: E402
from benchmarks.pictures import Point, save, scatter, start_pyplot  # noqa: E402
from rm_scale.reporting.benchmarks.benchmark_page import derived_tables, table  # noqa: E402
from rm_scale.reporting.benchmarks.record_tables import (  # noqa: E402
    DETAIL_HEADER,
    THROUGHPUT_HEADER,
    Place,
    Row,
    by_place,
    detail_cells,
    label,
    model_size_text,
    rows_of,
    throughput_cells,
)
from rm_scale.reporting.benchmarks.sealed_records import Record, peak_memory_bytes, read_records  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results"
PAGE = REPOSITORY / "docs" / "results.md"
PICTURES = REPOSITORY / "docs" / "pictures"
BEGIN, END = "<!-- throughput: written by benchmarks/publish.py -->", "<!-- end of throughput -->"
SHOWN_ROWS = 24
"""A longer table is folded away."""
LAYOUTS = {"padding": "TRL, padded", "none": "padded", "padding_free": "padding-free", "prefix_shared": "prompts once"}


def section(rows: Sequence[Row]) -> str:
    """Return all tiers of all machines."""
    places = sorted(by_place(rows), key=lambda one: one[0].device)
    return "\n\n".join(tier(place, here) for place, here in places)


def slug(name: str) -> str:
    """Return a name as it is good in a file's name."""
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"\(R\)|Processor", "", name).lower()).strip("_")


def tier(place: Place, rows: Sequence[Row]) -> str:
    """Return the tables of one size, the long ones folded away."""
    case = rows[0].record.case
    size = f", {model_size_text(case.num_parameters)}" if case.num_parameters else ""
    steps = sorted({len(row.record.counted) for row in rows if row.found is not None})
    told = f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else str(steps[0]) if steps else "no"
    parts = [f"### {place.model}{size}, on {place.device}", f"Measured: {place.settings_text}; timed steps: {told}."]
    picture = draw_speed(place, rows)
    if picture is not None:
        parts.append(f"![Pairs per second of each method, stage and layout]({picture})")
    main = table(THROUGHPUT_HEADER, [throughput_cells(row) for row in rows])
    parts.append(main if len(rows) <= SHOWN_ROWS else folded(f"All {len(rows)} cases", main))
    noted = [row.record for row in rows if row.found is None or row.record.reason]
    if noted:
        parts.append(table(["case", "", "note"], [[label(r.case), r.status, r.reason] for r in noted]))
    parts.append(folded("Utilisation, waiting, loading", table(DETAIL_HEADER, [detail_cells(row) for row in rows])))
    parts += [folded(*derived.split(":\n\n", 1)) for derived in derived_tables(rows)]
    return "\n\n".join(parts)


def folded(title: str, content: str) -> str:
    """Return content that is shown when asked for."""
    return f"<details><summary>{title}</summary>\n\n{content}\n\n</details>"


def draw_speed(place: Place, rows: Sequence[Row]) -> str | None:
    """Draw bars by method, stage and ranks, a colour per layout."""
    values: dict[str, dict[str, float]] = {}
    for row in rows:
        case = row.record.case
        if row.found is not None and case.repeat == 1:
            stage = f"Z{case.zero_stage}" if case.zero_stage else "DDP" if case.num_ranks > 1 else "-"
            group = f"{case.method}\n{stage}, {case.num_ranks}"
            values.setdefault(group, {})[case.packing] = row.found.pairs_per_second
    if len(values) < 2:
        return None
    pyplot = start_pyplot(place.model)
    figure, axes = pyplot.subplots(figsize=(max(6.0, 0.62 * len(values)), 3.4))
    width = 0.8 / len(LAYOUTS)
    for number, (layout, name) in enumerate(LAYOUTS.items()):
        x = [place + (number - 1.5) * width for place in range(len(values))]
        axes.bar(x, [found.get(layout, 0.0) for found in values.values()], width, label=name)
    axes.set_xticks(range(len(values)), list(values), fontsize=7)
    axes.set(ylabel="pairs/s per rank")
    axes.set_title(f"{place.model} on {place.device}: method, ZeRO stage, ranks (measured)", fontsize=9)
    axes.legend(fontsize=7)
    file = PICTURES / f"throughput_{slug(place.device)}_{place.model}.svg"
    save(pyplot, figure, file)
    return f"pictures/{file.name}"


def draw_predictions(records: Sequence[Record]) -> str:
    """Draw the peak memory of all cases, predicted over measured; return what links to the picture."""
    points = [
        Point(size / 1e9, record.predicted.peak_memory_bytes / 1e9, record.case.model)
        for record in records
        if record.status == "ok" and record.predicted is not None and (size := peak_memory_bytes(record))
    ]
    title = f"Peak memory of {len(points)} cases, grey: 20 % off"
    scatter(points, "GB per rank", 0.2, title, PICTURES / "throughput_memory.svg")
    return "![Peak memory of all cases, predicted over measured](pictures/throughput_memory.svg)"


def written(text: str, records: Sequence[Record]) -> str:
    """Return the page with what the records say between its markers; draw the pictures.

    Raises:
        SystemExit: the markers are not there.
    """
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", flags=re.S)
    if not pattern.search(text):
        raise SystemExit(f"{PAGE.name}: the markers are not there. Fix: put {BEGIN} and {END} where the tables belong.")
    body = f"{BEGIN}\n\n{draw_predictions(records)}\n\n{section(rows_of(records))}\n\n{END}"
    return pattern.sub(lambda _: body, text)


def main() -> None:
    """Write section and pictures."""
    found = read_records(sorted(path for path in RESULTS.iterdir() if path.is_dir()))
    for file, reason in found.refused:
        raise SystemExit(f"{file}: {reason}")
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), found.records), encoding="utf-8")
    pictures.main()
    print(f"{len(found.records)} records: {PAGE.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()

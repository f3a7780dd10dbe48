"""How far the planner is off on measurements that others have published.

    python benchmarks/published.py [--cases FILE.csv] [--rows] [--output DIR] [--pictures DIR]

Prints mean and worst relative errors by source, device and method; writes all of them to DIR/errors.csv and two plots
of predicted against measured. No measured figure of a row is read by its prediction. Then it sets the devices'
efficiencies anew on half of the rows, and on all sources but one, and says how far off the rest is. See
docs/planning_validation.md.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.pictures import Point, scatter  # noqa: E402
from rm_scale.planning.published.predict import predict_row, read_cases  # noqa: E402
from rm_scale.planning.published.scenario_of_row import Row, scenario_of_row  # noqa: E402
from rm_scale.planning.step_time import step_time  # noqa: E402

CASES = REPOSITORY / "benchmarks" / "data" / "published_measurements.csv"
SPEED, MEMORY = "tokens/s", "memory"
EFFICIENCIES = [share / 100 for share in range(40, 122, 2)]


@dataclass(frozen=True)
class Compared:
    """A figure that is both measured and predicted.

    Attributes:
        row: the row it belongs to.
        what: SPEED or MEMORY.
        predicted, measured: in the row's unit.
    """

    row: Row
    what: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative to the measured figure."""
        return self.predicted / self.measured - 1


def number(text: str) -> float | None:
    """Return the cell's figure, if it is one."""
    try:
        return float(text)
    except ValueError:
        return None


def compare(rows: Iterable[Row]) -> tuple[list[Compared], list[tuple[str, str, str]]]:
    """Return everything that is measured and was predicted too, and (id, what, reason) of what wasn't."""
    found, left_out = [], []
    for row in rows:
        answer = predict_row(row)
        for what, predicted, cell in (
            (MEMORY, answer.peak_memory, row["peak_mem_gb"]),
            (SPEED, answer.tokens_per_second, row["tok_s_gpu"]),
        ):
            measured = number(cell)
            if measured is not None and predicted is not None:
                found.append(Compared(row, what, predicted, measured))
            elif measured is not None:
                left_out.append((row["id"], what, answer.note))
    return found, left_out


def method_of(row: Row) -> str:
    """Return full, lora, qlora, or qlora with GPTQ's weights."""
    name = row["method"].split()[0]
    return f"{name} GPTQ" if "GPTQ" in row["precision"] else name


def table(found: Sequence[Compared], key: Callable[[Compared], str], title: str) -> str:
    """Return the errors by some property of a row."""
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for item in found:
        groups[item.what, key(item)].append(item.error)
        groups[item.what, "all"].append(item.error)
    lines = [f"{'what':<10}{title:<34}{'rows':>5}{'mean abs':>10}{'bias':>8}{'worst':>8}"]
    for (what, name), errors in sorted(
        groups.items(), key=lambda entry: (entry[0][0], entry[0][1] != "all", entry[0][1])
    ):
        size, worst = mean(map(abs, errors)), max(errors, key=abs)
        lines.append(f"{what:<10}{name:<34}{len(errors):>5}{size:>10.1%}{mean(errors):>+8.1%}{worst:>+8.1%}")
    return "\n".join(lines)


# --- How well it generalises ------------------------------------------------------------------------------------------


class Speeds:
    """Speed of rows as a function of their device's efficiency, the one figure per kind of device."""

    def __init__(self, found: Sequence[Compared]) -> None:
        self.items = [item for item in found if item.what == SPEED]
        self.errors: dict[tuple[str, float], float] = {}
        self.devices: dict[str, str] = {}
        for item in self.items:
            scenario = scenario_of_row(item.row)
            self.devices[item.row["id"]] = scenario.device.name
            now = step_time(scenario).expected
            for efficiency in EFFICIENCIES:
                other = replace(scenario, device=replace(scenario.device, step_efficiency=efficiency))
                self.errors[item.row["id"], efficiency] = (
                    item.predicted * now / step_time(other).expected / item.measured - 1
                )

    def best(self, ids: Iterable[str]) -> dict[str, float]:
        """Return the efficiency of each kind with the smallest mean error on these rows."""
        groups = defaultdict(list)
        for row_id in ids:
            groups[self.devices[row_id]].append(row_id)
        return {
            device: min(EFFICIENCIES, key=lambda value: sum(abs(self.errors[row_id, value]) for row_id in members))
            for device, members in groups.items()
        }

    def mean_error(self, ids: Iterable[str], chosen: dict[str, float]) -> float | None:
        """Return the mean error on rows whose device has an efficiency."""
        errors = [
            abs(self.errors[row_id, chosen[self.devices[row_id]]]) for row_id in ids if self.devices[row_id] in chosen
        ]
        return mean(errors) if errors else None


def halves(speeds: Speeds, times: int = 50) -> tuple[float, float]:
    """Return the mean error on the half that efficiencies were set on, and on the other; over random halves."""
    ids, inside, outside = [item.row["id"] for item in speeds.items], [], []
    draw = random.Random(0)
    for _ in range(times):
        shuffled = draw.sample(ids, len(ids))
        chosen = speeds.best(shuffled[: len(ids) // 2])
        inside.append(speeds.mean_error(shuffled[: len(ids) // 2], chosen) or 0.0)
        outside.append(speeds.mean_error(shuffled[len(ids) // 2 :], chosen) or 0.0)
    return mean(inside), mean(outside)


def without_each_source(speeds: Speeds) -> list[tuple[str, int, float]]:
    """Return each source's mean error with the efficiencies that all others give, where they have the device."""
    sources = sorted({item.row["source"] for item in speeds.items})
    result = []
    for source in sources:
        members = [item.row["id"] for item in speeds.items if item.row["source"] == source]
        chosen = speeds.best(item.row["id"] for item in speeds.items if item.row["source"] != source)
        error = speeds.mean_error(members, chosen)
        if error is not None:
            result.append((source, len(members), error))
    return result


# --- Files ------------------------------------------------------------------------------------------------------------


def write_errors(found: Sequence[Compared], file: Path) -> None:
    """Write one line per compared figure."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(["id", "source", "gpu", "method", "what", "predicted", "measured", "relative_error"])
        for item in found:
            row = item.row
            figures = [f"{item.predicted:.2f}", f"{item.measured:g}", f"{item.error:.4f}"]
            writer.writerow([row["id"], row["source"], row["gpu"], method_of(row), item.what, *figures])


def draw(found: Sequence[Compared], what: str, unit: str, file: Path) -> None:
    """Draw predicted against measured, a colour per source."""
    points = [Point(item.measured, item.predicted, item.row["source"]) for item in found if item.what == what]
    scatter(points, unit, 0.2, f"{what}: {len(points)} published rows, grey: 20 % off", file)


def main() -> None:
    """Print the tables, write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=str(CASES))
    parser.add_argument("--rows", action="store_true", help="every row too")
    parser.add_argument("--output", default=str(REPOSITORY / "benchmarks" / "results" / "published"))
    parser.add_argument("--pictures", default=str(REPOSITORY / "docs" / "pictures"))
    options = parser.parse_args()
    found, left_out = compare(read_cases(options.cases))
    if options.rows:
        for item in found:
            print(f"{item.row['id']} {item.what:<9}{item.predicted:>10.1f}{item.measured:>10.1f} {item.error:+7.1%}")
    print(table(found, lambda item: item.row["source"], "source"), end="\n\n")
    print(table(found, lambda item: item.row["gpu"], "device"), end="\n\n")
    print(table(found, lambda item: method_of(item.row), "method"), end="\n\n")
    print("left out:", *(f"  {row_id} {what:<9} ({reason})" for row_id, what, reason in left_out), sep="\n")
    speeds = Speeds(found)
    inside, outside = halves(speeds)
    print(f"\nefficiencies set on random halves: {inside:.1%} there, {outside:.1%} on the other halves")
    for source, count, error in without_each_source(speeds):
        print(f"  set without {source}: {error:.1%} on its {count} rows")
    write_errors(found, Path(options.output) / "errors.csv")
    draw(found, MEMORY, "GB or GiB, as the row has it", Path(options.pictures) / "published_memory.svg")
    draw(found, SPEED, "tokens/s per device", Path(options.pictures) / "published_speed.svg")


if __name__ == "__main__":
    main()

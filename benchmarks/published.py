"""How far the planner is off on measurements that others have published.

    python benchmarks/published.py [--cases FILE.csv] [--rows]

Prints mean and worst relative errors by source and device, and with --rows every row. No figure of a row is read by the
prediction. See docs/planning.md.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from rm_scale.planning.published import Row, predict_row, read_cases  # noqa: E402

CASES = REPOSITORY / "benchmarks" / "data" / "published_measurements.csv"


def errors(rows: list[Row]) -> list[tuple[Row, str, float, float]]:
    """Row, what, predicted and measured, for everything that is both measured and predicted."""
    found = []
    for row in rows:
        answer = predict_row(row)
        for what, predicted, measured in (
            ("memory", answer.peak_memory, row["peak_mem_gb"]),
            ("tokens/s", answer.tokens_per_second, row["tok_s_gpu"]),
        ):
            if predicted is not None and measured.replace(".", "", 1).isdigit():
                found.append((row, what, predicted, float(measured)))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=str(CASES))
    parser.add_argument("--rows", action="store_true")
    options = parser.parse_args()
    rows = read_cases(options.cases)
    groups: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for row, what, predicted, measured in errors(rows):
        error = predicted / measured - 1
        groups[what, row["source"], row["gpu"]].append(error)
        groups[what, "all", ""].append(error)
        if options.rows:
            print(f"{row['id']} {what:<9} predicted {predicted:10.1f} measured {measured:10.1f} {error:+7.1%}")
    print(f"{'what':<10}{'source':<34}{'device':<28}{'rows':>5}{'mean abs':>10}{'bias':>8}{'worst':>8}")
    for (what, source, gpu), values in sorted(groups.items()):
        worst = max(values, key=abs)
        size = mean(map(abs, values))
        print(f"{what:<10}{source:<34}{gpu:<28}{len(values):>5}{size:>10.1%}{mean(values):>+8.1%}{worst:>+8.1%}")
    left_out = {answer.note for answer in map(predict_row, rows) if answer.note}
    print("\nleft out:", *sorted(left_out), sep="\n  ")


if __name__ == "__main__":
    main()

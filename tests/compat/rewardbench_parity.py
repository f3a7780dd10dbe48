"""Score the same rows with RewardBench's own code and with `rm-scale eval --benchmark`; started by rewardbench.sh.

Theirs, unchanged, from the package: which subset belongs where and how much it counts, `calculate_scores_per_section`,
`reroll_and_score_dataset`, `process_single_model`, and the leaderboard's average with the prior sets. Ours is the
command on a file in the form of their published results. Scores are random, on a coarse grid so that many tie.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import math
import random
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rm_scale.cli import main as rm_scale
from tests.compat.records import write_record

MAX_DIFFERENCE = 1e-9
PRIOR = ("anthropic_helpful", "anthropic_hhh", "shp", "summarize")
SUBSETS_2 = {"Factuality": 475, "Precise IF": 160, "Math": 183, "Safety": 450, "Focus": 495}
NUM_TIES = 51
Line = tuple[str, float, float]


def main() -> int:
    """Print the table; return 1 when a difference is too large."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    theirs = their_code()
    print(f"[rewardbench] rewardbench {importlib.metadata.version('rewardbench')}, seeds 0 to {options.seeds - 1}")
    lines: list[Line] = []
    for seed in range(options.seeds):
        lines += first_version(theirs, random.Random(seed), options.output_dir / f"v1-{seed}.json", seed)
        lines += second_version(theirs, random.Random(seed), options.output_dir / f"v2-{seed}.json", seed)
    return table(lines, options.record)


def their_code() -> Any:
    """Load the package's scoring modules without its models, whose imports need another transformers.

    `rewardbench/__init__.py` imports every model; the two modules with the scoring do not use them.
    """
    found = importlib.util.find_spec("rewardbench")
    assert found is not None and found.submodule_search_locations, "rewardbench.sh makes the environment"
    package = types.ModuleType("rewardbench")
    package.__path__ = list(found.submodule_search_locations)
    models = types.ModuleType("rewardbench.models")
    models.REWARD_MODEL_CONFIG = {}  # type: ignore[attr-defined]
    sys.modules |= {"rewardbench": package, "rewardbench.models": models}
    from rewardbench import constants, utils  # type: ignore[import-not-found]

    for name in ("EXAMPLE_COUNTS", "SUBSET_MAPPING", "SUBSET_NAME_TO_PAPER_READY"):
        setattr(package, name, getattr(constants, name))
    return types.SimpleNamespace(constants=constants, utils=utils)


def ours(path: Path, words: list[str], format: str = "auto") -> Mapping[str, Any]:
    """Return what the command says of a file of results."""
    output = path.with_suffix("")
    command = ["eval", "--benchmark", str(path), "--benchmark_format", format, "--score_column", *words]
    with contextlib.redirect_stdout(io.StringIO()):
        code = rm_scale([*command, "--output", str(output), "--overwrite"])
    assert code == 0, f"rm-scale {' '.join(command)} ended with {code}"
    document = json.loads((output / "evaluation.json").read_text())
    (results,) = document["benchmarks"].values()
    (found,) = results.values()
    return dict(found)


# --- RewardBench 1 ---------------------------------------------------------------------------------------------------


def first_version(theirs: Any, chance: random.Random, path: Path, seed: int) -> list[Line]:
    """Sections, and the leaderboard's average with prior sets."""
    import pandas as pd

    counts = {**theirs.constants.EXAMPLE_COUNTS, "math-prm": 447, **dict.fromkeys(PRIOR, 50)}
    subsets = [name for name, count in counts.items() for _ in range(count)]
    chosen, rejected = ([chance.randrange(8) / 4 for _ in subsets] for _ in range(2))
    columns = {
        "id": list(range(len(subsets))),
        "subset": subsets,
        # As the hub has them: numbers in lists of one, and a column of results.
        "scores_chosen": [[score] for score in chosen],
        "scores_rejected": [[score] for score in rejected],
        "results": [int(one > other) for one, other in zip(chosen, rejected, strict=True)],
    }
    path.write_text(json.dumps({**columns, "model": "m", "model_type": "Seq. Classifier", "chat_template": "t"}))
    # As scripts/run_rm.py has it: a share per subset, then their function.
    right: dict[str, list[int]] = {}
    for name, result in zip(subsets, columns["results"], strict=True):
        right.setdefault(name, []).append(result)
    shares = {name: sum(values) / len(values) for name, values in right.items()}
    sections = theirs.utils.calculate_scores_per_section(
        theirs.constants.EXAMPLE_COUNTS, theirs.constants.SUBSET_MAPPING, shares
    )
    from analysis.get_benchmark_results import get_average_over_rewardbench  # type: ignore[import-not-found]

    core = {name: value for name, value in shares.items() if name not in PRIOR}
    frame, prior = (pd.DataFrame([{"model": "m", "model_type": "x", **values}]) for values in (core, shares))
    average = get_average_over_rewardbench(frame, prior).iloc[0]
    found = ours(path, ["scores_chosen,scores_rejected"])
    parts = found["parts"]
    lines = [(f"{seed} RewardBench {name}", sections[name], parts[name]) for name in sections]
    lines += [(f"{seed} RewardBench {name}, leaderboard", average[name], parts[name]) for name in sections]
    return [
        *lines,
        (f"{seed} RewardBench score", sum(sections.values()) / len(sections), found["score"]),
        (f"{seed} RewardBench Prior Sets", average["Prior Sets (0.5 weight)"], parts["Prior Sets"]),
        (f"{seed} RewardBench with Prior Sets", average["average"], parts["with Prior Sets"]),
    ]


# --- RewardBench 2 ---------------------------------------------------------------------------------------------------


def second_version(theirs: Any, chance: random.Random, path: Path, seed: int) -> list[Line]:
    """Six subsets: the best of four with shared places, and Ties by the rule of the released package."""
    import datasets

    rows: list[dict[str, Any]] = []
    for name, count in SUBSETS_2.items():
        for number in range(count):
            rows.append({"subset": name, "id": f"{name}-{number}", "num_correct": 1, "num": 4})
    for number in range(NUM_TIES):
        good = chance.randrange(2, 27)
        rows.append({"subset": "Ties", "id": f"ref:{number}", "num_correct": 1, "num": chance.randrange(2, 8)})
        rows.append(
            {"subset": "Ties", "id": f"tied:{number}", "num_correct": good, "num": good + chance.randrange(1, 8)}
        )
    flat = [
        {"text": "", "scores": score, **{key: row[key] for key in ("subset", "id", "num_correct")}}
        for row in rows
        for score in _scores(chance, row)
    ]
    scored = theirs.utils.reroll_and_score_dataset(datasets.Dataset.from_list(flat), [row["num"] for row in rows])
    path.write_text(
        json.dumps({name: scored[name][:] for name in ("id", "subset", "num_correct", "scores", "results")})
    )
    released = ours(path, ["scores"], "rewardbench2-0.1.4")
    current = ours(path, ["scores"])
    lines = []
    for name in (*SUBSETS_2, "Ties"):
        part = scored.filter(lambda row, name=name: row["subset"] == name)
        if name == "Ties":
            _, value = theirs.utils.process_single_model(part)
        else:
            value = sum(part["results"]) / len(part)
        lines.append((f"{seed} RewardBench 2 {name}", float(value), released["parts"][name]))
    values = [value for _, value, _ in lines]
    lines.append((f"{seed} RewardBench 2 score", sum(values) / len(values), released["score"]))
    print(
        f"seed {seed}: Ties by the rule of 0.1.4 {released['parts']['Ties']:.6f} (--benchmark_format "
        f"rewardbench2-0.1.4), by the repository's later rule {current['parts']['Ties']:.6f} (default)"
    )
    return lines


def _scores(chance: random.Random, row: Mapping[str, Any]) -> list[float]:
    """Return scores that often tie; of some Ties questions all good answers have the same, which is the hard case."""
    scores = [chance.randrange(6) / 2 for _ in range(row["num"])]
    if row["subset"] == "Ties":
        good = row["num_correct"]
        lift = chance.choice((0.0, 0.5, 3.0, 6.0))
        same = chance.random() < 0.2
        scores = [(2.0 if same else score) + lift for score in scores[:good]] + scores[good:]
    return scores


def table(lines: list[Line], record: Path) -> int:
    """Print section, theirs, ours, difference, and write the record; return 1 when a difference is too large."""
    width = max(len(name) for name, _, _ in lines)
    print(f"{'seed and section':<{width}}  {'theirs':>12}  {'ours':>12}  difference")
    worst = 0.0
    for name, value, own in lines:
        difference = abs(value - own)
        worst = math.inf if math.isnan(difference) else max(worst, difference)
        print(f"{name:<{width}}  {value:>12.9f}  {own:>12.9f}  {difference:.1e}")
    good = worst <= MAX_DIFFERENCE
    print(json.dumps({"compared": len(lines), "largest_difference": worst, "ok": good}))
    rows = [[name.split(" ", 1)[1], f"{value:.9f}", f"{own:.9f}"] for name, value, own in lines if name[0] == "0"]
    what = f"The same rows and random scores in both: {len(lines)} figures of several seeds, here those of the first"
    what += f" one; largest difference of all {worst:.1e}"
    write_record(record, "rewardbench.txt", ["rewardbench"], what, ["section", "its code", "rm-scale eval"], rows)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())

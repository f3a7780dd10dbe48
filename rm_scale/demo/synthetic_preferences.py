"""Generate the synthetic preferences that `make demo` and the tests train on, with nothing to download.

Seven subsets, each with a rule that a model of a few hundred thousand parameters can learn from scratch:

    arithmetic  the right sum of two digits is preferred to a wrong one
    comparison  the larger or smaller of two numbers, as asked, is preferred to the other
    format      the items in the format asked for (JSON, bullets, capitals, ...) are preferred to another format
    length      as many words as asked for are preferred to more or fewer
    on_topic    the text about the thing asked for is preferred to a text about something else
    refusal     harmful requests are refused, harmless ones answered
    sentiment   the review has the opinion asked for

Two properties make an accuracy on the held-out split mean something:

- **No shortcut.** The two responses of a pair come from the same distribution, and only the prompt says which of them
  is better: a model that doesn't read the prompt, or that counts characters, is right half of the time.
- **Generalisation.** The held-out split has its own wordings of prompts and responses, and its own combinations (sums,
  pairs of numbers, topics, requests); none of them occurs in training. The content words do occur: a model without
  pretraining can't know a word that it has never seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from rm_scale.demo.synthetic_sentences import EVASIONS
from rm_scale.demo.synthetic_tasks import TASKS, Case, RandomChoices, Split
from rm_scale.errors import DataError
from rm_scale.files import replacing

SyntheticFormat = Literal["explicit_prompt", "conversational", "hh_text", "ranked"]

SUBSETS = tuple(TASKS)
"""Names of the subsets, in the order in which they take turns."""


def _text_prompt(question: str) -> str:
    return f"Human: {question}\nAssistant:"


def _as_explicit_prompt(case: Case, index: int) -> dict[str, Any]:
    # Each response starts with a space, so that prompt and response can be joined as they are.
    return {"prompt": _text_prompt(case.question), "chosen": f" {case.good}", "rejected": f" {case.bad[0]}"}


def _as_conversational(case: Case, index: int) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": case.question}],
        "chosen": [{"role": "assistant", "content": case.good}],
        "rejected": [{"role": "assistant", "content": case.bad[0]}],
    }


def _as_hh_text(case: Case, index: int) -> dict[str, Any]:
    prompt = f"\n\nHuman: {case.question}\n\nAssistant: "
    return {"chosen": prompt + case.good, "rejected": prompt + case.bad[0]}


def _as_ranked(case: Case, index: int) -> dict[str, Any]:
    """Rank four responses: the good one, two worse ones that tie, and last one that evades the question."""
    responses = [case.good, *case.bad, EVASIONS[index % len(EVASIONS)]]
    ranks = [0, 1, 1, 2]
    turn = index % 4  # so that the position of a response says nothing
    return {
        "prompt": _text_prompt(case.question),
        "responses": [f" {response}" for response in responses[turn:] + responses[:turn]],
        "ranks": ranks[turn:] + ranks[:turn],
    }


_ROW_MAKERS: dict[str, Callable[[Case, int], dict[str, Any]]] = {
    "explicit_prompt": _as_explicit_prompt,
    "conversational": _as_conversational,
    "hh_text": _as_hh_text,
    "ranked": _as_ranked,
}


def generate_rows(
    num_rows: int,
    seed: int,
    split: Split,
    subsets: Sequence[str] | None = None,
    dataset_format: SyntheticFormat = "explicit_prompt",
) -> Iterator[dict[str, Any]]:
    """Generate rows of the synthetic set in one of four formats; row N has the same content in each of them.

    Args:
        num_rows: how many rows to generate.
        seed: the same seed gives the same rows on every platform and Python version.
        split: "train" or "heldout"; whatever the seeds, they share no wording and no combination of content.
        subsets: names out of `SUBSETS`, which take turns; by default all.
        dataset_format: explicit_prompt (prompt, chosen, rejected as text), conversational (the same as messages),
            hh_text (chosen and rejected as whole dialogues) or ranked (four responses, two of which tie).

    Yields:
        Rows with the format's columns, `subset` and `id`.

    Raises:
        DataError: unknown subset, split or format, or a negative number.
    """
    _check_request(num_rows, split, subsets, dataset_format)
    names = SUBSETS if subsets is None else tuple(subsets)
    return _rows(num_rows, seed, split, names, _ROW_MAKERS[dataset_format])


def _rows(
    num_rows: int, seed: int, split: Split, names: Sequence[str], make_row: Callable[[Case, int], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    choices = RandomChoices(seed, split)
    for index in range(num_rows):
        subset = names[index % len(names)]
        row = make_row(TASKS[subset](choices), index)
        yield {**row, "subset": subset, "id": f"{subset}-{split}-{seed}-{index}"}


def generate_pairs(
    num_pairs: int, seed: int, split: Split, subsets: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Generate chosen/rejected pairs with the keys prompt, chosen, rejected, subset and id; see `generate_rows`."""
    return generate_rows(num_pairs, seed, split, subsets, "explicit_prompt")


def _check_request(num_rows: int, split: str, subsets: Sequence[str] | None, dataset_format: str) -> None:
    if num_rows < 0:
        raise DataError(f"number of rows={num_rows}: must be 0 or more. Fix: ask for a positive number.")
    _check_choices("split", [split], ("train", "heldout"))
    _check_choices("format", [dataset_format], tuple(_ROW_MAKERS))
    _check_choices("subsets", SUBSETS if subsets is None else subsets, SUBSETS)


def _check_choices(name: str, given: Sequence[str], known: Sequence[str]) -> None:
    unknown = [value for value in given if value not in known]
    if unknown or not given:
        seen = ", ".join(unknown) or "nothing"
        raise DataError(f"{name}={seen}: the synthetic set doesn't have that. Fix: choose from {', '.join(known)}.")


def write_synthetic(
    directory: str | Path,
    num_train: int,
    num_heldout: int,
    seed: int,
    dataset_format: SyntheticFormat = "explicit_prompt",
) -> tuple[Path, Path]:
    """Write `train.jsonl` and `heldout.jsonl` into a directory, which is made if needed.

    A file is complete or absent: each is written under another name first and replaces an older one at the end.

    Args:
        directory: where the files go.
        num_train: rows of the training split.
        num_heldout: rows of the held-out split.
        seed: seed of both splits, which draw from different random sequences.
        dataset_format: see `generate_rows`.

    Returns:
        Paths of the training and the held-out file.

    Raises:
        DataError: as `generate_rows`, or the directory can't be written.
    """
    directory = Path(directory)
    train = generate_rows(num_train, seed, "train", None, dataset_format)
    heldout = generate_rows(num_heldout, seed, "heldout", None, dataset_format)
    paths = directory / "train.jsonl", directory / "heldout.jsonl"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path, rows in zip(paths, (train, heldout), strict=True):
            _write_jsonl(path, rows)
    except OSError as error:
        raise DataError(
            f"directory={directory}: the synthetic set can't be written there ({error.strerror}). "
            "Fix: give a directory that you may write to."
        ) from error
    return paths


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with replacing(path) as aside, aside.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

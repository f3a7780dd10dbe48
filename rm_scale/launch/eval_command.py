"""`rm-scale eval`: how good is a reward model, and can it be trusted."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rm_scale.errors import ConfigError, DataError, collect_problems
from rm_scale.logs import get_logger

if TYPE_CHECKING:
    from rm_scale.config import RunConfig
    from rm_scale.data.checks import IntArray
    from rm_scale.data.preparation import EvaluationData
    from rm_scale.evaluation.benchmarks import Benchmark
    from rm_scale.evaluation.document import EvaluationDocument
    from rm_scale.evaluation.evaluate import ScoredModel
    from rm_scale.evaluation.gate import Wanted
    from rm_scale.inference.scorer import RewardScorer

logger = get_logger(__name__)

HELP = "how good is a reward model, and can it be trusted"
DESCRIPTION = (
    "Evaluate saved reward models on preference files: accuracy with intervals, calibration, length bias, per subset "
    "and source; on benchmark files by the benchmark's rules; against each other; and against requirements, which set "
    "the exit code: 0 all hold, 1 one fails, 2 the command can't be run as given. See docs/evaluation.md."
)
EXIT_REQUIREMENT_FAILED = 1
_DEFAULT_REJECTED_SHARE = 0.05
# How data is read: our option, and the setting of a run that it stands for.
_READING_OPTIONS = {
    "dataset_format": "dataset_format",
    "subset_column": "subset_column",
    "max_samples": "max_eval_samples",
    "max_rejected_share": "max_rejected_share",
    "dataset_cache_dir": "dataset_cache_dir",
}
FORMATS = ("auto", "explicit_prompt", "implicit_prompt", "conversational", "hh_text", "ranked", "soft_label")
BENCHMARK_FORMATS = ("auto", "rewardbench", "rewardbench2", "rm_bench")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rm-scale eval`."""
    _add_models(parser)
    _add_data(parser)
    _add_results(parser)
    _add_scoring(parser)


def _add_models(parser: argparse.ArgumentParser) -> None:
    models = parser.add_argument_group("models")
    models.add_argument("--model", nargs="+", default=[], metavar="DIR", help="reward models; the first is judged")
    models.add_argument(
        "--scores", nargs="+", default=[], metavar="FILE", help="evaluation_scores.jsonl instead of a model"
    )
    models.add_argument(
        "--compare", nargs="+", default=[], metavar="DIR|FILE", help="models or scores files to compare the first with"
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset_path",
        "--input",
        nargs="+",
        default=[],
        metavar="FILE",
        help="preference files; default the evaluation data of the first model's own run",
    )
    data.add_argument("--dataset_format", choices=FORMATS, help="how rows are read (default auto)")
    data.add_argument("--subset_column", metavar="NAME", help="column that names a row's subset (default subset)")
    data.add_argument("--max_samples", type=int, metavar="N", help="only the first N groups")
    data.add_argument(
        "--max_rejected_share", type=float, metavar="SHARE", help="stop when more rows can't be used (default 0.05)"
    )
    data.add_argument("--dataset_cache_dir", metavar="DIR", help="where encoded data is cached")
    data.add_argument("--benchmark", nargs="+", default=[], metavar="FILE", help="benchmark files")
    data.add_argument("--benchmark_format", choices=BENCHMARK_FORMATS, default="auto")


def _add_results(parser: argparse.ArgumentParser) -> None:
    results = parser.add_argument_group("results")
    results.add_argument(
        "--output", metavar="DIR", help="write evaluation.json, .md, .html and evaluation_scores.jsonl there"
    )
    results.add_argument("--overwrite", action="store_true", help="replace results that are there")
    results.add_argument(
        "--require", action="append", default=[], metavar="REQ", help="e.g. 'accuracy>=0.8,ece<=0.1'; may be repeated"
    )
    results.add_argument("--model_card", action="store_true", help="put the numbers into the first model's README.md")
    results.add_argument("--num_resamples", type=int, default=2000, metavar="B", help="of the bootstrap over prompts")
    results.add_argument("--seed", type=int, default=0, help="of the bootstrap and of cross-validation")


def _add_scoring(parser: argparse.ArgumentParser) -> None:
    scoring = parser.add_argument_group("scoring")
    scoring.add_argument("--batch_size", type=int, default=16, help="sequences per forward pass")
    scoring.add_argument("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto")
    scoring.add_argument("--device", help="default: the GPU when there is one")
    scoring.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")


def run(options: argparse.Namespace) -> int:
    """Evaluate, say and write the results; 1 when a requirement fails, else 0."""
    entries = _entries(options)
    wanted = _check(options, entries)
    from rm_scale.evaluation.evaluate import Resampling, evaluate_all, gate_metrics
    from rm_scale.evaluation.gate import check_names, gate_text, judge

    scored, benchmarks = _score_all(options, entries, wanted)
    document = evaluate_all(scored, Resampling(options.num_resamples, options.seed), benchmarks)
    if wanted:
        metrics = gate_metrics(document)
        check_names(wanted, metrics)
        document["gate"] = judge(wanted, metrics)
    _say(document)
    if options.output:
        _write_results(document, scored, Path(options.output))
    if options.model_card:
        from rm_scale.reporting.model_card import update_model_card

        logger.info(f"model card: {update_model_card(Path(options.model[0]), document)}")
    gate = document["gate"]
    if gate is not None:
        print(gate_text(gate))
    return EXIT_REQUIREMENT_FAILED if gate is not None and not gate["passed"] else 0


# --- Options -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """A model's folder, or a file with a model's scores, and what it is called in the results."""

    path: Path
    name: str

    @property
    def is_model(self) -> bool:
        return self.path.is_dir()


def _entries(options: argparse.Namespace) -> list[_Entry]:
    paths = [Path(name) for name in [*options.model, *options.scores, *options.compare]]
    return [_Entry(path, name) for path, name in zip(paths, short_names(paths), strict=True)]


def short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart; a scores file is called like its folder."""
    parts = [_telling(path.absolute()) for path in paths]
    names = []
    for own in parts:
        for length in range(1, len(own) + 1):
            if sum(other[-length:] == own[-length:] for other in parts) == 1:
                break
        names.append("/".join(own[-length:]))
    # The same path twice is told apart by its number.
    return [f"{name} ({number + 1})" if names.count(name) > 1 else name for number, name in enumerate(names)]


def _telling(path: Path) -> tuple[str, ...]:
    if path.name != "evaluation_scores.jsonl":
        return path.parts
    return path.parent.parent.parts if path.parent.name == "run" else path.parent.parts


def _check(options: argparse.Namespace, entries: Sequence[_Entry]) -> list[Wanted]:
    """All that is wrong with the options, before anything is read; gives the requirements."""
    from rm_scale.data.sources import local_sources
    from rm_scale.evaluation.gate import read_requirements

    problems = [*_entry_problems(options, entries), *_data_problems(options, entries), *_result_problems(options)]
    least = {"max_samples": 1, "batch_size": 1, "num_resamples": 100, "max_rejected_share": 0}
    for option, bound in least.items():
        value = getattr(options, option)
        if value is not None and not value >= bound:
            problems.append(f"--{option} {value}: must be at least {bound}. Fix: --{option} {bound} or more.")
    # Missing files are to be seen before a model is loaded; what is in them comes later.
    collect_problems(problems, lambda: local_sources(options.dataset_path, "test"))
    wanted = collect_problems(problems, lambda: read_requirements(options.require))
    if problems:
        raise ConfigError(problems, "rm-scale eval: the options can't be used")
    return wanted or []


def _entry_problems(options: argparse.Namespace, entries: Sequence[_Entry]) -> Iterator[str]:
    if not options.model and not options.scores:
        yield "--model and --scores: neither is given. Fix: --model DIR, a run's output directory."
    for name in options.model:
        if not Path(name).is_dir():
            yield f"--model {name}: is no folder. Fix: give a run's output directory (a hub model: download it first)."
    for name in options.scores:
        if not Path(name).is_file():
            yield f"--scores {name}: is no file. Fix: give an evaluation_scores.jsonl."
    for name in options.compare:
        if not Path(name).exists():
            yield f"--compare {name}: does not exist. Fix: give a model's folder or an evaluation_scores.jsonl."


def _data_problems(options: argparse.Namespace, entries: Sequence[_Entry]) -> Iterator[str]:
    if options.benchmark and any(not entry.is_model for entry in entries):
        yield "--benchmark: scores files hold no model to score it with. Fix: --model DIR, for all models."
    only_scores = not options.model and not any(entry.is_model for entry in entries)
    if options.dataset_path and only_scores:
        yield (
            f"--dataset_path {' '.join(options.dataset_path)}: there is no model to score it with. "
            "Fix: --model DIR, or leave it out: the scores files hold their groups."
        )
    given = [name for name in _READING_OPTIONS if getattr(options, name) is not None]
    if options.benchmark:
        given = [name for name in given if name != "max_rejected_share"]  # that counts for benchmarks, too
    if given and (only_scores or (options.benchmark and not options.dataset_path)):
        yield (
            f"--{', --'.join(given)}: {'is' if len(given) == 1 else 'are'} for reading preference files, and none are "
            "read here. Fix: leave it out, or give --model DIR and --dataset_path FILE."
        )
    is_own = not options.dataset_path and not options.benchmark and options.model
    if is_own and Path(options.model[0]).is_dir() and _run_config_path(options) is None:
        yield (
            f"--dataset_path: not given, and {options.model[0]} has no run/run_config.yaml that would say what its run "
            "was evaluated on. Fix: --dataset_path FILE, or --benchmark FILE."
        )
    if options.scores and not only_scores and not options.dataset_path:
        yield "--scores beside a model: on which data that is to be scored is not said. Fix: --dataset_path FILE."


def _result_problems(options: argparse.Namespace) -> Iterator[str]:
    if options.output:
        there = [name for name in RESULT_FILES if (Path(options.output) / name).exists()]
        if there and not options.overwrite:
            yield f"--output {options.output}: {', '.join(there)} exists. Fix: another folder, or --overwrite."
        if Path(options.output).is_file():
            yield f"--output {options.output}: is a file. Fix: give a folder."
    if options.model_card and not options.model:
        yield "--model_card: there is no model whose card it could be. Fix: --model DIR."


def _run_config_path(options: argparse.Namespace) -> Path | None:
    path = Path(options.model[0]) / "run" / "run_config.yaml"
    return path if path.is_file() else None


# --- Scoring -------------------------------------------------------------------------------------------------------


def _score_all(
    options: argparse.Namespace, entries: Sequence[_Entry], wanted: Sequence[Wanted]
) -> tuple[list[ScoredModel], dict[str, dict[str, dict[str, Any]]]]:
    """Rewards of every model on the data, and its results on the benchmarks; one model in memory at a time."""
    from rm_scale.evaluation.evaluate import ScoredModel
    from rm_scale.evaluation.record import read_scores

    has_groups = not options.benchmark or bool(options.dataset_path)
    names = [entry.name for entry in entries] if has_groups else []
    _check_names_early(wanted, names, (), ("subsets.", "sources.", "benchmarks."))
    suites = _read_benchmarks(options)
    scored: list[ScoredModel] = []
    benchmarks: dict[str, dict[str, dict[str, Any]]] = {}
    source = _DataSource(options)
    for entry in entries:
        if not entry.is_model:
            scored.append(ScoredModel(entry.name, str(entry.path), read_scores(entry.path)))
            continue
        scorer = _load(entry.path, options)
        if has_groups:
            data = source.for_scorer(scorer)
            if not scored:
                _check_names_early(wanted, names, _subsets(data), ("benchmarks.",), data.origins.names)
            scored.append(_score(entry, scorer, data, source, options))
        if suites:
            benchmarks[entry.name] = _run_benchmarks(suites, scorer, options)
        del scorer
    return scored, benchmarks


def _check_names_early(
    wanted: Sequence[Wanted],
    names: Sequence[str],
    subsets: Sequence[str],
    later: Sequence[str],
    sources: Sequence[str] = (),
) -> None:
    """A misspelt metric must not cost the scoring first."""
    from rm_scale.evaluation.evaluate import metric_names
    from rm_scale.evaluation.gate import check_names

    if wanted:
        check_names(wanted, metric_names(names, subsets, sources), later)


def _subsets(data: EvaluationData) -> list[str]:
    return sorted({subset for subset in data.groups["subset"] if subset})


def _load(path: Path, options: argparse.Namespace) -> RewardScorer:
    from rm_scale.distributed import name_accelerator

    name_accelerator()
    import torch

    from rm_scale.inference.scorer import RewardScorer

    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    return RewardScorer.from_pretrained(path, options.device, dtype, trust_remote_code=options.trust_remote_code)


class _DataSource:
    """The same groups for every model, each with its own tokenizer.

    Without files they are the evaluation groups of the first model's run; other models get those among them that they
    can use.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.is_own = not options.dataset_path
        self._contents: IntArray | None = None

    @cached_property
    def config(self) -> RunConfig:
        """How the data is read."""
        return self._own_config() if self.is_own else self._config()

    def _config(self) -> RunConfig:
        from rm_scale.config import RunConfig

        # Each model's own encoder is what reads, so no model need be named.
        settings = {"model_name_or_path": "(several)", "eval_dataset_path": self.options.dataset_path}
        return RunConfig.model_validate({**settings, **self._asked()})

    def _own_config(self) -> RunConfig:
        from rm_scale.config import parse_config

        path = _run_config_path(self.options)
        assert path is not None
        parsed = parse_config(["--config", str(path)])
        parsed.raise_problems()
        return parsed.config.model_copy(update=self._asked())

    def _asked(self) -> dict[str, Any]:
        """Settings of the data that were given; all others keep their default, or what the run had."""
        asked = {_READING_OPTIONS[name]: getattr(self.options, name) for name in _READING_OPTIONS}
        return {name: value for name, value in asked.items() if value is not None}

    def for_scorer(self, scorer: RewardScorer) -> EvaluationData:
        """The groups as this model's tokens.

        Raises:
            DataError: too many rows can't be used.
        """
        from rm_scale.data.checks import DataReport, raise_if_too_many
        from rm_scale.data.preparation import prepare_evaluation, prepare_held_out

        if self.is_own and self._contents is None:
            data = prepare_held_out(self.config, scorer.encoder)
            self._contents = data.origins.content
        else:
            data = prepare_evaluation(self.config, scorer.encoder, self._contents)
        raise_if_too_many(DataReport(data.sources), self.config.max_rejected_share)
        if not len(data.groups):
            raise DataError("none of the first model's groups can be scored by the next one. Fix: see the log above.")
        return data


def _score(
    entry: _Entry, scorer: RewardScorer, data: EvaluationData, source: _DataSource, options: argparse.Namespace
) -> ScoredModel:
    from tqdm import tqdm

    from rm_scale.evaluation.evaluate import ScoredModel
    from rm_scale.evaluation.scoring import data_use, score_groups
    from rm_scale.training.losses import LossSettings

    rewards = score_groups(data, scorer, options.batch_size)
    groups = list(tqdm(rewards, total=len(data.groups), unit=" groups", desc=entry.name, mininterval=1.0, disable=None))
    settings, keep_ties = LossSettings(), True
    if source.is_own:  # as in the run's own record
        config = source.config
        settings = LossSettings(config.loss_type, config.label_smoothing_factor)
        keep_ties = config.tie_policy == "half"
    dtype = str(next(scorer.model.parameters()).dtype).removeprefix("torch.")
    facts = {"dtype": dtype, "device": str(scorer.device), "max_length": scorer.encoder.rules.max_length}
    return ScoredModel(entry.name, str(entry.path), groups, settings, keep_ties, facts, data_use(data.sources))


# --- Benchmarks ----------------------------------------------------------------------------------------------------


def _read_benchmarks(options: argparse.Namespace) -> dict[str, Benchmark]:
    """Benchmarks by name, read before any model is."""
    if not options.benchmark:
        return {}
    from rm_scale.evaluation.benchmarks import read_benchmark

    names = short_names([Path(name) for name in options.benchmark])
    return {
        name: read_benchmark(path, options.benchmark_format)
        for name, path in zip(names, options.benchmark, strict=True)
    }


def _run_benchmarks(
    suites: dict[str, Benchmark], scorer: RewardScorer, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    from rm_scale.evaluation.scoring import score_benchmark

    share = _DEFAULT_REJECTED_SHARE if options.max_rejected_share is None else options.max_rejected_share
    return {
        name: score_benchmark(benchmark, scorer, options.batch_size, share, name) for name, benchmark in suites.items()
    }


# --- Results -------------------------------------------------------------------------------------------------------

RESULT_FILES = ("evaluation.json", "evaluation.md", "evaluation.html", "evaluation_scores.jsonl")


def _write_results(document: EvaluationDocument, scored: Sequence[ScoredModel], folder: Path) -> None:
    """All files, or none: they are made aside and then given their names."""
    from rm_scale.evaluation.record import score_lines
    from rm_scale.reporting.evaluation_page import write_page
    from rm_scale.reporting.evaluation_summary import markdown_summary

    aside = folder / ".writing"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        for number, (model, one) in enumerate(zip(document["models"], scored, strict=True), 1):
            name = "evaluation_scores.jsonl" if number == 1 else f"evaluation_scores-{number}.jsonl"
            (aside / name).write_text(score_lines(one.groups), encoding="utf-8")
            model["scores_file"] = name
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        (aside / "evaluation.json").write_text(text, encoding="utf-8")
        (aside / "evaluation.md").write_text(markdown_summary(document), encoding="utf-8")
        write_page(dict(document), aside / "evaluation.html")
        for path in sorted(aside.iterdir()):
            os.replace(path, folder / path.name)
    except OSError as error:
        raise DataError(
            f"--output {folder}: can't be written ({error}). Fix: a folder with room, of your own."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    logger.info(f"results: {folder} ({', '.join(RESULT_FILES)})")


def _say(document: EvaluationDocument) -> None:
    from rm_scale.reporting.evaluation_summary import text_summary

    print(text_summary(document))

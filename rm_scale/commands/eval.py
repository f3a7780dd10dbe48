"""`rm-scale eval`: how good is a reward model, and can it be trusted."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rm_scale.commands import eval_columns
from rm_scale.commands.endpoint_options import (
    add_endpoint_arguments,
    endpoint_problems,
    endpoint_scorer,
    open_endpoints,
)
from rm_scale.config_columns import reading_problems
from rm_scale.errors import ConfigError, collect_problems
from rm_scale.files import write_problem
from rm_scale.logs import get_logger
from rm_scale.texts import one_line, printable, range_rule

if TYPE_CHECKING:
    from rm_scale.evaluation.evaluated_models import EvaluatedModel
    from rm_scale.evaluation.requirements import Wanted
    from rm_scale.evaluation.score_models import ScoringRequest
    from rm_scale.inference.endpoint import Endpoint
    from rm_scale.inference.scoring.contract_scorer import ContractScorer

logger = get_logger(__name__)

HELP = "how good is a reward model, and can it be trusted"
EXAMPLE = "rm-scale eval --model outputs/demo --dataset_path pairs.jsonl --output outputs/eval"
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
    "dataset_preset": "dataset_preset",
    "dataset_columns": "dataset_columns",
    "subset_column": "subset_column",
    "ignore_columns": "ignore_columns",
    "max_samples": "max_eval_samples",
    "max_rejected_share": "max_rejected_share",
    "dataset_cache_dir": "dataset_cache_dir",
}
# The smallest and the largest value that makes sense.
_RANGES = {
    "max_samples": (1, 1_000_000_000),
    "batch_size": (1, 1_000_000),
    "num_resamples": (100, 100_000),
    "max_rejected_share": (0, 1),
    "seed": (0, 2**32 - 1),
}
FORMATS = ("auto", "explicit_prompt", "implicit_prompt", "conversational", "hh_text", "ranked", "soft_label")
BENCHMARK_FORMATS = (
    "auto",
    "rewardbench",
    "rewardbench2",
    "rewardbench2-0.1.4",
    "rm_bench",
    "judgebench",
    "llmbar",
    "ppe",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `rm-scale eval`."""
    _add_models(parser)
    _add_data(parser)
    eval_columns.add_arguments(parser)
    _add_results(parser)
    _add_scoring(parser)
    add_endpoint_arguments(parser, several=True)


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
    data.add_argument("--dataset_preset", metavar="NAME", help="public set whose columns the files have")
    data.add_argument(
        "--dataset_columns", type=_map_in, metavar="JSON", help="where prompt, responses and label stand in the rows"
    )
    data.add_argument("--subset_column", metavar="NAME", help="column that names a row's subset (default subset)")
    data.add_argument("--ignore_columns", nargs="+", metavar="NAME", help="columns that are not read")
    data.add_argument("--max_samples", type=int, metavar="N", help="only the first N groups")
    data.add_argument(
        "--max_rejected_share", type=float, metavar="SHARE", help="stop when more rows can't be used (default 0.05)"
    )
    data.add_argument("--dataset_cache_dir", metavar="DIR", help="where encoded data is cached")
    data.add_argument("--benchmark", nargs="+", default=[], metavar="FILE", help="benchmark files")
    data.add_argument("--benchmark_format", choices=BENCHMARK_FORMATS, default="auto")


def _map_in(text: str) -> Any:
    """Return the map that a text is the JSON of; any other text as it is, to be refused with all other problems."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


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
    scoring.add_argument("--device", help="cpu, cuda or cuda:N; default: the GPU when there is one")
    scoring.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    scoring.add_argument("--no_contract", action="store_true", help="take models without scoring_contract.json")


def run(options: argparse.Namespace) -> int:
    """Evaluate, print and write the results; return 1 when a requirement fails, else 0."""
    from rm_scale.evaluation.evaluated_models import evaluated_models

    models = evaluated_models([*options.model, *options.scores, *options.compare])
    wanted = _check(options, models)
    from rm_scale.evaluation.evaluate import Resampling, evaluate_all, gate_metrics
    from rm_scale.evaluation.requirements import check_names, gate_text, judge
    from rm_scale.reporting.evaluation.evaluation_summary import text_summary

    if options.score_column is not None:
        scored, benchmarks = eval_columns.score(
            options, _settings(options), _rejected_share(options), wanted, _loader(options)
        )
    else:
        from rm_scale.evaluation.score_models import score_models

        request = _request(options, models, wanted)
        if request.groups is not None:
            request.groups.read_settings()
        scored, benchmarks = score_models(request, _loader(options))
    document = evaluate_all(scored, Resampling(options.num_resamples, options.seed), benchmarks)
    if wanted:
        metrics = gate_metrics(document)
        check_names(wanted, metrics)
        document["gate"] = judge(wanted, metrics)
    print(printable(text_summary(document)))
    if options.output:
        from rm_scale.reporting.evaluation.result_files import write_results

        write_results(document, scored, Path(options.output))
    if options.model_card:
        from rm_scale.reporting.run.model_card import update_model_card

        logger.info(f"model card: {update_model_card(Path(options.model[0]), document)}")
    gate = document["gate"]
    if gate is not None:
        print(printable(gate_text(gate)))
    return EXIT_REQUIREMENT_FAILED if gate is not None and not gate["passed"] else 0


# --- Options -------------------------------------------------------------------------------------------------------


def _check(options: argparse.Namespace, models: Sequence[EvaluatedModel]) -> list[Wanted]:
    """Check the options before anything is read, and return the requirements.

    Raises:
        ConfigError: everything that is wrong with them.
    """
    from rm_scale.data.sources import local_sources
    from rm_scale.evaluation.requirements import read_requirements

    problems = [*eval_columns.problems(options), *_result_problems(options), *endpoint_problems(options)]
    if options.score_column is None:
        problems = [*_model_problems(options), *_data_problems(options, models), *problems]
    for option, (least, most) in _RANGES.items():
        value = getattr(options, option)
        rule = range_rule(f"--{option}", value, least, most)
        problems += [f"--{option} {one_line(value, 40)}: {rule}"] if rule is not None else []
    # Missing files are to be seen before a model is loaded; what is in them comes later.
    collect_problems(problems, lambda: local_sources(options.dataset_path, "test"))
    wanted = collect_problems(problems, lambda: read_requirements(options.require))
    if problems:
        raise ConfigError(problems, "rm-scale eval: the options can't be used")
    return wanted or []


def _model_problems(options: argparse.Namespace) -> Iterator[str]:
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


def _data_problems(options: argparse.Namespace, models: Sequence[EvaluatedModel]) -> Iterator[str]:
    yield from reading_problems(
        options.dataset_preset,
        options.dataset_columns,
        options.dataset_format or "auto",
        options.ignore_columns or (),
    )
    if options.benchmark and any(not model.is_model for model in models):
        yield "--benchmark: scores files hold no model to score it with. Fix: --model DIR, for all models."
    only_scores = not options.model and not any(model.is_model for model in models)
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
        from rm_scale.reporting.evaluation.result_files import RESULT_FILES

        folder = Path(options.output)
        # One file of scores for each model behind the first.
        names = [*RESULT_FILES, *(path.name for path in folder.glob("evaluation_scores-*.jsonl"))]
        there = [name for name in names if (folder / name).exists()]
        if (folder / "run_config.yaml").exists():
            yield f"--output {options.output}: holds a run's own records, its evaluation too. Fix: another folder."
        elif there and not options.overwrite:
            yield f"--output {options.output}: {', '.join(there)} exists. Fix: another folder, or --overwrite."
        read = [*options.dataset_path, *options.benchmark, *options.scores, *options.compare]
        for name in (name for name in there if any(_is_same(folder / name, place) for place in read)):
            yield f"--output {options.output}: {name} there is read here, and not written over. Fix: another folder."
        refused = write_problem(folder)
        if folder.is_file():
            yield f"--output {options.output}: is a file. Fix: give a folder."
        elif refused is not None:
            yield f"--output {options.output}: can't be written ({refused}). Fix: a folder with room, of your own."
    if options.model_card and not options.model:
        yield "--model_card: there is no model whose card it could be. Fix: --model DIR."


def _is_same(path: Path, place: str) -> bool:
    """Return whether a file is an input, links followed."""
    return path.resolve() == Path(place).resolve()


def _run_config_path(options: argparse.Namespace) -> Path | None:
    """Return the settings of the first model's own run, if there is such a file."""
    path = Path(options.model[0]) / "run" / "run_config.yaml" if options.model else None
    return path if path is not None and path.is_file() else None


# --- The parts of the work -------------------------------------------------------------------------------------------


def _request(options: argparse.Namespace, models: Sequence[EvaluatedModel], wanted: Sequence[Wanted]) -> ScoringRequest:
    """Return what is to be scored, as the options say."""
    from rm_scale.evaluation.evaluation_groups import EvaluationGroups
    from rm_scale.evaluation.score_models import ScoringRequest

    groups = None
    if options.dataset_path or not options.benchmark:
        groups = EvaluationGroups(options.dataset_path, _run_config_path(options), _settings(options))
    share = _rejected_share(options)
    return ScoringRequest(
        models, groups, options.benchmark, options.benchmark_format, share, options.batch_size, wanted
    )


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the data that were given."""
    given = {name: getattr(options, option) for option, name in _READING_OPTIONS.items()}
    return {name: value for name, value in given.items() if value is not None}


def _rejected_share(options: argparse.Namespace) -> float:
    return _DEFAULT_REJECTED_SHARE if options.max_rejected_share is None else float(options.max_rejected_share)


def _loader(options: argparse.Namespace) -> Callable[[Path], ContractScorer]:
    """Return a function that loads a model, or asks its server; which device there is, is found out at the first."""

    @functools.cache
    def device() -> str:
        from rm_scale.distributed import World, prepare_environment
        from rm_scale.launch.devices import rank_device

        prepare_environment(World())
        return rank_device(options.device, World())

    @functools.cache
    def servers() -> dict[Path, Endpoint]:
        return dict(zip(map(Path, options.model), open_endpoints(options), strict=False))

    def load(path: Path) -> ContractScorer:
        if options.endpoint and path in servers():
            return endpoint_scorer(str(path), servers()[path], options)
        from rm_scale.inference.scoring.scorer import RewardScorer

        dtype = None if options.dtype == "auto" else options.dtype
        return RewardScorer.from_pretrained(
            path,
            device(),
            dtype,
            trust_remote_code=options.trust_remote_code,
            allow_missing_contract=options.no_contract,
        )

    return load

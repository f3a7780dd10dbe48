"""The preference groups that models are evaluated on: files that were given, or those of the first model's own run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rm_scale.config import RunConfig
from rm_scale.config_parsing import parse_config
from rm_scale.config_sources import LISTS, with_paths
from rm_scale.data.data_report import DataReport, IntArray, raise_if_too_many
from rm_scale.data.preparation import EvaluationData, prepare_evaluation, prepare_held_out
from rm_scale.errors import DataError
from rm_scale.files import files_of_pattern, read_json_object
from rm_scale.inference.scoring.contract_scorer import ContractScorer
from rm_scale.training.losses import LossSettings

_FILE_SETTINGS = ("dataset_path", "eval_dataset_path")


def _folders_of(run_config: Path, output_dir: str) -> list[Path]:
    """Return the folders that a run's relative names may belong to: this one, and where the run was started.

    Args:
        run_config: the run's `run_config.yaml`.
        output_dir: as it stands in there.
    """
    folders = [Path.cwd()]
    output, named = run_config.resolve().parent.parent, Path(output_dir)
    depth = len(named.parts)
    if not named.is_absolute() and output.parts[-depth:] == named.parts:  # also where the whole project was moved
        folders.append(Path(*output.parts[:-depth]))
    started = read_json_object(run_config.parent / "environment.json").get("working_directory")
    return [*folders, Path(started)] if isinstance(started, str) else folders


def _found(name: str, folders: Sequence[Path]) -> str:
    if Path(name).is_absolute():
        return name
    for folder in folders:
        try:
            is_there = (folder / name).exists() or bool(files_of_pattern(str(folder / name)))
        except ValueError as error:
            raise DataError(f"dataset_path={name}: {error}") from error
        if is_there:
            return name if folder == folders[0] else str(folder / name)
    places = " nor in ".join(map(str, dict.fromkeys(folders)))
    raise DataError(
        f"dataset_path={name}: the data of the model's own run is not in {places}. Fix: --dataset_path FILE, or call "
        "this where the training was started."
    )


class EvaluationGroups:
    """The same groups for every model, each with its own tokenizer.

    Without files they are the evaluation groups of the first model's run; other models get those among them that they
    can use.

    Args:
        files: preference files; none for those of the first model's run.
        run_config: that run's `run_config.yaml`.
        settings: settings of the data that were given; all others keep their default, or what the run had.
    """

    def __init__(self, files: Sequence[str], run_config: Path | None, settings: Mapping[str, Any]) -> None:
        self.files = list(files)
        self.run_config = run_config
        self.settings = dict(settings)
        self.is_own = not files
        self._contents: IntArray | None = None

    @cached_property
    def config(self) -> RunConfig:
        """How the data is read."""
        if not self.is_own:
            # Each model's own encoder is what reads, so no model need be named.
            named = {"model_name_or_path": "(several)", "eval_dataset_path": self.files}
            return RunConfig.model_validate({**named, **self.settings})
        assert self.run_config is not None, "checked with the options"
        parsed = parse_config(["--config", str(self.run_config)])
        parsed.raise_problems()
        # Names relative to where the run was started are found from any folder.
        folders = _folders_of(self.run_config, parsed.config.output_dir)
        given = {name: getattr(parsed.config, name) for name in _FILE_SETTINGS}
        found = {name: files and [_found(file, folders) for file in files] for name, files in given.items()}
        listed = {
            name: with_paths(getattr(parsed.config, name), lambda file: _found(file, folders))
            for name in LISTS
            if getattr(parsed.config, name)
        }
        return parsed.config.model_copy(update={**found, **listed, **self.settings})

    def read_settings(self) -> None:
        """Read how the data is to be read, so that what is wrong with that is told before a model is loaded.

        Raises:
            UserError: a setting of the run is wrong, or its data is not where it was.
        """
        if not self.is_own or self.run_config is not None:  # scores from a file need no data
            _ = self.config

    def for_scorer(self, scorer: ContractScorer) -> EvaluationData:
        """Return the groups as this model's tokens.

        Raises:
            DataError: too many rows can't be used.
        """
        if self.is_own and self._contents is None:
            data = prepare_held_out(self.config, scorer.encoder)
            self._contents = data.origins.content
        else:
            data = prepare_evaluation(self.config, scorer.encoder, self._contents)
        raise_if_too_many(DataReport(data.sources), self.config.max_rejected_share)
        if not len(data.groups):
            raise DataError("none of the first model's groups can be scored by the next one. Fix: see the log above.")
        return data

    def loss_settings(self) -> tuple[LossSettings, bool]:
        """Return which loss to report, and whether tied labels count in it: the run's own choice, else the default."""
        if not self.is_own:
            return LossSettings(), True
        config = self.config
        return LossSettings(config.loss_type, config.label_smoothing_factor), config.tie_policy == "half"

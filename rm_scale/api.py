"""`train_reward_model`: one training run from Python, in this process."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rm_scale.config_parsing import config_from_dict
from rm_scale.distributed import detect_world
from rm_scale.errors import UserError
from rm_scale.files import read_json_object
from rm_scale.logs import set_log_step


@dataclass(frozen=True)
class TrainingResult:
    """What `train_reward_model` returns.

    Attributes:
        output_dir: the model directory; `RewardScorer.from_pretrained` reads it. Records of the run are in its `run/`.
        finished: the model was trained to its end and saved. False after a request to stop (a file `STOP` in
            `output_dir`, or the end of the job's time): all is saved in a checkpoint, and the same call with
            `resume_from_checkpoint="auto"` goes on. False after `dry_run` too.
        evaluation: the content of `run/evaluation.json`: `accuracy`, `accuracy_ci95`, `num_pairs`, `num_ties`, `loss`,
            `mean_margin`, `subsets` and more. Empty without evaluation data, or when the run has not finished.
    """

    output_dir: Path
    finished: bool
    evaluation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def accuracy(self) -> float | None:
        """Share of held-out pairs that the model orders right; `None` without evaluation data."""
        return self.evaluation.get("accuracy")


def train_reward_model(**settings: Any) -> TrainingResult:
    """Train a reward model in this process and return where it is and how good it is.

    The model directory, the records and the numbers are those of `python rm_scale/train.py` with the same settings.
    Several GPUs need several processes: `deepspeed rm_scale/train.py`, `rm-scale launch`.

    Args:
        **settings: any field of `rm_scale.config.RunConfig` (docs/settings.md lists them), under the same names and
            rules as on the command line. `model_name_or_path` and a data set are required. Paths may be `Path` objects.

    Raises:
        ConfigError: settings are unknown, wrong or in conflict; all problems are listed at once, before anything is
            loaded or written.
        UserError: data, model or checkpoint can't be used, or the run had to stop; its subclasses say which.

    Example:
        ```python
        result = train_reward_model(
            model_name_or_path="assets/tiny", dataset_path="pairs.jsonl", eval_split_size=0.1, output_dir="outputs/mine"
        )
        print(result.accuracy)
        ```
    """
    parsed = config_from_dict({name: _plain(value) for name, value in settings.items()})
    parsed.raise_problems()
    with _alone_in_this_process():
        # Imported only now, since torch comes with it.
        from rm_scale.train import main

        code = main([], parsed=parsed, guard=_let_errors_pass)
    output_dir = Path(parsed.config.output_dir)
    finished = code == 0 and not parsed.config.dry_run
    return TrainingResult(
        output_dir, finished, read_json_object(output_dir / "run/evaluation.json") if finished else {}
    )


def _plain(value: Any) -> Any:
    """Return a setting as a YAML file would hold it: paths as text, tuples as lists."""
    if isinstance(value, Path):
        return str(value)
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _let_errors_pass(run: Callable[[], int], debug: bool) -> int:
    """Run without a guard: the caller in Python gets the exception."""
    return run()


@contextmanager
def _alone_in_this_process() -> Iterator[None]:
    """Restore the environment, and leave no process group and nothing of DeepSpeed's configuration.

    Random states, torch's deterministic mode and log levels stay as the run has set them.

    Raises:
        UserError: this process is one of several ranks, or belongs to a process group.
    """
    world = detect_world()
    if world.size > 1:
        raise UserError(
            f"train_reward_model in rank {world.rank} of {world.size}: it trains in one process. "
            "Fix: start the ranks with deepspeed, torchrun or srun and rm_scale/train.py."
        )
    if _has_process_group():
        raise UserError(
            "train_reward_model in a process that has a torch.distributed process group: the run needs its own. "
            "Fix: call it before the group is made, or in a new process."
        )
    before = dict(os.environ)
    try:
        yield
    finally:
        _restore_environment(before)
        _forget_run()


def _has_process_group() -> bool:
    """Return whether torch, if anything has loaded it, holds a process group."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def _restore_environment(before: Mapping[str, str]) -> None:
    """Take back what a run tells the libraries by variables: a process started later would take itself for a rank."""
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


def _forget_run() -> None:
    """Take the process group down where a failed run left one, and clear what transformers and DeepSpeed keep."""
    set_log_step(None)
    if _has_process_group():
        import torch

        torch.distributed.destroy_process_group()
    if "deepspeed" in sys.modules:
        from deepspeed.utils import groups

        groups._release_process_group_references()  # or the next engine would send over groups that are gone
    if "transformers" in sys.modules:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # or the next model that anyone loads would be sharded for ZeRO-3
    gc.collect()  # model, trainer and engine refer to each other in circles

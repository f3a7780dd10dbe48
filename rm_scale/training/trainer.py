"""The trainer: TRL's `RewardTrainer` with an exact step loss, an exact evaluation, and saves that are verified."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl

from rm_scale.distributed import agreed_errors, gather_from_ranks, sum_over_ranks
from rm_scale.errors import ModelError, TrainingError
from rm_scale.logs import get_logger
from rm_scale.modeling.contract import ScoringContract
from rm_scale.modeling.head import HEAD_NAMES, active_head, check_head_trainable
from rm_scale.modeling.scoring import batch_rewards, score_sequences
from rm_scale.packing.batching import (
    Batching,
    EpochDataLoader,
    GroupRef,
    StepCollator,
    StepDataset,
    StepSampler,
    read_groups,
)
from rm_scale.planning.compute import StepFlops, linear_parameters, peak_flops, step_flops
from rm_scale.planning.shape import shape_from_config
from rm_scale.training.callbacks import not_finite_error
from rm_scale.training.checkpoints import disk_errors_explained, verify_saved
from rm_scale.training.losses import LossSettings, centering, num_loss_terms, preference_loss
from rm_scale.training.meters import StepMeter
from rm_scale.training.metrics import EvaluationResult, ScoredGroup, evaluate_groups

logger = get_logger(__name__)


class RewardTrainer(trl.RewardTrainer):
    """Train a scalar reward on preference groups.

    It differs from TRL's trainer in four places only: which groups make a step and its micro-batches
    (`get_train_dataloader`, `training_step`), the loss and its weight (`get_batch_samples`, `compute_loss`), evaluation
    (`evaluate`), and saving (`_save`, `save_model`). The loop, DeepSpeed, schedules, loggers and checkpoints are
    transformers'. To its loop a whole optimizer step is one batch, since the number of micro-batches may vary.

    Args:
        model: sequence-classification model with a `ScalarHead`, adapters included.
        args: from `training_arguments`.
        tokenizer: saved beside the model.
        train_groups, eval_groups: encoded groups (see `rm_scale.data.preparation`).
        batching: how steps are cut into micro-batches and these become tensors.
        loss_settings: which loss.
        contract: the scoring contract, written at every save.
        shuffle: a new order of the groups in each epoch.
        saved_head: an existing head in fp32, put back exactly when an engine has rounded it.
        callbacks: further callbacks.
    """

    # The loss is already weighted for the whole step, so it must not be divided by the number of micro-steps.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: trl.RewardConfig,
        tokenizer: PreTrainedTokenizerBase,
        train_groups: datasets.Dataset,
        eval_groups: datasets.Dataset | None,
        batching: Batching,
        loss_settings: LossSettings,
        contract: ScoringContract,
        shuffle: bool = True,
        saved_head: torch.Tensor | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.batching = batching
        self.loss_settings = loss_settings
        self.contract = contract
        self.shuffle = shuffle
        self.saved_head = saved_head
        self.meter = StepMeter()
        self.control: TrainerControl = TrainerControl()
        self._step_terms = 1.0
        self._step_pairs = 1.0
        self._step_rows: list[int] = []
        self._last_evaluation: tuple[int, EvaluationResult] | None = None
        trainable = _trainable_values(model) if getattr(model, "is_loaded_in_4bit", False) else {}
        super().__init__(
            model=model,
            args=args,
            data_collator=batching.collate,
            train_dataset=train_groups,
            eval_dataset=eval_groups,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        # TRL rounds the trained weights of quantised models to bfloat16; the engine, if any, does that itself.
        for name, parameter in self.model.named_parameters():
            if name in trainable:
                parameter.data = trainable[name]
        check_head_trainable(self.model)
        self.meter.flops, self.meter.peak_flops = _model_flops(self.model), _device_peak()
        self.add_callback(_SyncHead(self))

    def _prepare_dataset(self, dataset: datasets.Dataset, *unused: Any, **also_unused: Any) -> datasets.Dataset:
        """Our groups are encoded and checked already."""
        return dataset

    # --- Batches -------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> EpochDataLoader:
        """This rank's share of each step. It is cut here, so accelerate must not shard it again."""
        args = self.args
        sampler = StepSampler(
            num_groups=len(self.train_dataset),
            groups_per_step=self.batching.groups_per_step,
            shuffle=self.shuffle,
            seed=args.data_seed if args.data_seed is not None else args.seed,
        )
        return EpochDataLoader(
            StepDataset(self.train_dataset, self.batching.split, args.process_index),
            batch_sampler=sampler,
            collate_fn=StepCollator(self.batching.collate),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and not args.use_cpu,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """A step with its micro-batches, and the number of loss terms they hold over all ranks."""
        self.meter.resume()
        steps, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [batch for step in steps for batch in step["micro_batches"]]
        terms = sum(num_loss_terms(batch, self.loss_settings) for batch in batches)
        pairs = sum(batch["pair_better"].numel() for batch in batches)
        self._step_terms, self._step_pairs = (max(1.0, total) for total in sum_over_ranks([terms, pairs], device))
        self._step_rows = [int(row) for batch in batches for row in batch["group_index"]]
        return steps, torch.tensor(self._step_terms, device=device)

    # --- Loss ----------------------------------------------------------------------------------------------------

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Forward and backward over a step's micro-batches; the last one reduces gradients and steps the engine."""
        losses = []
        batches = inputs["micro_batches"]
        for number, batch in enumerate(batches):
            is_last = number == len(batches) - 1
            self.accelerator.gradient_state._set_sync_gradients(is_last)
            waits = not is_last and not self.is_deepspeed_enabled
            with self.accelerator.no_sync(model=model) if waits else contextlib.nullcontext():
                losses.append(super().training_step(model, batch, num_items_in_batch))
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss.

        Engines average gradients over ranks, so the share is scaled by the number of ranks: what comes out is the mean
        over all terms of the step in the whole world, however it was cut up.
        """
        rewards = batch_rewards(model, inputs)
        loss = preference_loss(rewards, inputs, self.loss_settings) / self._step_terms
        if self.loss_settings.center_coefficient:
            loss = loss + self.loss_settings.center_coefficient * centering(rewards, inputs) / self._step_pairs
        loss = loss * self.args.world_size
        self.meter.add(rewards, inputs)
        return (loss, {"rewards": rewards}) if return_outputs else loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Look at loss and gradients before anything is logged or saved from this step.

        Raises:
            TrainingError: on every rank, when a rank's loss or the gradient is not finite.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # With fp16 an infinite norm is how loss scaling finds its scale; the engine skips that step.
        norm_is_bad = norm is not None and not self.args.fp16 and not math.isfinite(float(norm))
        loss_is_bad = not torch.isfinite(self._tr_loss).item()
        bad_losses, bad_norms = sum_over_ranks([float(loss_is_bad), float(norm_is_bad)], self.args.device)
        if bad_losses or bad_norms:
            raise not_finite_error(int(bad_losses), norm, self.state.global_step + 1, self._step_rows)
        return norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """Useful operations of a step on this rank (see `rm_scale.planning.compute`); transformers adds them up."""
        flops = self.meter.flops
        tokens = [batch["tokens"] for batch in inputs["micro_batches"]]
        return sum(flops.of(count.unshared, count.squares) for count in tokens) if flops is not None else 0.0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the meters to a training log line."""
        if "loss" in logs:
            logs.update(self.meter.read())
        self.meter.pause()
        super().log(logs, start_time)

    # --- Evaluation ----------------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: datasets.Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Exact evaluation over all groups, overall and per subset, logged under `eval_...`."""
        result = self.evaluate_exactly(eval_dataset)
        self._last_evaluation = (self.state.global_step, result)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in _flat(result).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def final_evaluation(self) -> EvaluationResult:
        """The evaluation after the last step, logged; the one just done at that step if there was one."""
        if self._last_evaluation is None or self._last_evaluation[0] != self.state.global_step:
            self.evaluate()
        assert self._last_evaluation is not None
        return self._last_evaluation[1]

    def evaluate_exactly(self, groups: datasets.Dataset | None = None) -> EvaluationResult:
        """Score every response once and count. A collective: every rank must call it and gets the same result."""
        groups = groups if groups is not None else self.eval_dataset
        assert groups is not None, "nothing to evaluate on"
        self.meter.pause()
        scored = self.score_groups(groups)
        return evaluate_groups(scored, self.loss_settings, self.batching.collate.keep_ties)

    def score_groups(self, groups: datasets.Dataset) -> list[ScoredGroup]:
        """All groups with their rewards, in the data set's order, on every rank."""
        world, rank = self.args.world_size, self.args.process_index
        batches = self.batching.scoring_batches(groups)
        model = self.model_wrapped
        model.eval()
        rewards: dict[int, list[float]] = {}
        for start in range(0, len(batches), world):
            # A rank without a batch of its own repeats the first: under ZeRO-3 nobody may skip a forward pass.
            mine = batches[start + rank] if start + rank < len(batches) else batches[start]
            rewards.update(self._score_batch(model, groups, mine))
        everything: dict[int, list[float]] = {}
        for part in gather_from_ranks(rewards):
            everything.update(part)
        rows = groups.select_columns(["ranks", "margin", "soft_label", "subset", "id", "input_ids"])
        return [_scored_group(rows[index], everything[index]) for index in range(len(groups))]

    def _score_batch(
        self, model: torch.nn.Module, groups: datasets.Dataset, indices: list[int]
    ) -> dict[int, list[float]]:
        rows = read_groups(groups, [GroupRef(index, True) for index in indices])
        batch = self._prepare_inputs(self.batching.collate(rows))
        with torch.no_grad():
            flat = batch_rewards(model, batch).tolist()
        scores: dict[int, list[float]] = {}
        for index, row in zip(indices, rows, strict=True):
            scores[index], flat = flat[: len(row["ranks"])], flat[len(row["ranks"]) :]
        return scores

    # --- Saving --------------------------------------------------------------------------------------------------

    def sync_head(self) -> None:
        """Give the head the exact fp32 master value that DeepSpeed holds. A collective."""
        if not self.is_deepspeed_enabled or getattr(self, "deepspeed", None) is None:
            return
        from deepspeed.utils import safe_get_full_fp32_param

        head = active_head(self.model)
        if head.weight.dtype == torch.float32:
            return
        master = safe_get_full_fp32_param(head.weight)
        if master is not None:
            head.set_residual(master.reshape(1, -1))

    def restore_saved_head(self) -> None:
        """Give DeepSpeed's fp32 master the exact head that the model came with. A collective."""
        head = active_head(self.model)
        if self.saved_head is None or not self.is_deepspeed_enabled or head.weight.dtype == torch.float32:
            return
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(head.weight, self.saved_head.to(self.args.device))

    def head_weight(self) -> torch.Tensor:
        """The fp32 head `(1, hidden_size)` that rewards are computed with, gathered if ZeRO-3 has sharded it."""
        head = active_head(self.model)
        if hasattr(head.weight, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([head.weight]):
                return head.effective_weight().detach().cpu().clone()
        return head.effective_weight().detach().cpu().clone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model, tokenizer and scoring contract, then load them again and compare. A collective.

        Raises:
            CheckpointError: on every rank, when the reloaded model is not the one in training.
        """
        self.meter.pause()
        folder = Path(output_dir or self.args.output_dir)
        sequences = self._golden_sequences()
        scores = score_sequences(
            self.model_wrapped, sequences, self.contract.pad_token_id, batch_size=1, device=self.args.device
        )
        contract = self.contract.with_golden(sequences, scores)
        self._saved_head = self.head_weight()
        # Errors are agreed on after the collectives in here, or the ranks without one would wait for the others.
        with agreed_errors(), disk_errors_explained(folder):
            super().save_model(str(folder), _internal_call=_internal_call)
            if self.args.should_save:
                contract.save(folder)
                verify_saved(folder, contract, self._saved_head)

    def _golden_sequences(self, count: int = 4) -> list[list[int]]:
        """A few short responses of the data: the same on every rank, and cheap to score on a CPU."""
        groups = self.eval_dataset if self.eval_dataset is not None and len(self.eval_dataset) else self.train_dataset
        sample = groups.select(range(min(len(groups), 64)))
        sequences = sorted((ids for row in sample["input_ids"] for ids in row), key=len)
        step = max(1, len(sequences) // 2 // count)
        return [list(ids) for ids in sequences[: step * count : step]]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the weights, with the head in fp32 and without the pickle that transformers adds."""
        if state_dict:
            heads = [name for name in state_dict if name in _head_parameter_names(self.model)]
            assert heads, "the weights to be saved hold no reward head"
            for name in heads:
                state_dict[name] = self._saved_head.clone()
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def create_model_card(self, *unused: Any, **also_unused: Any) -> None:
        """The model card is written once, at the end, with the evaluation's numbers."""


class _SyncHead(TrainerCallback):
    """Keep the forward pass on the head's fp32 master value under DeepSpeed's low-precision engines."""

    def __init__(self, trainer: RewardTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *unused: Any, **also_unused: Any) -> None:
        """A resumed run has a master from the checkpoint. The head must be sound before the first step.

        Raises:
            TrainingError: on every rank, when it is not.
        """
        if self.trainer.state.global_step == 0:
            self.trainer.restore_saved_head()
        self.trainer.sync_head()
        if not self.trainer.head_weight().isfinite().all():
            raise TrainingError(
                "the reward head holds NaN or infinite weights before the first step. "
                "Fix: check the model's files; for a new head try another --seed."
            )

    def on_step_end(self, *unused: Any, **also_unused: Any) -> None:
        """The master has moved."""
        self.trainer.sync_head()


def _model_flops(model: PreTrainedModel | PeftModel) -> StepFlops | None:
    """What the model's steps cost; `None` for a shape that can't be read."""
    counts = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        if not any(part in name for part in ("embed", *HEAD_NAMES)):
            counts[parameter.requires_grad] += getattr(parameter, "ds_numel", parameter.numel())
    try:
        shape = shape_from_config(model.config.to_dict())
    except ModelError:
        return None
    return step_flops(shape, counts[True], linear_parameters(shape) if counts[False] else 0)


def _device_peak() -> float | None:
    return peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def _trainable_values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def _head_parameter_names(model: torch.nn.Module) -> set[str]:
    head = active_head(model)
    return {name for name, parameter in model.named_parameters() if parameter is head.weight}


def _scored_group(row: dict[str, Any], rewards: list[float]) -> ScoredGroup:
    return ScoredGroup(
        rewards=rewards,
        ranks=row["ranks"],
        margin=row["margin"],
        soft_label=row["soft_label"],
        subset=row["subset"] or "",
        lengths=[len(ids) for ids in row["input_ids"]],
        id=row["id"] or "",
    )


def _flat(result: EvaluationResult) -> dict[str, Any]:
    values = result.as_dict()
    flat = {name: values[name] for name in ("accuracy", "loss", "mean_margin", "num_pairs", "num_ties")}
    low, high = values["accuracy_ci95"]
    flat |= {"accuracy_ci95_low": low, "accuracy_ci95_high": high, "score_std": values["score_std"]}
    return flat | {f"{name}_accuracy": part["accuracy"] for name, part in values["subsets"].items()}

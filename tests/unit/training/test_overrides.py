"""What `RewardTrainer` overrides or calls of TRL and transformers that no release promises, by name and signature.

A new release that renames one of these methods would not fail: ours would just never be called. A new override needs a
line here, and one in the docstring of `RewardTrainer`.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import transformers
import trl

from rm_scale.training.trainer import RewardTrainer

INIT = (
    "(self, model, args=None, data_collator=None, train_dataset=None, eval_dataset=None, processing_class=None, "
    "compute_metrics=None, callbacks=None, optimizers=(None, None), optimizer_cls_and_kwargs=None, "
    "preprocess_logits_for_metrics=None, quantization_config=None, peft_config=None)"
)
RUN_EPOCH = (
    "(self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, ignore_keys_for_eval, "
    "start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch)"
)

OVERRIDDEN = {
    "__init__": ("RewardTrainer", INIT),
    "_get_grad_norm": ("Trainer", "(self, model, grad_norm=None)"),
    "_load_from_checkpoint": ("Trainer", "(self, resume_from_checkpoint, model=None)"),
    "_prepare_dataset": ("RewardTrainer", "(self, dataset, processing_class, args, dataset_name)"),
    "_prepare_for_training": ("Trainer", "(self, max_steps, train_dataloader, resume_from_checkpoint)"),
    "_prepare_inputs": ("Trainer", "(self, inputs)"),
    "_run_epoch": ("Trainer", RUN_EPOCH),
    "_save": ("Trainer", "(self, output_dir=None, state_dict=None)"),
    "_save_checkpoint": ("RewardTrainer", "(self, model, trial)"),
    "compute_loss": ("RewardTrainer", "(self, model, inputs, return_outputs=False, num_items_in_batch=None)"),
    "create_model_card": ("_BaseTrainer", "(self, model_name=None, dataset_name=None, tags=None)"),
    "evaluate": ("RewardTrainer", "(self, eval_dataset=None, ignore_keys=None, metric_key_prefix='eval')"),
    "floating_point_ops": ("Trainer", "(self, inputs)"),
    "get_batch_samples": ("Trainer", "(self, epoch_iterator, num_batches, device)"),
    "get_train_dataloader": ("Trainer", "(self)"),
    "log": ("RewardTrainer", "(self, logs, start_time=None)"),
    "save_model": ("Trainer", "(self, output_dir=None, _internal_call=False)"),
    "train": ("Trainer", "(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None)"),
    "training_step": ("RewardTrainer", "(self, *args, **kwargs)"),
}
"""The class whose method ours stands in for, and that method's parameters."""

OVERRIDDEN_ATTRIBUTES = {"loss_is_scaled_for_ga"}

CALLED = {
    "_load_scaler": "(self, checkpoint)",
    "_save_optimizer_and_scheduler": "(self, output_dir)",
    "_save_rng_state": "(self, output_dir)",
    "_save_scaler": "(self, output_dir)",
    "store_flos": "(self)",
}
"""Methods of transformers' `Trainer` that writing and loading a checkpoint calls."""

TRAINING_STEP = "(self, model, inputs, num_items_in_batch=None)"
"""Of transformers' `Trainer`, to which TRL's `training_step` passes all it is given."""


def parameters_of(function: Any) -> str:
    """Return a function's parameters with their defaults, without types."""
    signature = inspect.signature(function)
    bare = [one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]
    return str(inspect.Signature(bare))


def owner_of(name: str) -> type:
    """Return the class from which `RewardTrainer` would have a method if it did not define it."""
    return next(base for base in RewardTrainer.__mro__[1:] if name in vars(base))


def defined_above() -> set[str]:
    """Return the names that `RewardTrainer` defines and a class above it too."""
    above = {name for base in RewardTrainer.__mro__[1:-1] for name in vars(base)}
    own = {name for name in vars(RewardTrainer) if name == "__init__" or not name.startswith("__")}
    return above & own


def test_every_override_is_listed() -> None:
    assert defined_above() == OVERRIDDEN.keys() | OVERRIDDEN_ATTRIBUTES
    assert trl.RewardTrainer.loss_is_scaled_for_ga is False and RewardTrainer.loss_is_scaled_for_ga is True


@pytest.mark.parametrize("name", sorted(OVERRIDDEN))
def test_the_library_has_the_method_that_is_overridden(name: str) -> None:
    owner, parameters = OVERRIDDEN[name]
    assert owner_of(name).__name__ == owner
    assert parameters_of(getattr(owner_of(name), name)) == parameters


def test_trl_passes_a_training_step_on() -> None:
    assert parameters_of(transformers.Trainer.training_step) == TRAINING_STEP


@pytest.mark.parametrize("name", sorted(CALLED))
def test_the_library_has_the_method_that_is_called(name: str) -> None:
    assert parameters_of(getattr(transformers.Trainer, name)) == CALLED[name]


@pytest.mark.parametrize("name", sorted(OVERRIDDEN.keys() - {"__init__"}))
def test_an_override_can_be_called_as_the_original(name: str) -> None:
    original = inspect.signature(getattr(transformers.Trainer, name, None) or getattr(owner_of(name), name))
    ours = inspect.signature(getattr(RewardTrainer, name))
    kinds = inspect.Parameter
    names = [one.name for one in original.parameters.values()]
    required = [one.name for one in original.parameters.values() if one.default is kinds.empty]
    ours.bind(*names)
    ours.bind(*required)
    ours.bind("self", **dict.fromkeys(names[1:]))
    for one in ours.parameters.values():
        if one.kind is kinds.POSITIONAL_OR_KEYWORD:
            assert names[list(ours.parameters).index(one.name)] == one.name, "another place than in the original"
            assert one.default == original.parameters[one.name].default


def test_the_docstring_names_every_override() -> None:
    text = RewardTrainer.__doc__ or ""
    assert [name for name in OVERRIDDEN if name not in text] == []

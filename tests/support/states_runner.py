"""What the launcher starts for tests of methods and stages: train cases, write down what each rank's engine holds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from rm_scale.guard import leave
from tests.support.case_runner import run_all


def storage_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of all storages behind these tensors, each counted once."""
    storages = {}
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters as they lie in memory: whole, flat or as partitions, with the constants of 4-bit ones."""
    found = []
    for parameter in model.parameters():
        is_sharded = hasattr(parameter, "ds_tensor") and parameter.numel() <= 1
        found += [None if is_sharded else parameter.data, getattr(parameter, "ds_tensor", None)]
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            nested = state.state2
            found += [state.absmax, *([nested.absmax] if nested is not None else [])]
    return found


def masters(optimizer: Any) -> list[torch.Tensor]:
    """The engine's fp32 copies of what it trains."""
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    return []


def gradient_bytes(optimizer: Any, model: torch.nn.Module) -> int:
    """Bytes of the gradients that a step is about to use."""
    if getattr(optimizer, "grad_partitions_flat_buffer", None) is not None:
        return storage_bytes([optimizer.grad_partitions_flat_buffer])
    if getattr(optimizer, "averaged_gradients", None):
        # A tensor on the border of two partitions shows each rank its part of a whole gradient; the parts count.
        parts = [part for group in optimizer.averaged_gradients.values() for part in group or []]
        return sum(part.numel() * part.element_size() for part in parts)
    return storage_bytes(parameter.grad for parameter in model.parameters())


def states(trainer: Any) -> dict[str, int]:
    """Bytes of weights, fp32 masters and optimizer state on this rank."""
    wrapper = getattr(trainer.model_wrapped, "optimizer", None)
    inner = wrapper.optimizer if wrapper is not None else trainer.optimizer
    inner = getattr(inner, "optimizer", inner)
    moments = [state[name] for state in inner.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return {
        "weights": storage_bytes(weights(trainer.model)),
        "masters": storage_bytes(masters(wrapper)) if wrapper is not None else 0,
        "moments": storage_bytes(moments),
    }


def watch_gathering() -> Callable[[], int]:
    """Let ZeRO-3 note how many elements of whole parameters it holds; the result gives the most since it last did."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    original = PartitionedParameterCoordinator.fetch_sub_module
    most = [0]

    def fetch_sub_module(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        most[0] = max(most[0], self._PartitionedParameterCoordinator__n_available_params)

    def most_since() -> int:
        found, most[0] = most[0], 0
        return found

    PartitionedParameterCoordinator.fetch_sub_module = fetch_sub_module
    return most_since


def watch_training() -> None:
    """Let `rm_scale.training_run.train` write `run/states-rank.json` when it is done."""
    from rm_scale import training_run

    original = training_run.train
    most_gathered = watch_gathering()

    def train(trainer: Any, attempt: Any) -> int:
        seen: dict[str, int] = {}
        most_gathered()
        before = trainer._get_grad_norm

        def at_step(model: torch.nn.Module, grad_norm: Any = None) -> Any:
            seen["gradients"] = gradient_bytes(getattr(model, "optimizer", None), trainer.model)
            return before(model, grad_norm=grad_norm)

        def engine_step(step: Any, optimizer: Any) -> Any:
            def measured(*args: Any, **kwargs: Any) -> Any:
                seen["gradients"] = gradient_bytes(optimizer, trainer.model)
                return step(*args, **kwargs)

            return measured

        trainer._get_grad_norm = at_step
        wrap = trainer.accelerator.prepare

        def prepare(*args: Any, **kwargs: Any) -> Any:
            prepared = wrap(*args, **kwargs)
            for item in prepared if isinstance(prepared, tuple) else (prepared,):
                if hasattr(item, "module") and hasattr(item, "optimizer") and item.optimizer is not None:
                    trainer._get_grad_norm = before
                    item.optimizer.step = engine_step(item.optimizer.step, item.optimizer)
            return prepared

        trainer.accelerator.prepare = prepare
        code = original(trainer, attempt)
        folder = Path(trainer.args.output_dir) / "run"
        record = {**states(trainer), **seen, "gathered_elements": most_gathered()}
        (folder / f"states-{trainer.args.process_index}.json").write_text(json.dumps(record))
        return code

    training_run.train = train


if __name__ == "__main__":
    watch_training()
    leave(run_all(Path(sys.argv[-1])))

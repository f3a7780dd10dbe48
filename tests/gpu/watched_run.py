"""What the launcher starts for `run_watched`: train cases in one process and write down what goes on inside them.

For each case and rank a file `NAME.seen-RANK.json` says which types and devices the loss and the head met, what the
model was wrapped in, the peaks of memory by device, and, in the steps asked for, each time that the host waited for
the device.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState

from rm_scale.distributed import detect_world, init_process_group, prepare_environment
from rm_scale.guard import leave
from rm_scale.launch.extensions import prepare_extensions
from rm_scale.train import main

PACKAGE = str(Path(sys.modules["rm_scale"].__file__ or "").parent)
LABELS = ("pair_target", "pair_margin")
COPIES = ("_prepare_input", "_prepare_inputs", "send_to_device", "move_batch")
"""Functions that move a micro-batch to the device: transformers', accelerate's and ours."""

Heard = tuple[str, list[traceback.FrameSummary]]


class Waits:
    """Each time that the host waited for the device, with the place it waited at.

    torch warns of them (`torch.cuda.set_sync_debug_mode`), but of no `torch.cuda.synchronize` and no event's, which are
    noted as they are called. What C++ does by itself (NCCL, kernels of extensions) is not heard.

    Args:
        steps: optimizer steps to listen in.
    """

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps
        self.micro_batches: dict[int, int] = {}
        self._heard: list[Heard] = []
        self._begun: list[tuple[int, int]] = []

    def begin_step(self, step: int) -> None:
        """The step's groups are about to be read."""
        self._begun.append((step, len(self._heard)))
        if step in self.steps:
            # First again in every step: libraries add filters of their own, and a repeated warning is shown once.
            warnings.filterwarnings("always", message="called a synchronizing CUDA operation")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear of every wait in here."""
        if not self.steps:
            yield
        elif "standin" in sys.modules:
            with sys.modules["standin"].listening(self._hear_standin):
                yield
        else:
            with self._warned():
                yield

    def _hear_standin(self, kind: str, what: str, size: int, stack: list[traceback.FrameSummary]) -> None:
        if kind == "wait":
            self._heard.append((what, stack))

    @contextmanager
    def _warned(self) -> Iterator[None]:
        shown = warnings.showwarning

        def show(message: Any, *args: Any, **kwargs: Any) -> None:
            if "called a synchronizing CUDA operation" in str(message):
                self._heard.append(("operation", traceback.extract_stack()[:-1]))
            else:
                shown(message, *args, **kwargs)

        def noted(function: Callable[..., Any], what: str) -> Callable[..., Any]:
            @functools.wraps(function)
            def call(*args: Any, **kwargs: Any) -> Any:
                self._heard.append((what, traceback.extract_stack()[:-1]))
                return function(*args, **kwargs)

            return call

        replaced = [(torch.cuda, "synchronize"), (torch.cuda.Event, "synchronize")]
        before = [getattr(owner, name) for owner, name in replaced]
        warnings.showwarning = show  # type: ignore[assignment]
        for (owner, name), function in zip(replaced, before, strict=True):
            setattr(owner, name, noted(function, f"{owner.__name__.split('.')[-1]}.{name}"))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = shown
            for (owner, name), function in zip(replaced, before, strict=True):
                setattr(owner, name, function)

    def found(self) -> list[dict[str, Any]]:
        """What was heard in the steps asked for, in order."""
        found = []
        ends = [start for _, start in self._begun[1:]] + [len(self._heard)]
        for (step, start), end in zip(self._begun, ends, strict=True):
            if step in self.steps:
                found += [{"step": step, **explain(what, stack)} for what, stack in self._heard[start:end]]
        return found


def explain(what: str, stack: list[traceback.FrameSummary]) -> dict[str, Any]:
    """Who waited: the innermost line that is not torch's, whose it is, and how it was reached."""
    frames = [frame for frame in stack if not _is_torch(frame.filename)]
    place, names = frames[-1], {frame.name for frame in frames}
    is_ours = place.filename.startswith(PACKAGE)
    return {
        "what": what,
        "owner": "batch" if names & set(COPIES) else "rm_scale" if is_ours else _package_of(place.filename),
        "in_micro_batch": "compute_loss" in names or bool(names & set(COPIES)),
        "at": f"{_short(place.filename)}:{place.lineno} {place.name}: {place.line}",
        "through": [f"{_short(frame.filename)}:{frame.lineno} {frame.name}" for frame in frames[-6:-1]],
    }


def _is_torch(file: str) -> bool:
    return "site-packages/torch/" in file or file.endswith(("/warnings.py", "/standin.py")) or file == __file__


def _package_of(file: str) -> str:
    return file.rpartition("site-packages/")[2].split("/")[0] if "site-packages/" in file else "python"


def _short(file: str) -> str:
    return file.rpartition("site-packages/")[2].removeprefix(f"{Path(PACKAGE).parent}/")


class Watch:
    """What a case shows of itself.

    Args:
        waits: listens in the steps asked for.
    """

    def __init__(self, waits: Waits) -> None:
        self.waits = waits
        self.labels: dict[str, dict[str, list[Any]]] = {name: {"dtypes": [], "values": []} for name in LABELS}
        self.head: list[dict[str, str]] = []
        self.trainer: Any = None

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Look at every trainer and head in here."""
        from rm_scale.modeling.head import ScalarHead
        from rm_scale.training.trainer import RewardTrainer

        compute_loss, forward = RewardTrainer.compute_loss, ScalarHead.forward
        get_batch_samples = RewardTrainer.get_batch_samples

        def seen_samples(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            step = trainer.state.global_step + 1
            self.waits.begin_step(step)
            found = get_batch_samples(trainer, *args, **kwargs)
            if step in self.waits.steps:
                self.waits.micro_batches[step] = sum(len(part["micro_batches"]) for part in found[0])
            return found

        def seen_loss(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.trainer = trainer
            if trainer.state.global_step + 1 not in self.waits.steps:
                self._see_labels(inputs)
            return compute_loss(trainer, model, inputs, *args, **kwargs)

        def seen_head(head: Any, hidden: torch.Tensor) -> torch.Tensor:
            devices = {"hidden": hidden, "weight": head.weight, "residual": head.residual}
            devices = {name: str(tensor.device) for name, tensor in devices.items()}
            types = {"weight_dtype": str(head.weight.dtype), "residual_dtype": str(head.residual.dtype)}
            if {**devices, **types} not in self.head:
                self.head.append({**devices, **types})
            return forward(head, hidden)

        RewardTrainer.get_batch_samples = seen_samples  # type: ignore[method-assign]
        RewardTrainer.compute_loss = seen_loss  # type: ignore[method-assign]
        ScalarHead.forward = seen_head  # type: ignore[method-assign]
        try:
            yield
        finally:
            RewardTrainer.get_batch_samples = get_batch_samples  # type: ignore[method-assign]
            RewardTrainer.compute_loss = compute_loss  # type: ignore[method-assign]
            ScalarHead.forward = forward  # type: ignore[method-assign]

    def _see_labels(self, inputs: dict[str, Any]) -> None:
        for name, seen in self.labels.items():
            seen["dtypes"] = sorted({*seen["dtypes"], str(inputs[name].dtype)})
            seen["values"] = sorted({*seen["values"], *inputs[name].tolist()})

    def record(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        trainer = self.trainer
        wrapped = type(trainer.model_wrapped).__name__ if trainer is not None else None
        return {
            "labels": self.labels,
            "head": self.head,
            "wrapped_in": wrapped,
            "n_gpu": trainer.args.n_gpu if trainer is not None else None,
            "world_size": trainer.args.world_size if trainer is not None else None,
            "peak_bytes": {
                f"cuda:{index}": torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())
            },
            "waits": self.waits.found(),
            "micro_batches": self.waits.micro_batches,
        }


def run_all(path: Path) -> int:
    """Train every case of the file; the first that fails ends it with its code."""
    cases = json.loads(path.read_text())
    owns_group = False
    # Cases share a group where they need one; a lone process without DeepSpeed has none, or it would get DDP.
    if "RANK" in os.environ:
        world = detect_world()
        prepare_environment(world)
        prepare_extensions(world.local_rank)
        if world.size > 1 or any("--deepspeed" in case["flags"] for case in cases.values()):
            owns_group = init_process_group(world, uses_deepspeed=True, timeout_seconds=300)
    for name, case in cases.items():
        watch = Watch(Waits(case.get("count_waits_in", [])))
        with watch.looking(), watch.waits.listening():
            code = main(case["flags"])
        rank = detect_world().rank
        print(f"case {name} rank {rank}: exit code {code}", flush=True)
        path.with_name(f"{name}.seen-{rank}.json").write_text(json.dumps(watch.record(), indent=1))
        if code:
            return code
        # The next case is another run: accelerate keeps its state in class attributes.
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
    if owns_group:
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    leave(run_all(Path(sys.argv[-1])))
